"""The encoder: refines the kept tokens only, each image paying for its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ats_detr.kernels import TokenPlan, pack_tokens, scatter_tokens
from ats_detr.model.attention import DeformableAttention
from ats_detr.model.tokens import Tokens


class FeedForward(nn.Module):
    """Linear, ReLU, Linear with dropout, residual and LayerNorm."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class EncoderLayer(nn.Module):
    """Deformable attention from packed rows into the dense memory, then the feed-forward network;
    post-norm.
    """

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
        memory_BSC: Tensor,
        tokens: Tokens,
        image_index_K: Tensor | None,
    ) -> Tensor:
        """Refined rows [K, C]."""
        attention = self.attention
        value_BSHD = attention.project_value(memory_BSC, tokens.padding_mask_BS)
        offsets, logits = attention.project_query(rows_KC + positions_KC)
        gathered = attention.attend(
            value_BSHD, tokens.level_shapes, references_KL2, offsets, logits, image_index_K
        )
        rows_KC = self.attention_norm(rows_KC + self.dropout(gathered))
        return self.feedforward(rows_KC)


class Encoder(nn.Module):
    """A stack of layers over one selection of tokens, made before the first."""

    def __init__(self, num_layers: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, tokens: Tokens, plan: TokenPlan | None) -> tuple[Tensor, list[Tensor]]:
        """The memory [B, S, C] and the rows [K, C] after each layer.

        After each layer the refined rows are written back; tokens that were not kept stay the raw features.
        Without a plan every token is refined, K = B * S.
        """
        memory_BSC = tokens.features_BSC
        dense = (memory_BSC, tokens.positions_BSC, tokens.reference_points())
        if plan is None:
            rows_KC, positions_KC, references_KL2 = (tensor.flatten(0, 1) for tensor in dense)
        else:
            rows_KC, positions_KC, references_KL2 = pack_tokens(plan, *dense)
        image_index_K = None if plan is None else plan.image_index_K
        layer_rows = []
        for layer in self.layers:
            rows_KC = layer(rows_KC, positions_KC, references_KL2, memory_BSC, tokens, image_index_K)
            memory_BSC = (
                rows_KC.view_as(memory_BSC) if plan is None else scatter_tokens(plan, memory_BSC, rows_KC)
            )
            layer_rows.append(rows_KC)
        return memory_BSC, layer_rows
