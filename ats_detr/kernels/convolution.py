"""Convolutions with their epilogue, for inference: scale, bias, residual sum and ReLU of a convolution's output.

Maps are [B, C, H, W], on the GPU in channels-last memory, where a 1x1 convolution is a product of matrices. Its kernel
writes the final result; other convolutions are the library's, followed by one pass over their output, or by cuDNN with
bias, sum and ReLU, where a probe found that right and fast.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.agreement import TOLERANCE, difference
from ats_detr.kernels.dispatch import (
    FLOATS,
    autocast,
    capture_lock,
    check_one_device,
    check_tensors,
    check_vectors,
    choose_backend,
    invalid,
    operator,
    product_limitation,
    refuse_gradients,
    runs_inside_graph,
    tensors_of,
)
from ats_detr.kernels.packing import check_target

logger = logging.getLogger(__name__)

Pair = tuple[int, int]


def fused_convolution(
    x_BCHW: Tensor,
    weight_FCHW: Tensor,
    bias_F: Tensor | None = None,
    *,
    scale_F: Tensor | None = None,
    residual_BFHW: Tensor | None = None,
    relu: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """ReLU(conv(x, weight) * scale + bias + residual), [B, F, H', W'] in x's dtype. For inference only.

    Args:
        x_BCHW: float32 or 16-bit; under autocast, cast to the autocast dtype.
        weight_FCHW: [F, C / groups, kernel height, kernel width], in x's dtype; cast under autocast.
        bias_F: in any floating point dtype, as `scale_F`; both are applied in at least float32.
        scale_F: factor of each output channel, such as that of a batch norm. None: 1.
        residual_BFHW: added before the ReLU, in any floating point dtype.
        relu: False omits the ReLU.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        backend: 'triton' or 'reference', see `choose_backend`. None: the kernels on CUDA, those of 1x1 convolutions
            with 16-bit weights only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: a gradient would be recorded.
    """
    check_tensors({"bias": bias_F, "scale": scale_F, "residual": residual_BFHW}, x=x_BCHW, weight=weight_FCHW)
    x_BCHW, weight_FCHW = autocast(x_BCHW), autocast(weight_FCHW)
    shape = convolution_shape(x_BCHW, weight_FCHW, stride, padding, dilation, groups)
    if weight_FCHW.dtype != x_BCHW.dtype:
        raise invalid("weight", weight_FCHW, f"of x's {x_BCHW.dtype}")
    check_vectors(shape[1], scale=scale_F, bias=bias_F)
    if residual_BFHW is not None and not (residual_BFHW.shape == shape and residual_BFHW.dtype in FLOATS):
        raise invalid("residual", residual_BFHW, f"{list(shape)}, floats")
    refuse_gradients("fused convolutions", x_BCHW, weight_FCHW, scale_F, bias_F, residual_BFHW)
    limitation = product_limitation(x_BCHW.device)
    epilogue = (scale_F, bias_F, residual_BFHW, relu)
    if not runs_inside_graph():
        check_one_device("fused_convolution", tensors_of((x_BCHW, weight_FCHW, *epilogue)))
    if tuple(weight_FCHW.shape[2:]) == (1, 1) and groups == 1 and tuple(padding) == (0, 0):
        # Exact float32 products have no tensor cores to use.
        pays = weight_FCHW.element_size() == 2
        arguments = (x_BCHW, weight_FCHW, *epilogue, list(stride))
        tensors = tensors_of(arguments)
        if choose_backend(tensors, backend, kernel_pays=pays, limitation=limitation) == "triton":
            return _pointwise_convolution(*arguments, backend="triton")
    layout = (stride, padding, dilation, groups)
    if choose_backend(x_BCHW, backend, limitation=limitation) == "reference":
        is_affine = scale_F is not None or (residual_BFHW is not None and residual_BFHW.dtype != x_BCHW.dtype)
        if limitation is None and not is_affine and _has_onednn(x_BCHW, backend):
            return _onednn_convolution(x_BCHW, weight_FCHW, bias_F, residual_BFHW, relu, *layout)
        return reference.fused_convolution(x_BCHW, weight_FCHW, *epilogue, *layout)

    def compute(x_BCHW: Tensor) -> Tensor:
        out_BFHW = F.conv2d(x_BCHW, weight_FCHW, None, *layout).contiguous(memory_format=torch.channels_last)
        return affine_relu_(
            out_BFHW, bias_F, scale_C=scale_F, residual_BCHW=residual_BFHW, relu=relu, backend=backend
        )

    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    if relu and scale_F is None and backend is None and _may_use_cudnn(x_BCHW, residual_BFHW):
        return _cudnn_convolution(x_BCHW, weight_FCHW, bias_F, residual_BFHW, compute, *layout)
    return compute(x_BCHW)


def affine_relu_(
    x_BCHW: Tensor,
    bias_C: Tensor | None = None,
    *,
    scale_C: Tensor | None = None,
    residual_BCHW: Tensor | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Writes ReLU(x * scale + bias + residual) to x and returns it; computed in at least float32.

    As `fused_convolution`. The kernel reads and writes channels-last maps; the reference computes others.
    """
    check_tensors({"bias": bias_C, "scale": scale_C, "residual": residual_BCHW}, x=x_BCHW)
    _check_map("x", x_BCHW)
    check_vectors(x_BCHW.shape[1], scale=scale_C, bias=bias_C)
    if residual_BCHW is not None and not (
        residual_BCHW.shape == x_BCHW.shape and residual_BCHW.dtype in FLOATS
    ):
        raise invalid("residual", residual_BCHW, f"{list(x_BCHW.shape)}, floats")
    check_target("x", x_BCHW, scale_C, bias_C, residual_BCHW)
    limitation = product_limitation(x_BCHW.device)
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        limitation = limitation or "x is not in channels-last memory"
    _affine_relu_(x_BCHW, scale_C, bias_C, residual_BCHW, relu, backend=backend, limitation=limitation)
    return x_BCHW


