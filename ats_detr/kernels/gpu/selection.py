"""Adaptive token selection in two launches, without device-to-host synchronisation: one threshold per image, then
compaction in index order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu.common import cdiv, next_power_of_2

CHUNK = 1024  # tokens per program of the compaction


@triton.jit
def ordered_keys(score, last):
    """int32 keys that sort as the scores do: NaN above all, -0 as 0, tokens of `last` below all."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score != score, 0x7FFFFFFF, key)
    return tl.where(last, -0x7FFFFFFF - 1, key)


@triton.jit
def score_of(key):
    """The float32 score of a key (scalar)."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(score_ptr, padding_ptr, image, token, num_tokens, PADDED: tl.constexpr):
    """Keys of an image's tokens. Padded tokens and those past the end sort last; those past the end have the
    higher index."""
    score_ptr += image.to(tl.int64) * num_tokens
    if PADDED:
        padding_ptr += image.to(tl.int64) * num_tokens
        last = tl.load(padding_ptr + token, mask=token < num_tokens, other=1) != 0
    else:
        last = token >= num_tokens
    # Masked by `last`, so that the mask's registers are free before the keys are made: otherwise sm_120 spills.
    score = tl.load(score_ptr + token, mask=last == 0, other=0.0)
    return ordered_keys(score, last)


@triton.jit
def count_true(mask, SIZE: tl.constexpr):
    return tl.sum(tl.reshape(mask.to(tl.int32), (SIZE,), can_reorder=True))


@triton.jit
def clamp_keep(keep, num_tokens):
    """int64 tokens to keep as int32 in 0..num_tokens."""
    return tl.minimum(tl.maximum(keep, 0), num_tokens).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def find_thresholds(
    score_ptr,  # [B, S]
    padding_ptr,  # [B, S] bool, where PADDED
    keep_ptr,  # int64 [B] tokens to keep
    threshold_ptr,  # [B] int32 out: the keep-th largest key
    ties_ptr,  # [B] int32 out: how many of the tokens at the threshold are kept
    above_ptr,  # [B, CHUNKS] int32 out: tokens above the threshold in the chunks before this one
    equal_ptr,  # [B, CHUNKS] int32 out: tokens at the threshold in the chunks before this one
    num_tokens,
    PADDED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per image, with all keys in registers: a search between the smallest and the largest key.

    Each step counts the keys above a guess. Guesses alternate between interpolating the score that should give the
    wanted count and halving the range of keys. At most 64 steps, usually about ten.
    """
    image = tl.program_id(0)
    SIZE: tl.constexpr = CHUNKS * CHUNK
    token = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    key = load_keys(score_ptr, padding_ptr, image, token, num_tokens, PADDED)
    keep = clamp_keep(tl.load(keep_ptr + image), num_tokens)
    flat = tl.reshape(key, (SIZE,), can_reorder=True)
    high = tl.max(flat)
    at_high = count_true(key == high, SIZE)
    # The threshold is the largest key that at least `keep` keys reach. `low` always satisfies this, `high` never does.
    low = tl.min(flat)
    at_low = tl.zeros_like(at_high) + SIZE
    if at_high >= keep:
        low = high
        at_low = at_high
    step = 0
    while (high.to(tl.int64) - low.to(tl.int64) > 1) & (at_low != keep):
        width = high.to(tl.int64) - low.to(tl.int64)
        middle = (low.to(tl.int64) + width // 2).to(tl.int32)
        share = (at_low - keep).to(tl.float32) / (at_low - at_high).to(tl.float32)
        guess = score_of(low) + (score_of(high) - score_of(low)) * share
        bits = (guess + 0.0).to(tl.int32, bitcast=True)
        guess_key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        good = (step % 2 == 0) & (guess == guess) & (guess_key > low) & (guess_key < high)
        middle = tl.where(good, guess_key, middle)
        reached = count_true(key >= middle, SIZE)
        enough = reached >= keep
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, reached, at_low)
        high = tl.where(enough, high, middle)
        at_high = tl.where(enough, at_high, reached)
        step += 1
    both_C = tl.sum((key > low).to(tl.int32) * 65536 + (key == low).to(tl.int32), axis=1)
    above_C = both_C >> 16
    equal_C = both_C & 0xFFFF
    at = image * CHUNKS + tl.arange(0, CHUNKS)
    tl.store(above_ptr + at, tl.cumsum(above_C) - above_C)
    tl.store(equal_ptr + at, tl.cumsum(equal_C) - equal_C)
    tl.store(threshold_ptr + image, low)
    tl.store(ties_ptr + image, keep - tl.sum(above_C))


