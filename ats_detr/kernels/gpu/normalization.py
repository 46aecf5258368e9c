"""GroupNorm of maps in channels-last memory, written to token rows, in two launches.

    group_moments     mean and sum of squared deviations of each group, for interleaved parts of an image's pixels
    normalize_groups  combines the moments of the parts, and writes (x - mean) / sqrt(variance + eps) * weight + bias

Both read the map once; the second writes each token once. Moments are float32, and those of two sets are combined as by
Chan et al. (1979), without the cancellation of mean(x^2) - mean(x)^2. No atomic additions, so results are reproducible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu.common import INTERPRETING, cdiv, next_power_of_2

_ELEMENTS = 1 << 16 if INTERPRETING else 8192
"""Elements of a tile: 32 for each thread of eight warps. The interpreter wants few large programs."""
_MAX_PARTS = 64
"""Parts of an image: enough programs for the first launch, and few moments for each program of the second to read."""


@triton.jit
def _load_pixels(x_ptr, image, row, num_pixels, CHANNELS: tl.constexpr):
    """float32 [rows, CHANNELS] pixels of an image, 0 past its end."""
    column = tl.arange(0, CHANNELS)
    x_ptr += image.to(tl.int64) * num_pixels * CHANNELS
    at = row[:, None] * CHANNELS + column[None, :]
    return tl.load(x_ptr + at, mask=(row < num_pixels)[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_pixels"])
def group_moments(
    x_ptr,  # [B, num_pixels, CHANNELS]
    moments_ptr,  # [B, PARTS, 2, GROUPS] float32 out: means, sums of squared deviations from them
    num_pixels,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: every PARTS-th tile of ROWS pixels of an image."""
    image, part = tl.program_id(0), tl.program_id(1)
    SIZE: tl.constexpr = CHANNELS // GROUPS
    lane = tl.arange(0, ROWS)
    mean_G = tl.zeros((GROUPS,), tl.float32)
    squares_G = tl.zeros((GROUPS,), tl.float32)
    count = 0.0
    for start in tl.range(part * ROWS, num_pixels, PARTS * ROWS):
        row = start + lane
        x = tl.reshape(_load_pixels(x_ptr, image, row, num_pixels, CHANNELS), (ROWS, GROUPS, SIZE))
        own_count = tl.minimum(ROWS, num_pixels - start).to(tl.float32) * SIZE
        own_mean_G = tl.sum(tl.sum(x, axis=2), axis=0) / own_count
        deviation = tl.where((row < num_pixels)[:, None, None], x - own_mean_G[None, :, None], 0.0)
        own_squares_G = tl.sum(tl.sum(deviation * deviation, axis=2), axis=0)
        share = own_count / (count + own_count)
        shift_G = own_mean_G - mean_G
        mean_G += shift_G * share
        squares_G += own_squares_G + shift_G * (count * share) * shift_G  # 0 of no pixels, not 0 * inf
        count += own_count
    group = tl.arange(0, GROUPS)
    moments_ptr += (image * PARTS + part) * 2 * GROUPS
    tl.store(moments_ptr + group, mean_G)
    tl.store(moments_ptr + GROUPS + group, squares_G)


@triton.jit(do_not_specialize=["num_pixels", "image_stride", "row_stride", "eps"])
def normalize_groups(
    x_ptr, moments_ptr,  # as in group_moments
    weight_ptr, bias_ptr,  # [CHANNELS]
    out_ptr,  # rows of CHANNELS, `row_stride` apart; those of an image are `image_stride` after those of the last
    num_pixels, image_stride, row_stride, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels of an image."""
    image, tile = tl.program_id(0), tl.program_id(1)
    SIZE: tl.constexpr = CHANNELS // GROUPS
    part, group = tl.arange(0, PARTS), tl.arange(0, GROUPS)
    num_tiles = tl.num_programs(1)
    pixels_P = (num_tiles - part + PARTS - 1) // PARTS * ROWS
    pixels_P -= tl.where(part == (num_tiles - 1) % PARTS, num_tiles * ROWS - num_pixels, 0)
    count_P1 = pixels_P.to(tl.float32)[:, None] * SIZE
    at = ((image * PARTS + part) * 2 * GROUPS)[:, None] + group[None, :]
    mean_PG, squares_PG = tl.load(moments_ptr + at), tl.load(moments_ptr + at + GROUPS)
    total = num_pixels.to(tl.float32) * SIZE
    mean_G = tl.sum(mean_PG * count_P1, axis=0) / total
    shift_PG = mean_PG - mean_G[None, :]
    variance_G = tl.sum(squares_PG + shift_PG * count_P1 * shift_PG, axis=0) / total
    factor_G = tl.rsqrt(variance_G + eps)

    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHANNELS)
    x = tl.reshape(_load_pixels(x_ptr, image, row, num_pixels, CHANNELS), (ROWS, GROUPS, SIZE))
    x = (x - mean_G[None, :, None]) * factor_G[None, :, None]
    weight, bias = tl.load(weight_ptr + column).to(tl.float32), tl.load(bias_ptr + column).to(tl.float32)
    out = tl.reshape(x, (ROWS, CHANNELS)) * weight[None, :] + bias[None, :]
    out_ptr += image.to(tl.int64) * image_stride
    at = row[:, None] * row_stride + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(row < num_pixels)[:, None])


def group_norm_(tokens: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Writes the normalised pixels of a map [B, C, H, W] to `tokens` [B, H * W, C], whose rows are contiguous."""
    batch, channels, height, width = x.shape
    num_pixels = height * width
    if tokens.numel() == 0:
        return
    x = x.contiguous(memory_format=torch.channels_last)
    tile = {"CHANNELS": channels, "GROUPS": num_groups}
    tile["ROWS"] = min(max(1, _ELEMENTS // channels), next_power_of_2(num_pixels))
    num_tiles = cdiv(num_pixels, tile["ROWS"])
    tile["PARTS"] = min(_MAX_PARTS, next_power_of_2(num_tiles))
    moments = torch.empty(batch, tile["PARTS"], 2, num_groups, dtype=torch.float32, device=x.device)
    group_moments[(batch, tile["PARTS"])](x, moments, num_pixels, **tile, num_warps=8)
    normalize_groups[(batch, num_tiles)](
        x, moments, weight.contiguous(), bias.contiguous(), tokens, num_pixels, tokens.stride(0), tokens.stride(1),
        eps, **tile, num_warps=8,
    )  # fmt: skip
