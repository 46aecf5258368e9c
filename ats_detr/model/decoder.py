"""The decoder: self-attention of the queries, deformable cross-attention to the memory, and box refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats_detr.kernels import TokenGeometry, deformable_attention_map, packed_linear, refine_boxes
from ats_detr.kernels.reference import LevelShapes
from ats_detr.model.attention import DeformableAttention, linear_norm, linear_relu
from ats_detr.model.encoder import FeedForward, LayerStack
from ats_detr.model.output import Prediction


class Perceptron(nn.ModuleList):
    """Linear layers with ReLUs between them; features [..., C]."""

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            x = linear_relu(x, layer)  # type: ignore[arg-type]
        return last(x)


class PredictionHead(nn.Module):
    """Classes (linear layer) and boxes (3-layer perceptron) of queries or proposals."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        last = nn.Linear(width, 4)
        self.box = Perceptron([nn.Linear(width, width), nn.Linear(width, width), last])
        nn.init.constant_(self.classify.bias, -math.log(99))  # every class starts at probability 0.01
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, reference: Tensor) -> Prediction:
        """Class logits [..., T] and boxes [..., 4] (cxcywh, 0..1).

        Args:
            x: features [..., C].
            reference: float32 logits of boxes [..., 4] to which the predicted offsets are added.
        """
        return Prediction(self.classify(x), (self.offsets(x).float() + reference).sigmoid())

    def offsets(self, x: Tensor) -> Tensor:
        """Offsets [..., 4] of the boxes from their references, in logits."""
        return self.box(x)


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
        group_sizes: Sequence[int] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Updated queries [B, Q, C], and the cross-attention's offsets [B * Q, H, L, P, 2] and logits [B * Q, H, L, P].

        Args:
            x_BQC: content of the queries.
            query_pos_BQC: positional part of the queries.
            level_references: [B * Q, L, 2] points or [B * Q, L, 4] boxes, normalised to each level.
            value_BSC: projected values of the memory.
            group_sizes: numbers of consecutive queries that attend to each other only, Q in all. None: one group.
        """
        attended_BQC = self._attend_to_queries(x_BQC, query_pos_BQC, group_sizes)
        own, cross = self.self_attention, self.cross_attention
        x_BQC = linear_norm(attended_BQC, own.out_proj, self.dropout, x_BQC, self.self_norm)
        offsets, logits = cross.project_query(x_BQC.flatten(0, 1), query_pos_BQC.flatten(0, 1))
        gathered = cross.attend(value_BSC, level_shapes, level_references, offsets, logits).view_as(x_BQC)
        x_BQC = linear_norm(gathered, cross.output_proj, self.dropout, x_BQC, self.cross_norm)
        return self.feedforward(x_BQC), (offsets, logits)

    def _attend_to_queries(
        self, x_BQC: Tensor, query_pos_BQC: Tensor, group_sizes: Sequence[int] | None
    ) -> Tensor:
        """Self-attention of the queries of each group before its output projection, as nn.MultiheadAttention, batch
        first."""
        attention, width = self.self_attention, x_BQC.shape[-1]
        weights = attention.in_proj_weight.split([2 * width, width])
        biases = attention.in_proj_bias.split([2 * width, width])
        if torch.is_grad_enabled():
            projected = F.linear(x_BQC + query_pos_BQC, weights[0], biases[0])
        else:
            content, positions = x_BQC.flatten(0, 1), query_pos_BQC.flatten(0, 1)
            projected = packed_linear(content, weights[0], biases[0], add_KC=positions).view(
                *x_BQC.shape[:2], -1
            )
        values = F.linear(x_BQC, weights[1], biases[1])
        query, key, value = (
            rows.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for rows in (*projected.chunk(2, dim=-1), values)
        )
        dropout = attention.dropout if self.training else 0.0
        groups = [(query, key, value)]
        if group_sizes is not None:
            groups = list(zip(*(rows.split(group_sizes, dim=2) for rows in groups[0]), strict=True))
        attended = [
            F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            for query, key, value in groups
        ]
        rows = attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)
        return rows.transpose(1, 2).flatten(2)


class Decoder(LayerStack):
    """A stack of layers. With `box_refine`, the (detached) boxes of each layer are the references of the next."""

    def __init__(self, num_layers: int, box_refine: bool, **layer: Any) -> None:
        super().__init__(DecoderLayer(**layer) for _ in range(num_layers))
        self.box_refine = box_refine

    def forward(
        self,
        x_BQC: Tensor,
        query_pos_BQC: Tensor,
        references: Tensor,
        reference_logits: Tensor,
        memory_BSC: Tensor,
        geometry: TokenGeometry,
        heads: Sequence[PredictionHead],
        *,
        group_sizes: Sequence[int] | None,
        every_layer: bool,
        with_attention_map: bool,
    ) -> tuple[list[Prediction], Tensor | None]:
        """The predictions, and the attention that each token received from the first group, summed over layers, [B, S].

        Args:
            references: initial references in 0..1 of the unpadded image, [B, Q, 2] points or [B, Q, 4] boxes.
            reference_logits: their logits.
            heads: one head per layer, or one shared head.
            group_sizes: numbers of consecutive queries that attend to each other only, Q in all. None: one group.
            every_layer: return the predictions of all layers instead of the last only.
            with_attention_map: compute the attention map; otherwise None is returned for it.
        """
        predictions, attention_map_BS = [], None
        ratios = geometry.valid_ratios_BL2.repeat(1, 1, references.shape[-1] // 2)  # [B, L, 2 or 4]
        level_references = (references[:, :, None] * ratios[:, None]).flatten(0, 1)
        values = self.project_values(memory_BSC, geometry.padding_mask_BS)
        for index, (layer, value_BSC) in enumerate(zip(self.layers, values, strict=True)):
            x_BQC, (offsets, logits) = self.run_layer(
                layer, x_BQC, query_pos_BQC, level_references, value_BSC, geometry.level_shapes, group_sizes
            )
            if with_attention_map:
                attention_map_BS = deformable_attention_map(
                    _of_first_group(level_references, len(x_BQC), group_sizes),
                    _of_first_group(offsets, len(x_BQC), group_sizes),
                    _of_first_group(logits, len(x_BQC), group_sizes),
                    geometry.level_shapes,
                    len(x_BQC),
                    into=attention_map_BS,
                )
            is_wanted = every_layer or layer is self.layers[-1]
            if is_wanted or self.box_refine:
                head = heads[index % len(heads)]
                # A point is a box whose width and height are predicted without a reference.
                if reference_logits.shape[-1] == 2:
                    reference_logits = F.pad(reference_logits, (0, 2))
                boxes_BQ4, refined_BQ4, on_levels = refine_boxes(
                    head.offsets(x_BQC), reference_logits, geometry.valid_ratios_BL2
                )
                if is_wanted:
                    predictions.append(Prediction(head.classify(x_BQC), boxes_BQ4))
                if self.box_refine:
                    reference_logits, level_references = refined_BQ4, on_levels
        return predictions, attention_map_BS


def _of_first_group(rows: Tensor, num_images: int, group_sizes: Sequence[int] | None) -> Tensor:
    """The rows of the first group of queries, of rows [B * Q, ...] of all queries."""
    if group_sizes is None:
        return rows
    return rows.unflatten(0, (num_images, -1))[:, : group_sizes[0]].flatten(0, 1)
