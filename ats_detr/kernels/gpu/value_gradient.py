"""The value's gradient of deformable attention without a stream of atomic sums: samples sorted by pixel tile.

Summing 4 corners x HEAD_DIM floats per sample into memory costs 512 bytes of reductions at 32 channels; at
encoder scale those are most of the backward pass. Here the samples of each (image, head) are first sorted into
tiles with windows of 8x8 pixels. `reduce_tiles` then forms, for 64 samples at a time, the matrix of their hat weights
[64 pixels, 64 samples], multiplies it with their gradient rows on the tensor cores, and adds or writes the sum: each
pixel once per program instead of once per sample.

A sample touches up to four pixels, which may lie in the windows of several tiles. There are two ways:

    shared pixels   tiles of 7x7 cells (a cell is the square between four pixel centres): each sample is in one tile,
                    the outermost pixels are in several, and their sums are added in float32 memory
    OWNED pixels    tiles of 8x8 pixels: each sample is in every tile that it touches (1.27 on average), and the one
                    program of a tile writes its pixels in the value's dtype: nothing is zeroed, added or cast. From
                    the first level on whose tiles have too many samples for one program, levels are still added up: the
                    coarse ones, where the fine ones come first. Expected to pay where samples are few

    spatial_keys    queries along a Z-shaped curve, so that a program's samples fall into few tiles (then torch.sort)
    count_samples   counts the samples of each tile and ranks each within its tile, one counter increment per program
                    and tile; a cumulative sum then makes the counts first places
    place_samples   writes (x, y, weight, row) of every sample at its sorted place, 16 bytes
    reduce_tiles    hat matrix x gradient rows

The deterministic mode fixes every order: tiles from `bin_samples`, a stable torch.sort, and
`reduce_tiles` with one program per tile in four launches over tiles that do not touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu import tuning
from ats_detr.kernels.gpu.common import (
    INTERPRETING,
    LOG2E,
    SIZES,
    cdiv,
    first_sample,
    images_of,
    level_size,
    next_power_of_2,
    operand_of,
    points_of,
    samples_of_level,
    view_as,
)
from ats_detr.kernels.gpu.problem import Problem

WINDOW = tl.constexpr(8)  # pixels per side of a tile's window
CELLS = tl.constexpr(7)  # cells per side of a tile whose outermost pixels are shared
PIECE = 64  # samples per step of reduce_tiles


@triton.jit
def _side(OWNED: tl.constexpr):
    """Pixels from one tile to the next."""
    return WINDOW if OWNED else CELLS


@triton.jit
def _tiles(size, OWNED: tl.constexpr):
    return (size + _side(OWNED) - 1) // _side(OWNED)


@triton.jit
def _touches(x, y, width, height):
    """Whether a sample touches a pixel of the map; False for NaN too."""
    return (x > -1.0) & (x < width.to(tl.float32)) & (y > -1.0) & (y < height.to(tl.float32))


@triton.jit
def _first_pixel(coordinate, touches):
    """First column or row of pixels that a sample touches, 0 for one that touches none."""
    return tl.maximum(tl.where(touches, coordinate, 0.0), 0.0).to(tl.int32)


@triton.jit
def _crosses(first_pixel, size):
    """Whether the sample also touches the next column or row of tiles, where tiles own their pixels."""
    return (first_pixel % WINDOW == WINDOW - 1) & (first_pixel + 1 < size)


@triton.jit
def _sizes_of(level, LEVELS: tl.constexpr, OWNED: tl.constexpr,
              shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7):  # fmt: skip
    """Height, width and first tile (of an image and head) of each of a tensor of levels."""
    height = level * 0
    width = level * 0
    first_tile = level * 0
    for other in tl.static_range(LEVELS):
        other_height, other_width = level_size(
            other, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
        )
        height = tl.where(level == other, other_height, height)
        width = tl.where(level == other, other_width, width)
        first_tile += tl.where(other < level, _tiles(other_height, OWNED) * _tiles(other_width, OWNED), 0)
    return height, width, first_tile


@triton.jit(do_not_specialize=["num_queries", "queries_per_image"])
def spatial_keys(
    position_ptr,  # [N, PITCH] normalised x and y first
    image_ptr,  # [N], where PACKED
    key_ptr,  # [N] int16 out: image, then the position along a Z-shaped curve over a grid of 2^BITS x 2^BITS
    num_queries, queries_per_image,
    PITCH: tl.constexpr, PACKED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sixteen bits, because sorting takes a pass for every eight. Which image comes first does not matter."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = query < num_queries
    if PACKED:
        image = tl.load(image_ptr + query, mask=mask, other=0)
    else:
        image = query // queries_per_image
    x = tl.load(position_ptr + query.to(tl.int64) * PITCH, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(position_ptr + query.to(tl.int64) * PITCH + 1, mask=mask, other=0.0).to(tl.float32)
    LAST: tl.constexpr = (1 << BITS) - 1
    x = (tl.clamp(tl.where(x == x, x, 0.0), 0.0, 1.0) * LAST).to(tl.int32)
    y = (tl.clamp(tl.where(y == y, y, 0.0), 0.0, 1.0) * LAST).to(tl.int32)
    key = image << (2 * BITS)
    for bit in tl.static_range(BITS):
        key |= ((x >> bit) & 1) << (2 * bit)
        key |= ((y >> bit) & 1) << (2 * bit + 1)
    tl.store(key_ptr + query, key.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_images", "num_tiles", *SIZES])
def count_samples(
    reference_ptr, offset_ptr, image_ptr,  # as in msda_forward
    order_ptr,  # [N] int32 queries, neighbours close to each other
    count_ptr,  # [1 + B * HEADS * num_tiles] int32: zeros, counted up from the second on
    rank_ptr,  # [1 or, where OWNED, 4, N, HEADS, samples] int32 out: place of each sample within its tile(s)
    num_queries, queries_per_image, num_images, num_tiles,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr, OFFSET_PITCH: tl.constexpr,
    REFERENCE: tl.constexpr, PACKED: tl.constexpr, OWNED: tl.constexpr, POINTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK neighbouring queries of one head, one level. Those of their samples that fall within 4x4 tiles
    of one image are ranked by cumulative sums and one increment per tile, the few elsewhere one by one, and so
    are the further tiles of samples that touch several.
    """
    head = tl.program_id(0) % HEADS
    level = tl.program_id(0) // HEADS % LEVELS
    place = tl.program_id(0) // (HEADS * LEVELS) * BLOCK + tl.arange(0, BLOCK)
    live = place < num_queries
    query = tl.load(order_ptr + place, mask=live, other=0)
    image, shift = images_of(image_ptr, query, queries_per_image, num_images, PACKED)
    height, width, first_tile = _sizes_of(
        level, LEVELS, OWNED, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
    )
    first_tile += head * num_tiles + 1
    tiles_x = _tiles(width, OWNED)
    OF_ROW: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    point = tl.arange(0, POINTS_PADDED)[None, :]
    points = points_of(level, POINTS, LEVELS)
    first = first_sample(level, POINTS, FIRST, LEVELS)
    x, y = samples_of_level(
        reference_ptr, offset_ptr, query[:, None], (query * (OFFSET_PITCH // 2) + head * OF_ROW)[:, None],
        first + tl.minimum(point, points - 1), height, width, level, LEVELS, POINTS, REFERENCE,
    )  # fmt: skip
    if PACKED:
        x += shift[:, None]
    touches = _touches(x, y, width, height) & live[:, None] & (point < points)
    pixel_x = _first_pixel(x, touches)
    pixel_y = _first_pixel(y, touches)
    tile_x = pixel_x // _side(OWNED)
    tile_y = pixel_y // _side(OWNED)
    own_tile = (image * (HEADS * num_tiles))[:, None] + first_tile + tile_y * tiles_x + tile_x
    ranks = rank_ptr + (query * HEADS + head).to(tl.int64)[:, None] * OF_ROW + first + point
    if OWNED:
        plane = num_queries.to(tl.int64) * (HEADS * OF_ROW)
        into_next = _crosses(pixel_x, width)
        below = _crosses(pixel_y, height)
        rank = tl.atomic_add(count_ptr + own_tile + 1, 1, mask=into_next, sem="relaxed")
        tl.store(ranks + plane, rank, mask=into_next)
        rank = tl.atomic_add(count_ptr + own_tile + tiles_x, 1, mask=below, sem="relaxed")
        tl.store(ranks + 2 * plane, rank, mask=below)
        rank = tl.atomic_add(count_ptr + own_tile + tiles_x + 1, 1, mask=into_next & below, sem="relaxed")
        tl.store(ranks + 3 * plane, rank, mask=into_next & below)

    # Anchor of the 4x4 tiles: the first tile met, or one before the mean where the samples spread over more.
    SAMPLES: tl.constexpr = BLOCK * POINTS_PADDED
    tl.static_assert(SAMPLES < 256)
    home = tl.max(tl.where(live, image, 0))
    at_home = touches & (image == home)[:, None]
    # One axis: a reduction is then one instruction of the whole warp instead of a shuffle per step.
    at_home = tl.reshape(at_home, (SAMPLES,))
    column = tl.reshape(tile_x, (SAMPLES,))
    line = tl.reshape(tile_y, (SAMPLES,))
    number = tl.maximum(tl.sum(at_home.to(tl.int32)), 1)
    left = tl.min(tl.where(at_home, column, 1 << 20))
    right = tl.max(tl.where(at_home, column, 0))
    top = tl.min(tl.where(at_home, line, 1 << 20))
    low = tl.max(tl.where(at_home, line, 0))
    mean_x = tl.sum(tl.where(at_home, column, 0)) // number
    mean_y = tl.sum(tl.where(at_home, line, 0)) // number
    left = tl.where(right - left < 4, left, tl.maximum(mean_x - 1, 0))
    top = tl.where(low - top < 4, top, tl.maximum(mean_y - 1, 0))
    near = at_home & (column >= left) & (column < left + 4) & (line >= top) & (line < top + 4)

    # The four counters of a row of tiles are bytes of one word: one cumulative sum ranks the samples of all four.
    byte = tl.where(near, (column - left) * 8, 0)
    slots = tl.arange(0, 16)
    rank = tl.zeros((SAMPLES,), tl.int32)
    count = tl.zeros((16,), tl.int32)
    for step in tl.static_range(4):
        hit = tl.where(near & (line - top == step), 1 << byte, 0)
        rank = tl.where(hit != 0, tl.cumsum(hit) - hit, rank)
        count = tl.where(slots // 4 == step, tl.sum(hit), count)
    rank = (rank >> byte) & 255
    count = (count >> (slots % 4 * 8)) & 255
    slot_tile = home * (HEADS * num_tiles) + first_tile + (top + slots // 4) * tiles_x + left + slots % 4
    base = tl.atomic_add(count_ptr + slot_tile, count, mask=count > 0, sem="relaxed")
    rank += tl.gather(base, tl.where(near, (line - top) * 4 + column - left, 0), 0)
    rank = tl.reshape(rank, (BLOCK, POINTS_PADDED))
    stray = touches & ~tl.reshape(near, (BLOCK, POINTS_PADDED))
    if tl.max(tl.max(stray.to(tl.int32), axis=1)) > 0:
        single = tl.atomic_add(count_ptr + own_tile, 1, mask=stray, sem="relaxed")
        rank = tl.where(stray, single, rank)
    tl.store(ranks, rank, mask=touches)


@triton.jit(
    do_not_specialize=["num_queries", "queries_per_image", "num_images", "num_tiles", "num_bins", *SIZES]
)
def bin_samples(
    reference_ptr, offset_ptr, image_ptr,  # as in msda_forward
    bin_ptr,  # [N, HEADS, samples] int32 out: tile of each sample, num_bins where it touches no pixel
    num_queries, queries_per_image, num_images, num_tiles, num_bins,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr, OFFSET_PITCH: tl.constexpr,
    REFERENCE: tl.constexpr, PACKED: tl.constexpr, POINTS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which tile each sample falls into, counted over images, heads and levels."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    point = tl.arange(0, POINTS_PADDED)[None, :]
    live = row < num_queries * HEADS
    row = tl.minimum(row, num_queries * HEADS - 1)
    query = row // HEADS
    head = row % HEADS
    image, shift = images_of(image_ptr, query, queries_per_image, num_images, PACKED)
    OF_ROW: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    offset_at = query * (OFFSET_PITCH // 2) + head * OF_ROW
    first_tile = (image * HEADS + head) * num_tiles
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7)
        sample = FIRST[level] + tl.minimum(point, POINTS[level] - 1)
        x, y = samples_of_level(
            reference_ptr,
            offset_ptr,
            query,
            offset_at,
            sample,
            height,
            width,
            level,
            LEVELS,
            POINTS,
            REFERENCE,
        )
        if PACKED:
            x += shift
        touches = _touches(x, y, width, height)
        own_tile = first_tile + _first_pixel(y, touches) // CELLS * _tiles(width, False)
        own_tile += _first_pixel(x, touches) // CELLS
        bin = tl.where(touches, own_tile, num_bins)
        at = row * OF_ROW + FIRST[level] + point
        tl.store(bin_ptr + at, bin, mask=live & (point < POINTS[level]))
        first_tile += _tiles(width, False) * _tiles(height, False)


@triton.jit(do_not_specialize=["num_queries", "queries_per_image", "num_images", "num_tiles", *SIZES])
def place_samples(
    reference_ptr, offset_ptr, weight_ptr, image_ptr,  # as in msda_forward
    start_ptr,  # [B * HEADS * num_tiles] int32 first place of each tile; None: ranks are places
    rank_ptr,  # [1 or, where OWNED, 4, N, HEADS, samples] int32 place of each sample within its tile(s)
    sample_ptr,  # [places, 4] int32 out: x and y in pixels of its tile and weight as float32 bits, row
    num_queries, queries_per_image, num_images, num_tiles,
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, FIRST: tl.constexpr, OFFSET_PITCH: tl.constexpr,
    WEIGHT_PITCH: tl.constexpr, REFERENCE: tl.constexpr, PACKED: tl.constexpr, OWNED: tl.constexpr,
    LEVELS_PADDED: tl.constexpr, POINTS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes every sample's coordinates, weight and row to its sorted place(s), one 16-byte store each.

    In the order of the rows and all levels at once, so that parameters are read as they lie.
    """
    COLUMNS: tl.constexpr = LEVELS_PADDED * POINTS_PADDED
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_queries * HEADS
    row = tl.minimum(row, num_queries * HEADS - 1)[:, None]
    query = row // HEADS
    head = row % HEADS
    column = tl.arange(0, COLUMNS)[None, :]
    level = tl.minimum(column // POINTS_PADDED, LEVELS - 1)
    points = points_of(level, POINTS, LEVELS)
    exists = (column // POINTS_PADDED < LEVELS) & (column % POINTS_PADDED < points)
    j = first_sample(level, POINTS, FIRST, LEVELS) + tl.minimum(column % POINTS_PADDED, points - 1)
    OF_ROW: tl.constexpr = FIRST[LEVELS - 1] + POINTS[LEVELS - 1]
    height, width, first_tile = _sizes_of(
        level, LEVELS, OWNED, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
    )
    x, y = samples_of_level(
        reference_ptr, offset_ptr, query, query * (OFFSET_PITCH // 2) + head * OF_ROW,
        j, height, width, level, LEVELS, POINTS, REFERENCE,
    )  # fmt: skip
    image, shift = images_of(image_ptr, query, queries_per_image, num_images, PACKED)
    if PACKED:
        x += shift
    weight = tl.load(weight_ptr + (query * WEIGHT_PITCH + head * OF_ROW) + j).to(tl.float32)
    if REFERENCE != 0:
        logit = tl.where(exists, weight, float("-inf"))
        weight = tl.exp2((logit - tl.max(logit, axis=1)[:, None]) * LOG2E)
        weight /= tl.sum(weight, axis=1)[:, None]
    touches = _touches(x, y, width, height) & live[:, None] & exists
    pixel_x = _first_pixel(x, touches)
    pixel_y = _first_pixel(y, touches)
    tile_x = pixel_x // _side(OWNED)
    tile_y = pixel_y // _side(OWNED)
    ranks = rank_ptr + row.to(tl.int64) * OF_ROW + j
    plane = num_queries.to(tl.int64) * (HEADS * OF_ROW)
    starts = start_ptr
    if start_ptr is not None:
        starts += (image * HEADS + head) * num_tiles + first_tile + tile_y * _tiles(width, OWNED) + tile_x
    x -= (tile_x * _side(OWNED)).to(tl.float32)  # exact
    y -= (tile_y * _side(OWNED)).to(tl.float32)
    _write_sample(sample_ptr, starts, ranks, x, y, weight, row, touches)
    if OWNED:
        into_next = _crosses(pixel_x, width)
        below = _crosses(pixel_y, height)
        low = starts + _tiles(width, OWNED)
        _write_sample(sample_ptr, starts + 1, ranks + plane, x - WINDOW, y, weight, row, into_next)
        _write_sample(sample_ptr, low, ranks + 2 * plane, x, y - WINDOW, weight, row, below)
        _write_sample(
            sample_ptr, low + 1, ranks + 3 * plane, x - WINDOW, y - WINDOW, weight, row, into_next & below
        )


@triton.jit
def _write_sample(sample_ptr, starts, ranks, x, y, weight, row, mask):
    position = tl.load(ranks, mask=mask, other=0)
    if starts is not None:
        position += tl.load(starts, mask=mask, other=0)
    sample = tl.join(
        tl.join(x.to(tl.int32, bitcast=True), weight.to(tl.int32, bitcast=True)),
        tl.join(y.to(tl.int32, bitcast=True), row + tl.zeros_like(position)),
    )  # [rows, columns, 2, 2]: x, y, weight, row
    target = sample_ptr + position.to(tl.int64)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(target, tl.reshape(sample, (x.shape[0], x.shape[1], 4)), mask=mask[:, :, None])


@triton.jit
def _high_part(x):
    """float32 rounded to the eight bits of a bfloat16."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _splits(samples, tiles, per_program):
    """Programs per tile, each for about `per_program` samples, where `samples` fall into `tiles`.

    The launcher computes the same: it counts on it.
    """
    return tl.maximum((samples + tiles * (per_program // 2)) // (tiles * per_program), 1)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "first_summed",
        "num_tiles",
        "num_groups",
        "num_samples",
        "per_program",
        *SIZES,
    ]
)
def reduce_tiles(
    sample_ptr,  # as place_samples left it
    start_ptr,  # [bins + 1] int32 first position of each tile, and one past the last of the last
    grad_out_ptr,  # [N, HEADS, HEAD_DIM]
    grad_value_ptr,  # [B, S, HEADS, HEAD_DIM] out, where OWNED: tokens before `first_summed`
    sum_ptr,  # [B, S - first_summed, HEADS, HEAD_DIM] float32, added to: the other tokens
    num_tokens,  # of an image
    first_summed,  # token; the first of a level
    num_tiles,  # of an image and head
    num_groups,  # images * heads
    num_samples,  # of a group on the level with the most points, on average
    per_program,  # samples
    shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, OWNED: tl.constexpr,
    COLOR: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_value[pixel] (+)= sum over samples of weight * hat(pixel) * grad_out[row], for the 8x8 pixels of one tile
    and WIDTH channels.

    Levels from `first_summed` on are added up in `sum_ptr`. A tile with many more than `per_program` samples is shared
    between programs, which take its pieces in turns: only of such levels. The coarse levels come first, their programs
    are the long ones; programs of one tile are far apart, so that their sums meet seldom.
    COLOR 0..3 takes the tiles of one parity of column and row only, one program each: their windows do not overlap, so
    that nothing is summed out of order. -1: all tiles.
    """
    program = tl.program_id(0)
    tile = 0
    split = 0
    splits = 1
    height = 1
    width = 1
    rows = 1
    columns = 1
    first_token = 0
    first_tile = num_tiles
    level_start = num_tokens
    for level in tl.static_range(LEVELS - 1, -1, -1):
        level_height, level_width = level_size(
            level, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
        )
        level_rows = _tiles(level_height, OWNED)
        level_columns = _tiles(level_width, OWNED)
        level_tiles = level_rows * level_columns
        level_start -= level_height * level_width
        level_splits = 1
        if COLOR < 0:
            level_splits = _splits(num_samples, level_tiles, per_program)
        else:
            level_rows = (level_rows + 1 - COLOR // 2) // 2
            level_columns = (level_columns + 1 - COLOR % 2) // 2
        programs = num_groups * level_rows * level_columns
        mine = (program >= 0) & (program < programs * level_splits)
        first_token = tl.where(mine, level_start, first_token)
        first_tile -= tl.where(program >= 0, level_tiles, 0)
        height = tl.where(mine, level_height, height)
        width = tl.where(mine, level_width, width)
        rows = tl.where(mine, level_rows, rows)
        columns = tl.where(mine, level_columns, columns)
        splits = tl.where(mine, level_splits, splits)
        # A colour without tiles here belongs to no program.
        tile = tl.where(mine, program % tl.maximum(programs, 1), tile)
        split = tl.where(mine, program // tl.maximum(programs, 1), split)
        program -= programs * level_splits
    tile_x = tile % columns
    tile_y = tile // columns % rows
    group = tile // (columns * rows)  # image * HEADS + head
    if COLOR >= 0:
        tile_x = tile_x * 2 + COLOR % 2
        tile_y = tile_y * 2 + COLOR // 2
    bin = group * num_tiles + first_tile + tile_y * _tiles(width, OWNED) + tile_x
    position = tl.load(start_ptr + bin) + split * PIECE
    end = tl.load(start_ptr + bin + 1)
    is_summed = True
    if OWNED:
        is_summed = first_token >= first_summed
    if (position >= end) & is_summed:
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    piece = tl.arange(0, PIECE)
    # 0 .. 7 are loaded from memory: the compiler then computes the hat matrix in the registers of the matrix product.
    # Otherwise it would pass it through shared memory (cost: docs/kernels.md).
    samples = view_as(sample_ptr, tl.float32)
    pixel = tl.arange(0, WINDOW)
    pixel = tl.load(samples + pixel, mask=pixel < -num_tokens, other=pixel.to(tl.float32))
    total = tl.zeros((WINDOW * WINDOW, WIDTH), tl.float32)
    for start in tl.range(position, end, splits * PIECE, num_stages=STAGES):
        at = (start + piece).to(tl.int64) * 4
        inside = start + piece < end
        x = tl.load(samples + at, mask=inside, other=0.0)
        y = tl.load(samples + at + 1, mask=inside, other=0.0)
        weight = tl.load(samples + at + 2, mask=inside, other=0.0)
        row = tl.load(sample_ptr + at + 3, mask=inside, other=0)
        grad = tl.load(
            grad_out_ptr + (row.to(tl.int64) * HEAD_DIM)[:, None] + column[None, :],
            mask=(column < HEAD_DIM)[None, :] & inside[:, None],
            other=0.0,
        )
        hat_x = tl.clamp(1.0 - tl.abs(x[None, :] - pixel[:, None]), 0.0, 1.0) * weight[None, :]
        hat_y = tl.clamp(1.0 - tl.abs(y[None, :] - pixel[:, None]), 0.0, 1.0)
        share = tl.reshape(hat_y[:, None, :] * hat_x[None, :, :], (WINDOW * WINDOW, PIECE))
        if SPLIT:  # float32 factors as sums of two of 8 bits each: three products, 16 bits
            share_high = _high_part(share)
            grad_high = _high_part(grad)
            share_low = (share - share_high).to(tl.bfloat16)
            grad_low = (grad - grad_high).to(tl.bfloat16)
            share_high = share_high.to(tl.bfloat16)
            grad_high = grad_high.to(tl.bfloat16)
            total = tl.dot(share_low, grad_high, total)
            total = tl.dot(share_high, grad_low, total)
            total = tl.dot(share_high, grad_high, total)
        else:
            total = tl.dot(share.to(OPERAND), grad.to(OPERAND), total)
    window = tl.arange(0, WINDOW * WINDOW)
    pixel_x = tile_x * _side(OWNED) + window % WINDOW
    pixel_y = tile_y * _side(OWNED) + window // WINDOW
    mask = ((pixel_x < width) & (pixel_y < height))[:, None] & (column < HEAD_DIM)[None, :]
    token = first_token + pixel_y * width + pixel_x
    image = (group // HEADS).to(tl.int64)
    channel = (group % HEADS * HEAD_DIM + column)[None, :]
    if is_summed:
        row = image * (num_tokens - first_summed) + token - first_summed
        tl.atomic_add(sum_ptr + row[:, None] * (HEADS * HEAD_DIM) + channel, total, mask=mask, sem="relaxed")
    else:
        if OWNED:
            row = image * num_tokens + token
            place = grad_value_ptr + row[:, None] * (HEADS * HEAD_DIM) + channel
            tl.store(place, total.to(grad_value_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num"])
def invert_permutation(order_ptr, position_ptr, num, BLOCK: tl.constexpr):
    """position[order[i]] = i (int64 order, int32 positions)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(position_ptr + tl.load(order_ptr + i, mask=i < num), i, mask=i < num)


# ------------------------------------------------------------------------------------------------------------ launchers
def spatial_order(problem: Problem) -> Tensor:
    """int32 [N] queries image by image, neighbours on the image close to each other (by reference, or first sample)."""
    position = problem.offsets if problem.reference is None else problem.reference
    num_queries = problem.num_queries
    keys = torch.empty(num_queries, dtype=torch.int16, device=position.device)
    bits = max(0, 16 - (problem.value.shape[0] - 1).bit_length()) // 2
    spatial_keys[(cdiv(num_queries, 256),)](
        position, problem.image_index, keys, *problem.counts[:2], PITCH=position.stride(0),
        PACKED=problem.image_index is not None, BITS=bits, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return keys.argsort().int()


def value_gradient_tiled(problem: Problem, grad_out: Tensor) -> Tensor:
    """Gradient by the value from samples sorted by tile."""
    value, weights, num_queries = problem.value, problem.weights, problem.num_queries
    order = spatial_order(problem)
    integers = dict(dtype=torch.int32, device=value.device)

    def launch(samples_per_program: int, num_warps: int, reduce_warps: int, owned: bool) -> Tensor:
        tiles = Tiles.of(problem, owned)
        copies = 4 if owned else 1
        counts = torch.zeros(1 + tiles.groups * tiles.total, **integers)
        ranks = torch.empty(copies, weights.numel(), **integers)
        points = next_power_of_2(max(problem.points))
        block = max(1, samples_per_program // points)
        num_programs = cdiv(num_queries, block) * weights.shape[1] * len(problem.points)
        count_samples[(num_programs,)](
            problem.reference, problem.offsets, problem.image_index, order, counts, ranks,
            *problem.counts, tiles.total, *problem.levels, **problem.constants(),
            PACKED=problem.image_index is not None, OWNED=owned, POINTS_PADDED=points, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
        starts = counts.cumsum(0, dtype=torch.int32)
        # as many as there can be: how many samples are in several tiles, or in none, only the device knows
        samples = torch.empty(copies * weights.numel(), 4, **integers)
        _place_samples(problem, tiles, starts, ranks, samples)
        return _reduce_tiles(problem, tiles, samples, starts, grad_out, reduce_warps)

    density = tuning.density(weights.numel(), value.shape[:3].numel())
    return tuning.run("value_tiles", (*problem.key(), density), num_queries, value.device, launch)


class Tiles(NamedTuple):
    """How the levels of one image and head are cut."""

    sides: list[tuple[int, int]]
    """(rows, columns) of tiles of each level."""
    groups: int
    """Images x heads."""
    owned: bool
    """Whether tiles own their pixels."""

    @staticmethod
    def of(problem: Problem, owned: bool) -> Tiles:
        step = WINDOW.value if owned else CELLS.value
        sides = [(cdiv(height, step), cdiv(width, step)) for height, width in problem.sizes]
        return Tiles(sides, problem.value.shape[0] * problem.value.shape[2], owned)

    @property
    def total(self) -> int:
        return sum(rows * columns for rows, columns in self.sides)


def _place_samples(
    problem: Problem, tiles: Tiles, starts: Tensor | None, ranks: Tensor, samples: Tensor
) -> None:
    num_heads = problem.weights.shape[1]
    levels, points = next_power_of_2(len(problem.points)), next_power_of_2(max(problem.points))
    # 512 samples need 130 registers where tiles own their pixels, 256 half of that and 6 % more instructions (sm_90).
    block = max(1, (8192 if INTERPRETING else 256) // (levels * points))
    place_samples[(cdiv(problem.num_queries * num_heads, block),)](
        problem.reference, problem.offsets, problem.weights, problem.image_index, starts, ranks, samples,
        *problem.counts, tiles.total, *problem.levels, **problem.constants(),
        WEIGHT_PITCH=problem.weights.stride(0), PACKED=problem.image_index is not None, OWNED=tiles.owned,
        LEVELS_PADDED=levels, POINTS_PADDED=points, BLOCK=block, num_warps=2,
    )  # fmt: skip


def _reduce_tiles(
    problem: Problem,
    tiles: Tiles,
    samples: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    num_warps: int,
    colors: Sequence[int] = (-1,),
) -> Tensor:
    """The value's gradient, in its dtype; a launch for each of `colors` (see `reduce_tiles`)."""
    value = problem.value
    batch, num_tokens, num_heads, head_dim = value.shape
    num_samples = problem.counts[1] * max(problem.points)
    # Few long programs sum to memory less often, but are too few to fill the GPU where there is little to do.
    per_program = (16 if problem.weights.numel() >= 4 << 20 else 8) * PIECE
    num_tiles = [rows * columns for rows, columns in tiles.sides]
    splits = [  # as _splits: a level that is split there only would have two owners of a pixel
        max(1, (num_samples + number * (per_program // 2)) // (number * per_program)) for number in num_tiles
    ]
    own_levels = next((i for i, n in enumerate(splits) if n > 1), len(splits)) if tiles.owned else 0
    first_summed = sum(height * width for height, width in problem.sizes[:own_levels])
    summed_shape = (batch, num_tokens - first_summed, num_heads, head_dim)
    summed = torch.zeros(summed_shape, dtype=torch.float32, device=value.device)
    owned = torch.empty(value.shape, dtype=value.dtype, device=value.device) if tiles.owned else None

    operand = operand_of(value.dtype)
    width = max(16, next_power_of_2(head_dim))
    if operand == tl.float32:  # three products for one: wider or more would spill
        width, num_warps, stages = min(width, 32), 4, 2
    else:
        width, stages = min(width, 128), 3
        num_warps = num_warps if width <= 32 else 4
    for color in colors:
        if color < 0:
            programs = sum(number * split for number, split in zip(num_tiles, splits, strict=True))
        else:
            programs = sum(
                ((rows + 1 - color // 2) // 2) * ((columns + 1 - color % 2) // 2)
                for rows, columns in tiles.sides
            )
        if programs == 0:
            continue
        reduce_tiles[(tiles.groups * programs, cdiv(head_dim, width))](
            samples, starts, grad_out, owned, summed, num_tokens, first_summed, tiles.total, tiles.groups, num_samples,
            per_program, *problem.levels, HEADS=num_heads, HEAD_DIM=head_dim, LEVELS=len(tiles.sides), WIDTH=width,
            OWNED=tiles.owned, COLOR=color, OPERAND=operand, SPLIT=operand == tl.float32 and not INTERPRETING,
            PIECE=PIECE, STAGES=stages, num_warps=num_warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    if owned is None:
        return summed.to(value.dtype)
    if summed.numel():
        owned[:, first_summed:] = summed
    return owned


def value_gradient_sorted(problem: Problem, grad_out: Tensor) -> Tensor:
    """Gradient by the value, bit-equal from run to run."""
    value, weights, num_queries = problem.value, problem.weights, problem.num_queries
    num_heads = weights.shape[1]
    tiles = Tiles.of(problem, owned=False)
    num_bins = tiles.groups * tiles.total
    num_samples = weights.numel()
    integers = dict(dtype=torch.int32, device=value.device)
    points_padded = next_power_of_2(max(problem.points))
    block = max(1, 512 // points_padded)
    bins = torch.empty(num_samples, **integers)
    bin_samples[(cdiv(num_queries * num_heads, block),)](
        problem.reference, problem.offsets, problem.image_index, bins,
        *problem.counts, tiles.total, num_bins, *problem.levels, **problem.constants(),
        PACKED=problem.image_index is not None, POINTS_PADDED=points_padded, BLOCK=block, num_warps=4,
    )  # fmt: skip
    sorted_bins, order = bins.sort(stable=True)
    starts = torch.searchsorted(sorted_bins, torch.arange(num_bins + 1, **integers), out_int32=True)
    positions = torch.empty(num_samples, **integers)
    invert_permutation[(cdiv(num_samples, 1024),)](order, positions, num_samples, BLOCK=1024)
    samples = torch.empty(num_samples, 4, **integers)
    _place_samples(problem, tiles, None, positions, samples)
    return _reduce_tiles(problem, tiles, samples, starts, grad_out, num_warps=2, colors=range(4))
