"""Dense tokens to packed rows and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.dispatch import (
    FLOATS,
    INTEGERS,
    check_tensors,
    invalid,
    is_exporting,
    no_transforms,
    operator,
    runs_inside_graph,
)
from ats_detr.kernels.plan import TokenPlan
from ats_detr.kernels.selection import check_padding_mask

MAX_ROW = 16384
"""Elements of a token that the kernels can move."""


def pack_tokens(plan: TokenPlan, *dense: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Kept rows [K, ...] of each dense tensor [B, S, ...], in one launch each, with gradients.

    Rows that a capacity plan does not use are unspecified. Such plans have no gradient: backward raises RuntimeError.

    Raises ValueError for tensors of other images or tokens than the plan's, or on another device.
    """
    for tensor in dense:
        check_tensors(tensor=tensor)
        _check_dense("tensor", tensor, plan)
    if not dense:
        return ()
    return tuple(
        _pack(
            *_index(plan), list(dense), backend=backend, limitation=_limitation(dense), registered=not plan.exact
        )
    )  # fmt: skip


def scatter_tokens(
    plan: TokenPlan,
    memory_BSC: Tensor,
    rows_KC: Tensor,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`memory_BSC` with the kept tokens replaced by their packed rows, with gradients to both.

    Args:
        memory_BSC: any [B, S, ...].
        rows_KC: [K, ...], cast to the memory's dtype.
        in_place: overwrite `memory_BSC` and return it, without gradients. Only the kept rows are moved if the memory's
            rows are equally far apart (slices of one wide projection are); other layouts are copied as a whole. Under
            torch.export the result is a new tensor.

    Raises:
        ValueError: shapes or devices that do not fit the plan; in place, a memory whose elements overlap.
        RuntimeError: in place, if a gradient would be recorded. Backward through a capacity plan.
    """
    check_tensors(memory=memory_BSC, rows=rows_KC)
    _check_dense("memory", memory_BSC, plan)
    shape = (plan.token_index_K.shape[0], *memory_BSC.shape[2:])
    if rows_KC.shape != shape:
        raise invalid("rows", rows_KC, f"{list(shape)} for a memory {list(memory_BSC.shape)}")
    rows_KC = rows_KC.to(memory_BSC.dtype)
    arguments = (memory_BSC, rows_KC, *_index(plan))
    limitation = _limitation([memory_BSC])
    if not in_place or is_exporting():
        return _scatter(*arguments, backend=backend, limitation=limitation, registered=not plan.exact)
    check_target("memory", memory_BSC, rows_KC)
    _scatter_in_place(*arguments, backend=backend, limitation=limitation)
    return memory_BSC


def zero_padding(dense_BSN: Tensor, padding_mask_BS: Tensor, *, backend: str | None = None) -> Tensor:
    """Zeroes the padded tokens of a [B, S, ...] tensor in place, and returns it.

    The kernel writes the padded rows only. While gradients or a graph are recorded, PyTorch reads and writes all rows.

    Raises ValueError for a mask that is not bool [B, S], and for a tensor whose elements overlap.
    """
    check_tensors(tensor=dense_BSN, padding_mask=padding_mask_BS)
    if dense_BSN.ndim < 2:
        raise invalid("tensor", dense_BSN, "[B, S, ...]")
    check_padding_mask(padding_mask_BS, dense_BSN)
    check_no_overlap("tensor", dense_BSN)
    if runs_inside_graph() or (dense_BSN.requires_grad and torch.is_grad_enabled()):
        return dense_BSN.masked_fill_(_like(padding_mask_BS, dense_BSN), 0)
    _zero_padding_in_place(dense_BSN, padding_mask_BS, backend=backend, limitation=_limitation([dense_BSN]))
    return dense_BSN


# ------------------------------------------------------------------------------------------------ checks of arguments
def _check_dense(name: str, tensor: Tensor, plan: TokenPlan) -> None:
    if tensor.shape[:2] != plan.slot_BS.shape:
        images, tokens = plan.slot_BS.shape
        raise invalid(name, tensor, f"[{images}, {tokens}, ...] for a plan of {images} x {tokens} tokens")


def check_target(name: str, target: Tensor, *sources: Tensor | None) -> None:
    """Raises unless `target` may be overwritten: without gradients, and with each element in a place of its own."""
    check_no_overlap(name, target)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (target, *sources)):
        raise RuntimeError(
            f"writing to {name} in place has no gradient: call it under torch.no_grad(), or use scatter_tokens"
        )


def check_no_overlap(name: str, tensor: Tensor) -> None:
    """Raises ValueError where elements of the tensor may share memory. Not checked under torch.compile."""
    if runs_inside_graph():
        return
    reach = 0  # distance between the first and the last element of the axes of smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            raise ValueError(
                f"{name} {list(tensor.shape)} of strides {tensor.stride()}: its elements share memory, as those of an"
                " expanded tensor; call .contiguous() first"
            )
        reach += stride * (size - 1)


def _limitation(dense: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot move the rows of these tensors."""
    longest = max(tensor.shape[2:].numel() for tensor in dense)
    if longest > MAX_ROW:
        return f"a token of {longest} elements exceeds the maximum of {MAX_ROW}"
    for tensor in dense:
        if tensor.dtype not in (*FLOATS, *INTEGERS, torch.bool):
            return f"tensors of {tensor.dtype} are not supported"
    return no_transforms()


def _index(plan: TokenPlan) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return plan.token_index_K, plan.image_index_K, plan.slot_BS, plan.num_rows


def _like(mask: Tensor, dense: Tensor) -> Tensor:
    """The mask [B, S] with the dimensions of `dense` [B, S, ...]."""
    return mask.view(*mask.shape, *[1] * (dense.ndim - 2))


# ------------------------------------------------------------------------------------------------ the custom operators
# The gradients of `scatter` are `pack` and itself, and those of `pack` are `scatter`, so that both have derivatives of
# any order.
_pack = operator("packing.pack")(reference.pack)
_scatter = operator("packing.scatter")(reference.scatter)
_scatter_in_place = operator("packing.scatter_", mutates_args=("memory",))(reference.scatter_)


@_pack.register_fake
def _(token_index: Tensor, *others: Any) -> list[Tensor]:
    return [tensor.new_empty(token_index.shape[0], *tensor.shape[2:]) for tensor in others[-1]]


@_scatter.register_fake
def _(memory: Tensor | None, rows: Tensor | None, *others: Any) -> Tensor:
    if memory is not None:
        return memory.new_empty(memory.shape)
    assert rows is not None
    return rows.new_empty(*others[2].shape, *rows.shape[1:])


@operator("packing.zero_padding_", mutates_args=("dense",))
def _zero_padding_in_place(dense: Tensor, padding_mask: Tensor) -> None:
    dense.masked_fill_(_like(padding_mask, dense), 0)


# ------------------------------------------------------------------------------------------------------------ gradients
CAPACITY_ERROR = (
    "a capacity plan has no gradient: it is for inference; call select_tokens without capacity for training"
)


def _save_pack(ctx: Any, inputs: tuple, output: Any) -> None:
    token_index, image_index, slots, num_rows, dense = inputs
    ctx.exact, ctx.num_dense = num_rows is None, len(dense)
    ctx.save_for_backward(token_index, image_index, slots)


def _differentiate_pack(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple:
    if not ctx.exact:
        raise RuntimeError(CAPACITY_ERROR)
    needed = ctx.needs_input_grad[4]
    needed = needed if isinstance(needed, (list, tuple)) else [needed] * ctx.num_dense
    dense = [
        _scatter.packet(None, gradient, *ctx.saved_tensors, None, ctx.backend)
        if wanted and gradient is not None
        else None
        for gradient, wanted in zip(gradients, needed, strict=True)
    ]
    return None, None, None, None, dense


_pack.register_autograd(_differentiate_pack, _save_pack)


def _save_scatter(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, token_index, image_index, slots, num_rows = inputs
    ctx.exact = num_rows is None
    ctx.save_for_backward(token_index, image_index, slots)


def _differentiate_scatter(ctx: Any, gradient: Tensor) -> tuple:
    if not ctx.exact:
        raise RuntimeError(CAPACITY_ERROR)
    index = (*ctx.saved_tensors, None)
    memory = rows = None
    if ctx.needs_input_grad[0]:
        memory = _scatter.packet(gradient, None, *index, ctx.backend)
    if ctx.needs_input_grad[1]:
        (rows,) = _pack.packet(*index, [gradient], ctx.backend)
    return memory, rows, None, None, None, None


_scatter.register_autograd(_differentiate_scatter, _save_scatter)
