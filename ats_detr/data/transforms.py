"""From a decoded image and its boxes to what the model sees: the published augmentation and the evaluation's
resize.

Geometry is torchvision.transforms.v2 on PIL images (PIL's bilinear filter always antialiases, as published)
and `tv_tensors.BoundingBoxes`; the only rules written here are those where torchvision rounds differently
from the published code or has no counterpart. Randomness comes from torch's global generator, which the
loaders seed per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from ats_detr.boxes import xyxy_to_cxcywh

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet statistics of RGB in 0..1."""


def resized_size(size: tuple[int, int], short_side: int, long_side: int | None = None) -> tuple[int, int]:
    """(height, width) after the published resize: shorter side `short_side` unless the longer would exceed
    `long_side`.

    The roundings are those of the published code, on which every published number rests: the reduced short
    side is rounded to nearest, the long side truncated; an image whose short side already fits is left alone.
    """
    height, width = size
    short, long = min(size), max(size)
    if long_side is not None and long / short * short_side > long_side:
        short_side = max(1, round(long_side * short / long))
    if short == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB PIL image -> float32 [3, h, w], normalised by the ImageNet statistics."""
    pixels = F.to_dtype(F.to_image(image).as_subclass(Tensor), torch.float32, scale=True)
    return F.normalize(pixels, IMAGE_MEAN, IMAGE_STD, inplace=True)


class ResizeShortSide(v2.Transform):
    """Resize to a short side drawn from `short_sides`, by the rule of `resized_size`."""

    def __init__(self, short_sides: Sequence[int], long_side: int | None = None) -> None:
        super().__init__()
        self.short_sides, self.long_side = tuple(short_sides), long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        # Where there is no choice nothing is drawn: evaluation leaves the global generator alone.
        choice = int(torch.randint(len(self.short_sides), ())) if len(self.short_sides) > 1 else 0
        short_side = self.short_sides[choice]
        return {"size": list(resized_size((height, width), short_side, self.long_side))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


class CropRandomSize(v2.Transform):
    """Crop a window at a random place, each side drawn uniformly from smallest..min(side of the image,
    largest).
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = (
            int(torch.randint(min(self.smallest, side), min(side, self.largest) + 1, ()))
            for side in (height, width)
        )
        top, left = (
            int(torch.randint(side - crop + 1, ()))
            for side, crop in ((height, crop_height), (width, crop_width))
        )
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class Transform:
    """(image, boxes_xyxy_N4 in pixels, labels_N) -> (float32 [3, h, w] normalised, boxes_cxcywh_N4 in 0..1,
    labels_N).

    Boxes are clipped to what is left of the image and stay if any area is left, as published; labels stay
    aligned.
    """

    def __init__(self, geometry: v2.Transform) -> None:
        self.geometry = geometry

    def __call__(
        self, image: Image.Image, boxes_xyxy_N4: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        boxes = BoundingBoxes(boxes_xyxy_N4, format="XYXY", canvas_size=(image.height, image.width))
        image, boxes = self.geometry(image, boxes)
        height, width = boxes.canvas_size
        corners = F.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        has_area = (corners[:, 2:] > corners[:, :2]).all(1)
        scale = corners.new_tensor([width, height, width, height])
        return image_to_tensor(image), xyxy_to_cxcywh(corners[has_area] / scale), labels_N[has_area]


def evaluation_transform(short_side: int = 800, long_side: int = 1333) -> Transform:
    """The published evaluation resize."""
    return Transform(ResizeShortSide((short_side,), long_side))


def training_transform(
    short_sides: Sequence[int] = tuple(range(480, 801, 32)),
    long_side: int = 1333,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] = (384, 600),
) -> Transform:
    """The published augmentation (DETR): flip with p 0.5; then, with p 0.5 each, a random resize, or a resize
    to `crop_short_sides`, a crop with sides in `crop_size`, and that random resize. No `crop_short_sides`: no
    crops.

    Raises ValueError for sizes that cannot work, e.g. a smallest crop above the smallest `crop_short_sides`.
    """
    if not short_sides or min(*short_sides, long_side) < 1:
        raise ValueError(
            f"train_short_sides {tuple(short_sides)} and long_side {long_side} must be positive sizes"
        )
    resize = ResizeShortSide(short_sides, long_side)
    if not crop_short_sides:
        return Transform(v2.Compose([v2.RandomHorizontalFlip(), resize]))
    smallest, largest = crop_size
    if not 1 <= smallest <= min(largest, *crop_short_sides):
        raise ValueError(
            f"crop_size {tuple(crop_size)} must be (smallest, largest) with smallest at least 1 and at most"
            f" min(crop_short_sides) = {min(crop_short_sides)}"
        )
    crop = v2.Compose([ResizeShortSide(crop_short_sides), CropRandomSize(smallest, largest), resize])
    return Transform(v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop])]))
