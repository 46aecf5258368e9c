"""What flows out of the detector, for users and for the training criterion."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

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
    """One forward pass. Everything the criterion and the distillation read is here; nothing hides in module state."""

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
