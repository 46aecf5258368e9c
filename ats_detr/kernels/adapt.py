"""Replaces the deformable attention in models of other projects by `multi_scale_deformable_attention`.

Two things are recognised in a model: modules that are the operator and nothing else (transformers' class `LAYER`), and
modules whose `forward` calls one of the functions in `Operators`. The first get another `forward`. The second get
their own `forward` with other globals: each instance is changed, never its class or its file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr.kernels.attention import multi_scale_deformable_attention
from ats_detr.kernels.dispatch import BACKENDS
from ats_detr.kernels.levels import LevelShapes, read_level_shapes

LAYER = "MultiScaleDeformableAttention"
"""The class of transformers that is the operator; other projects give this name to modules with projections."""
AUTOGRAD_FUNCTIONS = (
    "MSDeformAttnFunction",  # Deformable DETR, DINO, MaskDINO, Mask2Former
    "MultiScaleDeformableAttnFunction",  # mmcv, GroundingDINO, detrex
    "MultiScaleDeformableAttentionFunction",  # transformers before 4.48
)
_SIMILAR = re.compile(r"deform\w*att", re.IGNORECASE)
"""Names that suggest this operator: what is not known is reported, not passed over."""


class Adaptation:
    """The modules that `adapt` changed. As a context manager, it restores them on exit.

    A deep copy of an adapted model is adapted, and cannot be undone. A pickled one is loaded unadapted;
    modules that hold the function as an attribute cannot be pickled while they are adapted.
    """

    names: tuple[str, ...]
    """Qualified names of the changed modules."""
    skipped: dict[str, str]
    """Name and reason of every module with a deformable attention that is unchanged; empty if `strict`."""

    def __init__(self, changes: dict[str, tuple[nn.Module, dict[str, Any]]], skipped: dict[str, str]) -> None:
        self.names, self.skipped = tuple(changes), skipped
        self._changes = [
            (f"{name}.{attribute}", module, attribute, new, vars(module).get(attribute))
            for name, (module, attributes) in changes.items()
            for attribute, new in attributes.items()
        ]
        for _, module, attribute, new, _ in self._changes:
            setattr(module, attribute, new)

    def undo(self) -> None:
        """Restores the model; without effect if that has been done.

        Raises RuntimeError, and restores nothing, if something else has replaced what `adapt` set.
        """
        lost = [name for name, module, key, new, _ in self._changes if vars(module).get(key) is not new]
        if lost:
            raise RuntimeError(f"cannot undo: {', '.join(lost)} was replaced after adapt; undo that first")
        for _, module, attribute, _, old in self._changes:
            if old is None:
                delattr(module, attribute)
            else:
                setattr(module, attribute, old)
        self._changes = []

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Adaptation({len(self.names)} modules, {len(self.skipped)} skipped)"


def adapt(model: nn.Module, *, backend: str | None = None, strict: bool = True) -> Adaptation:
    """Computes every deformable attention of `model` with `multi_scale_deformable_attention`, in place.

    Covers transformers (every model that has the operator), rfdetr, mmcv and mmdet, detectron2's Mask2Former,
    GroundingDINO, detrex, and the modules of Deformable DETR that other projects copy. Parameters, state dict and
    other models of the same classes are unchanged.

    Call it before `torch.compile`. Two results may differ from the original: under autocast the operator returns the
    autocast dtype (PyTorch's grid_sample float32), and samples at NaN coordinates are NaN.

    Args:
        backend: 'triton' or 'reference' for all of them, see `choose_backend`.
        strict: raise if any deformable attention of the model cannot be replaced; False: leave it unchanged.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no deformable attention was found, one cannot be replaced (if `strict`), or the model is adapted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: must be a torch.nn.Module; pass the module in it"
        )
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend {backend!r}: must be one of {', '.join(BACKENDS)}")
    operators = Operators(backend)
    changes, skipped = {}, {}
    for name, module in model.named_modules():
        try:
            attributes = _changes_of(module, operators)
        except _NotAdaptable as error:
            skipped[name or type(module).__name__] = str(error)
        else:
            if attributes:
                changes[name] = (module, attributes)
    if skipped and strict:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"{len(skipped)} deformable attentions cannot be replaced (strict=False omits them):\n{reasons}"
        )
    if not changes and not skipped:
        raise ValueError(
            f"no deformable attention in {type(model).__name__}: looked for modules of class {LAYER} and for modules "
            f"whose forward calls {', '.join([*operators.functions, *AUTOGRAD_FUNCTIONS])}"
        )
    return Adaptation(changes, skipped)


