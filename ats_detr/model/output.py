"""Outputs of the model, for inference and for the training criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.kernels import TokenPlan


@dataclass
class Prediction:
    """Class logits and boxes of one prediction layer."""

    logits: Tensor
    """[B, Q, T] logits of sigmoid classes; [B, S, T] for proposals, [K, T] for auxiliary encoder layers."""
    boxes: Tensor
    """[B, Q, 4] cxcywh, 0..1 of the unpadded image; [B, S, 4] and [K, 4] likewise."""

    def split(self, sizes: Sequence[int]) -> list[Prediction]:
        """The predictions of consecutive groups of queries."""
        groups = zip(self.logits.split(sizes, dim=1), self.boxes.split(sizes, dim=1), strict=True)
        return [Prediction(logits, boxes) for logits, boxes in groups]


@dataclass
class TokenScores:
    """The output of the token selector."""

    scores_BS: Tensor
    """Score of each token; padded tokens have the lowest score."""
    num_valid_B: Tensor
    """int64 number of tokens that are not padding."""
    num_kept_B: Tensor
    """int64 number of kept tokens."""
    budget_logits: Tensor | None
    """[B, num_budgets] logits of the budget classes; None if the budget is fixed."""
    plan: TokenPlan
    """The kept tokens of all images, packed."""
    budget_B: Tensor | None = None
    """int64 index of the budget that the model chose, smallest first; None if the ratio was fixed or given."""

    @property
    def keep_ratio_B(self) -> Tensor:
        """Kept share of the valid tokens."""
        return self.num_kept_B / self.num_valid_B


@dataclass
class DetectorOutput:
    """The outputs of one forward pass, including everything that the criterion and the distillation use."""

    last: Prediction
    """Predictions of the last decoder layer, from which detections are made."""
    level_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""
    padding_mask_BS: Tensor
    """Bool, True on padding."""
    memory_BSC: Tensor
    """Encoder output of all tokens."""
    decoder_auxiliary: list[Prediction] = field(default_factory=list)
    """Predictions of the decoder layers before the last, in order (supervision only)."""
    one_to_many: list[Prediction] = field(default_factory=list)
    """Predictions of all decoder layers for the second group of queries, in order; see `Detr.one_to_many`."""
    encoder: Prediction | None = None
    """Two-stage proposals of all S tokens (supervision only)."""
    encoder_auxiliary: list[Prediction] = field(default_factory=list)
    """Predictions of the encoder layers before the last at the kept tokens, packed by `selection.plan`."""
    selection: TokenScores | None = None
    """Token scores and selection; None for a dense encoder."""
    attention_map_BS: Tensor | None = None
    """Decoder cross-attention received by each token, summed over layers (DAM; supervision only)."""
    adapted_memory_BSC: Tensor | None = None
    """The memory after the adaption layer, for distillation (supervision only)."""
    query_index_BQ: Tensor | None = None
    """Index of the token that initialised each two-stage query."""


class BudgetOptions(TypedDict, total=False):
    """Arguments of `Detr.detect` that choose the budgets; none of them: as trained."""

    keep_ratio: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Number of tokens of one image, and how many of them the encoder updated."""

    num_valid_tokens: int
    num_kept_tokens: int
    budget_class: int | None
    """Index of the chosen budget, smallest first; None if the ratio is fixed or given, or all tokens are kept."""

    @property
    def keep_ratio(self) -> float:
        """Kept share of the valid tokens, 0..1."""
        return self.num_kept_tokens / self.num_valid_tokens

    @property
    def text(self) -> str:
        """For captions."""
        return f"keeps {self.num_kept_tokens} of {self.num_valid_tokens} tokens ({self.keep_ratio:.0%})"


@dataclass
class Detections:
    """The detections of one image, by descending score."""

    scores_N: Tensor
    """float32 probabilities."""
    labels_N: Tensor
    """int64 class indices."""
    boxes_xyxy_N4: Tensor
    """float32 corners in pixels of the original image, not clipped to it."""


@dataclass
class BatchDetections:
    """Detections and budgets of a batch, in few small tensors on the device of the model."""

    detections_BN6: Tensor
    """float32 x1, y1, x2, y2 in pixels of the original image, score, and class index, by descending score."""
    budgets_B3: Tensor
    """See `budget_table`."""
    kept_BS: Tensor | None
    """Bool, True on kept tokens; None for a dense encoder."""
    level_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""

    @staticmethod
    def from_output(output: DetectorOutput, scale_B4: Tensor, max_detections: int) -> BatchDetections:
        """Without device-to-host synchronisation. `scale_B4`: width, height, width, height of the original images."""
        scores_BN, labels_BN, boxes_BN4 = top_pairs(output.last, max_detections)
        columns = (boxes_BN4 * scale_B4[:, None], scores_BN[..., None], labels_BN[..., None].float())
        kept_BS = None if output.selection is None else output.selection.plan.slot_BS >= 0
        return BatchDetections(torch.cat(columns, -1), budget_table(output), kept_BS, output.level_shapes)


def budget_table(output: DetectorOutput) -> Tensor:
    """int64 [B, 3]: number of valid tokens, number of kept tokens, and budget class (-1: none) of each image."""
    selection = output.selection
    num_valid_B = (~output.padding_mask_BS).sum(1) if selection is None else selection.num_valid_B
    num_kept_B, budget_B = num_valid_B, torch.full_like(num_valid_B, -1)
    if selection is not None:
        num_kept_B = selection.num_kept_B
        if selection.budget_B is not None:
            budget_B = selection.budget_B
    return torch.stack([num_valid_B, num_kept_B.to(num_valid_B), budget_B], dim=1)


def token_budgets(table_B3: Tensor) -> list[TokenBudget]:
    """The rows of a `budget_table`, with one device-to-host transfer."""
    return [
        TokenBudget(
            num_valid_tokens=num_valid, num_kept_tokens=num_kept, budget_class=None if budget < 0 else budget
        )
        for num_valid, num_kept, budget in table_B3.tolist()
    ]


def top_detections(
    prediction: Prediction, original_sizes: Sequence[tuple[int, int]], max_detections: int = 100
) -> list[Detections]:
    """The detections of each image: the class-query pairs of highest probability, without non-maximum suppression.

    Args:
        prediction: predictions [B, Q, T] and [B, Q, 4].
        original_sizes: (height, width) of each image in pixels, to which the boxes are scaled.
        max_detections: number of detections per image, at most Q * T.
    """
    scores_BN, labels_BN, boxes_BN4 = top_pairs(prediction, max_detections)
    scale_B4 = torch.tensor([[width, height, width, height] for height, width in original_sizes])
    boxes_BN4 = boxes_BN4 * scale_B4[:, None].to(boxes_BN4.device, non_blocking=True)
    return [
        Detections(scores, labels, boxes)
        for scores, labels, boxes in zip(scores_BN, labels_BN, boxes_BN4, strict=True)
    ]


def top_pairs(prediction: Prediction, max_detections: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N], class indices [B, N] and boxes [B, N, 4] (xyxy, 0..1 of the unpadded image) of the best pairs.

    N is `max_detections`, or Q * T if that is smaller.
    """
    num_classes = prediction.logits.shape[-1]
    scores = prediction.logits.float().sigmoid().flatten(1)  # [B, Q * T]
    top = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    index_BN4 = (top.indices // num_classes)[..., None].expand(-1, -1, 4)
    boxes_BN4 = cxcywh_to_xyxy(prediction.boxes.float().gather(1, index_BN4))
    return top.values, top.indices % num_classes, boxes_BN4
