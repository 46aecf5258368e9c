"""The value's gradient of deformable attention with few atomic sums: queries in spatial order, a window of
pixels at a time.

Summing 4 corners x HEAD_DIM floats per sample into memory costs 512 bytes of reductions at 32 channels; at
encoder scale those are most of the backward pass. Queries that lie close together sample overlapping pixels,
so a program takes 64 neighbouring queries of one head, and for one level the bounding box of their samples.
For each 8x8 pixels of the box it forms the matrix of hat weights [64 pixels, 64 queries], multiplies it with
the gradient rows on the tensor cores and sums only the result [64 pixels, HEAD_DIM] into memory: each pixel
once per program instead of once per sample. Samples that do not fit into a box of MAX_BLOCKS x MAX_BLOCKS
windows, or belong to another image, take the direct way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ats_detr.kernels.gpu.common import LOG2E, SIZES, level_size, samples_of_level

QUERIES = 64  # per program
MAX_BLOCKS = tl.constexpr(3)  # 8x8 pixel windows per side of the box


@triton.jit
def _covered(x, y, left, top, last_x, last_y):
    """Whether the pixels that a sample touches lie in the box (those beyond the map do not count)."""
    return (
        (x > -1.0)
        & (y > -1.0)
        & (tl.maximum(x, 0.0) >= left)
        & (tl.maximum(y, 0.0) >= top)
        & (x < last_x)
        & (y < last_y)
    )


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_tokens", *SIZES])
def add_windows(
    reference_ptr, offset_ptr, weight_ptr, image_ptr,  # as in msda_forward
    order_ptr,  # [N] int32 queries, neighbours close to each other
    scale_ptr,  # [N, HEADS] float32 log2 of the softmax denominators, where REFERENCE is not 0
    grad_out_ptr,  # [N, HEADS, HEAD_DIM]
    grad_value_ptr,  # [B, S, HEADS, HEAD_DIM] float32, added to
    num_queries, queries_per_image, num_tokens,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    POINTS_PADDED: tl.constexpr, OFFSET_PITCH: tl.constexpr, WEIGHT_PITCH: tl.constexpr, REFERENCE: tl.constexpr,
    PACKED: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_value[pixel] += sum of weight * hat(pixel) * grad_out[row] over the samples of BLOCK queries, one
    head, one level."""
    head = tl.program_id(0) % HEADS
    level = tl.program_id(0) // HEADS % LEVELS
    place = tl.program_id(0) // (HEADS * LEVELS) * BLOCK + tl.arange(0, BLOCK)
    live = place < num_queries
    query = tl.load(order_ptr + place, mask=live, other=0)
    if PACKED:
        image = tl.load(image_ptr + query)
    else:
        image = query // queries_per_image
    home = tl.max(tl.where(live, image, 0))  # images ascend: the last one
    height = 0
    width = 0
    origin = 0
    for other in tl.static_range(LEVELS):
        other_height, other_width = level_size(
            other, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
        )
        height = tl.where(level == other, other_height, height)
        width = tl.where(level == other, other_width, width)
        origin += tl.where(other < level, other_height * other_width, 0)
    width_f = width.to(tl.float32)
    height_f = height.to(tl.float32)
    offset_at = query * (OFFSET_PITCH // 2) + head * (LEVELS * POINTS)
    weight_at = query * WEIGHT_PITCH + head * (LEVELS * POINTS) + level * POINTS
    if REFERENCE != 0:
        scale = tl.load(scale_ptr + query * HEADS + head)

    # The box: from the samples of the home image that touch a pixel, or around their mean where they lie too far apart.
    point = tl.arange(0, POINTS_PADDED)[None, :]
    xs, ys = samples_of_level(
        reference_ptr, offset_ptr, query[:, None], offset_at[:, None], tl.minimum(point, POINTS - 1), height, width,
        level, LEVELS, POINTS, REFERENCE,
    )  # fmt: skip
    seen = (xs > -1.0) & (xs < width_f) & (ys > -1.0) & (ys < height_f) & (live & (image == home))[:, None]
    num_seen = tl.sum(tl.sum(seen.to(tl.float32), axis=1))
    SPAN: tl.constexpr = 8.0 * MAX_BLOCKS - 2.0
    left = tl.min(tl.min(tl.where(seen, xs, 1e9), axis=1))
    right = tl.max(tl.max(tl.where(seen, xs, -1e9), axis=1))
    top = tl.min(tl.min(tl.where(seen, ys, 1e9), axis=1))
    low = tl.max(tl.max(tl.where(seen, ys, -1e9), axis=1))
    mean_x = tl.sum(tl.sum(tl.where(seen, xs, 0.0), axis=1)) / tl.maximum(num_seen, 1.0)
    mean_y = tl.sum(tl.sum(tl.where(seen, ys, 0.0), axis=1)) / tl.maximum(num_seen, 1.0)
    left = tl.maximum(tl.floor(tl.where(right - left < SPAN, left, mean_x - SPAN / 2)), 0.0)
    top = tl.maximum(tl.floor(tl.where(low - top < SPAN, top, mean_y - SPAN / 2)), 0.0)
    columns = tl.minimum(((tl.minimum(right, width_f - 1.0) - left + 2.0) / 8.0).to(tl.int32) + 1, MAX_BLOCKS)
    lines = tl.minimum(((tl.minimum(low, height_f - 1.0) - top + 2.0) / 8.0).to(tl.int32) + 1, MAX_BLOCKS)
    windows = tl.where(num_seen > 0, columns * lines, 0)
    last_x = left + columns.to(tl.float32) * 8.0 - 1.0  # a sample is covered if both its pixels are
    last_y = top + lines.to(tl.float32) * 8.0 - 1.0

    channel = tl.arange(0, WIDTH)
    grad = tl.load(
        grad_out_ptr + ((query * HEADS + head).to(tl.int64) * HEAD_DIM)[:, None] + channel[None, :],
        mask=live[:, None] & (channel < HEAD_DIM)[None, :],
        other=0.0,
    )
    heads = grad_value_ptr + head * HEAD_DIM + channel[None, :]
    pixel = tl.arange(0, 8)
    pixels = tl.arange(0, 64)
    for window in range(0, windows):
        window_x = left + (window % columns).to(tl.float32) * 8.0
        window_y = top + (window // columns).to(tl.float32) * 8.0
        share = tl.zeros((8, 8, BLOCK), tl.float32)
        for p in range(0, POINTS):
            x, y = samples_of_level(
                reference_ptr,
                offset_ptr,
                query,
                offset_at,
                p,
                height,
                width,
                level,
                LEVELS,
                POINTS,
                REFERENCE,
            )
            weight = tl.load(weight_ptr + weight_at + p).to(tl.float32)
            if REFERENCE != 0:
                weight = tl.exp2(weight * LOG2E - scale)
            covered = _covered(x, y, left, top, last_x, last_y) & live & (image == home)
            x = tl.where(covered, x, 0.0)
            y = tl.where(covered, y, 0.0)
            weight = tl.where(covered, weight, 0.0)
            hat_x = tl.clamp(1.0 - tl.abs(x[None, :] - (window_x + pixel.to(tl.float32))[:, None]), 0.0, 1.0)
            hat_y = tl.clamp(1.0 - tl.abs(y[None, :] - (window_y + pixel.to(tl.float32))[:, None]), 0.0, 1.0)
            share += (hat_y * weight[None, :])[:, None, :] * hat_x[None, :, :]
        share = tl.reshape(share, (64, BLOCK))
        if OPERAND == tl.float32:
            total = tl.dot(share, grad.to(tl.float32), input_precision="tf32x3")
        else:
            total = tl.dot(share.to(OPERAND), grad.to(OPERAND))
        pixel_x = window_x.to(tl.int32) + pixels % 8
        pixel_y = window_y.to(tl.int32) + pixels // 8
        token = home * num_tokens + origin + pixel_y * width + pixel_x
        mask = (pixel_x < width) & (pixel_y < height)
        mask = mask & (pixel_x.to(tl.float32) < right + 1.0) & (pixel_y.to(tl.float32) < low + 1.0)
        tl.atomic_add(
            heads + (token.to(tl.int64) * (HEADS * HEAD_DIM))[:, None],
            total,
            mask=mask[:, None] & (channel < HEAD_DIM)[None, :],
            sem="relaxed",
        )

    for p in range(0, POINTS):  # what the windows do not cover
        x, y = samples_of_level(
            reference_ptr, offset_ptr, query, offset_at, p, height, width, level, LEVELS, POINTS, REFERENCE
        )
        covered = _covered(x, y, left, top, last_x, last_y) & (image == home)
        stray = (x > -1.0) & (x < width_f) & (y > -1.0) & (y < height_f) & live & (covered == 0)
        if tl.max(stray.to(tl.int32)) > 0:
            weight = tl.load(weight_ptr + weight_at + p).to(tl.float32)
            if REFERENCE != 0:
                weight = tl.exp2(weight * LOG2E - scale)
            x = tl.where(stray, x, 0.0)
            y = tl.where(stray, y, 0.0)
            column_f = tl.floor(x)
            line_f = tl.floor(y)
            for corner in range(0, 4):
                corner_x = column_f + (corner % 2)
                corner_y = line_f + (corner // 2)
                inside = (
                    stray
                    & (corner_x >= 0.0)
                    & (corner_x < width_f)
                    & (corner_y >= 0.0)
                    & (corner_y < height_f)
                )
                w = weight * (1.0 - tl.abs(x - corner_x)) * (1.0 - tl.abs(y - corner_y))
                token = image * num_tokens + origin + (corner_y * width_f + corner_x).to(tl.int32)
                tl.atomic_add(
                    heads + (tl.where(inside, token, 0).to(tl.int64) * (HEADS * HEAD_DIM))[:, None],
                    grad.to(tl.float32) * w[:, None],
                    mask=inside[:, None] & (channel < HEAD_DIM)[None, :],
                    sem="relaxed",
                )


@triton.jit(do_not_specialize=["num_queries", "queries_per_image"])
def spatial_keys(
    position_ptr,  # [N, PITCH] normalised x and y first
    image_ptr,  # [N], where PACKED
    key_ptr,  # [N] int32 out: image, then the position along a Z-shaped curve over a grid of 256 x 256
    num_queries, queries_per_image,
    PITCH: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = query < num_queries
    if PACKED:
        image = tl.load(image_ptr + query, mask=mask, other=0)
    else:
        image = query // queries_per_image
    x = tl.load(position_ptr + query.to(tl.int64) * PITCH, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(position_ptr + query.to(tl.int64) * PITCH + 1, mask=mask, other=0.0).to(tl.float32)
    x = (tl.clamp(tl.where(x == x, x, 0.0), 0.0, 1.0) * 255.0).to(tl.int32)
    y = (tl.clamp(tl.where(y == y, y, 0.0), 0.0, 1.0) * 255.0).to(tl.int32)
    key = image << 16
    for bit in tl.static_range(8):
        key |= ((x >> bit) & 1) << (2 * bit)
        key |= ((y >> bit) & 1) << (2 * bit + 1)
    tl.store(key_ptr + query, key, mask=mask)
