"""The decoder: queries that attend to each other, gather from the memory, and refine their boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr.boxes import inverse_sigmoid
from ats_detr.kernels import deformable_attention_map
from ats_detr.kernels.reference import LevelShapes
from ats_detr.model.attention import DeformableAttention, project_values
from ats_detr.model.encoder import FeedForward, run_layer
from ats_detr.model.output import Prediction
from ats_detr.model.tokens import Tokens


class PredictionHead(nn.Module):
    """Class logits (a linear map) and box logits (a 3-layer perceptron) of a query."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        last = nn.Linear(width, 4)
        self.box = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), last])
        nn.init.constant_(self.classify.bias, -math.log(99))  # every class starts at probability 0.01
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, reference: Tensor) -> Prediction:
        """[..., C] queries and their reference as logits, [..., 2] or [..., 4] -> logits and boxes (cxcywh,
        0..1).
        """
        return Prediction(self.classify(x), self.boxes(x, reference))

    def boxes(self, x: Tensor, reference: Tensor) -> Tensor:
        """The boxes alone."""
        box = x
        for layer in self.box[:-1]:
            box = layer(box).relu()
        box = self.box[-1](box).float()
        if reference.shape[-1] == 2:
            box = torch.cat([box[..., :2] + reference, box[..., 2:]], -1)
        else:
            box = box + reference
        return box.sigmoid()


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and feed-forward network; post-norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, num_heads, num_levels, num_points)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = FeedForward(width, feedforward_width, dropout)

    def forward(
        self,
        x_BQC: Tensor,
        query_pos_BQC: Tensor,
        references_NLX: Tensor,
        value_BSC: Tensor,
        level_shapes: LevelShapes,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Refined queries [B, Q, C], and the raw offsets and logits of the cross-attention."""
        query = x_BQC + query_pos_BQC
        attended, _ = self.self_attention(query, query, x_BQC, need_weights=False)
        x_BQC = self.self_norm(x_BQC + self.dropout(attended))
        attention = self.cross_attention
        offsets, logits = attention.project_query((x_BQC + query_pos_BQC).flatten(0, 1))
        gathered = attention.attend(value_BSC, level_shapes, references_NLX, offsets, logits)
        gathered = attention.output_proj(gathered).view_as(x_BQC)
        x_BQC = self.cross_norm(x_BQC + self.dropout(gathered))
        return self.feedforward(x_BQC), (offsets, logits)


class Decoder(nn.Module):
    """A stack of layers. With `box_refine` each layer's (detached) boxes are the next one's references."""

    def __init__(self, num_layers: int, box_refine: bool, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(**layer) for _ in range(num_layers))
        self.box_refine = box_refine
        self.recompute = False
        """In training, keep only each layer's inputs and run it again in the backward pass."""

    def forward(
        self,
        x_BQC: Tensor,
        query_pos_BQC: Tensor,
        references_BQX: Tensor,
        memory_BSC: Tensor,
        tokens: Tokens,
        heads: Sequence[PredictionHead],
        *,
        every_layer: bool,
        with_attention_map: bool,
    ) -> tuple[list[Prediction], Tensor | None]:
        """The prediction of every layer (or of the last alone) and, if asked for, the attention each token received
        in all layers [B, S].

        Args:
            references_BQX: initial references in 0..1 of the unpadded image, [B, Q, 2] points or [B, Q, 4]
                boxes.
            heads: one head per layer, or a single shared one.
        """
        predictions, attention_map_BS = [], None
        attentions: Any = [layer.cross_attention for layer in self.layers]
        values = project_values(attentions, memory_BSC, tokens.padding_mask_BS)
        for index, (layer, value_BSC) in enumerate(zip(self.layers, values, strict=True)):
            ratios_BL = tokens.valid_ratios_BL2.repeat(1, 1, references_BQX.shape[-1] // 2)
            references_NLX = (references_BQX[:, :, None] * ratios_BL[:, None]).flatten(0, 1)
            x_BQC, (offsets_NHLP2, logits_NHLP) = run_layer(
                layer,
                self.recompute and self.training,
                *(x_BQC, query_pos_BQC, references_NLX, value_BSC, tokens.level_shapes),
            )
            head, reference = heads[index % len(heads)], inverse_sigmoid(references_BQX)
            if every_layer or layer is self.layers[-1]:
                predictions.append(head(x_BQC, reference))
            if self.box_refine and layer is not self.layers[-1]:
                boxes_BQ4 = predictions[-1].boxes if every_layer else head.boxes(x_BQC, reference)
                references_BQX = boxes_BQ4.detach()
            if with_attention_map:
                attention_map_BS = deformable_attention_map(
                    references_NLX,
                    offsets_NHLP2,
                    logits_NHLP,
                    tokens.level_shapes,
                    len(x_BQC),
                    into=attention_map_BS,
                )
        return predictions, attention_map_BS
