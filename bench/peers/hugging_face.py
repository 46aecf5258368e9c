"""Deformable DETR and RT-DETR of the transformers library."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
)

from ats_detr.batch import ImageBatch
from bench.peers import Peer

NUM_CLASSES = 91


def deformable_detr() -> Peer:
    """The library's default: one stage, no box refinement; the fastest of the family."""
    config = DeformableDetrConfig(num_labels=NUM_CLASSES, backbone="resnet50", use_pretrained_backbone=False)
    model = DeformableDetrForObjectDetection(config)

    def run(batch: ImageBatch) -> object:
        return model(pixel_values=batch.images_B3HW, pixel_mask=(~batch.padding_mask_BHW).long())

    return Peer(model, run, encoder=model.model.encoder)


def rt_detr() -> Peer:
    """RT-DETR R50. It is designed for 640x640; here it gets the common images, padded to a multiple of 32."""
    model = RTDetrForObjectDetection(RTDetrConfig(num_labels=NUM_CLASSES))

    def run(batch: ImageBatch) -> object:
        height, width = batch.images_B3HW.shape[-2:]
        return model(pixel_values=F.pad(batch.images_B3HW, (0, -width % 32, 0, -height % 32)))

    return Peer(model, run, encoder=model.model.encoder)
