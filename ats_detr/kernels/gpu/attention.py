"""Multi-scale deformable attention in Triton: forward, and backward with atomic sums into the value's gradient.

Rows (one head of one query) lie in memory order, so that the parameters of the rows of a program are
neighbours: at eight heads of 32 channels one warp holds one query. Everything is computed and summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.attention import MAX_HEAD_DIM
from ats_detr.kernels.gpu import tuning
from ats_detr.kernels.gpu.common import (
    SIZES,
    cdiv,
    images_of,
    level_size,
    load_pair,
    load_row,
    next_power_of_2,
    pack_pair,
    pair_words,
    pixel_index,
    reference_on_level,
    slopes,
    softmax_terms,
    softmax_weight,
    store_row,
    view_as,
    window,
)
from ats_detr.kernels.gpu.problem import Problem, aligned, prepare, row_kind
from ats_detr.kernels.gpu.value_gradient import value_gradient_sorted, value_gradient_tiled
from ats_detr.kernels.levels import join_shapes


@triton.jit
def _rows_of_program(num_rows, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of this program, clamped to the last one; whether they exist; their queries and heads."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    return row, live, row // HEADS, row % HEADS


@triton.jit
def _add_corner(
    first, second, ptr, weight, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr
):
    """The two tiles of a row's sum plus one pixel of a sample."""
    u, v = load_row(ptr, column, COLUMNS, WIDTH, KIND)
    return first + u * weight[:, None], second + v * weight[:, None]


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_images", "num_tokens", *SIZES])
def msda_forward(
    value_ptr,  # [B, S, HEADS, HEAD_DIM], VALUE_PITCH elements from token to token
    reference_ptr,  # [N, LEVELS, REFERENCE]
    # [N, HEADS, SAMPLES, 2] offsets, or locations where REFERENCE is 0; OFFSET_PITCH from query to query
    offset_ptr,
    weight_ptr,  # [N, HEADS, SAMPLES] logits, or weights where REFERENCE is 0; WEIGHT_PITCH from query to query
    image_ptr,  # [N] int32 image of each query, where PACKED
    count_ptr,  # [1] int32 queries in use, where COUNTED
    out_ptr,  # [N, HEADS, HEAD_DIM]
    num_queries, queries_per_image, num_images, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr,  # points and first sample of each level
    VALUE_PITCH: tl.constexpr, OFFSET_PITCH: tl.constexpr, WEIGHT_PITCH: tl.constexpr,
    REFERENCE: tl.constexpr, PACKED: tl.constexpr, COUNTED: tl.constexpr, THIN: tl.constexpr, LARGE: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over samples of weight * bilinear(value). Reads per row: 4 corners x samples x HEAD_DIM values."""
    WORD: tl.constexpr = 2 if KIND == "bf16" or KIND == "fp16" else 1
    PITCH: tl.constexpr = VALUE_PITCH // WORD
    SAMPLES: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    num_rows = num_queries * HEADS
    if COUNTED:
        num_rows = tl.minimum(tl.load(count_ptr), num_queries).to(tl.int32) * HEADS
        if tl.program_id(0) * BLOCK >= num_rows:
            return
    row, live, query, head = _rows_of_program(num_rows, HEADS, BLOCK)
    column = tl.arange(0, WIDTH)
    image, shift = images_of(image_ptr, query, queries_per_image, num_images, PACKED)
    origin = image * num_tokens
    if WORD == 2:
        value_ptr = view_as(value_ptr, tl.int32)
        out_ptr = view_as(out_ptr, tl.int32)
    values = value_ptr + (head * (HEAD_DIM // WORD))[:, None] + column[None, :]
    offset_at = query * (OFFSET_PITCH // 2) + head * SAMPLES
    weight_at = query * WEIGHT_PITCH + head * SAMPLES
    if REFERENCE != 0:
        top_logit, inverse_sum = softmax_terms(weight_ptr, weight_at, SAMPLES, SAMPLES_PADDED)
    first = tl.zeros((BLOCK, WIDTH), tl.float32)
    second = tl.zeros((BLOCK, WIDTH), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
        width_f = width.to(tl.float32)
        height_f = height.to(tl.float32)
        right = tl.where(width > 1, PITCH, 0) if THIN else PITCH
        below = tl.where(height > 1, width, 0) * PITCH if THIN else width * PITCH
        x0, y0, x_unit, y_unit = reference_on_level(
            reference_ptr, query, width_f, height_f, level, LEVELS, POINTS, REFERENCE
        )
        if PACKED:
            x0 += shift
        for point in tl.range(POINTS[level], loop_unroll_factor=UNROLL[level]):
            j = FIRST[level] + point
            x, y = load_pair(offset_ptr, offset_at + j)
            weight = tl.load(weight_ptr + weight_at + j).to(tl.float32)
            x = x * x_unit + x0
            y = y * y_unit + y0
            if REFERENCE != 0:
                weight = softmax_weight(weight, top_logit, inverse_sum)
            poison = x * 0.0 + (y * 0.0 + poison)  # NaN as soon as one coordinate is NaN or infinite
            xb, _, left_w, right_w = window(x, width_f, THIN)
            yb, _, top_w, low_w = window(y, height_f, THIN)
            token = origin + pixel_index(xb, yb, width, width_f, LARGE)
            top = values + (token.to(tl.int64) * PITCH)[:, None]
            low = top + below
            top_w *= weight
            low_w *= weight
            first, second = _add_corner(first, second, top, top_w * left_w, column, COLUMNS, WIDTH, KIND)
            first, second = _add_corner(
                first, second, top + right, top_w * right_w, column, COLUMNS, WIDTH, KIND
            )
            first, second = _add_corner(first, second, low, low_w * left_w, column, COLUMNS, WIDTH, KIND)
            first, second = _add_corner(
                first, second, low + right, low_w * right_w, column, COLUMNS, WIDTH, KIND
            )
        origin += height * width
    first += poison[:, None]
    second += poison[:, None]
    out = out_ptr + (row * (HEAD_DIM // WORD))[:, None] + column[None, :]
    store_row(out, first, second, live[:, None] & (column < COLUMNS)[None, :], COLUMNS, KIND)


@triton.jit
def _add_row(
    ptr, first, second, weight, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr
):
    """One pixel's share of a row's gradient, summed into float32 memory: the first tile, then the second."""
    mask = None if COLUMNS == WIDTH else (weight == weight)[:, None] & (column < COLUMNS)[None, :]
    tl.atomic_add(ptr, first * weight[:, None], mask=mask, sem="relaxed")
    if KIND != "plain":
        tl.atomic_add(ptr + COLUMNS, second * weight[:, None], mask=mask, sem="relaxed")


@triton.jit
def _product(ptr, first, second, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """<row at ptr, gradient row>, [rows]."""
    u, v = load_row(ptr, column, COLUMNS, WIDTH, KIND)
    if KIND == "plain":
        return tl.sum(first * u, axis=1)
    else:
        return tl.sum(first * u + second * v, axis=1)


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_images", "num_tokens", *SIZES])
def msda_backward(
    value_ptr, reference_ptr, offset_ptr, weight_ptr, image_ptr,  # as in msda_forward
    out_ptr,  # [N, HEADS, HEAD_DIM] what the forward pass gave (fused only)
    grad_out_ptr,  # [N, HEADS, HEAD_DIM]
    grad_value_ptr,  # [B, S, HEADS, HEAD_DIM] float32, zeros; 16-bit kinds: even channels of a head, then odd ones
    grad_offset_ptr, grad_weight_ptr,  # contiguous
    num_queries, queries_per_image, num_images, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr,  # points and first sample of each level
    VALUE_PITCH: tl.constexpr, OFFSET_PITCH: tl.constexpr, WEIGHT_PITCH: tl.constexpr,
    REFERENCE: tl.constexpr, PACKED: tl.constexpr, THIN: tl.constexpr, LARGE: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES_PADDED: tl.constexpr,
    SCATTER: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients by offsets and logits (or locations and weights) and, where SCATTER, by the value.

    With s the products of the gradient row with the four corners, everything but the value's gradient is scalar work:
    d/dweight = sum of hat * s; d/dx = weight * sum of slope * s. The softmax needs sum_j weight_j d/dweight_j, which is
    <gradient, output>, as in flash attention. Programs of one warp need no barrier.
    """
    WORD: tl.constexpr = 2 if KIND == "bf16" or KIND == "fp16" else 1
    PITCH: tl.constexpr = VALUE_PITCH // WORD
    GRAD_PITCH: tl.constexpr = HEADS * HEAD_DIM
    SAMPLES: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    row, live, query, head = _rows_of_program(num_queries * HEADS, HEADS, BLOCK)
    column = tl.arange(0, WIDTH)
    image, shift = images_of(image_ptr, query, queries_per_image, num_images, PACKED)
    origin = image * num_tokens
    if WORD == 2:
        value_ptr = view_as(value_ptr, tl.int32)
        out_ptr = view_as(out_ptr, tl.int32)
        grad_out_ptr = view_as(grad_out_ptr, tl.int32)
    values = value_ptr + (head * (HEAD_DIM // WORD))[:, None] + column[None, :]
    if SCATTER:
        grads = grad_value_ptr + (head * HEAD_DIM)[:, None] + column[None, :]
    offset_at = query * (OFFSET_PITCH // 2) + head * SAMPLES
    weight_at = query * WEIGHT_PITCH + head * SAMPLES
    out_at = (row * (HEAD_DIM // WORD))[:, None] + column[None, :]
    g_first, g_second = load_row(grad_out_ptr + out_at, column, COLUMNS, WIDTH, KIND)
    g_first = tl.where(live[:, None], g_first, 0.0)
    g_second = tl.where(live[:, None], g_second, 0.0)
    if REFERENCE != 0:
        top_logit, inverse_sum = softmax_terms(weight_ptr, weight_at, SAMPLES, SAMPLES_PADDED)
        mean = _product(out_ptr + out_at, g_first, g_second, column, COLUMNS, WIDTH, KIND)
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
        width_f = width.to(tl.float32)
        height_f = height.to(tl.float32)
        right = tl.where(width > 1, 1, 0) if THIN else 1
        below = tl.where(height > 1, width, 0) if THIN else width
        x0, y0, x_unit, y_unit = reference_on_level(
            reference_ptr, query, width_f, height_f, level, LEVELS, POINTS, REFERENCE
        )
        if PACKED:
            x0 += shift
        for point in tl.range(POINTS[level], loop_unroll_factor=UNROLL[level]):
            j = FIRST[level] + point
            x, y = load_pair(offset_ptr, offset_at + j)
            weight = tl.load(weight_ptr + weight_at + j).to(tl.float32)
            if REFERENCE != 0:
                weight = softmax_weight(weight, top_logit, inverse_sum)
            x = x * x_unit + x0
            y = y * y_unit + y0
            poison = x * 0.0 + y * 0.0  # NaN for a coordinate that is NaN or infinite
            xb, tx, left_w, right_w = window(x, width_f, THIN)
            yb, ty, top_w, low_w = window(y, height_f, THIN)
            token = (origin + pixel_index(xb, yb, width, width_f, LARGE)).to(tl.int64)
            top = values + (token * PITCH)[:, None]
            low = top + below * PITCH
            s00 = _product(top, g_first, g_second, column, COLUMNS, WIDTH, KIND)
            s01 = _product(top + right * PITCH, g_first, g_second, column, COLUMNS, WIDTH, KIND)
            s10 = _product(low, g_first, g_second, column, COLUMNS, WIDTH, KIND)
            s11 = _product(low + right * PITCH, g_first, g_second, column, COLUMNS, WIDTH, KIND)
            left_d, right_d = slopes(tx, width_f, THIN)
            top_d, low_d = slopes(ty, height_f, THIN)
            upper = left_w * s00 + right_w * s01
            lower = left_w * s10 + right_w * s11
            dw = top_w * upper + (low_w * lower + poison)
            dx = (
                weight
                * x_unit
                * (left_d * (top_w * s00 + low_w * s10) + right_d * (top_w * s01 + low_w * s11))
            )
            dy = weight * y_unit * (top_d * upper + low_d * lower)
            if REFERENCE != 0:
                dw = weight * (dw - mean)
            at = row * SAMPLES + j
            tl.store(grad_weight_ptr + at, dw.to(grad_weight_ptr.dtype.element_ty), mask=live)
            tl.store(pair_words(grad_offset_ptr) + at, pack_pair(grad_offset_ptr, dx, dy), mask=live)
            if SCATTER:
                target = grads + (token * GRAD_PITCH)[:, None]
                target_low = target + below * GRAD_PITCH
                step = right * GRAD_PITCH
                top_w *= weight
                low_w *= weight
                _add_row(target, g_first, g_second, top_w * left_w, column, COLUMNS, WIDTH, KIND)
                _add_row(target + step, g_first, g_second, top_w * right_w, column, COLUMNS, WIDTH, KIND)
                _add_row(target_low, g_first, g_second, low_w * left_w, column, COLUMNS, WIDTH, KIND)
                _add_row(target_low + step, g_first, g_second, low_w * right_w, column, COLUMNS, WIDTH, KIND)
        origin += height * width


@triton.jit(do_not_specialize=["num_rows"])
def interleave_halves(
    planar_ptr,  # [rows, 2, COLUMNS] float32: even channels, odd channels
    out_ptr,  # [rows, COLUMNS] words of two 16-bit channels
    num_rows,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Casts the value's gradient from the order in which it was summed to that of the value."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    mask = (row < num_rows)[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    plane = planar_ptr + row.to(tl.int64)[:, None] * (2 * COLUMNS) + column[None, :]
    even = tl.load(plane, mask=mask)
    odd = tl.load(plane + COLUMNS, mask=mask)
    store_row(view_as(out_ptr, tl.int32) + at, even, odd, mask, COLUMNS, KIND)


# ------------------------------------------------------------------------------------------------------------ launchers
def attend(
    value: Tensor, sizes: Sequence[int], shapes_L2: Tensor | None, reference_points: Tensor | None, offsets: Tensor,
    weights: Tensor, image_index: Tensor | None, num_rows: Tensor | None, deterministic: bool | None,
    num_points: Sequence[int],
) -> Tensor:  # fmt: skip
    """The operator `ats_detr::msda`."""
    shapes = join_shapes(sizes, shapes_L2, value.shape[1])
    samples = (reference_points, offsets, weights, image_index, num_points)
    outs = [forward(prepare(part, shapes, *samples), num_rows) for part in _parts(value)]
    if len(outs) == 1:
        return outs[0]
    return torch.cat([out.unflatten(1, (value.shape[2], -1)) for out in outs], dim=2).flatten(1)


def differentiate(
    grad_out: Tensor, out: Tensor, value: Tensor, sizes: Sequence[int], shapes_L2: Tensor | None,
    reference_points: Tensor | None, offsets: Tensor, weights: Tensor, image_index: Tensor | None, need_value: bool,
    deterministic: bool | None, num_points: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `ats_detr::msda_backward`."""
    shapes = join_shapes(sizes, shapes_L2, value.shape[1])
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    heads = value.shape[2:]
    parts = zip(
        _parts(value), _parts(out.unflatten(1, heads)), _parts(grad_out.unflatten(1, heads)), strict=True
    )
    samples = (reference_points, offsets, weights, image_index, num_points)
    grads = [
        backward(prepare(part, shapes, *samples), out, grad, need_value, deterministic)
        for part, out, grad in parts
    ]
    values, *others = zip(*grads, strict=True)
    grad_offsets, grad_weights = (tensors[0] if len(tensors) == 1 else sum(tensors) for tensors in others)
    if not need_value:
        return value.new_empty(0), grad_offsets, grad_weights
    return values[0] if len(values) == 1 else torch.cat(values, dim=3), grad_offsets, grad_weights


def _parts(heads: Tensor) -> Sequence[Tensor]:
    """[..., D] in parts of at most MAX_HEAD_DIM channels: equal except for the last one, whole 16-byte words."""
    head_dim = heads.shape[-1]
    if head_dim <= MAX_HEAD_DIM:
        return [heads]
    num_parts = cdiv(head_dim, MAX_HEAD_DIM)
    return heads.split(cdiv(head_dim, 8 * num_parts) * 8, dim=-1)


def _block(constants: dict, num_warps: int, multiple: int) -> int:
    """Rows per program that give every lane four consecutive words, `multiple` times over."""
    return max(1, 128 // constants["WIDTH"]) * num_warps * multiple


def forward(problem: Problem, num_rows: Tensor | None, out: Tensor | None = None) -> Tensor:
    """[N, H * D] deformable attention (in `out` if given); rows past `num_rows` are not written."""
    value, num_queries = problem.value, problem.num_queries
    num_heads, head_dim = value.shape[2:]
    if out is None:
        out = value.new_empty(num_queries, num_heads * head_dim)
    if problem.is_empty:
        return out.zero_()

    def launch(num_warps: int, unroll: int, multiple: int = 1, whole_rows: bool = False) -> None:
        constants = problem.value_constants(row_kind(value, whole_rows))
        block = _block(constants, num_warps, multiple)
        msda_forward[(cdiv(num_queries * num_heads, block),)](
            value, problem.reference, problem.offsets, problem.weights, problem.image_index, num_rows, out,
            *problem.counts, value.shape[1], *problem.levels,
            **constants, COUNTED=num_rows is not None, BLOCK=block, UNROLL=problem.unrolled(unroll),
            num_warps=num_warps,
        )  # fmt: skip

    tuning.run("msda_forward", problem.key(), num_queries, value.device, launch)
    return out


def backward(
    problem: Problem, out: Tensor, grad_out: Tensor, need_value: bool, deterministic: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients by value (None unless needed), offsets and weights."""
    value, num_queries = problem.value, problem.num_queries
    grad_offsets = torch.empty_like(problem.offsets, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(problem.weights, memory_format=torch.contiguous_format)
    if problem.is_empty:
        return (
            value.new_zeros(value.shape) if need_value else None,
            grad_offsets.zero_(),
            grad_weights.zero_(),
        )
    grad_out, out = aligned(grad_out), aligned(out)
    method = "none"
    if need_value:
        method = "sorted" if deterministic else tuning.value_gradient(problem.key(), num_queries)
        if method == "tiles" and problem.large:  # more tiles than `reduce_tiles` counts
            method = "atomic"
    grad_value = None
    if method == "atomic":
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)

    def launch(num_warps: int, unroll: int, multiple: int = 1) -> None:
        constants = problem.value_constants(row_kind(value))
        block = _block(constants, num_warps, multiple)
        msda_backward[(cdiv(num_queries * value.shape[2], block),)](
            value, problem.reference, problem.offsets, problem.weights, problem.image_index, out, grad_out,
            grad_value, grad_offsets, grad_weights,
            *problem.counts, value.shape[1], *problem.levels,
            **constants, SCATTER=method == "atomic", BLOCK=block, UNROLL=problem.unrolled(unroll), num_warps=num_warps,
        )  # fmt: skip

    def reset() -> None:
        if grad_value is not None:
            grad_value.zero_()

    tuning.run(
        "msda_backward", (*problem.key(), method == "atomic"), num_queries, value.device, launch, reset
    )
    if method == "atomic":
        grad_value = _value_gradient_in_order(grad_value, value)
    elif method == "tiles":
        grad_value = value_gradient_tiled(problem, grad_out)
    elif method == "sorted":
        grad_value = value_gradient_sorted(problem, grad_out)
    return grad_value, grad_offsets, grad_weights


def _value_gradient_in_order(summed: Tensor, value: Tensor) -> Tensor:
    kind = row_kind(value)
    if kind not in ("bf16", "fp16"):
        return summed.to(value.dtype)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    columns, num_rows = value.shape[-1] // 2, summed.numel() // value.shape[-1]
    width = next_power_of_2(columns)
    block = max(1, 2048 // width)
    interleave_halves[(cdiv(num_rows, block),)](
        summed, out, num_rows, COLUMNS=columns, WIDTH=width, KIND=kind, BLOCK=block, num_warps=4
    )
    return out
