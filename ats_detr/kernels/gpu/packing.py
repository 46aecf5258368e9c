"""Rows of dense tensors into packed form, and back, in one launch each. Pure copies, limited by bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu.common import cdiv, next_power_of_2

ELEMENTS = 1024  # per program, approximately


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def move_rows(
    token_index_ptr, image_index_ptr,  # [K]
    count_ptr,  # [1] int32 rows in use, where COUNTED
    dense_ptr,  # [B, S, ROW]
    packed_ptr,  # [K, ROW]
    num_rows, num_tokens,
    dense_pitch,  # elements from one token's row to the next where INTO_DENSE; there may be others between
    ROW: tl.constexpr, WIDTH: tl.constexpr, COUNTED: tl.constexpr, INTO_DENSE: tl.constexpr, BLOCK: tl.constexpr,
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
    column = tl.arange(0, WIDTH)[None, :]
    inside = mask[:, None] & (column < ROW)
    dense = dense_ptr + (dense_row * (dense_pitch if INTO_DENSE else ROW))[:, None] + column
    packed = packed_ptr + (packed_row.to(tl.int64) * ROW)[:, None] + column
    if INTO_DENSE:
        tl.store(dense, tl.load(packed, mask=inside), mask=inside)
    else:
        tl.store(packed, tl.load(dense, mask=inside), mask=inside)


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


def _launch_moves(
    token_index: Tensor, image_index: Tensor, num_rows: Tensor | None, dense: Sequence[Tensor],
    packed: Sequence[Tensor], into_dense: bool,
) -> None:  # fmt: skip
    """Moves rows between each pair of tensors; those to be packed are contiguous."""
    capacity = token_index.shape[0]
    for own, rows in zip(dense, packed, strict=True):
        length = _row_length(own, 2)
        width = next_power_of_2(length)
        block = _block(width)
        move_rows[(cdiv(capacity, block),)](
            token_index, image_index, num_rows, own, rows, capacity, own.shape[1],
            own.stride(1), ROW=length, WIDTH=width,
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
