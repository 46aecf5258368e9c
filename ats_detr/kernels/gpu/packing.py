"""Rows of several dense tensors into packed form, and back, in one launch each. Pure copies, limited by bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu.common import cdiv, next_power_of_2

GROUP = 4  # tensors per launch
ELEMENTS = 1024  # per tensor and program, approximately


@triton.jit
def _move(source_ptr, target_ptr, source_at, target_at, mask, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """One row of ROW elements from each of `source_at` to `target_at`, in elements."""
    column = tl.arange(0, WIDTH)[None, :]
    inside = mask[:, None] & (column < ROW)
    value = tl.load(source_ptr + source_at[:, None] + column, mask=inside)
    tl.store(target_ptr + target_at[:, None] + column, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def move_rows(
    token_index_ptr, image_index_ptr,  # [K]
    count_ptr,  # [1] int32 rows in use, where COUNTED
    dense0_ptr, dense1_ptr, dense2_ptr, dense3_ptr,  # [B, S, ROWi]
    packed0_ptr, packed1_ptr, packed2_ptr, packed3_ptr,  # [K, ROWi]
    num_rows, num_tokens,
    dense_pitch,  # elements from one token's row to the next where INTO_DENSE; there may be others between
    ROW0: tl.constexpr, ROW1: tl.constexpr, ROW2: tl.constexpr, ROW3: tl.constexpr,  # elements, 0: no such tensor
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, WIDTH3: tl.constexpr,
    COUNTED: tl.constexpr, INTO_DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """packed[k] = dense[image_index[k], token_index[k]], or the other way round where INTO_DENSE."""
    if COUNTED:
        num_rows = tl.minimum(num_rows, tl.load(count_ptr))
        if tl.program_id(0) * BLOCK >= num_rows:
            return
    packed_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = packed_row < num_rows
    image = tl.load(image_index_ptr + packed_row, mask=mask, other=0).to(tl.int64)
    dense_row = image * num_tokens + tl.load(token_index_ptr + packed_row, mask=mask, other=0)
    packed_row = packed_row.to(tl.int64)
    if INTO_DENSE:
        _move(packed0_ptr, dense0_ptr, packed_row * ROW0, dense_row * dense_pitch, mask, ROW0, WIDTH0)
    else:
        _move(dense0_ptr, packed0_ptr, dense_row * ROW0, packed_row * ROW0, mask, ROW0, WIDTH0)
        if ROW1 > 0:
            _move(dense1_ptr, packed1_ptr, dense_row * ROW1, packed_row * ROW1, mask, ROW1, WIDTH1)
        if ROW2 > 0:
            _move(dense2_ptr, packed2_ptr, dense_row * ROW2, packed_row * ROW2, mask, ROW2, WIDTH2)
        if ROW3 > 0:
            _move(dense3_ptr, packed3_ptr, dense_row * ROW3, packed_row * ROW3, mask, ROW3, WIDTH3)


@triton.jit(do_not_specialize=["num_rows"])
def merge_rows(
    slot_ptr,  # [B, S] packed row of each token, or -1
    packed_ptr,  # [K, ROW], or None: zeros
    dense_ptr,  # [B, S, ROW], or None: zeros
    out_ptr,  # [B, S, ROW]
    num_rows,  # B * S
    ROW: tl.constexpr, WIDTH: tl.constexpr, HAS_PACKED: tl.constexpr, HAS_DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = packed[slot] where the token is kept, dense[token] elsewhere: every row is written once,
    in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    slot = tl.load(slot_ptr + row, mask=mask, other=-1)
    column = tl.arange(0, WIDTH)[None, :]
    inside = mask[:, None] & (column < ROW)
    kept = slot[:, None] >= 0
    at = row.to(tl.int64)[:, None] * ROW + column
    value = tl.zeros((BLOCK, WIDTH), out_ptr.dtype.element_ty)
    if HAS_DENSE:
        value = tl.load(dense_ptr + at, mask=inside & (slot[:, None] < 0), other=0)
    if HAS_PACKED:
        packed = tl.load(packed_ptr + slot.to(tl.int64)[:, None] * ROW + column, mask=inside & kept, other=0)
        value = tl.where(kept, packed, value)
    tl.store(out_ptr + at, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def clear_rows(
    mask_ptr,  # [rows] bool as uint8
    dense_ptr,  # [rows, ROW], PITCH elements from row to row
    num_rows, PITCH: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dense[row] = 0 where mask[row]; other rows are not touched."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    masked = tl.load(mask_ptr + row, mask=row < num_rows, other=0) != 0
    if tl.max(masked.to(tl.int32)) > 0:
        column = tl.arange(0, WIDTH)[None, :]
        place = dense_ptr + (row.to(tl.int64) * PITCH)[:, None] + column
        tl.store(
            place, tl.zeros((BLOCK, WIDTH), dense_ptr.dtype.element_ty), mask=masked[:, None] & (column < ROW)
        )


# ------------------------------------------------------------------------------------------------------------ launchers
def _row_length(tensor: Tensor, leading: int) -> int:
    return tensor.shape[leading:].numel()


def _block(width: int) -> int:
    return max(1, ELEMENTS // width)


def _launch_moves(token_index, image_index, num_rows, dense, packed, into_dense: bool) -> None:
    capacity, num_tokens = token_index.shape[0], dense[0].shape[1]
    for first in range(0, len(dense), GROUP):
        some_dense, some_packed = dense[first : first + GROUP], packed[first : first + GROUP]
        lengths = [_row_length(tensor, 2) for tensor in some_dense]
        widths = [next_power_of_2(length) for length in lengths]
        block = _block(max(widths))
        absent = GROUP - len(some_dense)
        move_rows[(cdiv(capacity, block),)](
            token_index, image_index, num_rows,
            *some_dense, *[None] * absent, *some_packed, *[None] * absent, capacity, num_tokens,
            dense[0].stride(1), *lengths, *[0] * absent, *widths, *[1] * absent,
            COUNTED=num_rows is not None, INTO_DENSE=into_dense, BLOCK=block, num_warps=4,
        )  # fmt: skip


def pack(
    token_index: Tensor, image_index: Tensor, slots: Tensor, num_rows: Tensor | None, dense: Sequence[Tensor]
) -> list[Tensor]:
    """Kept rows [K, ...] of each dense tensor [B, S, ...]; rows past `num_rows` are not written."""
    packed = [tensor.new_empty(token_index.shape[0], *tensor.shape[2:]) for tensor in dense]
    pairs = [(d.contiguous(), p) for d, p in zip(dense, packed, strict=True) if p.numel()]
    if pairs:
        _launch_moves(token_index, image_index, num_rows, *zip(*pairs, strict=True), into_dense=False)
    return packed


def scatter(
    memory: Tensor | None, rows: Tensor | None, token_index: Tensor, image_index: Tensor, slots: Tensor,
    num_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """A new [B, S, ...]: the packed row (None: zeros) of each kept token, `memory` (None: zeros) at the others."""
    like, shape = (rows, rows.shape[1:]) if memory is None else (memory, memory.shape[2:])
    out = like.new_empty(*slots.shape, *shape)
    if out.numel() == 0:
        return out
    length = shape.numel()
    width = next_power_of_2(length)
    block = _block(width)
    merge_rows[(cdiv(slots.numel(), block),)](
        slots,
        None if rows is None else rows.contiguous(),
        None if memory is None else memory.contiguous(),
        out, slots.numel(), ROW=length, WIDTH=width, HAS_PACKED=rows is not None, HAS_DENSE=memory is not None,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def scatter_(
    memory: Tensor,
    rows: Tensor,
    token_index: Tensor,
    image_index: Tensor,
    slots: Tensor,
    num_rows: Tensor | None,
) -> None:
    """Overwrites the kept tokens of `memory` with the packed rows."""
    if not rows_evenly_spaced(memory):
        memory.copy_(scatter(memory, rows, token_index, image_index, slots, num_rows))
    elif rows.numel():
        _launch_moves(token_index, image_index, num_rows, [memory], [rows.contiguous()], into_dense=True)


def zero_padding_(dense: Tensor, padding_mask: Tensor) -> None:
    """Zeroes the padded tokens of [B, S, ...]."""
    num_rows, length = padding_mask.numel(), _row_length(dense, 2)
    if not rows_evenly_spaced(dense):
        dense.masked_fill_(padding_mask.view(*padding_mask.shape, *[1] * (dense.ndim - 2)), 0)
    elif num_rows and length:
        width = next_power_of_2(length)
        block = max(1, min(16, 4 * _block(width)))
        clear_rows[(cdiv(num_rows, block),)](
            padding_mask.contiguous().view(torch.uint8), dense, num_rows, PITCH=dense.stride(1), ROW=length,
            WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip


def rows_evenly_spaced(memory: Tensor) -> bool:
    """Whether the rows of [B, S, ...] are contiguous and equally far apart, across images too, as the kernels address
    them. True of slices of one wide projection."""
    batch, num_tokens = memory.shape[:2]
    pitch, width = memory.stride(1), memory.shape[2:].numel()
    across = batch < 2 or memory.stride(0) == num_tokens * pitch
    return across and pitch >= width and (memory.numel() == 0 or memory[0, 0].is_contiguous())
