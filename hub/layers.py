"""The layer that the `kernels` library puts in place of transformers' module of the same name."""

from torch import Tensor, nn

from .attention import multi_scale_deformable_attention


class MultiScaleDeformableAttention(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return multi_scale_deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )
