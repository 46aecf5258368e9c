"""Multi-scale deformable attention as a layer (Deformable DETR, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats_detr.kernels import (
    TokenPlan,
    deformable_attention,
    packed_linear,
    packed_linear_norm,
    scatter_tokens,
    zero_padding,
)
from ats_detr.kernels.reference import LevelShapes


class DeformableAttention(nn.Module):
    """Deformable attention: each query samples `num_points` locations of every level.

    The sampling offsets (relative to the query's reference) and the attention weights are linear functions of the
    query.

    Raises:
        ValueError: if `width` is not divisible by `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.value_proj = nn.Linear(width, width)
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * num_points)
        self.output_proj = nn.Linear(width, width)
        self.register_buffer("query_weight", None, persistent=False)  # see `fuse_weights`
        self.register_buffer("query_bias", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the projections as in Deformable DETR.

        Head h samples in direction 2 pi h / H, point p at distance p + 1 pixels; all attention weights are equal.
        """
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        for parameter in (*self.attention_weights.parameters(), self.sampling_offsets.weight):
            nn.init.zeros_(parameter)
        angle_H = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction_H2 = torch.stack([angle_H.cos(), angle_H.sin()], -1)
        direction_H2 /= direction_H2.abs().amax(-1, keepdim=True)
        distance_P = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction_H2[:, None, None] * distance_P[:, None]
        bias = offsets.expand(self.num_heads, self.num_levels, self.num_points, 2).flatten()
        self.sampling_offsets.bias.copy_(bias)

    def fuse_weights(self) -> None:
        """Store the weights of both projections of the query as one, for inference with weights that never change."""
        self.query_weight, self.query_bias = _concatenated([self.sampling_offsets, self.attention_weights])

    def project_query(
        self, rows_KC: Tensor, positions_KC: Tensor, num_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sampling offsets [K, H, L, P, 2] in pixels and attention logits [K, H, L, P] of packed queries.

        Args:
            rows_KC: features of the queries; their positions are added.
            num_rows: int32 [1] on the device: rows in use; later rows are uninitialised. None: all.
        """
        shape = (self.num_heads, self.num_levels, self.num_points)
        if torch.is_grad_enabled() or (num_rows is None and self.query_weight is None):
            query_KC = rows_KC + positions_KC
            offsets, logits = self.sampling_offsets(query_KC), self.attention_weights(query_KC)
        else:  # one GEMM with float32 results
            weight, bias = self.query_weight, self.query_bias
            if weight is None:
                weight, bias = _concatenated([self.sampling_offsets, self.attention_weights])
            both = packed_linear(rows_KC, weight, bias, num_rows, add_KC=positions_KC, dtype=torch.float32)
            offsets, logits = both.split([2 * math.prod(shape), math.prod(shape)], 1)
        return offsets.unflatten(-1, (*shape, 2)), logits.unflatten(-1, shape)

    def update_values(self, plan: TokenPlan, value_BSC: Tensor, rows_KC: Tensor) -> Tensor:
        """Values [B, S, C] in which the kept tokens have the projections of `rows_KC`.

        Updates `value_BSC` in place unless gradients are enabled.
        """
        projection = self.value_proj
        if plan.num_rows is not None:
            return packed_linear(
                rows_KC, projection.weight, projection.bias, plan.num_rows, memory_BSF=value_BSC, plan=plan
            )
        return scatter_tokens(plan, value_BSC, projection(rows_KC), in_place=not torch.is_grad_enabled())

    def attend(
        self,
        value_BSC: Tensor,
        level_shapes: LevelShapes,
        reference_points: Tensor,
        offsets_KHLP2: Tensor,
        logits_KHLP: Tensor,
        image_index_K: Tensor | None = None,
        num_rows: Tensor | None = None,
    ) -> Tensor:
        """Attention output [K, C] of packed queries before `output_proj`; see `ats_detr.kernels.deformable_attention`.

        Args:
            value_BSC: projected values, see `project_values`.
            reference_points: [K, L, 2] points or [K, L, 4] boxes, normalised to each level.
            image_index_K: image of each query, ascending. None: all images have K / B consecutive queries.
            num_rows: int32 [1] on the device: number of rows in use. None: all.
        """
        return deformable_attention(
            value_BSC.unflatten(-1, (self.num_heads, -1)),
            level_shapes,
            reference_points,
            offsets_KHLP2,
            logits_KHLP,
            image_index_K,
            num_rows=num_rows,
        )


def project_values(
    attentions: Sequence[DeformableAttention],
    memory_BSC: Tensor,
    padding_mask_BS: Tensor,
    fused: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> list[Tensor]:
    """Projected values [B, S, C] of the same memory for each of several attention layers, zero at padding.

    On CUDA, the values are slices of the result of one GEMM, which the kernels read in place. On the CPU, separate
    projections take the same time, and sampling contiguous rows is faster (1,782 queries of R50: 2.3 ms instead of
    6.4 ms, two CPU threads, 2026-11-23).

    Args:
        fused: `value_weights` of the layers, where they are stored.
    """
    if memory_BSC.is_cuda:
        weight, bias = fused if fused[0] is not None else value_weights(attentions)
        values = zero_padding(F.linear(memory_BSC, weight, bias), padding_mask_BS)
        return list(values.chunk(len(attentions), dim=-1))
    return [zero_padding(attention.value_proj(memory_BSC), padding_mask_BS) for attention in attentions]


def value_weights(attentions: Sequence[DeformableAttention]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the value projections of several layers as one."""
    return _concatenated([attention.value_proj for attention in attentions])


def _concatenated(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def linear_norm(
    x: Tensor,
    linear: nn.Linear,
    dropout: nn.Dropout,
    residual: Tensor,
    norm: nn.LayerNorm,
    num_rows: Tensor | None = None,
) -> Tensor:
    """norm(residual + dropout(linear(x))), [..., C]. `num_rows`: rows in use (inference only), None: all."""
    if num_rows is None and (torch.is_grad_enabled() or norm.training):
        return norm(residual + dropout(linear(x)))
    rows, residual_rows = x.flatten(0, -2), residual.flatten(0, -2)
    affine = (norm.weight, norm.bias, norm.eps)
    out = packed_linear_norm(rows, linear.weight, linear.bias, residual_rows, *affine, num_rows)
    return out.view_as(residual)


def linear_relu(x: Tensor, linear: nn.Linear) -> Tensor:
    """max(linear(x), 0)."""
    if torch.is_grad_enabled():
        return linear(x).relu()
    return packed_linear(x.flatten(0, -2), linear.weight, linear.bias, relu=True).unflatten(0, x.shape[:-1])
