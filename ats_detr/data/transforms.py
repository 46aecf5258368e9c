"""Transforms of images and boxes: the published augmentation and the resize of the evaluation.

They use torchvision.transforms.v2 on PIL images (PIL's bilinear filter always antialiases, as published) and
`tv_tensors.BoundingBoxes`. The transforms defined here are those that torchvision rounds differently from the published
code or does not have. Random numbers come from torch's global generator, which the loaders seed per image.
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
    """(height, width) after the published resize: the shorter side is `short_side` unless the longer would exceed
    `long_side`.

    Rounding is that of the published code: the reduced short side is rounded to nearest, the long side is truncated; an
    image whose short side already fits keeps its size.
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
    """Convert an RGB PIL image to float32 [3, h, w], normalised by the ImageNet statistics."""
    pixels = F.to_dtype(F.to_image(image).as_subclass(Tensor), torch.float32, scale=True)
    return F.normalize(pixels, IMAGE_MEAN, IMAGE_STD, inplace=True)


class ResizeShortSide(v2.Transform):
    """Resize to a short side drawn from `short_sides`, by the rule of `resized_size`."""

    def __init__(self, short_sides: Sequence[int], long_side: int | None = None) -> None:
        super().__init__()
        self.short_sides, self.long_side = tuple(short_sides), long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        # With one choice nothing is drawn, so that evaluation does not change the global generator.
        choice = int(torch.randint(len(self.short_sides), ())) if len(self.short_sides) > 1 else 0
        short_side = self.short_sides[choice]
        return {"size": list(resized_size((height, width), short_side, self.long_side))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


class CropRandomSize(v2.Transform):
    """Crop a window at a random position; each side is drawn uniformly from smallest..min(image side, largest)."""

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


class RandomRotate90(v2.Transform):
    """Rotate by 0, 90, 180 or 270 degrees, with equal probability. Exact for pixels and boxes."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"angle": 90 * int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.rotate(inpt, params["angle"], expand=True) if params["angle"] else inpt


class Transform:
    """Transform of an image with its boxes and labels.

    Input: PIL image, boxes_xyxy_N4 in pixels, labels_N. Output: float32 [3, h, w], normalised; boxes_cxcywh_N4 in 0..1;
    labels_N. Boxes are clipped to the transformed image; those left without area are removed with their labels.
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
    rotate_90: bool = False,
    color_jitter: float = 0.0,
) -> Transform:
    """The published augmentation (DETR), and options for small datasets.

    A horizontal flip with probability 0.5; then, with probability 0.5 each, either a random resize, or a resize to
    `crop_short_sides`, a crop with sides in `crop_size`, and the random resize. Empty `crop_short_sides`: no crops.

    Args:
        rotate_90: before that, rotate by a random multiple of 90 degrees.
        color_jitter: before that, scale brightness, contrast and saturation by independent random factors in
            1 - color_jitter..1 + color_jitter.

    Raises ValueError if sizes are inconsistent, such as a smallest crop above the smallest of `crop_short_sides`.
    """
    if not short_sides or min(*short_sides, long_side) < 1:
        raise ValueError(
            f"train_short_sides {tuple(short_sides)} and long_side {long_side} must be positive sizes"
        )
    resize = ResizeShortSide(short_sides, long_side)
    first: list[v2.Transform] = [v2.ColorJitter(*[color_jitter] * 3)] if color_jitter else []
    first += [RandomRotate90()] if rotate_90 else []
    first.append(v2.RandomHorizontalFlip())
    if not crop_short_sides:
        return Transform(v2.Compose([*first, resize]))
    smallest, largest = crop_size
    if not 1 <= smallest <= min(largest, *crop_short_sides):
        raise ValueError(
            f"crop_size {tuple(crop_size)} must be (smallest, largest) with smallest at least 1 and at most"
            f" min(crop_short_sides) = {min(crop_short_sides)}"
        )
    crop = v2.Compose([ResizeShortSide(crop_short_sides), CropRandomSize(smallest, largest), resize])
    return Transform(v2.Compose([*first, v2.RandomChoice([resize, crop])]))