class _NotAdaptable(Exception):
    """A deformable attention that this file cannot replace; the message is the reason."""


# ------------------------------------------------------------------------------------------------ what is replaced
class Operators:
    """The operator with the parameters of other projects' functions. Parameter names are theirs: they are compared."""

    def __init__(self, backend: str | None) -> None:
        def attend(value: Tensor, shapes: LevelShapes | Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return multi_scale_deformable_attention(value, shapes, locations, weights, backend=backend)

        def classical(
            value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
        ) -> Tensor:
            return attend(
                value, read_level_shapes(value_spatial_shapes), sampling_locations, attention_weights
            )

        def channels_first(
            value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
            value_spatial_shapes_hw: LevelShapes | None = None,
        ) -> Tensor:  # fmt: skip
            """Values [B, H, D, S] and weights [B, Q, H, L*P]; locations may have L*P in one dimension too."""
            shapes = value_spatial_shapes_hw or read_level_shapes(value_spatial_shapes)
            samples = (len(shapes), attention_weights.shape[-1] // len(shapes))
            if sampling_locations.ndim == 5:
                sampling_locations = sampling_locations.unflatten(3, samples)
            value = value.permute(0, 3, 1, 2)
            return attend(value, shapes, sampling_locations, attention_weights.unflatten(-1, samples))

        def either_layout(
            value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
        ) -> Tensor:
            """Deformable DETR's function, and the one that LW-DETR and early versions of rfdetr have under its name."""
            function = channels_first if attention_weights.ndim == 4 else classical
            return function(value, value_spatial_shapes, sampling_locations, attention_weights)

        def points_per_level(
            value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
            num_points_list: list[int], method: str = "default",
        ) -> Tensor:  # fmt: skip
            return multi_scale_deformable_attention(
                value, read_level_shapes(value_spatial_shapes), sampling_locations, attention_weights,
                num_points=num_points_list, method=method, backend=backend,
            )  # fmt: skip

        class AutogradFunction:
            @staticmethod
            def apply(
                value: Tensor, value_spatial_shapes: Any, value_level_start_index: Any, sampling_locations: Tensor,
                attention_weights: Tensor, im2col_step: int,
            ) -> Tensor:  # fmt: skip
                shapes = read_level_shapes(value_spatial_shapes, value_level_start_index)
                return attend(value, shapes, sampling_locations, attention_weights)

        def forward(
            self: nn.Module, value: Tensor, value_spatial_shapes: Any, value_spatial_shapes_list: LevelShapes,
            level_start_index: Any, sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
        ) -> Tensor:  # fmt: skip
            return attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)

        self.forward: Callable[..., Tensor] = forward
        """Of transformers' class."""
        self.functions: dict[str, tuple[Callable[..., Tensor], ...]] = {
            "multi_scale_deformable_attention": (classical,),  # transformers: Mask2Former, OneFormer
            "multi_scale_deformable_attention_v2": (points_per_level,),  # RT-DETRv2, D-FINE, DEIMv2
            "multi_scale_deformable_attn_pytorch": (classical,),  # mmcv, GroundingDINO, detrex
            "ms_deform_attn_core_pytorch": (either_layout, channels_first),  # Deformable DETR; rfdetr
        }
        """By name, the known versions."""
        self.autograd_function = AutogradFunction
        """Of the compiled extensions."""
        self.rebuilt: dict[Callable[..., Any], FunctionType | None] = {}
        """Functions with other globals, by the original."""

    def replacement(self, found: Any) -> Any:
        """What a module has to call instead of `found`; None if that is not this operator."""
        if not (inspect.isfunction(found) or inspect.isclass(found)):
            return None
        if found.__module__ == __name__:
            raise ValueError("the model is adapted already: call undo() of that adaptation first")
        if not _SIMILAR.search(found.__name__):
            return None
        if inspect.isfunction(found):
            for known in self.functions.get(found.__name__, ()):
                if _parameters(known) == _parameters(found):
                    return known
        elif issubclass(found, torch.autograd.Function):
            if found.__name__ in AUTOGRAD_FUNCTIONS and _parameters(found.forward)[-6:] == _parameters(
                self.autograd_function.apply
            ):
                return self.autograd_function
            found = found.forward
        else:
            return None
        raise _NotAdaptable(f"{found.__qualname__}({', '.join(_parameters(found))}) is not a known version")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# ------------------------------------------------------------------------------------------------ how it is replaced
def _changes_of(module: nn.Module, operators: Operators) -> dict[str, Any]:
    """New attributes of one module; none if it has no deformable attention. Raises _NotAdaptable."""
    changes = {
        name: operators.replacement(found) for name, found in vars(module).items() if name != "forward"
    }
    changes = {name: new for name, new in changes.items() if new is not None}
    forward = _new_forward(module, operators)
    if forward is not None:
        changes["forward"] = MethodType(forward, module)
    if changes:
        _check_samples(module)
    return changes


def _check_samples(module: nn.Module) -> None:
    """Raises _NotAdaptable for what RT-DETRv2, D-FINE and DEIMv2 can be configured to, but the operator cannot do."""
    if "discrete" in (getattr(module, "method", None), getattr(module, "decoder_method", None)):
        raise _NotAdaptable(
            "method 'discrete' reads the nearest pixel: another operator, without a kernel here"
        )


def _new_forward(module: nn.Module, operators: Operators) -> Callable[..., Any] | None:
    own = vars(module).get("forward")
    bound = isinstance(own, MethodType) and own.__self__ is module
    current = own.__func__ if bound else type(module).forward
    if not isinstance(current, FunctionType):
        return None
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if owner.__name__ == LAYER and _parameters(current) == _parameters(operators.forward):
        operators.replacement(current)  # raises if it is ours
        new: Callable[..., Any] | None = operators.forward
    else:
        new = _rebuilt(current, operators)
    if new is None and owner.__name__ == LAYER:
        raise _NotAdaptable(f"{LAYER}.forward({', '.join(_parameters(current))}) is not a known version")
    if new is not None and own is not None and not bound:
        raise _NotAdaptable(f"its forward was replaced by {own!r}: call adapt before what did that")
    return new


def _rebuilt(function: Callable[..., Any], operators: Operators) -> FunctionType | None:
    """`_rebuild`, once for each function: the layers of a model share what torch.compile makes of it."""
    if function not in operators.rebuilt:
        operators.rebuilt[function] = _rebuild(function, operators)
    return operators.rebuilt[function]


def _rebuild(function: Callable[..., Any], operators: Operators) -> FunctionType | None:
    """`function`, decorators included, with this operator in the place of those it calls; None if it calls none."""
    if not isinstance(function, FunctionType):
        return None
    decorated = getattr(function, "__wrapped__", None)
    if decorated is None:
        found = {name: function.__globals__.get(name) for name in _names(function.__code__)}
        changed = {name: operators.replacement(value) for name, value in found.items()}
        changed = {name: new for name, new in changed.items() if new is not None}
        # Without __name__, torch.compile looks globals up here; with it, in the module of that name.
        scope = {name: value for name, value in function.__globals__.items() if name != "__name__"}
        return _copy(function, scope | changed, function.__closure__) if changed else None
    new = _rebuilt(decorated, operators)
    if new is None:
        return None
    cells = function.__closure__ or ()
    if all(cell.cell_contents is not decorated for cell in cells):
        raise _NotAdaptable(
            f"the decorator of {function.__qualname__} does not hold the function it decorates"
        )
    closure = tuple(CellType(new) if cell.cell_contents is decorated else cell for cell in cells)
    copy = _copy(function, function.__globals__, closure)
    copy.__wrapped__ = new  # type: ignore[attr-defined]
    return copy


def _names(code: CodeType) -> Iterator[str]:
    """Names that code looks up, functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _copy(
    function: FunctionType, scope: dict[str, Any], closure: tuple[CellType, ...] | None
) -> FunctionType:
    code = function.__code__.replace()  # torch.compile keeps what it compiled by the code object
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__module__, copy.__doc__ = (
        function.__qualname__,
        function.__module__,
        function.__doc__,
    )
    copy.__dict__.update(vars(function))
    return copy
