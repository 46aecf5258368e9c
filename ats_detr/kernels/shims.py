"""Stands in for the compiled extensions in which other projects ship this operator.

Their Python code then imports and trains unchanged, with the Triton kernels on a GPU and nothing to compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels.attention import differentiate_multi_scale, multi_scale_deformable_attention
from ats_detr.kernels.levels import read_level_shapes


# The names of the parameters are those of mmcv, the only extension that takes keywords.
def ms_deform_attn_forward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, im2col_step: int = 64,
) -> Tensor:  # fmt: skip
    """[B, Q, H*D] in the value's dtype, also under autocast. `im2col_step` has no effect: nothing is split."""
    shapes = read_level_shapes(value_spatial_shapes, value_level_start_index)
    with torch.autocast(value.device.type, enabled=False):
        return multi_scale_deformable_attention(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, grad_output: Tensor, im2col_step: int = 64,
) -> list[Tensor]:  # fmt: skip
    """Gradients by value, sampling locations and attention weights."""
    shapes = read_level_shapes(value_spatial_shapes, value_level_start_index)
    return list(differentiate_multi_scale(grad_output, value, shapes, sampling_locations, attention_weights))


def ms_deform_attn_backward_into(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor, grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor, im2col_step: int = 64,
) -> None:  # fmt: skip
    """As `ms_deform_attn_backward`, written into the three tensors: the form of mmcv."""
    gradients = ms_deform_attn_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output,
    )
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)


MMCV = "mmcv._ext"
BACKWARD: dict[str, Callable[..., Any]] = {
    "MultiScaleDeformableAttention": ms_deform_attn_backward,  # Deformable DETR, DINO, MaskDINO, Mask2Former
    "groundingdino._C": ms_deform_attn_backward,
    "detrex._C": ms_deform_attn_backward,
    MMCV: ms_deform_attn_backward_into,
}
"""The extensions that can be provided, with their backward functions."""


class _Extension(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None, origin=__name__)

    def __getattr__(self, name: str) -> Any:
        if self.__name__ != MMCV or name.startswith("__"):
            raise AttributeError(f"{self.__name__} is provided by ats_detr, which has no {name!r}")

        # mmcv asks for all of its operators when it is imported, however few are called.
        def missing(*arguments: Any, **keywords: Any) -> Any:
            if name.startswith("get_compil"):  # get_compiler_version, get_compiling_cuda_version
                return "n/a"  # as mmcv's report about the environment writes for mmcv-lite
            raise NotImplementedError(
                f"{self.__name__}.{name}: ats_detr provides ms_deform_attn only; this operator needs a compiled mmcv"
            )

        return missing


def install_shims(*names: str, replace: bool = False) -> tuple[str, ...]:
    """Provides the compiled extensions in which other projects ship this operator; returns their module names.

    Call it before the projects are imported: `from groundingdino import _C` finds the operator afterwards. Only this
    operator is provided; other functions of an extension raise when they are called. Warns if a project was imported
    before: its modules that have failed to import the extension do not use the operator.

    Args:
        names: modules among `BACKWARD`; by default all of them.
        replace: use this operator even where the compiled extension is installed. Its other functions remain.

    Raises:
        ValueError: an unknown name.
        ImportError: the compiled extension is installed, and not `replace`. Nothing is provided then.
    """
    names = names or tuple(BACKWARD)
    if unknown := set(names) - set(BACKWARD):
        raise ValueError(f"no shim for {', '.join(sorted(unknown))}: must be among {', '.join(BACKWARD)}")
    installed = [name for name in names if _is_installed(name)]
    if installed and not replace:
        raise ImportError(
            f"{', '.join(installed)} is installed: pass replace=True to use this operator in its place, or the names "
            "of the modules to provide"
        )
    for name in names:
        parent = name.rpartition(".")[0]
        if parent in sys.modules and name not in sys.modules:
            warnings.warn(
                f"{parent} was imported before install_shims: modules of it that have already tried to import {name} "
                "do not use the operator; call install_shims first",
                stacklevel=2,
            )
        try:  # in place: modules that have imported the extension use the operator too
            extension = importlib.import_module(name) if name in installed else sys.modules.get(name)
        except (ImportError, OSError):  # built for another version of PyTorch or CUDA
            extension = None
        if extension is None:
            extension = sys.modules[name] = _Extension(name)
            if parent in sys.modules:
                setattr(sys.modules[parent], name.rpartition(".")[2], extension)
        extension.ms_deform_attn_forward = ms_deform_attn_forward  # type: ignore[attr-defined]
        extension.ms_deform_attn_backward = BACKWARD[name]  # type: ignore[attr-defined]
    return names


def _is_installed(name: str) -> bool:
    """Whether the extension itself can be found, without this operator in it. Imports nothing: the packages around it
    import the extension."""
    if name in sys.modules:
        return getattr(sys.modules[name], "ms_deform_attn_forward", None) is not ms_deform_attn_forward
    parent = name.rpartition(".")[0]
    if not parent:
        return importlib.util.find_spec(name) is not None
    package = sys.modules.get(parent) or importlib.util.find_spec(parent)
    path = getattr(package, "__path__", None) or getattr(package, "submodule_search_locations", None)
    return path is not None and PathFinder.find_spec(name, list(path)) is not None
