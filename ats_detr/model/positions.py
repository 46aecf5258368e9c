"""Sine encodings of positions and boxes (DETR, appendix A.4; Efficient DETR for boxes)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_features(angle: Tensor, num_features: int) -> Tensor:
    """Sine (even) and cosine (odd) features [..., n, num_features] of angles [..., n] in radians.

    Frequencies decrease geometrically from 1 to about 1 / TEMPERATURE.
    """
    exponent = torch.arange(num_features, dtype=torch.float32, device=angle.device).div(
        2, rounding_mode="floor"
    )
    angle = angle[..., None] / TEMPERATURE ** (2 * exponent / num_features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def encode_grid(padding_mask_BHW: Tensor, width: int) -> Tensor:
    """Encoding of each cell of a map, float32 [B, H, W, width]: `width / 2` features of y, then of x.

    Positions are relative to the unpadded area. `padding_mask_BHW` is True on padding.
    """
    valid = ~padding_mask_BHW
    axes = []
    for dim in (1, 2):
        count = valid.cumsum(dim, dtype=torch.float32)
        last = count.narrow(dim, count.shape[dim] - 1, 1)
        axes.append(sine_features((count - 0.5) / (last + 1e-6) * (2 * math.pi), width // 2))
    return torch.cat(axes, dim=-1)


def encode_boxes(boxes_cxcywh: Tensor, width: int) -> Tensor:
    """Encoding [..., 2 * width] of boxes [..., 4] in 0..1: `width / 2` features for each of cx, cy, w, h."""
    return sine_features(boxes_cxcywh * (2 * math.pi), width // 2).flatten(-2)
