"""The decoder: self-attention of the queries, deformable cross-attention to the memory, and box refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr.boxes import inverse_sigmoid
from ats_detr.kernels import TokenGeometry, deformable_attention_map
from ats_detr.kernels.reference import LevelShapes
from ats_detr.model.attention import DeformableAttention, project_values
from ats_detr.model.encoder import FeedForward, run_layer
from ats_detr.model.output import Prediction


class PredictionHead(nn.Module):
    """Classes (linear layer) and boxes (3-layer perceptron) of queries or geometry."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        last = nn.Linear(width, 4)
        self.box = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), last])
        nn.init.constant_(self.classify.bias, -math.log(99))  # every class starts at probability 0.01
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, reference: Tensor) -> Prediction:
        """Class logits [..., T] and boxes [..., 4] (cxcywh, 0..1).

        Args:
            x: features [..., C].
            reference: logits of points [..., 2] or boxes [..., 4] to which the predicted offsets are added.
        """
        return Prediction(self.classify(x), self.boxes(x, reference))

    def boxes(self, x: Tensor, reference: Tensor) -> Tensor:
        """The boxes of `forward`, float32 [..., 4]."""
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
        level_references: Tensor,
        value_BSC: Tensor,
        level_shapes: LevelShapes,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Updated queries [B, Q, C], and the cross-attention's offsets [B * Q, H, L, P, 2] and logits [B * Q, H, L, P].

        Args:
            x_BQC: content of the queries.
            query_pos_BQC: positional part of the queries.
            level_references: [B * Q, L, 2] points or [B * Q, L, 4] boxes, normalised to each level.
            value_BSC: projected values of the memory.
        """
        query = x_BQC + query_pos_BQC
        attended, _ = self.self_attention(query, query, x_BQC, need_weights=False)
        x_BQC = self.self_norm(x_BQC + self.dropout(attended))
        attention = self.cross_attention
        offsets, logits = attention.project_query((x_BQC + query_pos_BQC).flatten(0, 1))
        gathered = attention.attend(value_BSC, level_shapes, level_references, offsets, logits)
        gathered = attention.output_proj(gathered).view_as(x_BQC)
        x_BQC = self.cross_norm(x_BQC + self.dropout(gathered))
        return self.feedforward(x_BQC), (offsets, logits)


class Decoder(nn.Module):
    """A stack of layers. With `box_refine`, the (detached) boxes of each layer are the references of the next."""

    def __init__(self, num_layers: int, box_refine: bool, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(**layer) for _ in range(num_layers))
        self.box_refine = box_refine
        self.recompute = False
        """Recompute the activations of each layer in the backward pass (training only)."""

    def forward(
        self,
        x_BQC: Tensor,
        query_pos_BQC: Tensor,
        references: Tensor,
        memory_BSC: Tensor,
        geometry: TokenGeometry,
        heads: Sequence[PredictionHead],
        *,
        every_layer: bool,
        with_attention_map: bool,
    ) -> tuple[list[Prediction], Tensor | None]:
        """The predictions, and the attention that each token received, summed over layers, [B, S].

        Args:
            references: initial references in 0..1 of the unpadded image, [B, Q, 2] points or [B, Q, 4] boxes.
            heads: one head per layer, or one shared head.
            every_layer: return the predictions of all layers instead of the last only.
            with_attention_map: compute the attention map; otherwise None is returned for it.
        """
        predictions, attention_map_BS = [], None
        attentions: Any = [layer.cross_attention for layer in self.layers]
        values = project_values(attentions, memory_BSC, geometry.padding_mask_BS)
        for index, (layer, value_BSC) in enumerate(zip(self.layers, values, strict=True)):
            ratios = geometry.valid_ratios_BL2.repeat(1, 1, references.shape[-1] // 2)  # [B, L, 2 or 4]
            level_references = (references[:, :, None] * ratios[:, None]).flatten(0, 1)
            x_BQC, (offsets, logits) = run_layer(
                layer,
                self.recompute and self.training,
                *(x_BQC, query_pos_BQC, level_references, value_BSC, geometry.level_shapes),
            )
            head, reference = heads[index % len(heads)], inverse_sigmoid(references)
            if every_layer or layer is self.layers[-1]:
                predictions.append(head(x_BQC, reference))
            if self.box_refine and layer is not self.layers[-1]:
                boxes_BQ4 = predictions[-1].boxes if every_layer else head.boxes(x_BQC, reference)
                references = boxes_BQ4.detach()
            if with_attention_map:
                attention_map_BS = deformable_attention_map(
                    level_references,
                    offsets,
                    logits,
                    geometry.level_shapes,
                    len(x_BQC),
                    into=attention_map_BS,
                )
        return predictions, attention_map_BS
