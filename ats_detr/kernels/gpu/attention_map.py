"""The decoder cross-attention map (DAM): attention weights spread bilinearly over the tokens, straight from
raw projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu.common import (
    SIZES,
    cdiv,
    level_size,
    next_power_of_2,
    samples_of_level,
    softmax_terms,
    softmax_weight,
)
from ats_detr.kernels.gpu.problem import prepare
from ats_detr.kernels.levels import join_shapes


@triton.jit
def _add(map_ptr, count_ptr, at, share, mask):
    if count_ptr is not None:
        count = (tl.where(share == share, share, 0.0) * 4294967296.0).to(tl.int64)
        tl.atomic_add(count_ptr + at, count, mask=mask, sem="relaxed")
        share *= 0.0
    tl.atomic_add(map_ptr + at, share, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_tokens", *SIZES])
def add_attention(
    reference_ptr, offset_ptr, weight_ptr,  # as in msda_forward
    map_ptr,  # [B, S] float32, added to
    count_ptr,  # [B, S] int64 or None: gets the sums instead, in units of 2^-32; the map then gets NaN where one is
    num_queries, queries_per_image, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr, OFFSET_PITCH: tl.constexpr,
    WEIGHT_PITCH: tl.constexpr, REFERENCE: tl.constexpr, POINTS_PADDED: tl.constexpr, SAMPLES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """map[token] += weight * share of the token around (x*W, y*H), without the half pixel of the sampling itself.

    One sample per lane, four scalar reductions each: about 0.6 million per decoder
    layer of four images, instead of a map per layer and head in memory.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_queries * HEADS
    row = tl.minimum(row, num_queries * HEADS - 1)
    query = row // HEADS
    head = row % HEADS
    SAMPLES: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    weight_at = query * WEIGHT_PITCH + head * SAMPLES
    offset_at = query * (OFFSET_PITCH // 2) + head * SAMPLES
    top_logit, inverse_sum = softmax_terms(weight_ptr, weight_at, SAMPLES, SAMPLES_PADDED)
    point = tl.arange(0, POINTS_PADDED)[None, :]
    first = ((query // queries_per_image).to(tl.int64) * num_tokens)[:, None]
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
        sample = FIRST[level] + tl.minimum(point, POINTS[level] - 1)
        x, y = samples_of_level(
            reference_ptr, offset_ptr, query[:, None], offset_at[:, None], sample, height, width,
            level, LEVELS, POINTS, REFERENCE,
        )  # fmt: skip
        x += 0.5
        y += 0.5
        weight = tl.load(weight_ptr + weight_at[:, None] + sample).to(tl.float32)
        weight = softmax_weight(weight, top_logit[:, None], inverse_sum[:, None])
        near = (x > -2.0) & (x < width + 1.0) & (y > -2.0) & (y < height + 1.0)  # False for NaN too
        near = near & live[:, None] & (point < POINTS[level])
        column_f = tl.floor(tl.where(near, x, 0.0))
        line_f = tl.floor(tl.where(near, y, 0.0))
        right = tl.where(near, x, 0.0) - column_f
        low = tl.where(near, y, 0.0) - line_f
        column = column_f.to(tl.int32)
        line = line_f.to(tl.int32)
        left_in = near & (column >= 0) & (column < width)
        right_in = near & (column >= -1) & (column < width - 1)
        top_in = (line >= 0) & (line < height)
        low_in = (line >= -1) & (line < height - 1)
        at = first + line * width + column
        top_weight = weight * (1.0 - low)
        low_weight = weight * low
        _add(map_ptr, count_ptr, at, top_weight * (1.0 - right), left_in & top_in)
        _add(map_ptr, count_ptr, at + 1, top_weight * right, right_in & top_in)
        _add(map_ptr, count_ptr, at + width, low_weight * (1.0 - right), left_in & low_in)
        _add(map_ptr, count_ptr, at + width + 1, low_weight * right, right_in & low_in)
        first += height * width


def add_attention_map(
    target: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sizes: Sequence[int],
    shapes_L2: Tensor | None,
) -> None:
    """Adds the attention of N = B*Q queries to `target` [B, S]; with deterministic algorithms, the same bits each time:
    sums of integers do not depend on their order."""
    shapes = join_shapes(sizes, shapes_L2, target.shape[1])
    problem = prepare(None, shapes, reference_points, offsets, logits, None)
    if logits.numel() == 0 or target.numel() == 0:
        return
    map_BS = target.contiguous()
    num_rows = problem.num_queries * logits.shape[1]
    points = next_power_of_2(logits.shape[3])
    block = max(1, 128 // points)
    counts_BS = None
    if torch.are_deterministic_algorithms_enabled():
        counts_BS = torch.zeros_like(map_BS, dtype=torch.int64)
    add_attention[(cdiv(num_rows, block),)](
        problem.reference, problem.offsets, problem.weights, map_BS, counts_BS,
        problem.num_queries, problem.num_queries // map_BS.shape[0], map_BS.shape[1], *problem.levels,
        **problem.constants(), WEIGHT_PITCH=problem.weights.stride(0), POINTS_PADDED=points,
        SAMPLES_PADDED=next_power_of_2(sum(problem.points)), BLOCK=block, num_warps=4,
    )  # fmt: skip
    if counts_BS is not None:
        map_BS.add_(counts_BS.double().mul_(2.0**-32))
    if map_BS is not target:
        target.copy_(map_BS)
