"""Geometry of tokens: masks, valid counts and proposals of all, positions and references of the kept ones.

Everything is computed from the image sizes in float32; nothing is read but those and the indices of the rows. Programs
are blocks of tokens (`token_geometry`), rows (`token_rows`) or boxes (`encode_boxes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.geometry import LARGEST_LOGIT
from ats_detr.kernels.gpu.common import INTERPRETING, SIZES, cdiv, level_size, next_power_of_2
from ats_detr.kernels.levels import num_tokens_of, pairs

BLOCK = 4096 if INTERPRETING else 256  # tokens
ELEMENTS = 1 << 18 if INTERPRETING else 2048  # features per program, approximately
LOG2_TEMPERATURE = tl.constexpr(math.log2(10000.0))
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def _num_valid(side, padded, cells):
    """How many of `cells` cells have a nearest pixel in 0..side-1 of `padded` pixels."""
    scale = tl.div_rn(padded.to(tl.float32), cells.to(tl.float32))
    limit = side.to(tl.float32)
    count = tl.maximum(tl.div_rn(limit, scale).to(tl.int32) - 1, 0)
    for _ in tl.static_range(4):  # the guess is at most 3 too low
        inside = (tl.floor(count.to(tl.float32) * scale) < limit) & (count < cells)
        count += inside.to(tl.int32)
    return count


@triton.jit
def _place(token, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7, LEVELS: tl.constexpr):
    """Level, column and row of each token, and height and width of its level."""
    level = tl.zeros_like(token)
    first = tl.zeros_like(token)
    height, width = level_size(0, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
    end = height * width
    height += tl.zeros_like(token)
    width += tl.zeros_like(token)
    for i in tl.static_range(1, LEVELS):
        h, w = level_size(i, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
        later = token >= end
        level = tl.where(later, i, level)
        first = tl.where(later, end, first)
        height = tl.where(later, h, height)
        width = tl.where(later, w, width)
        end += h * w
    cell = token - first
    return level, cell % width, cell // width, height, width


@triton.jit
def _sine(angle, feature, FEATURES: tl.constexpr):
    """Sine (even) or cosine (odd features) of angle / 10000^(2 (feature // 2) / FEATURES); |angle| is below 1000."""
    exponent = (feature // 2 * 2).to(tl.float32) * (LOG2_TEMPERATURE / FEATURES)
    angle = angle * tl.exp2(-exponent)
    # Remainder by pi / 2 in two parts, then the Taylor series of both: within 1e-7 of the exact value.
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = tl.fma(quarter, -1.5707963705062866, angle)
    x = tl.fma(quarter, 4.371139000186243e-08, x)
    square = x * x
    sine = tl.fma(square, 2.755731922398589e-06, -1.984126984126984e-04)
    sine = tl.fma(sine, square, 8.333333333333333e-03)
    sine = tl.fma(sine, square, -0.16666666666666666)
    sine = tl.fma(sine * square, x, x)
    cosine = tl.fma(square, 2.48015873015873e-05, -1.388888888888889e-03)
    cosine = tl.fma(cosine, square, 4.1666666666666664e-02)
    cosine = tl.fma(cosine, square, -0.5)
    cosine = tl.fma(cosine, square, 1.0)
    turn = quarter.to(tl.int32) + feature % 2  # cos x = sin(x + pi / 2)
    value = tl.where(turn % 2 == 0, sine, cosine)
    return tl.where(turn % 4 >= 2, -value, value)


@triton.jit(do_not_specialize=["padded_height", "padded_width", "num_tokens", *SIZES])
def geometry_of_tokens(
    size_ptr,  # [B, 2] (height, width) of each image
    count_ptr, ratio_ptr,  # [B, LEVELS, 2] int32 and float32 (columns, rows)
    num_valid_ptr,  # [B] int64
    mask_ptr, allowed_ptr,  # [B, S] bool as uint8
    proposal_ptr,  # [B, S, 4] float32
    padded_height, padded_width, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens, images. The first block of an image also writes its counts."""
    image = tl.program_id(1).to(tl.int64)
    # Clamped before the cast: int64 would wrap around.
    image_height = tl.minimum(tl.maximum(tl.load(size_ptr + 2 * image).to(tl.int64), 0), padded_height).to(
        tl.int32
    )
    image_width = tl.minimum(tl.maximum(tl.load(size_ptr + 2 * image + 1).to(tl.int64), 0), padded_width).to(
        tl.int32
    )
    if tl.program_id(0) == 0:
        num_valid = image * 0
        for i in tl.static_range(0, LEVELS):
            h, w = level_size(i, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
            columns = _num_valid(image_width, padded_width, w)
            rows = _num_valid(image_height, padded_height, h)
            num_valid += columns.to(tl.int64) * rows
            at = (image * LEVELS + i) * 2
            tl.store(count_ptr + at, columns)
            tl.store(count_ptr + at + 1, rows)
            tl.store(ratio_ptr + at, tl.div_rn(columns.to(tl.float32), w.to(tl.float32)))
            tl.store(ratio_ptr + at + 1, tl.div_rn(rows.to(tl.float32), h.to(tl.float32)))
        tl.store(num_valid_ptr + image, num_valid)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    level, column, row, height, width = _place(
        token, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7, LEVELS
    )
    columns = _num_valid(image_width, padded_width, width)
    rows = _num_valid(image_height, padded_height, height)
    valid = (column < columns) & (row < rows)
    x = tl.div_rn(column.to(tl.float32) + 0.5, columns.to(tl.float32))
    y = tl.div_rn(row.to(tl.float32) + 0.5, rows.to(tl.float32))
    side = tl.exp2(level.to(tl.float32)) * 0.05
    allowed = valid & (x > 0.01) & (x < 0.99) & (y > 0.01) & (y < 0.99) & (side < 0.99)
    at = image * num_tokens + token
    tl.store(mask_ptr + at, (valid == 0).to(tl.uint8), mask=live)
    tl.store(allowed_ptr + at, allowed.to(tl.uint8), mask=live)
    for i in tl.static_range(4):
        value = tl.where(allowed, x if i == 0 else y if i == 1 else side, 0.5)
        logit = tl.log(tl.div_rn(value, 1.0 - value))
        tl.store(proposal_ptr + at * 4 + i, tl.where(allowed, logit, float("inf")), mask=live)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", *SIZES])
def geometry_of_rows(
    count_ptr, ratio_ptr,  # [B, LEVELS, 2] int32 and float32 (columns, rows)
    token_index_ptr, image_index_ptr,  # [K], where PACKED; otherwise all tokens of all images
    in_use_ptr,  # int32 [1] rows in use, where COUNTED
    embed_ptr,  # [LEVELS, 2 * FEATURES] contiguous
    position_ptr,  # [K, 2 * FEATURES]
    reference_ptr,  # [K, LEVELS, 2] float32
    level_ptr,  # [K] int32
    num_rows, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    LEVELS: tl.constexpr, FEATURES: tl.constexpr, PACKED: tl.constexpr, COUNTED: tl.constexpr,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WIDTH is 2 * FEATURES and PAIRS 2 * LEVELS, padded to powers of two."""
    if COUNTED:
        num_rows = tl.minimum(num_rows, tl.load(in_use_ptr))
        if tl.program_id(0) * BLOCK >= num_rows:
            return
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = k < num_rows
    if PACKED:
        token = tl.load(token_index_ptr + k, mask=live, other=0)
        image = tl.load(image_index_ptr + k, mask=live, other=0).to(tl.int64)
    else:
        token = (k % num_tokens).to(tl.int32)
        image = tl.where(live, k // num_tokens, 0)
    level, column, row, height, width = _place(
        token, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7, LEVELS
    )
    tl.store(level_ptr + k, level, mask=live)
    own = (image * LEVELS + level) * 2
    x = (column.to(tl.float32) + 0.5) / (tl.load(ratio_ptr + own) * width.to(tl.float32))
    y = (row.to(tl.float32) + 0.5) / (tl.load(ratio_ptr + own + 1) * height.to(tl.float32))
    pair = tl.arange(0, PAIRS)[None, :]
    inside = live[:, None] & (pair < 2 * LEVELS)
    ratio = tl.load(ratio_ptr + (image * (2 * LEVELS))[:, None] + pair, mask=inside, other=0.0)
    reference = tl.where(pair % 2 == 0, x[:, None], y[:, None]) * ratio
    tl.store(reference_ptr + k[:, None] * (2 * LEVELS) + pair, reference, mask=inside)
    columns = tl.load(count_ptr + own)
    rows = tl.load(count_ptr + own + 1)
    x_angle = (
        (tl.minimum(column + 1, columns).to(tl.float32) - 0.5) / (columns.to(tl.float32) + 1e-6) * TWO_PI
    )
    y_angle = (tl.minimum(row + 1, rows).to(tl.float32) - 0.5) / (rows.to(tl.float32) + 1e-6) * TWO_PI
    channel = tl.arange(0, WIDTH)[None, :]
    angle = tl.where(channel < FEATURES, y_angle[:, None], x_angle[:, None])
    inside = live[:, None] & (channel < 2 * FEATURES)
    embed = tl.load(embed_ptr + level[:, None] * (2 * FEATURES) + channel, mask=inside, other=0.0)
    position = _sine(angle, channel % FEATURES, FEATURES) + embed.to(tl.float32)
    at = position_ptr + k[:, None] * (2 * FEATURES) + channel
    tl.store(at, position.to(position_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_values"])
def sine_of_values(
    value_ptr,  # [num_values] in 0..1
    out_ptr,  # [num_values, FEATURES] float32
    num_values, FEATURES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(value_ptr + row, mask=row < num_values, other=0.0).to(tl.float32) * TWO_PI
    feature = tl.arange(0, WIDTH)[None, :]
    inside = (row < num_values)[:, None] & (feature < FEATURES)
    tl.store(
        out_ptr + row[:, None] * FEATURES + feature, _sine(angle[:, None], feature, FEATURES), mask=inside
    )


@triton.jit(do_not_specialize=["num_queries", "num_values"])
def refine_references(
    offset_ptr, reference_ptr, ratio_ptr,  # [B, Q, 4], [B, Q, 4] float32, [B, LEVELS, 2] float32
    box_ptr, logit_ptr, on_level_ptr,  # float32 [B, Q, 4], [B, Q, 4], [B * Q, LEVELS, 4]
    num_queries, num_values, LEVELS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK coordinates."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_values
    logit = tl.load(offset_ptr + at, mask=live, other=0.0).to(tl.float32)
    logit += tl.load(reference_ptr + at, mask=live, other=0.0)
    box = 1.0 / (1.0 + tl.exp(-logit))
    tl.store(box_ptr + at, box, mask=live)
    logit = tl.minimum(logit, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(logit_ptr + at, tl.maximum(logit, -LARGEST, propagate_nan=tl.PropagateNan.ALL), mask=live)
    query = at // 4
    image = tl.where(live, query // num_queries, 0)
    for level in tl.static_range(LEVELS):
        ratio = tl.load(ratio_ptr + (image * LEVELS + level) * 2 + at % 2)
        tl.store(on_level_ptr + (query * LEVELS + level) * 4 + at % 4, box * ratio, mask=live)


# ------------------------------------------------------------------------------------------------------------ launchers
def _levels(levels: Sequence[int]) -> list[int]:
    packed = [height << 16 | width for height, width in pairs(levels)]
    return packed + [0] * (len(SIZES) - len(packed))


def token_geometry(
    sizes: Tensor, height: int, width: int, levels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts, valid ratios, numbers of valid tokens, padding mask, proposals, and where these are allowed."""
    batch, num_levels, num_tokens = len(sizes), len(levels) // 2, num_tokens_of(pairs(levels))
    counts = sizes.new_empty(batch, num_levels, 2, dtype=torch.int32)
    ratios, num_valid = (
        torch.empty_like(counts, dtype=torch.float32),
        sizes.new_empty(batch, dtype=torch.int64),
    )
    mask, allowed = (sizes.new_empty(batch, num_tokens, dtype=torch.bool) for _ in range(2))
    proposals = sizes.new_empty(batch, num_tokens, 4, dtype=torch.float32)
    if batch:
        geometry_of_tokens[(cdiv(num_tokens, BLOCK), batch)](
            sizes.contiguous(), counts, ratios, num_valid, mask.view(torch.uint8), allowed.view(torch.uint8),
            proposals, height, width, num_tokens, *_levels(levels), LEVELS=num_levels, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return counts, ratios, num_valid, mask, proposals, allowed


def token_rows(
    counts: Tensor, ratios: Tensor, token_index: Tensor | None, image_index: Tensor | None, num_rows: Tensor | None,
    level_embed: Tensor, levels: Sequence[int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Positions [K, C], references [K, L, 2] and level [K] of the rows; those past `num_rows` are not written."""
    (batch, num_levels, _), width, num_tokens = (
        counts.shape,
        level_embed.shape[1],
        num_tokens_of(pairs(levels)),
    )
    capacity = batch * num_tokens if token_index is None else len(token_index)
    positions = ratios.new_empty(capacity, width, dtype=dtype)
    references, level = ratios.new_empty(capacity, num_levels, 2), counts.new_empty(capacity)
    if capacity:
        padded = next_power_of_2(width)
        block = max(1, ELEMENTS // padded)
        geometry_of_rows[(cdiv(capacity, block),)](
            counts, ratios, token_index, image_index, num_rows, level_embed.contiguous(), positions, references, level,
            capacity, num_tokens, *_levels(levels), LEVELS=num_levels, FEATURES=width // 2,
            PACKED=token_index is not None, COUNTED=num_rows is not None,
            WIDTH=padded, PAIRS=next_power_of_2(2 * num_levels), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return positions, references, level


def encode_boxes(boxes: Tensor, num_features: int) -> Tensor:
    """[..., 4 * num_features] sine features of boxes [..., 4]."""
    out = boxes.new_empty(*boxes.shape[:-1], 4 * num_features, dtype=torch.float32)
    if out.numel():
        width = next_power_of_2(num_features)
        block = max(1, ELEMENTS // width)
        sine_of_values[(cdiv(boxes.numel(), block),)](
            boxes.contiguous(), out, boxes.numel(), FEATURES=num_features, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def refine_boxes(offset: Tensor, reference: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes and their clamped logits [B, Q, 4], and the boxes on every level [B * Q, L, 4]."""
    (batch, num_queries, _), num_levels = reference.shape, ratios.shape[1]
    boxes, logits = (reference.new_empty(reference.shape) for _ in range(2))
    on_levels = reference.new_empty(batch * num_queries, num_levels, 4)
    if boxes.numel():
        refine_references[(cdiv(boxes.numel(), BLOCK),)](
            offset.contiguous(), reference.contiguous(), ratios.contiguous(), boxes, logits, on_levels,
            num_queries, boxes.numel(), LEVELS=num_levels, LARGEST=LARGEST_LOGIT, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return boxes, logits, on_levels