def affine_relu_max_pool(
    x_BCHW: Tensor, bias_C: Tensor | None = None, *, scale_C: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The 3x3 maximum of ReLU(x * scale + bias) with stride 2 and padding 1, [B, C, ceil(H / 2), ceil(W / 2)].

    As `fused_convolution`. NaN in a window is its maximum.
    """
    check_tensors({"bias": bias_C, "scale": scale_C}, x=x_BCHW)
    _check_map("x", x_BCHW)
    check_vectors(x_BCHW.shape[1], scale=scale_C, bias=bias_C)
    refuse_gradients("fused convolutions", x_BCHW, scale_C, bias_C)
    if 0 in x_BCHW.shape[2:]:
        raise invalid("x", x_BCHW, "at least one pixel high and wide")
    return _affine_relu_max_pool(
        x_BCHW, scale_C, bias_C, backend=backend, limitation=product_limitation(x_BCHW.device)
    )


def convolution_shape(
    x_BCHW: Tensor, weight_FCHW: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
) -> tuple[int, int, int, int]:
    """[B, F, H', W'] of a convolution's output. Raises ValueError for arguments that do not fit together."""
    _check_map("x", x_BCHW)
    if groups < 1 or weight_FCHW.ndim != 4 or weight_FCHW.shape[0] % groups:
        raise invalid("weight", weight_FCHW, f"[F, C, height, width], F a multiple of groups = {groups} >= 1")
    if weight_FCHW.shape[1] * groups != x_BCHW.shape[1]:
        raise invalid("weight", weight_FCHW, f"[F, {x_BCHW.shape[1] / groups:g}, height, width]")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} {tuple(pair)}: must be two integers >= {least}")
    sides = []
    for axis in range(2):
        reach = dilation[axis] * (weight_FCHW.shape[2 + axis] - 1) + 1
        sides.append((x_BCHW.shape[2 + axis] + 2 * padding[axis] - reach) // stride[axis] + 1)
    if min(sides) < 1:
        raise invalid("x", x_BCHW, f"as large as the kernel {list(weight_FCHW.shape[2:])} with its dilation")
    return x_BCHW.shape[0], weight_FCHW.shape[0], sides[0], sides[1]


# ------------------------------------------------------------------------------------------------ checks of arguments
def _check_map(name: str, x: Tensor) -> None:
    if not (x.ndim == 4 and x.dtype in FLOATS):
        raise invalid(name, x, "[B, C, H, W], floating point")


# ----------------------------------------------------------------------------------------------------------- on the CPU
def _has_onednn(x: Tensor, backend: str | None) -> bool:
    """Whether oneDNN's convolution with a bias and a sum can compute it. A requested reference is the definition."""
    if backend or os.environ.get("ATS_DETR_BACKEND") or runs_inside_graph() or x.device.type != "cpu":
        return False
    is_known = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return bool(is_known and torch.backends.mkldnn.enabled) and x.dtype == torch.float32 and x.numel() > 0


def _onednn_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    layout = (list(padding), list(stride), list(dilation), groups)
    bias = None if bias is None else bias.to(x.dtype).contiguous()  # oneDNN ignores its stride
    convolution = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        out = convolution(x, weight, bias, *layout, "none", [], "")
    else:
        out = convolution.binary(x, residual, weight, bias, *layout, "add", 1.0, None, [], None)
    return out.relu_() if relu else out  # oneDNN's ReLU of NaN is 0, after a sum that of infinity is finite


# ------------------------------------------------------------------------------------------------------------- by cuDNN
_cudnn_pays: dict[tuple[Any, ...], bool] = {}
"""Whether cuDNN computes a convolution with its epilogue, by all that this depends on."""
_is_probing: ContextVar[bool] = ContextVar("is_probing", default=False)


@contextmanager
def probing() -> Iterator[None]:
    """Context in which each new convolution with a ReLU is also computed by cuDNN, in one launch and with its epilogue.
    If the result is the same and not slower, cuDNN computes such convolutions from then on. Synchronises."""
    token = _is_probing.set(True)
    try:
        yield
    finally:
        _is_probing.reset(token)


def _may_use_cudnn(x: Tensor, residual: Tensor | None) -> bool:
    cudnn = torch.backends.cudnn
    is_deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    is_able = x.is_cuda and cudnn.enabled and not is_deterministic and not runs_inside_graph()
    return is_able and (residual is None or residual.dtype == x.dtype)


def _cudnn_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, compute: Callable[[Tensor], Tensor],
    stride: Pair, padding: Pair, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """ReLU(conv(x, weight) + bias + residual) by cuDNN, or `compute(x)` unless a probe has found cuDNN to be better."""
    layout = (list(stride), list(padding), list(dilation), groups)

    def fused(x: Tensor) -> Tensor:
        own_bias = None if bias is None else bias.to(x.dtype).contiguous()
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, weight, own_bias, *layout)
        return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, own_bias, *layout)

    kind = (bias is None, residual is None, torch.backends.cudnn.allow_tf32)
    key = (x.device, x.dtype, x.shape, weight.shape, str(layout), *kind)
    if key not in _cudnn_pays and _is_probing.get():
        try:
            with capture_lock, torch.cuda.device_of(x):
                reason = _why_not(fused, compute, x)
            _cudnn_pays[key] = reason is None
        except torch.OutOfMemoryError:  # now, but perhaps not at the next probe
            reason = "not probed, out of memory"
        logger.info(
            "cuDNN with its epilogue, %s by %s: %s", list(x.shape), list(weight.shape), reason or "used"
        )
    return fused(x) if _cudnn_pays.get(key) else compute(x)


