"""One-to-one assignment of predictions to objects (DETR), for all prediction layers of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from ats_detr.batch import Target
from ats_detr.boxes import cxcywh_to_xyxy

# Shapes: R rows of predictions of the whole batch, image after image; K classes; N objects of one image.


@dataclass(frozen=True, kw_only=True)
class PredictionRows:
    """The predictions of one layer as rows, the images one after another."""

    name: str
    """Names the layer in errors."""
    logits_RK: Tensor
    boxes_R4: Tensor
    """cxcywh, 0..1 of the unpadded image."""
    starts: Sequence[int]
    """[B+1] first row of each image and, last, the number of rows; on the host."""
    class_agnostic: bool = False
    """The layer tells objects from background only: its targets are all of class 0."""


@dataclass(frozen=True)
class Match:
    """Matched pairs of one layer, int64: prediction row `rows_M[i]` answers for object `objects_M[i]`."""

    rows_M: Tensor
    """Row of the layer, 0..R-1."""
    objects_M: Tensor
    """Index into the objects of the batch, the images one after another."""


class HungarianMatcher:
    """Minimum-cost assignment per layer and image: focal class cost, L1 on cxcywh, negative GIoU, in float32.

    The costs of every layer are computed on the device and fetched at once; scipy assigns on the host.
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ) -> None:
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @torch.no_grad()
    def __call__(self, layers: Sequence[PredictionRows], targets: Sequence[Target]) -> list[Match]:
        """The matches of each layer. An image with fewer rows than objects leaves objects unmatched.

        Raises:
            FloatingPointError: a cost is NaN or infinite; the message names the tensor that is to blame.
        """
        with_objects = [image for image, target in enumerate(targets) if len(target.labels_N)]
        costs = [self.costs_of_image(layers, image, targets[image]) for image in with_objects]
        pairs: list[list[np.ndarray]] = [[np.zeros((2, 0), np.int64)] for _ in layers]
        on_host = (
            torch.cat([cost.flatten() for cost in costs]).cpu().numpy() if costs else np.zeros(0, np.float32)
        )
        taken, first_object = 0, 0
        for image in with_objects:
            num_objects = len(targets[image].labels_N)
            for layer, found in zip(layers, pairs, strict=True):
                num_rows = layer.starts[image + 1] - layer.starts[image]
                cost = on_host[taken : taken + num_rows * num_objects].reshape(num_rows, num_objects)
                if not np.isfinite(cost).all():
                    raise FloatingPointError(_blame(layer, image, targets[image]))
                rows, objects = linear_sum_assignment(cost)
                found.append(np.stack([rows + layer.starts[image], objects + first_object]))
                taken += cost.size
            first_object += num_objects
        merged = [np.concatenate(found, axis=1) for found in pairs]
        on_host_pairs = torch.from_numpy(np.concatenate(merged, axis=1))
        on_device = on_host_pairs.to(layers[0].boxes_R4.device, non_blocking=True)
        return [Match(*part) for part in on_device.split([found.shape[1] for found in merged], dim=1)]

    def costs_of_image(self, layers: Sequence[PredictionRows], image: int, target: Target) -> Tensor:
        """float32 [rows of that image in the first layer + in the second + ..., N]."""
        rows = [slice(layer.starts[image], layer.starts[image + 1]) for layer in layers]
        no_class = torch.zeros_like(target.labels_N)
        p = torch.cat(
            [
                layer.logits_RK[own].index_select(1, no_class if layer.class_agnostic else target.labels_N)
                for layer, own in zip(layers, rows, strict=True)
            ]
        )
        p = p.float().sigmoid()
        found = self.focal_alpha * (1 - p) ** self.focal_gamma * -(p + 1e-8).log()
        missed = (1 - self.focal_alpha) * p**self.focal_gamma * -(1 - p + 1e-8).log()
        boxes = torch.cat([layer.boxes_R4[own] for layer, own in zip(layers, rows, strict=True)]).float()
        distance = torch.cdist(boxes, target.boxes_N4.float(), p=1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target.boxes_N4.float()))
        return self.class_cost * (found - missed) + self.bbox_cost * distance - self.giou_cost * giou


def _blame(layer: PredictionRows, image: int, target: Target) -> str:
    rows = slice(layer.starts[image], layer.starts[image + 1])
    suspects = {
        f"logits of {layer.name}": layer.logits_RK[rows],
        f"boxes of {layer.name}": layer.boxes_R4[rows],
        "target boxes": target.boxes_N4,
    }
    where = f"image {image} of the batch (id {target.image_id})"
    for name, tensor in suspects.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            return f"{name} hold {bad} NaN or infinite values for {where}"
    return f"the cost of {layer.name} is not finite for {where}: a predicted and a target box both lack area"
