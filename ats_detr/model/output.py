"""What flows out of the detector, for users and for the training criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.kernels import TokenPlan


@dataclass
class Prediction:
    """Class logits and boxes of one prediction layer."""

    logits: Tensor
    """[B, Q, K] raw logits (sigmoid classes); packed [rows, K] for the encoder's auxiliary layers."""
    boxes: Tensor
    """[B, Q, 4] cxcywh, 0..1 of the unpadded image; packed [rows, 4] likewise."""


@dataclass
class TokenScores:
    """What the selector decided and why."""

    scores_BS: Tensor
    """Score of each token, padded tokens filled with the lowest score."""
    num_valid_B: Tensor
    """int64 tokens of each image that are not padding."""
    num_kept_B: Tensor
    """int64 tokens of each image that were kept."""
    budget_logits_BR: Tensor | None
    """Logits of the budget classes, None where the budget is fixed."""
    plan: TokenPlan

    @property
    def keep_ratio_B(self) -> Tensor:
        """Share of each image's valid tokens that was kept."""
        return self.num_kept_B / self.num_valid_B


@dataclass
class DetectorOutput:
    """One forward pass. Everything the criterion and the distillation read is here; nothing hides in module
    state.
    """

    last: Prediction
    """The last decoder layer: the detections."""
    level_shapes: tuple[tuple[int, int], ...]
    padding_mask_BS: Tensor
    memory_BSC: Tensor
    """Encoder output of all tokens."""
    decoder_auxiliary: list[Prediction] = field(default_factory=list)
    """Decoder layers before the last, first layer first."""
    encoder: Prediction | None = None
    """Two-stage proposals of all S tokens."""
    encoder_auxiliary: list[Prediction] = field(default_factory=list)
    """Encoder layers before the last, on the kept tokens, packed by `selection.plan`."""
    selection: TokenScores | None = None
    attention_map_BS: Tensor | None = None
    """Decoder cross-attention received by each token (DAM), when it was asked for."""
    adapted_memory_BSC: Tensor | None = None
    """The memory through the adaption layer, for distillation (training only)."""
    query_index_BQ: Tensor | None = None
    """Token each two-stage query started from."""


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """What the detector spent on one image."""

    num_valid_tokens: int
    num_kept_tokens: int
    budget_class: int | None
    """Chosen budget, 0 the smallest; None where the budget is fixed or all tokens are kept."""

    @property
    def keep_ratio(self) -> float:
        return self.num_kept_tokens / self.num_valid_tokens


@dataclass
class Detections:
    """The detections of one image, best first."""

    scores_N: Tensor
    """float32 probabilities."""
    labels_N: Tensor
    """int64 class rows."""
    boxes_xyxy_N4: Tensor
    """float32 corners in pixels of the original image, not clipped to it."""


def token_budgets(output: DetectorOutput) -> list[TokenBudget]:
    """What each image of a batch was given, in one transfer to the host."""
    num_valid_B = (~output.padding_mask_BS).sum(1)
    num_kept_B, budget_B = num_valid_B, torch.full_like(num_valid_B, -1)
    if output.selection is not None:
        num_kept_B = output.selection.num_kept_B
        if output.selection.budget_logits_BR is not None:
            budget_B = output.selection.budget_logits_BR.argmax(1)
    columns = torch.stack([num_valid_B, num_kept_B.to(num_valid_B), budget_B], dim=1).tolist()
    return [
        TokenBudget(
            num_valid_tokens=num_valid, num_kept_tokens=num_kept, budget_class=None if budget < 0 else budget
        )
        for num_valid, num_kept, budget in columns
    ]


def top_detections(
    prediction: Prediction, original_sizes: Sequence[tuple[int, int]], max_detections: int = 100
) -> list[Detections]:
    """The best class-query pairs of each image by probability (no suppression of overlaps, as in Deformable
    DETR).

    Args:
        original_sizes: (height, width) in pixels of each image as stored.
    """
    scores_BN, labels_BN, boxes_BN4 = top_pairs(prediction, max_detections)
    scale_B4 = torch.tensor([[width, height, width, height] for height, width in original_sizes])
    boxes_BN4 = boxes_BN4 * scale_B4[:, None].to(boxes_BN4.device, non_blocking=True)
    return [
        Detections(scores, labels, boxes)
        for scores, labels, boxes in zip(scores_BN, labels_BN, boxes_BN4, strict=True)
    ]


def top_pairs(prediction: Prediction, max_detections: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N], class rows [B, N] and boxes [B, N, 4] (corners, 0..1 of the unpadded image) of the best pairs."""
    num_classes = prediction.logits.shape[-1]
    scores_BQK = prediction.logits.float().sigmoid().flatten(1)
    top = scores_BQK.topk(min(max_detections, scores_BQK.shape[1]), dim=1)
    boxes_BN4 = cxcywh_to_xyxy(prediction.boxes.float())
    boxes_BN4 = boxes_BN4.gather(1, (top.indices // num_classes)[..., None].expand(-1, -1, 4))
    return top.values, top.indices % num_classes, boxes_BN4