def _why_not(fused: Callable[[Tensor], Tensor], compute: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Why `fused` cannot replace `compute`; None if it can. Raises OutOfMemoryError if the probe lacks memory."""
    try:
        expected = compute(x)
        # Memory that is freed at once and used for the result: cuDNN may multiply its contents by 0.
        torch.full_like(expected, torch.nan)
        if fault := difference([(fused(x), expected)], None, TOLERANCE[x.dtype]):
            return fault
        if not fused(torch.full_like(x, torch.nan)).isnan().any():
            return "NaN is lost"
        times = [_milliseconds(function, x) for function in (fused, compute)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the library
        return repr(error)
    return None if times[0] <= times[1] else "{:.4f} instead of {:.4f} ms".format(*times)


def _milliseconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    from triton.testing import do_bench  # Triton is optional

    return do_bench(lambda: function(x), warmup=1, rep=2, return_mode="median")


# ------------------------------------------------------------------------------------------------ the custom operators
@operator("convolution.pointwise_convolution")
def _pointwise_convolution(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: Sequence[int],
) -> Tensor:  # fmt: skip
    out = reference.fused_convolution(x, weight, scale, bias, residual, relu, stride)
    return out.contiguous(memory_format=torch.channels_last)


def _strided(x: Sequence[int], stride: Sequence[int]) -> list[int]:
    return [(side - 1) // step + 1 for side, step in zip(x[2:], stride, strict=True)]


@_pointwise_convolution.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return _channels_last(x, x.shape[0], weight.shape[0], *_strided(x.shape, others[-1]))


@_pointwise_convolution.register_flops
def _(x: torch.Size, weight: torch.Size, *others: Any) -> int:
    return 2 * x[0] * math.prod(_strided(x, others[-1])) * weight[0] * weight[1]


_affine_relu_ = operator("convolution.affine_relu_", mutates_args=("x_BCHW",))(reference.affine_relu_)


@operator("convolution.affine_relu_max_pool")
def _affine_relu_max_pool(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return reference.affine_relu_max_pool(x, scale, bias).contiguous(memory_format=torch.channels_last)


@_affine_relu_max_pool.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _channels_last(x, *x.shape[:2], *_strided(x.shape, (2, 2)))


def _channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
