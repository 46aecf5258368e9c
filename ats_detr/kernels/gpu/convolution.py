"""Convolutions with their epilogue: y * scale + bias + residual, then ReLU, of rows of channels (channels-last maps).

    pointwise_rows         1x1 convolution: a product of matrices whose tiles are written after the epilogue
    affine_relu_rows       the epilogue in place; each element is read and written once
    affine_relu_pool_rows  the epilogue and a 3x3 maximum with stride 2; inputs shared by windows come from the caches

Sums and the epilogue are float32. Factors of products have the weights' dtype, see `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu import tuning
from ats_detr.kernels.gpu.common import INTERPRETING, cdiv, next_power_of_2
from ats_detr.kernels.gpu.linear import _key, _products, _relu, _rows, _store, _transposed, _vector

_ELEMENTS = 1 << 18 if INTERPRETING else 4096
"""Elements of a tile without products: 32 for each thread of four warps. The interpreter wants few large programs."""


@triton.jit
def _affine(value, scale_ptr, bias_ptr, column, WIDTH: tl.constexpr):
    """value * scale + bias of a float32 tile [rows, columns]; a pointer may be None."""
    if scale_ptr is not None:
        value *= _vector(scale_ptr, column, WIDTH)[None, :]
    if bias_ptr is not None:
        value += _vector(bias_ptr, column, WIDTH)[None, :]
    return value


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def pointwise_rows(
    x_ptr,  # [B * height * width, IN]
    weight_ptr, scale_ptr, bias_ptr,  # [OUT, IN] contiguous, [OUT] or None
    residual_ptr,  # [num_rows, OUT] or None
    out_ptr,  # [num_rows, OUT]
    num_rows, height, width, out_height, out_width,
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, RELU: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x COLUMNS of the result. Programs of the same rows are neighbours."""
    STRIPES: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // STRIPES * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % STRIPES * COLUMNS + tl.arange(0, COLUMNS)
    live = row < num_rows
    pixel = row
    if STRIDE_Y != 1 or STRIDE_X != 1:
        line = row // out_width  # of all images
        pixel = (
            line // out_height * height + line % out_height * STRIDE_Y
        ) * width + row % out_width * STRIDE_X
    EVEN: tl.constexpr = IN % DEPTH == 0 and OUT % COLUMNS == 0
    PADDED_IN: tl.constexpr = (IN + DEPTH - 1) // DEPTH * DEPTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, IN, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        x = _rows(x_ptr, pixel, inner, live, IN, IN, PADDED_IN)
        weight = _transposed(weight_ptr, inner, column, IN, OUT, EVEN)
        total = tl.dot(x.to(OPERAND), weight.to(OPERAND), total, input_precision=PRECISION)
    total = _affine(total, scale_ptr, bias_ptr, column, OUT)
    if residual_ptr is not None:
        total += _rows(residual_ptr, row, column, live, OUT, OUT, STRIPES * COLUMNS).to(tl.float32)
    if RELU:
        total = _relu(total)
    _store(out_ptr, row, column, total, live, OUT, OUT)


