"""RetinaNet and FCOS of torchvision. Their time includes non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchvision.models import detection

from ats_detr.batch import ImageBatch
from bench.peers import Peer


def retinanet() -> Peer:
    return _peer(detection.retinanet_resnet50_fpn)


def fcos() -> Peer:
    return _peer(detection.fcos_resnet50_fpn)


def _peer(build: Callable[..., Any]) -> Peer:
    # The images are normalised already.
    model = build(
        weights=None, weights_backbone=None, num_classes=91, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )

    def run(batch: ImageBatch) -> object:
        # And resized: these bounds make its own resizing an identity.
        sides = batch.images_B3HW.shape[-2:]
        model.transform.min_size, model.transform.max_size = (min(sides),), max(sides)
        return model(list(batch.images_B3HW))

    return Peer(model, run)
