"""The encoder: updates the kept tokens of all images, packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats_detr.kernels import (
    TokenPlan,
    pack_tokens,
    packed_feedforward,
    packed_linear_norm,
    scatter_tokens,
)
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

    def forward(self, x: Tensor) -> Tensor:
        """Updated features [..., C] of features [..., C]."""
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
            plan: the selection. None: all tokens are kept, K = B * S.
        """
        attention = self.attention
        if plan is not None and plan.num_rows is not None:
            return self._refine_rows_in_use(
                rows_KC, positions_KC, references_KL2, value_BSC, level_shapes, plan
            )
        offsets, logits = attention.project_query(rows_KC, positions_KC)
        image_index_K = None if plan is None else plan.image_index_K
        gathered = attention.attend(value_BSC, level_shapes, references_KL2, offsets, logits, image_index_K)
        rows_KC = linear_norm(gathered, attention.output_proj, self.dropout, rows_KC, self.attention_norm)
        return self.feedforward(rows_KC)

    def _refine_rows_in_use(
        self,
        rows_KC: Tensor,
        positions_KC: Tensor,
        references_KL2: Tensor,
        value_BSC: Tensor,
        level_shapes: LevelShapes,
        plan: TokenPlan,
    ) -> Tensor:
        """`forward` for a capacity plan, whose number of rows in use is known on the device only; skips unused rows."""
        attention, norm, feedforward = self.attention, self.attention_norm, self.feedforward
        num_rows = plan.num_rows
        assert num_rows is not None
        offsets, logits = attention.project_query(rows_KC, positions_KC, num_rows)
        gathered = attention.attend(
            value_BSC, level_shapes, references_KL2, offsets, logits, plan.image_index_K, num_rows
        )
        output = attention.output_proj
        rows_KC = packed_linear_norm(
            gathered, output.weight, output.bias, rows_KC, norm.weight, norm.bias, norm.eps, num_rows
        )
        return packed_feedforward(
            rows_KC,
            feedforward.linear1.weight,
            feedforward.linear1.bias,
            feedforward.linear2.weight,
            feedforward.linear2.bias,
            feedforward.norm.weight,
            feedforward.norm.bias,
            feedforward.norm.eps,
            num_rows,
        )


def run_layer(layer: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """`layer(*inputs)`. With `recompute`, activations are recomputed in the backward pass instead of stored."""
    return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)


class Encoder(nn.Module):
    """A stack of layers that update the same selection of tokens."""

    def __init__(self, num_layers: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_layers))
        self.recompute = False
        """Recompute the activations of each layer in the backward pass (training only)."""
        self.register_buffer("value_weight", None, persistent=False)  # see `fuse_weights`
        self.register_buffer("value_bias", None, persistent=False)

    def fuse_weights(self) -> None:
        """Store the weights of the layers' value projections as one, for inference with weights that never change."""
        attentions: Any = [layer.attention for layer in self.layers]
        self.value_weight, self.value_bias = value_weights(attentions)

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
        attentions: Any = [layer.attention for layer in self.layers]
        mask_BS, level_shapes = tokens.geometry.padding_mask_BS, tokens.geometry.level_shapes
        fused = (self.value_weight, self.value_bias)
        raw_values = [] if plan is None else project_values(attentions, memory_BSC, mask_BS, fused)
        layer_rows: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            attention = attentions[index]
            if plan is None:
                (value_BSC,) = project_values([attention], rows_KC.view_as(memory_BSC), mask_BS)
            else:
                value_BSC = raw_values[index]
                if index > 0:
                    value_BSC = attention.update_values(plan, value_BSC, rows_KC)
            rows_KC = run_layer(
                layer,
                self.recompute and self.training,
                *(rows_KC, positions_KC, references_KL2, value_BSC, level_shapes, plan),
            )
            layer_rows.append(rows_KC)
        if plan is None:
            return rows_KC.view_as(memory_BSC), layer_rows
        return scatter_tokens(plan, memory_BSC, rows_KC), layer_rows
