"""Adaptive token selection: the public function and the custom operator behind it."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.backend import choose_backend, is_exporting, runs_inside_graph
from ats_detr.kernels.plan import TokenPlan

MAX_TOKENS = 32768


def select_tokens(
    scores_BS: Tensor,
    num_keep_B: Tensor,
    padding_mask_BS: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> TokenPlan:
    """The num_keep_B[i] best-scored tokens of each image i, as a plan in ascending index order.

    Ties go to the lower index, NaN counts as the largest score (as in torch.topk), and a padded token is
    taken only when no valid one is left. Asking for more than S tokens keeps all S.

    Args:
        scores_BS: any floating dtype; float16 and bfloat16 compare as the numbers they are.
        num_keep_B: integers on the device of the scores.
        padding_mask_BS: bool, True on padding.
        capacity: rows of the plan. None: exactly as many as are kept, which the host has to wait for. With a
            capacity (from the largest budget and the image sizes, say) nothing waits; tokens past it are
            dropped, the last image's first.
        backend: 'triton' or 'reference', see `choose_backend`.
    """
    batch, num_tokens = scores_BS.shape
    if num_keep_B.shape != (batch,) or (
        padding_mask_BS is not None and padding_mask_BS.shape != scores_BS.shape
    ):
        raise ValueError(
            f"scores {tuple(scores_BS.shape)}: want one num_keep per image and a mask of the same shape"
        )
    scores_BS = scores_BS.detach()
    backend = choose_backend(scores_BS, backend)
    if num_tokens > MAX_TOKENS:  # the kernel holds an image's keys in registers
        backend = "reference"
    if batch * num_tokens == 0 or (backend == "reference" and not runs_inside_graph()):
        return reference.select_tokens(scores_BS, num_keep_B, padding_mask_BS, capacity)
    exact = capacity is None
    row_starts = None
    if exact and runs_inside_graph():  # where a number of each image would be one unknown size more
        capacity = int(num_keep_B.clamp(0, num_tokens).sum())
    elif exact:
        row_starts = (0, *accumulate(num_keep_B.clamp(0, num_tokens).tolist()))
        capacity = row_starts[-1]
    capacity = min(capacity, batch * num_tokens)
    # An exported graph computes all rows of its capacity with ordinary operators; those without a slot go nowhere.
    exact = exact or is_exporting()
    tensors = torch.ops.ats_detr.select(scores_BS, num_keep_B, padding_mask_BS, capacity, backend)
    return TokenPlan(*tensors, exact=exact, row_starts=row_starts)


@torch.library.custom_op("ats_detr::select", mutates_args=())
def _select(
    scores: Tensor, num_keep: Tensor, padding_mask: Tensor | None, capacity: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token index [capacity], image index [capacity], offsets [B+1], slots [B, S]), int32."""
    if backend == "triton":
        from ats_detr.kernels.gpu import select

        with torch.cuda.device_of(scores):
            return select.select(scores, num_keep, padding_mask, capacity)
    plan = reference.select_tokens(scores, num_keep, padding_mask, capacity)
    return plan.token_index_K, plan.image_index_K, plan.offsets_B1, plan.slot_BS


@_select.register_fake
def _(scores, num_keep, padding_mask, capacity, backend):
    batch, num_tokens = scores.shape
    shapes = ((capacity,), (capacity,), (batch + 1,), (batch, num_tokens))
    return tuple(scores.new_empty(shape, dtype=torch.int32) for shape in shapes)
