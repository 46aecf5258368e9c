"""The encoder: updates the kept tokens of all images, packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats_detr.kernels import TokenPlan, pack_tokens, packed_feedforward, scatter_tokens
from ats_detr.kernels.reference import LevelShapes
from ats_detr.model.attention import (
    DeformableAttention,
    linear_norm,
    linear_relu,
    project_values,
    value_weights,
)
from ats_detr.model.tokens import Tokens


class FeedForward(nn.Module):
    """Feed-forward network: linear, ReLU, linear, with dropout, residual connection and LayerNorm (post-norm)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, num_rows: Tensor | None = None) -> Tensor:
        """Updated features [..., C] of features [..., C].

        num_rows: rows in use of [K, C], int32 [1] on the device (inference only). None: all.
        """
        if num_rows is not None:
            layers = (self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
            return packed_feedforward(x, *layers, self.norm.weight, self.norm.bias, self.norm.eps, num_rows)
        hidden = self.dropout(linear_relu(x, self.linear1))
        return linear_norm(hidden, self.linear2, self.dropout, x, self.norm)


class EncoderLayer(nn.Module):
    """Deformable attention and feed-forward network, post-norm. K kept tokens are queries; all S tokens are values."""

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
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = FeedForward(width, feedforward_width, dropout)

    def forward(
        self,
        rows_KC: Tensor,
        positions_KC: Tensor,
        references_KL2: Tensor,
        value_BSC: Tensor,
        level_shapes: LevelShapes,
        plan: TokenPlan | None,
    ) -> Tensor:
        """Updated rows [K, C].

        Args:
            rows_KC: features of the kept tokens.
            positions_KC: their positional encodings.
            references_KL2: their centres, normalised to each level.
            value_BSC: projected values of all tokens.
            plan: the selection; rows that a capacity plan does not use are skipped. None: all tokens, K = B * S.
        """
        attention = self.attention
        image_index_K, num_rows = (None, None) if plan is None else (plan.image_index_K, plan.num_rows)
        offsets, logits = attention.project_query(rows_KC, positions_KC, num_rows)
        gathered = attention.attend(
            value_BSC, level_shapes, references_KL2, offsets, logits, image_index_K, num_rows
        )
        rows_KC = linear_norm(
            gathered, attention.output_proj, self.dropout, rows_KC, self.attention_norm, num_rows
        )
        return self.feedforward(rows_KC, num_rows)


class LayerStack(nn.Module):
    """Layers that each attend to values of the same memory."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = False
        """Recompute the activations of each layer in the backward pass (training only)."""
        self.register_buffer("value_weight", None, persistent=False)  # see `fuse_weights`
        self.register_buffer("value_bias", None, persistent=False)

    def attentions(self) -> list[DeformableAttention]:
        """The deformable attention of each layer."""
        return [
            part
            for layer in self.layers
            for part in layer.children()
            if isinstance(part, DeformableAttention)
        ]

    def fuse_weights(self) -> None:
        """Store the weights of the layers' value projections as one, for inference with weights that never change."""
        self.value_weight, self.value_bias = value_weights(self.attentions())

    def project_values(self, memory_BSC: Tensor, padding_mask_BS: Tensor) -> list[Tensor]:
        """The values [B, S, C] of each layer; see the function `project_values`."""
        fused = (self.value_weight, self.value_bias)
        return project_values(self.attentions(), memory_BSC, padding_mask_BS, fused)

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        """`layer(*inputs)`, recomputed in the backward pass where `recompute` is set."""
        if self.recompute and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class Encoder(LayerStack):
    """A stack of layers that update the same selection of tokens."""

    def __init__(self, num_layers: int, **layer: Any) -> None:
        super().__init__(EncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, tokens: Tokens, plan: TokenPlan | None) -> tuple[Tensor, list[Tensor]]:
        """The memory [B, S, C] and the kept rows [K, C] after each layer.

        Each layer reads the rows updated by the previous layer; tokens that are not kept remain the raw features.
        Without a plan all tokens are updated, K = B * S.
        """
        memory_BSC = tokens.features_BSC
        positions_KC, references_KL2 = tokens.rows(plan)
        rows_KC = memory_BSC.flatten(0, 1) if plan is None else pack_tokens(plan, memory_BSC)[0]
        # With a plan, most rows of the memory never change: their values are projected once for all layers, and each
        # layer projects only the kept rows again.
        mask_BS, level_shapes = tokens.geometry.padding_mask_BS, tokens.geometry.level_shapes
        raw_values = [] if plan is None else self.project_values(memory_BSC, mask_BS)
        layer_rows: list[Tensor] = []
        for index, (layer, attention) in enumerate(zip(self.layers, self.attentions(), strict=True)):
            if plan is None:
                (value_BSC,) = project_values([attention], rows_KC.view_as(memory_BSC), mask_BS)
            else:
                value_BSC = raw_values[index]
                if index > 0:
                    value_BSC = attention.update_values(plan, value_BSC, rows_KC)
            rows_KC = self.run_layer(
                layer, rows_KC, positions_KC, references_KL2, value_BSC, level_shapes, plan
            )
            layer_rows.append(rows_KC)
        if plan is None:
            return rows_KC.view_as(memory_BSC), layer_rows
        return scatter_tokens(plan, memory_BSC, rows_KC), layer_rows
