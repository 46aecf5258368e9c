"""Box arithmetic in float32: conversions, and broadcasting versions of operations of torchvision.ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners (x0, y0, x1, y1) [..., 4] of boxes (centre x, centre y, width, height) [..., 4].

    Equals torchvision's conversion, in half as many kernels.
    """
    centre, size = boxes.split(2, dim=-1)
    half = 0.5 * size
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes (centre x, centre y, width, height) [..., 4] of corners (x0, y0, x1, y1) [..., 4]."""
    return box_convert(boxes, "xyxy", "cxcywh")


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union [...], 0..1, of boxes [..., 4] whose leading axes broadcast.

    NaN if both boxes have zero area.
    """
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    return overlap / union


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU [...], -1..1 (Rezatofighi et al., 2019), of boxes [..., 4] whose leading axes broadcast.

    Unlike torchvision's loss, which indexes with a mask, it does not synchronise with the device. NaN if both boxes
    have zero area.
    """
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    hull = _area(
        torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    )
    return overlap / union - (hull - union) / hull


def _overlap_and_union(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    width, height = (torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - first).clamp(min=0).unbind(-1)
    overlap = width * height
    area_a, area_b = (_area(boxes[..., :2], boxes[..., 2:]) for boxes in (a_xyxy, b_xyxy))
    return overlap, area_a + area_b - overlap


def _area(first_xy: Tensor, last_xy: Tensor) -> Tensor:
    width, height = (last_xy - first_xy).unbind(-1)
    return width * height
