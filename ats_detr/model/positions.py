"""Sine encodings of positions and boxes (DETR, appendix A.4; Efficient DETR for boxes)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_features(angle: Tensor, num_features: int) -> Tensor:
    """[..., n] angles in radians -> [..., n, num_features]: sine on even, cosine on odd features, falling
    frequencies.
    """
    exponent = torch.arange(num_features, dtype=torch.float32, device=angle.device).div(
        2, rounding_mode="floor"
    )
    angle = angle[..., None] / TEMPERATURE ** (2 * exponent / num_features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def encode_grid(padding_mask_BHW: Tensor, width: int) -> Tensor:
    """[B, H, W, width] float32 encoding of each cell: y features first, then x, relative to the unpadded
    area.
    """
    valid = ~padding_mask_BHW
    axes = []
    for dim in (1, 2):
        count = valid.cumsum(dim, dtype=torch.float32)
        last = count.narrow(dim, count.shape[dim] - 1, 1)
        axes.append(sine_features((count - 0.5) / (last + 1e-6) * (2 * math.pi), width // 2))
    return torch.cat(axes, dim=-1)


def encode_boxes(boxes_cxcywh: Tensor, width: int) -> Tensor:
    """[..., 4] boxes in 0..1 -> [..., 2 * width], `width / 2` features for each of cx, cy, w, h."""
    return sine_features(boxes_cxcywh * (2 * math.pi), width // 2).flatten(-2)