@triton.jit(do_not_specialize=["num_tokens", "num_images", "capacity"])
def compact_tokens(
    score_ptr, padding_ptr, keep_ptr, threshold_ptr, ties_ptr, above_ptr, equal_ptr,  # as in find_thresholds
    token_index_ptr, image_index_ptr,  # [capacity] int32 out
    offsets_ptr,  # [B + 1] int32 out
    slot_ptr,  # [B, S] int32 out
    num_tokens, num_images, capacity,
    PADDED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, IMAGES_PADDED: tl.constexpr,
):  # fmt: skip
    """Writes the plan, one chunk of one image per program. Unused rows become token 0 of the last image."""
    image = tl.program_id(0)
    chunk = tl.program_id(1)
    images = tl.arange(0, IMAGES_PADDED)
    keep_B = tl.load(keep_ptr + images, mask=images < num_images, other=0)
    keep_B = clamp_keep(keep_B, num_tokens)
    start = tl.sum(tl.where(images < image, keep_B, 0))
    total = tl.minimum(tl.sum(keep_B), capacity)
    if chunk == 0:
        keep = tl.sum(tl.where(images == image, keep_B, 0))
        tl.store(offsets_ptr + image + 1, tl.minimum(start + keep, capacity))
        if image == 0:
            tl.store(offsets_ptr, 0)
    lane = tl.arange(0, CHUNK)
    row = (image * tl.num_programs(1) + chunk) * CHUNK + lane
    unused = (row >= total) & (row < capacity)
    tl.store(token_index_ptr + row, tl.zeros_like(row), mask=unused)
    tl.store(image_index_ptr + row, tl.zeros_like(row) + num_images - 1, mask=unused)
    token = chunk * CHUNK + lane
    key = load_keys(score_ptr, padding_ptr, image, token, num_tokens, PADDED)
    threshold = tl.load(threshold_ptr + image)
    ties = tl.load(ties_ptr + image)
    above = key > threshold
    equal = key == threshold
    both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    before = tl.cumsum(both) - both
    above_before = (before >> 16) + tl.load(above_ptr + image * CHUNKS + chunk)
    equal_before = (before & 0xFFFF) + tl.load(equal_ptr + image * CHUNKS + chunk)
    slot = start + above_before + tl.minimum(equal_before, ties)
    kept = (above | (equal & (equal_before < ties))) & (slot < capacity) & (token < num_tokens)
    tl.store(token_index_ptr + slot, token, mask=kept)
    tl.store(image_index_ptr + slot, tl.zeros_like(token) + image, mask=kept)
    tl.store(
        slot_ptr + image.to(tl.int64) * num_tokens + token, tl.where(kept, slot, -1), mask=token < num_tokens
    )


def select(
    scores: Tensor, num_keep: Tensor, padding_mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token index [capacity], image index [capacity], offsets [Bp1], slots [B, S]) of a plan with `capacity` rows."""
    batch, num_tokens = scores.shape
    integers = dict(dtype=torch.int32, device=scores.device)
    token_index, image_index = torch.empty(capacity, **integers), torch.empty(capacity, **integers)
    offsets, slots = torch.empty(batch + 1, **integers), torch.empty(batch, num_tokens, **integers)
    if slots.numel() == 0:
        return token_index, image_index, offsets.zero_(), slots
    chunks = next_power_of_2(cdiv(num_tokens, CHUNK))
    scratch = torch.empty(batch * (2 * chunks + 2), **integers)
    above, equal, rest = scratch.split([batch * chunks, batch * chunks, 2 * batch])
    threshold, ties = rest.split(batch)
    scores = scores.float().contiguous()  # keys made from 16-bit loads spill on sm_100
    if padding_mask is not None:
        padding_mask = padding_mask.contiguous().view(torch.uint8)
    keys = (scores, padding_mask, num_keep.long().contiguous(), threshold, ties, above, equal)
    constants = dict(PADDED=padding_mask is not None, CHUNKS=chunks, CHUNK=CHUNK)
    # 128 registers are the most of 16 warps. Without the limit, ptxas spills to fit several programs on sm_100.
    num_warps = max(4, min(16, chunks))
    find_thresholds[(batch,)](*keys, num_tokens, **constants, num_warps=num_warps, maxnreg=128)
    compact_tokens[(batch, cdiv(num_tokens, CHUNK))](
        *keys, token_index, image_index, offsets, slots, num_tokens, batch, capacity,
        **constants, IMAGES_PADDED=next_power_of_2(batch), num_warps=4,
    )  # fmt: skip
    return token_index, image_index, offsets, slots
