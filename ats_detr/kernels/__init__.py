"""The operators of the detector. Needs torch only; knows nothing about detection.

One place chooses the implementation: CPU tensors run the definitions of `reference`.
"""

from ats_detr.kernels.plan import TokenPlan
from ats_detr.kernels.reference import (
    attention_map,
    deformable_attention,
    deformable_attention_map,
    multi_scale_deformable_attention,
    pack_tokens,
    scatter_tokens,
    select_tokens,
)

__all__ = [
    "TokenPlan",
    "attention_map",
    "deformable_attention",
    "deformable_attention_map",
    "multi_scale_deformable_attention",
    "pack_tokens",
    "scatter_tokens",
    "select_tokens",
]
