"""Box arithmetic in float32: conversions, and broadcasting versions of operations of torchvision.ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners (x0, y0, x1, y1) [..., 4] of boxes (centre x, centre y, width, height) [..., 4]."""
    return box_convert(boxes, "cxcywh", "xyxy")


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
    a_left, a_top, a_right, a_bottom = a_xyxy.unbind(-1)
    b_left, b_top, b_right, b_bottom = b_xyxy.unbind(-1)
    width = torch.maximum(a_right, b_right) - torch.minimum(a_left, b_left)
    height = torch.maximum(a_bottom, b_bottom) - torch.minimum(a_top, b_top)
    hull = width * height
    return overlap / union - (hull - union) / hull


def _overlap_and_union(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    a_left, a_top, a_right, a_bottom = a_xyxy.unbind(-1)
    b_left, b_top, b_right, b_bottom = b_xyxy.unbind(-1)
    width = torch.minimum(a_right, b_right) - torch.maximum(a_left, b_left)
    height = torch.minimum(a_bottom, b_bottom) - torch.maximum(a_top, b_top)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    area_a, area_b = (a_right - a_left) * (a_bottom - a_top), (b_right - b_left) * (b_bottom - b_top)
    return overlap, area_a + area_b - overlap
