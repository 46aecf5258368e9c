"""Inputs of the model: a padded batch of images, and the targets of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_IMAGE = -(2**63) - 1
"""Image id of a target without an image in a data set; it cannot collide with an int64 id."""


@dataclass
class Target:
    """Ground truth of one image."""

    image_id: int
    original_size: tuple[int, int]
    """(height, width) in pixels of the image as stored."""
    labels_N: Tensor
    """int64 class indices of the N objects."""
    boxes_N4: Tensor
    """float32 cxcywh, 0..1 of the unpadded image."""

    def to(self, device: torch.device | str) -> Target:
        """A copy with its tensors on the device."""
        labels, boxes = (t.to(device, non_blocking=True) for t in (self.labels_N, self.boxes_N4))
        return Target(self.image_id, self.original_size, labels, boxes)


def targets_to(targets: Sequence[Target], device: torch.device | str) -> list[Target]:
    """Copies of the targets with their tensors on the device, moved in one transfer."""
    counts = [len(target.labels_N) for target in targets]
    columns = [torch.cat([target.boxes_N4, target.labels_N[:, None].float()], 1) for target in targets]
    table = torch.cat(columns)  # float32 represents labels up to 2^24 exactly
    if torch.device(device).type == "cuda":
        table = table.pin_memory()
    table = table.to(device, non_blocking=True)
    boxes, labels = table[:, :4].split(counts), table[:, 4].long().split(counts)
    return [
        Target(target.image_id, target.original_size, own_labels, own_boxes)
        for target, own_labels, own_boxes in zip(targets, labels, boxes, strict=True)
    ]


def most_of_a_class(targets: Sequence[Target]) -> int:
    """The largest number of objects of the same class in the same image. Targets must be on the CPU."""
    return max(
        (int(np.unique(target.labels_N, return_counts=True)[1].max(initial=0)) for target in targets),
        default=0,
    )


@dataclass
class ImageBatch:
    """Normalised images of different sizes in one tensor, zero-padded at the bottom and right."""

    images_B3HW: Tensor
    """Float, normalised by the ImageNet mean and standard deviation."""
    sizes: list[tuple[int, int]]
    """(height, width) of each image without padding, on the host."""

    @staticmethod
    def collate(images: Sequence[Tensor], size_multiple: int = 1) -> ImageBatch:
        """A batch of images [3, h, w], padded to their largest height and width rounded up to `size_multiple`."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = bucket_size((max(h for h, _ in sizes), max(w for _, w in sizes)), size_multiple)
        batch = images[0].new_zeros(len(images), 3, height, width)
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image
        return ImageBatch(batch, sizes)

    @property
    def sizes_B2(self) -> Tensor:
        """`sizes` on the device, int64."""
        return torch.tensor(self.sizes).to(self.images_B3HW.device, non_blocking=True)

    @property
    def padding_mask_BHW(self) -> Tensor:
        """Bool, True on padding."""
        return padding_mask(self.images_B3HW, self.sizes_B2)

    def to(self, device: torch.device | str) -> ImageBatch:
        """A copy on the device."""
        return ImageBatch(self.images_B3HW.to(device, non_blocking=True), self.sizes)

    def pin_memory(self) -> ImageBatch:
        """A copy in pinned memory, for asynchronous transfers to a GPU."""
        return ImageBatch(self.images_B3HW.pin_memory(), self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def padding_mask(images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
    """Bool [B, H, W], True on the padding of images of these sizes (height, width)."""
    height, width = images_B3HW.shape[-2:]
    is_below = torch.arange(height, device=images_B3HW.device) >= sizes_B2[:, :1]  # [B, height]
    is_right = torch.arange(width, device=images_B3HW.device) >= sizes_B2[:, 1:]  # [B, width]
    return is_below[:, :, None] | is_right[:, None, :]


def bucket_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The padded (height, width) of an image: each side rounded up to a multiple of `multiple`."""
    height, width = size
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
