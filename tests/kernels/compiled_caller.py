"""Deformable attention as projects write it that ship this operator as a compiled extension; from its signatures.

Import it after `install_shims`.
"""

from __future__ import annotations

from typing import Any

import MultiScaleDeformableAttention as extension
import torch
from torch import Tensor, nn
from torch.autograd import Function

from ats_detr.kernels import reference


class MSDeformAttnFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
        sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
    ) -> Tensor:  # fmt: skip
        ctx.im2col_step = im2col_step
        tensors = (
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )
        ctx.save_for_backward(*tensors)
        return extension.ms_deform_attn_forward(*tensors, ctx.im2col_step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        gradients = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.im2col_step)
        grad_value, grad_locations, grad_weights = gradients
        return grad_value, None, None, grad_locations, grad_weights, None


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return reference.multi_scale_deformable_attention(
        value, value_spatial_shapes.tolist(), sampling_locations, attention_weights
    )


class MSDeformAttn(nn.Module):
    """With projections, like every caller; `compiled` chooses the function."""

    def __init__(self, d_model: int = 32, n_levels: int = 2, n_heads: int = 4, n_points: int = 3) -> None:
        super().__init__()
        self.im2col_step, self.compiled = 64, True
        self.heads, self.levels, self.points = n_heads, n_levels, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    def forward(
        self, query: Tensor, reference_points: Tensor, input_flatten: Tensor, input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
    ) -> Tensor:  # fmt: skip
        value = self.value_proj(input_flatten).unflatten(-1, (self.heads, -1))
        samples = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        locations = reference_points[:, :, None, :, None] + 0.1 * offsets
        weights = weights.unflatten(-1, samples[1:])
        if self.compiled:
            output = MSDeformAttnFunction.apply(
                value, input_spatial_shapes, input_level_start_index, locations, weights, self.im2col_step
            )
        else:
            output = ms_deform_attn_core_pytorch(value, input_spatial_shapes, locations, weights)
        return self.output_proj(output)


def inputs(d_model: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random arguments of `MSDeformAttn.forward`: two images of two levels, six queries each."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[6, 8], [3, 4]])
    query, reference_points, tokens = (
        torch.rand(shape, generator=generator) for shape in ((2, 6, d_model), (2, 6, 2, 2), (2, 60, d_model))
    )
    return query, reference_points, tokens, shapes, torch.tensor([0, 48])
