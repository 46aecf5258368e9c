"""Datasets and loaders of a config, for this process."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ats_detr import distributed
from ats_detr.config import Config, DataConfig
from ats_detr.data.coco import ClassMap, CocoDetection, spread_over_difficulty
from ats_detr.data.layout import Role
from ats_detr.data.loader import EvaluationLoader, TrainingLoader
from ats_detr.data.sources import find_split
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.data.transforms import training_transform
from ats_detr.errors import UserError

_OVERFIT_BATCHES = 50
"""Batches per epoch where `data.overfit_images` is set."""
_CALIBRATION_IMAGES = 1000
"""Images, of all numbers of objects, on which self-taught budgets are calibrated."""


@dataclass(frozen=True)
class Loaders:
    """The loaders of a training run."""

    train: TrainingLoader
    val: EvaluationLoader
    class_map: ClassMap
    calibration: EvaluationLoader | None = None
    """Training images, without augmentation, on which self-taught budgets are calibrated."""

    def close(self) -> None:
        """End the worker processes."""
        self.train.reader.close()
        self.val.reader.close()
        if self.calibration is not None:
            self.calibration.reader.close()


def build_loaders(config: Config, *, pin_memory: bool = False) -> Loaders:
    """Training and validation loaders of this process, with the classes of the training annotations."""
    data = config.data
    train_set = open_dataset(data, "train")
    transform = training_transform(
        short_sides=data.train_short_sides,
        long_side=data.long_side,
        crop_short_sides=data.crop_short_sides,
        crop_size=data.crop_size,
        rotate_90=data.rotate_90,
        color_jitter=data.color_jitter,
    )
    images_per_step = data.batch_size * distributed.world_size()
    indices = overfit_indices(data, train_set)
    train = TrainingLoader(
        train_set,
        transform,
        batch_size=data.batch_size,
        indices=indices and indices * math.ceil(_OVERFIT_BATCHES * images_per_step / len(indices)),
        seed=config.seed,
        num_workers=data.num_workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        pin_memory=pin_memory,
        timeout_minutes=config.train.timeout_minutes,
    )
    val = build_evaluation_loader(config, train_set.class_map, pin_memory=pin_memory)
    calibration = None
    if config.teachers == "self":
        chosen = indices or spread_over_difficulty(train_set, _CALIBRATION_IMAGES)
        calibration = _evaluation_loader(config, train_set, chosen, pin_memory=pin_memory)
    return Loaders(train, val, train_set.class_map, calibration)


def build_evaluation_loader(
    config: Config,
    class_map: ClassMap,
    *,
    shared: bool = True,
    num_images: int | None = None,
    pin_memory: bool = False,
    split: Role = "val",
) -> EvaluationLoader:
    """The validation loader of this process.

    Args:
        class_map: classes of the model.
        shared: split the images over the processes; False: each process reads all of them.
        num_images: number of images, evenly spaced by their number of objects. None: all.
        split: the images to evaluate on.
    """
    data = config.data
    overfits = data.overfit_images > 0 and split == "val"
    dataset = open_dataset(data, "train" if overfits else split, class_map)
    indices = None
    if overfits:
        indices = overfit_indices(data, dataset)
    elif num_images is not None:
        indices = spread_over_difficulty(dataset, num_images)
    return _evaluation_loader(config, dataset, indices, shared=shared, pin_memory=pin_memory)


def _evaluation_loader(
    config: Config,
    dataset: CocoDetection,
    indices: list[int] | None,
    *,
    shared: bool = True,
    pin_memory: bool = False,
) -> EvaluationLoader:
    data = config.data
    return EvaluationLoader(
        dataset,
        short_side=data.short_side,
        long_side=data.long_side,
        size_multiple=data.size_multiple,
        batch_size=data.eval_batch_size,
        num_workers=data.num_workers,
        rank=distributed.rank() if shared else 0,
        world_size=distributed.world_size() if shared else 1,
        indices=indices,
        pin_memory=pin_memory,
        timeout_minutes=config.train.timeout_minutes,
    )


def overfit_indices(config: DataConfig, dataset: CocoDetection) -> list[int] | None:
    """The `overfit_images` images to train and evaluate on, of different numbers of objects. None: all images.

    Raises UserError if fewer images have objects.
    """
    wanted = config.overfit_images
    if not wanted:
        return None
    usable = np.flatnonzero((dataset.num_objects > 0) & ~dataset.unusable)
    if len(usable) < wanted:
        raise UserError(f"data.overfit_images = {wanted}: must be <= {len(usable)}, the images with objects")
    return spread_over_difficulty(dataset, wanted, usable)


def describe_images(dataset: CocoDetection) -> dict[str, Any]:
    """Number and digest of the images that determine the batches of an epoch: their ids and sizes, in order."""
    annotations = dataset.annotations
    sha = hashlib.sha256(annotations.image_ids.tobytes() + annotations.sizes.tobytes())
    if annotations.result_ids is not None:
        sha.update(annotations.result_ids.tobytes())
    return {"number": len(dataset), "digest": sha.hexdigest()[:16]}


def open_dataset(config: DataConfig, role: Role, class_map: ClassMap | None = None) -> CocoDetection:
    """The images to train, evaluate or test on. Raises UserError."""
    split = find_split(dataclasses.replace(config, kind="coco", root=str(data_root(config))), role)
    return CocoDetection(
        split.images,
        split.annotations,
        class_map=class_map,
        cache_images=config.cache_images,
        on_bad_image=config.on_bad_image,
        on_bad_annotation=config.on_bad_annotation,
        exif=config.exif,
        need_objects=role == "train",
        max_image_pixels=config.max_image_pixels,
    )


def data_root(config: DataConfig) -> Path:
    """The folder that the config's paths are relative to. Missing synthetic images are generated in it."""
    if config.kind == "coco":
        return Path(config.root)
    return synthetic_dataset(config.root, **dataclasses.asdict(config.synthetic))
