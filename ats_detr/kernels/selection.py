"""Adaptive token selection: the best-scored tokens of each image, in any number per image."""

from __future__ import annotations

from itertools import accumulate

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

MAX_TOKENS = 32768
"""Tokens per image that the kernel can select from: it holds an image's keys in registers."""


def select_tokens(
    scores_BS: Tensor,
    num_keep_B: Tensor,
    padding_mask_BS: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> TokenPlan:
    """The num_keep_B[i] best-scored tokens of each image i, as a plan in ascending index order.

    Ties go to the lower index, NaN counts as the largest score (as in torch.topk), and a padded token is selected only
    if no valid one is left. The scores get no gradient.

    Args:
        scores_BS: any floating dtype; float16 and bfloat16 are compared exactly.
        num_keep_B: integers; values outside 0..S are clamped.
        padding_mask_BS: bool, True on padding.
        capacity: number of rows of the plan. None: exactly the number of kept tokens, which needs a device-to-host
            synchronisation. With a capacity (from the largest budget and the image sizes, for example) there is none;
            tokens beyond it are dropped, the last image's first.
        backend: 'triton' or 'reference', see `choose_backend`. The kernels select from at most 32,768 tokens per image.

    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_tensors({"padding_mask": padding_mask_BS}, scores=scores_BS, num_keep=num_keep_B)
    if not (scores_BS.ndim == 2 and scores_BS.dtype in FLOATS):
        raise invalid("scores", scores_BS, "[B, S], floating point")
    batch, num_tokens = scores_BS.shape
    if not (num_keep_B.shape == (batch,) and num_keep_B.dtype in INTEGERS):
        raise invalid("num_keep", num_keep_B, f"[{batch}] (one per image), integers")
    if padding_mask_BS is not None:
        check_padding_mask(padding_mask_BS, scores_BS)
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity {capacity}: must be >= 0")
    scores_BS = scores_BS.detach()
    exact = capacity is None
    row_starts = None
    if capacity is not None:
        capacity = min(capacity, batch * num_tokens)
    elif runs_inside_graph():  # one unknown size; a number per image would be B of them
        capacity = int(num_keep_B.long().clamp(0, num_tokens).sum())
    else:
        row_starts = (0, *accumulate(num_keep_B.long().clamp(0, num_tokens).tolist()))
        capacity = row_starts[-1]
    limitation = no_transforms()
    if num_tokens > MAX_TOKENS:
        limitation = f"{num_tokens} tokens per image exceed the maximum of {MAX_TOKENS}"
    index_K, image_K, offsets_B1, slot_BS = _select(
        scores_BS, num_keep_B, padding_mask_BS, capacity, backend=backend, limitation=limitation
    )
    # An exported graph computes all rows of its capacity with ordinary operators; rows without a token are discarded.
    return TokenPlan(index_K, image_K, offsets_B1, slot_BS, exact or is_exporting(), row_starts)


def check_padding_mask(padding_mask_BS: Tensor, dense: Tensor) -> None:
    """Raises ValueError unless the mask is bool and has the first two dimensions of `dense`."""
    if not (padding_mask_BS.shape == dense.shape[:2] and padding_mask_BS.dtype == torch.bool):
        raise invalid("padding mask", padding_mask_BS, f"{list(dense.shape[:2])} of torch.bool")


_select = operator("selection.select")(reference.select_tokens)


@_select.register_fake
def _(scores: Tensor, num_keep: Tensor, padding_mask: Tensor | None, capacity: int) -> tuple[Tensor, ...]:
    batch, num_tokens = scores.shape
    shapes = ((capacity,), (capacity,), (batch + 1,), (batch, num_tokens))
    return tuple(scores.new_empty(shape, dtype=torch.int32) for shape in shapes)
