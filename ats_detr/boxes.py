"""Box arithmetic that torchvision.ops does not have, and its conversions under the names used here. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre, width and height -> corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] corners -> centre, width and height."""
    return box_convert(boxes, "xyxy", "cxcywh")


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1], both x and 1 - x clamped to at least `eps` (Deformable DETR)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] that broadcast against each other (torchvision's take lists), 0..1.

    NaN where both boxes lack area.
    """
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    return overlap / union


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of boxes [..., 4] that broadcast against each other; -1..1.

    Unlike torchvision's loss it does not wait for the device (that picks the overlapping pairs by a mask). NaN where
    both boxes lack area.
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
