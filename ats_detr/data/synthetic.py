"""A synthetic detection dataset of known difficulty, generated from a seed and cached in COCO's layout.

Images show textured shapes on textured backgrounds, from one large object to twenty-five small overlapping ones. A
detector learns on them, and learns to allocate its tokens by difficulty, within minutes on a CPU.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ats_detr.config import ConfigError, SyntheticConfig
from ats_detr.errors import UserError
from ats_detr.files import exclusive_use

log = logging.getLogger(__name__)

VERSION = 1
"""Part of the cache folder's name; must be raised when the same seed gives different images."""

MIN_SIDE = 12.0
"""Minimum side of an object in pixels, at which shape and texture remain distinguishable."""
MIN_VISIBLE = 0.65
"""Minimum visible share of an object that is partly covered by others."""

Array = NDArray[np.floating]


# Shapes: signed distance of points (x, y) to the outline, negative inside, in units of half the object's side.


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.72


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.5


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.maximum(np.minimum(x, y) - 0.27, np.maximum(x, y) - 0.88)


def _ring(x: Array, y: Array) -> Array:
    return abs(np.hypot(x, y) - 0.72) - 0.24


def _bar(x: Array, y: Array) -> Array:
    return np.maximum(abs(x) - 0.95, abs(y) - 0.32)


def _half_disc(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y + 0.4) - 0.95, -y - 0.4)


def _star(x: Array, y: Array) -> Array:
    angle = np.arctan2(y, x)
    return np.hypot(x, y) - 0.62 - 0.3 * np.cos(5 * angle)


# Textures: values in 0..1 at points (x, y), in units of the texture's period.