@triton.jit(do_not_specialize=["num_rows"])
def affine_relu_rows(
    x_ptr,  # [num_rows, WIDTH], overwritten
    scale_ptr, bias_ptr,  # [WIDTH] or None
    residual_ptr,  # [num_rows, WIDTH] or None
    num_rows,
    WIDTH: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x COLUMNS."""
    STRIPES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // STRIPES * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % STRIPES * COLUMNS + tl.arange(0, COLUMNS)
    live = row < num_rows
    value = _rows(x_ptr, row, column, live, WIDTH, WIDTH, STRIPES * COLUMNS).to(tl.float32)
    value = _affine(value, scale_ptr, bias_ptr, column, WIDTH)
    if residual_ptr is not None:
        value += _rows(residual_ptr, row, column, live, WIDTH, WIDTH, STRIPES * COLUMNS).to(tl.float32)
    if RELU:
        value = _relu(value)
    _store(x_ptr, row, column, value, live, WIDTH, WIDTH)


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def affine_relu_pool_rows(
    x_ptr,  # [B * height * width, WIDTH]
    scale_ptr, bias_ptr,  # [WIDTH] or None
    out_ptr,  # [num_rows, WIDTH]
    num_rows, height, width, out_height, out_width,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS windows x COLUMNS channels."""
    STRIPES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // STRIPES * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % STRIPES * COLUMNS + tl.arange(0, COLUMNS)
    live = row < num_rows
    y, x = row // out_width % out_height * 2, row % out_width * 2
    first = row // (out_width * out_height) * height
    top = tl.zeros((ROWS, COLUMNS), tl.float32)  # the ReLU's bound
    for tap in tl.static_range(9):
        # A pixel outside is replaced by its nearest neighbour, which is in the window, too.
        pixel_y = tl.minimum(tl.maximum(y + tap // 3 - 1, 0), height - 1)
        pixel_x = tl.minimum(tl.maximum(x + tap % 3 - 1, 0), width - 1)
        pixel = (first + pixel_y) * width + pixel_x
        value = _rows(x_ptr, pixel, column, live, WIDTH, WIDTH, STRIPES * COLUMNS).to(tl.float32)
        value = _affine(value, scale_ptr, bias_ptr, column, WIDTH)
        top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
    _store(out_ptr, row, column, top, live, WIDTH, WIDTH)


# ------------------------------------------------------------------------------------------------------------ launchers
def pointwise_convolution(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool,
    stride: Sequence[int],
) -> Tensor:  # fmt: skip
    """[B, OUT, H', W'] in channels-last memory."""
    batch, depth_in, height, width = x.shape
    num_columns = weight.shape[0]
    out_height, out_width = (-(-side // step) for side, step in zip((height, width), stride, strict=True))
    out = _empty(x, batch, num_columns, out_height, out_width)
    if out.numel() == 0:
        return out
    x, weight = _channels_last(x), weight.reshape(num_columns, depth_in).contiguous()
    scale, bias = _contiguous(scale), _contiguous(bias)
    residual = None if residual is None else _channels_last(residual)
    num_rows = batch * out_height * out_width

    def launch(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> None:
        pointwise_rows[(cdiv(num_rows, rows) * cdiv(num_columns, columns),)](
            x, weight, scale, bias, residual, out, num_rows, height, width, out_height, out_width,
            IN=depth_in, OUT=num_columns, STRIDE_Y=stride[0], STRIDE_X=stride[1], RELU=relu, **_products(weight),
            ROWS=rows, COLUMNS=columns, DEPTH=depth,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    tuning.run("pointwise", _key(x, weight), num_rows, x.device, launch)
    return out


def affine_relu_(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> None:
    """The epilogue of a map in channels-last memory, in place."""
    if x.numel() == 0:
        return
    if residual is not None:
        residual = _channels_last(residual)
    num_rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile = _tile(num_rows, channels)
    affine_relu_rows[(cdiv(num_rows, tile["ROWS"]) * cdiv(channels, tile["COLUMNS"]),)](
        x, _contiguous(scale), _contiguous(bias), residual, num_rows, WIDTH=channels, RELU=relu, **tile
    )


def affine_relu_max_pool(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """[B, C, ceil(H / 2), ceil(W / 2)] in channels-last memory."""
    batch, channels, height, width = x.shape
    out = _empty(x, batch, channels, (height + 1) // 2, (width + 1) // 2)
    if out.numel() == 0:
        return out
    num_rows = out.numel() // channels
    tile = _tile(num_rows, channels)
    affine_relu_pool_rows[(cdiv(num_rows, tile["ROWS"]) * cdiv(channels, tile["COLUMNS"]),)](
        _channels_last(x), _contiguous(scale), _contiguous(bias), out, num_rows, height, width, *out.shape[2:],
        WIDTH=channels, **tile,
    )  # fmt: skip
    return out


def _tile(num_rows: int, channels: int) -> dict[str, int]:
    columns = min(256, next_power_of_2(channels))
    return {"ROWS": min(_ELEMENTS // columns, next_power_of_2(num_rows)), "COLUMNS": columns}


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
