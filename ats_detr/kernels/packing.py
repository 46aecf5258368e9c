"""Dense tokens to packed rows and back: the public functions and the custom operators behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.backend import choose_backend, is_exporting, runs_inside_graph
from ats_detr.kernels.plan import TokenPlan


def pack_tokens(plan: TokenPlan, *dense: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Kept rows [K, ...] of each dense tensor [B, S, ...], in one launch.

    Rows that a capacity plan does not use are not written (the reference fills them); such plans give no gradient.
    """
    _check(plan, *dense)
    if not dense or (choose_backend(dense[0], backend) == "reference" and not runs_inside_graph()):
        return reference.pack_tokens(plan, *dense)
    backend = choose_backend(dense[0], backend)
    return tuple(
        torch.ops.ats_detr.pack(
            plan.token_index_K, plan.image_index_K, plan.slot_BS, plan.num_rows, list(dense), backend
        )
    )


def scatter_tokens(
    plan: TokenPlan,
    memory_BSC: Tensor,
    rows_KC: Tensor,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`memory_BSC` with the kept tokens replaced by their packed rows, gradients to both; `rows_KC` takes its dtype.

    in_place: overwrites `memory_BSC` and returns it, without gradients: a fraction of the bytes, for inference. Its
        rows may be slices of longer ones (other layouts make the host wait).
    """
    _check(plan, memory_BSC)
    rows_KC = rows_KC.to(memory_BSC.dtype)
    backend = choose_backend(memory_BSC, backend)
    if in_place and not is_exporting():  # an exported graph changes none of its tensors
        torch.ops.ats_detr.scatter_(
            memory_BSC, rows_KC, plan.token_index_K, plan.image_index_K, plan.num_rows, backend
        )
        return memory_BSC
    if backend == "reference" and not runs_inside_graph():
        return reference.scatter_tokens(plan, memory_BSC, rows_KC)
    return torch.ops.ats_detr.scatter(
        memory_BSC, rows_KC, plan.token_index_K, plan.image_index_K, plan.slot_BS, plan.num_rows, backend
    )


def zero_padding(dense_BSN: Tensor, padding_mask_BS: Tensor, *, backend: str | None = None) -> Tensor:
    """Zeroes the padded tokens of `dense_BSN` in place, and returns it.

    The kernel touches nothing else. Where gradients or a graph are recorded, PyTorch reads and writes all.
    """
    if padding_mask_BS.shape != dense_BSN.shape[:2] or padding_mask_BS.dtype != torch.bool:
        raise ValueError(
            f"padding mask {tuple(padding_mask_BS.shape)} of {padding_mask_BS.dtype} for {tuple(dense_BSN.shape)}:"
            f" want {tuple(dense_BSN.shape[:2])} of torch.bool"
        )
    recorded = runs_inside_graph() or (dense_BSN.requires_grad and torch.is_grad_enabled())
    if choose_backend(dense_BSN, backend) == "reference" or recorded:
        return dense_BSN.masked_fill_(padding_mask_BS[..., None], 0.0)
    torch.ops.ats_detr.zero_padding_(dense_BSN, padding_mask_BS)
    return dense_BSN


def is_evenly_spaced(memory: Tensor) -> bool:
    """Whether the rows of [B, S, ...] are contiguous each and lie at one distance from each other, across images too,
    as the kernels address them: true of slices of one wide projection."""
    batch, num_tokens = memory.shape[:2]
    pitch, width = memory.stride(1), memory.shape[2:].numel()
    across = batch < 2 or memory.stride(0) == num_tokens * pitch
    return across and pitch >= width and (memory.numel() == 0 or memory[0, 0].is_contiguous())


def _check(plan: TokenPlan, *dense: Tensor) -> None:
    for tensor in dense:
        if tensor.shape[:2] != plan.slot_BS.shape:
            raise ValueError(f"tensor {tuple(tensor.shape)} for a plan of {tuple(plan.slot_BS.shape)} tokens")


# ------------------------------------------------------------------------------------------------ the custom operators
def _plan(token_index: Tensor, image_index: Tensor, slots: Tensor, num_rows: Tensor | None) -> TokenPlan:
    """A plan good enough for the reference, which does not read the offsets of an exact plan."""
    offsets = slots.new_zeros(1) if num_rows is None else num_rows
    return TokenPlan(token_index, image_index, offsets, slots, num_rows is None)


@torch.library.custom_op("ats_detr::pack", mutates_args=())
def _pack(
    token_index: Tensor,
    image_index: Tensor,
    slots: Tensor,
    num_rows: Tensor | None,
    dense: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    if backend == "triton":
        from ats_detr.kernels.gpu import pack

        with torch.cuda.device_of(token_index):
            return pack.pack(token_index, image_index, num_rows, dense)
    return list(reference.pack_tokens(_plan(token_index, image_index, slots, num_rows), *dense))


@_pack.register_fake
def _(token_index, image_index, slots, num_rows, dense, backend):
    return [tensor.new_empty(token_index.shape[0], *tensor.shape[2:]) for tensor in dense]


@torch.library.custom_op("ats_detr::merge", mutates_args=())
def _merge(slots: Tensor, packed: Tensor | None, dense: Tensor | None, backend: str) -> Tensor:
    """Dense tensor with `packed` rows (None: zeros) at the kept tokens and `dense` (None: zeros) elsewhere."""
    if backend == "triton":
        from ats_detr.kernels.gpu import pack

        with torch.cuda.device_of(slots):
            return pack.merge(slots, packed, dense)
    return reference.merge(slots, packed, dense)


@_merge.register_fake
def _(slots, packed, dense, backend):
    like, leading = (packed, 1) if dense is None else (dense, 2)
    return like.new_empty(*slots.shape, *like.shape[leading:])


@torch.library.custom_op("ats_detr::scatter", mutates_args=())
def _scatter(
    memory: Tensor, rows: Tensor, token_index: Tensor, image_index: Tensor, slots: Tensor, num_rows: Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    if backend == "triton":
        from ats_detr.kernels.gpu import pack

        with torch.cuda.device_of(memory):
            return pack.merge(slots, rows, memory)
    return reference.merge(slots, rows, memory)


@_scatter.register_fake
def _(memory, rows, token_index, image_index, slots, num_rows, backend):
    return memory.new_empty(memory.shape)


@torch.library.custom_op("ats_detr::scatter_", mutates_args=("memory",))
def _scatter_in_place(
    memory: Tensor,
    rows: Tensor,
    token_index: Tensor,
    image_index: Tensor,
    num_rows: Tensor | None,
    backend: str,
) -> None:
    if backend == "triton":
        from ats_detr.kernels.gpu import pack

        with torch.cuda.device_of(memory):
            if is_evenly_spaced(memory):
                pack.scatter_in_place(token_index, image_index, num_rows, memory, rows)
                return
    if num_rows is not None:
        token_index, image_index, rows = (t[: int(num_rows)] for t in (token_index, image_index, rows))
    memory[image_index.long(), token_index.long()] = rows


@_scatter_in_place.register_fake
def _(memory, rows, token_index, image_index, num_rows, backend):
    return None


@torch.library.custom_op("ats_detr::zero_padding_", mutates_args=("dense",))
def _zero_padding(dense: Tensor, padding_mask: Tensor) -> None:
    from ats_detr.kernels.gpu import pack

    with torch.cuda.device_of(dense):
        if is_evenly_spaced(dense):
            pack.zero_padding(dense, padding_mask)
        else:
            dense.masked_fill_(padding_mask[..., None], 0.0)


@_zero_padding.register_fake
def _(dense, padding_mask):
    return None


# ------------------------------------------------------------------------------------------------------------ gradients
CAPACITY_ERROR = (
    "a capacity plan has no gradient: it is for inference; select_tokens without capacity for training"
)


def _save_pack(ctx, inputs, output) -> None:
    _, _, slots, num_rows, dense, ctx.backend = inputs
    ctx.exact, ctx.num_dense = num_rows is None, len(dense)
    ctx.save_for_backward(slots)


def _differentiate_pack(ctx, grads):
    if not ctx.exact:
        raise RuntimeError(CAPACITY_ERROR)
    (slots,) = ctx.saved_tensors
    needed = ctx.needs_input_grad[4]
    needed = needed if isinstance(needed, (list, tuple)) else [needed] * ctx.num_dense
    dense = [
        torch.ops.ats_detr.merge(slots, grad, None, ctx.backend) if wanted and grad is not None else None
        for grad, wanted in zip(grads, needed, strict=True)
    ]
    return None, None, None, None, dense, None


torch.library.register_autograd("ats_detr::pack", _differentiate_pack, setup_context=_save_pack)


def _save_scatter(ctx, inputs, output) -> None:
    _, _, token_index, image_index, slots, num_rows, ctx.backend = inputs
    ctx.exact = num_rows is None
    ctx.save_for_backward(token_index, image_index, slots)


def _differentiate_scatter(ctx, grad):
    if not ctx.exact:
        raise RuntimeError(CAPACITY_ERROR)
    token_index, image_index, slots = ctx.saved_tensors
    memory = rows = None
    if ctx.needs_input_grad[0]:
        memory = torch.ops.ats_detr.merge(slots, None, grad, ctx.backend)
    if ctx.needs_input_grad[1]:
        (rows,) = torch.ops.ats_detr.pack(token_index, image_index, slots, None, [grad], ctx.backend)
    return memory, rows, None, None, None, None, None


torch.library.register_autograd("ats_detr::scatter", _differentiate_scatter, setup_context=_save_scatter)