def _stripes(x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.sin(2 * np.pi * x)


def _checks(x: Array, y: Array) -> Array:
    return (np.sin(np.pi * x) * np.sin(np.pi * y) > 0).astype(np.float32)


def _dots(x: Array, y: Array) -> Array:
    return (np.hypot(x - np.floor(x) - 0.5, y - np.floor(y) - 0.5) < 0.3).astype(np.float32)


def _plain(x: Array, y: Array) -> Array:
    return np.zeros_like(x)


CLASSES: tuple[tuple[str, Callable[[Array, Array], Array], Callable[[Array, Array], Array]], ...] = (
    ("striped disc", _disc, _stripes),
    ("checked square", _square, _checks),
    ("dotted triangle", _triangle, _dots),
    ("plain cross", _cross, _plain),
    ("checked ring", _ring, _checks),
    ("striped bar", _bar, _stripes),
    ("dotted half disc", _half_disc, _dots),
    ("plain star", _star, _plain),
)
"""Name, shape and texture of each class. Colours are random and independent of the class."""


@dataclass(frozen=True)
class DrawnImage:
    """One synthetic image and its exact ground truth."""

    pixels: NDArray[np.uint8]
    """[height, width, 3]"""
    classes: NDArray[np.int64]
    """[objects] index into CLASSES"""
    boxes_xyxy: NDArray[np.int64]
    """[objects, 4] tight boxes of the visible pixels, right and bottom exclusive"""
    areas: NDArray[np.int64]
    """[objects] visible pixels"""


def draw_image(
    rng: np.random.Generator, size: tuple[int, int], num_objects: int, num_classes: int
) -> DrawnImage:
    """An image of `size` (height, width) with exactly `num_objects` objects; their size falls with their number.

    Later objects may cover earlier ones, of which at least MIN_VISIBLE remains visible. Raises UserError if the objects
    do not fit.
    """
    for _ in range(10):
        drawn = _try_to_draw(rng, size, num_objects, num_classes)
        if drawn is not None:
            return drawn
    raise UserError(
        f"{num_objects} objects do not fit in {size[1]}x{size[0]} pixels; reduce max_objects or increase image_size"
    )


def _try_to_draw(
    rng: np.random.Generator, size: tuple[int, int], num_objects: int, num_classes: int
) -> DrawnImage | None:
    height, width = size
    canvas = _background(rng, size)
    brightness = canvas.mean()
    object_map = np.zeros(size, np.int64)  # 0: background, otherwise 1 + index of the object on top
    classes = rng.integers(num_classes, size=num_objects)
    full_area, visible = np.zeros(num_objects + 1), np.zeros(num_objects + 1)
    windows: list[tuple[slice, slice]] = []
    for i, class_index in enumerate(classes):
        for _ in range(40):
            side = np.sqrt(height * width * 0.42 / num_objects) * np.exp(rng.uniform(-0.25, 0.25))
            side = float(np.clip(side, MIN_SIDE, 0.85 * min(size)))
            extent = int(np.ceil(side)) + 2
            top, left = (int(rng.integers(0, max(1, length - extent + 1))) for length in size)
            window = (slice(top, top + extent), slice(left, left + extent))
            alpha, texture = _shape(rng, extent, side, int(class_index))
            below = object_map[window]
            inner = (slice(below.shape[0]), slice(below.shape[1]))
            alpha, texture = alpha[inner], texture[inner]
            inside = alpha >= 0.5
            covered = np.bincount(below[inside], minlength=num_objects + 1)
            covered[0] = 0
            if (visible - covered >= MIN_VISIBLE * full_area).all():
                break
        else:
            return None
        visible -= covered
        full_area[i + 1] = visible[i + 1] = inside.sum()
        below[inside] = i + 1
        colour, texture_colour = _colours(rng, brightness)
        paint = colour + (texture_colour - colour) * texture[..., None]
        canvas[window] += (paint - canvas[window]) * alpha[..., None]
        windows.append(window)

    boxes = np.zeros((num_objects, 4), np.int64)
    for i, (rows, columns) in enumerate(windows):
        mine = object_map[rows, columns] == i + 1
        ys, xs = mine.any(1).nonzero()[0], mine.any(0).nonzero()[0]
        boxes[i] = (
            columns.start + xs[0],
            rows.start + ys[0],
            columns.start + xs[-1] + 1,
            rows.start + ys[-1] + 1,
        )
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return DrawnImage(pixels, classes, boxes, visible[1:].astype(np.int64))


def _shape(rng: np.random.Generator, extent: int, side: float, class_index: int) -> tuple[Array, Array]:
    """Alpha and texture, each [extent, extent] in 0..1, of an object rotated by a random angle."""
    _, distance, pattern = CLASSES[class_index]
    axis = (np.arange(extent, dtype=np.float32) - (extent - 1) / 2) * (2 / side)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = cos * axis + sin * axis[:, None]
    y = cos * axis[:, None] - sin * axis
    alpha = np.clip(0.5 - distance(x, y) * (side / 2), 0, 1)
    # A period is a fifth of the object, at least 4 pixels.
    periods = np.float32(side / 2 / max(4.0, side / 5))
    return alpha, pattern(x * periods, y * periods)


def _colours(rng: np.random.Generator, background: float) -> tuple[Array, Array]:
    """Colours of an object and of its texture, RGB in 0..255, in strong contrast to the background."""
    lighter = rng.random() < (255 - background) / 255
    low, high = (background + 55, 255) if lighter else (0, background - 55)
    colour = rng.uniform(low, max(low + 20, high), 3)
    texture_colour = colour + (255 - colour if colour.mean() < 128 else -colour) * rng.uniform(0.45, 0.75)
    return colour.astype(np.float32), texture_colour.astype(np.float32)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Background [height, width, 3] of colour clouds, grain of a few pixels and faint waves."""
    height, width = size
    brightness = rng.uniform(70, 185)
    clouds = _noise(rng, size, max(2, min(size) // 40), 22.0)
    grain = _noise(rng, size, max(2, min(size) // 4), rng.uniform(4, 16))
    fx, fy = rng.uniform(-0.25, 0.25, 2)
    phase = (np.arange(width) * fx + np.arange(height)[:, None] * fy) * np.pi
    waves = np.sin(phase)[..., None] * rng.uniform(0, 9)
    return (brightness + clouds + grain + waves).astype(np.float32)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: int, amplitude: float) -> Array:
    """Smooth noise [height, width, 3] of standard deviation `amplitude`, with `cells` cells along the shorter side."""
    height, width = size
    coarse = (height * cells // min(size), width * cells // min(size), 3)
    values = np.clip(128 + rng.standard_normal(coarse) * 40, 0, 255).astype(np.uint8)
    smooth = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(smooth, np.float32) - 128) * np.float32(amplitude / 40)


def spread_counts(
    rng: np.random.Generator, num_images: int, smallest: int, largest: int
) -> NDArray[np.int64]:
    """Number of objects per image: small numbers are frequent, and small datasets cover the whole range, too.

    Shuffled quantiles of smallest + (largest + 1 - smallest) * u^2, u uniform; for 1..25 the median is 7, the mean 8.8.
    """
    quantiles = (rng.permutation(num_images) + 0.5) / num_images
    return smallest + ((largest + 1 - smallest) * quantiles**2).astype(np.int64)


def synthetic_dataset(cache_folder: str | Path, **settings: Any) -> Path:
    """Folder of the dataset in COCO's layout, generated unless it is in the cache.

    Layout: train2017/, val2017/ and annotations/instances_{train,val}2017.json. Images are JPEGs of about image_size²
    pixels with aspect ratios in 1/max_aspect_ratio..max_aspect_ratio. The folder is created atomically; of several
    processes one generates it, the others wait, for at most 30 minutes. About 400 images of 128 x 128 pixels per second
    and core.

    Args:
        settings: fields of `ats_detr.config.SyntheticConfig`, such as `num_train`.

    Raises UserError if sizes or counts are out of range, or if the folder cannot be written.
    """
    try:
        config = SyntheticConfig(**settings)
    except ConfigError as error:
        raise UserError(f"synthetic {error}") from None
    if config.num_classes > len(CLASSES):
        raise UserError(f"synthetic num_classes = {config.num_classes}: must be <= {len(CLASSES)}")
    smallest = math.ceil(math.sqrt(config.max_objects * 2.5) * MIN_SIDE)
    if config.image_size < smallest:
        raise UserError(
            f"synthetic image_size = {config.image_size}: must be >= {smallest} for {config.max_objects} objects of"
            f" {MIN_SIDE:g} pixels each"
        )
    name = (
        f"synthetic-v{VERSION}-{config.num_train}-{config.num_val}-{config.image_size}px"
        f"-ratio{config.max_aspect_ratio:g}-{config.num_classes}classes"
        f"-{config.min_objects}to{config.max_objects}-seed{config.seed}"
    )
    folder = Path(cache_folder) / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_use(folder.parent, wait=True):
            for unfinished in folder.parent.glob(".synthetic-v*"):  # of killed processes
                shutil.rmtree(unfinished)
            if folder.is_dir():  # generated by another process
                return folder
            log.info("generating %d synthetic images in %s", config.num_train + config.num_val, folder)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
                unfinished = Path(temporary) / "dataset"
                (unfinished / "annotations").mkdir(parents=True)
                for split, num_images in enumerate((config.num_train, config.num_val)):
                    rng = np.random.default_rng([config.seed, split])
                    counts = spread_counts(rng, num_images, config.min_objects, config.max_objects)
                    _write_split(unfinished, split, counts.tolist(), config)
                os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"cannot write the synthetic dataset to {folder}: {error.strerror}") from None
    return folder


def _write_split(folder: Path, split: int, counts: list[int], config: SyntheticConfig) -> None:
    """Write images with these numbers of objects and their annotations; split 0 is the training split."""
    name = ("train2017", "val2017")[split]
    (folder / name).mkdir()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index, count in enumerate(counts):
        rng = np.random.default_rng([config.seed, split, index])
        size = _draw_size(rng, config.image_size, config.max_aspect_ratio)
        drawn = draw_image(rng, size, count, config.num_classes)
        file_name = f"{index + 1:06d}.jpg"
        Image.fromarray(drawn.pixels).save(folder / name / file_name, quality=92, subsampling=0)
        images.append({"id": index + 1, "file_name": file_name, "height": size[0], "width": size[1]})
        annotations += _annotations(drawn, image_id=index + 1, first_id=len(annotations) + 1)
    categories = [{"id": i + 1, "name": CLASSES[i][0]} for i in range(config.num_classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def _draw_size(rng: np.random.Generator, image_size: int, max_aspect_ratio: float) -> tuple[int, int]:
    stretch = float(np.exp(rng.uniform(-0.5, 0.5) * np.log(max_aspect_ratio)))
    return round(image_size / stretch), round(image_size * stretch)


def _annotations(drawn: DrawnImage, image_id: int, first_id: int) -> list[dict[str, object]]:
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": class_index + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": area,
            "iscrowd": 0,
        }
        for i, (class_index, (x0, y0, x1, y1), area) in enumerate(
            zip(drawn.classes.tolist(), drawn.boxes_xyxy.tolist(), drawn.areas.tolist(), strict=True)
        )
    ]
