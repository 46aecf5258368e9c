"""The operators of the detector. Needs torch only (and Triton for its kernels); knows nothing about detection.

`reference` defines every operator in plain PyTorch; `gpu` holds the Triton kernels; the modules beside them
choose between the two (`dispatch.choose_backend`) and register the operators with PyTorch.
"""

from ats_detr.kernels.adapt import Adaptation, adapt
from ats_detr.kernels.attention import deformable_attention, multi_scale_deformable_attention
from ats_detr.kernels.attention_map import deformable_attention_map
from ats_detr.kernels.convolution import affine_relu_, affine_relu_max_pool, fused_convolution
from ats_detr.kernels.explain import Choice, Explanation, explain
from ats_detr.kernels.geometry import TokenGeometry, encode_boxes, refine_boxes, token_geometry
from ats_detr.kernels.linear import packed_feedforward, packed_linear, packed_linear_norm
from ats_detr.kernels.normalization import group_norm_
from ats_detr.kernels.packing import pack_tokens, scatter_tokens, zero_padding
from ats_detr.kernels.plan import TokenPlan
from ats_detr.kernels.selection import select_tokens
from ats_detr.kernels.shims import install_shims

__all__ = [
    "Adaptation",
    "Choice",
    "Explanation",
    "TokenGeometry",
    "TokenPlan",
    "adapt",
    "affine_relu_",
    "affine_relu_max_pool",
    "deformable_attention",
    "deformable_attention_map",
    "encode_boxes",
    "explain",
    "fused_convolution",
    "group_norm_",
    "install_shims",
    "multi_scale_deformable_attention",
    "pack_tokens",
    "packed_feedforward",
    "packed_linear",
    "packed_linear_norm",
    "refine_boxes",
    "scatter_tokens",
    "select_tokens",
    "token_geometry",
    "zero_padding",
]
