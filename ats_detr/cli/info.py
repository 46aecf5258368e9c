"""Describe a configuration or a checkpoint: architecture, keep ratios, parameters, multiply-adds, classes, training."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ats_detr.batch import ImageBatch, bucket_size
from ats_detr.checkpoint import (
    config_of,
    load_checkpoint,
    load_detector,
    resolve_checkpoint,
)
from ats_detr.cli.options import CHECKPOINT, CONFIG, add_overrides
from ats_detr.config import Config, load_config, shipped_configs
from ats_detr.console import say
from ats_detr.data.coco import ClassMap
from ats_detr.data.transforms import resized_size
from ats_detr.errors import UserError
from ats_detr.flops import count_flops, num_parameters
from ats_detr.model import Detr, build_without_fetching
from ats_detr.model_card import name_of_model
from ats_detr.precompile import COCO_CLASSES, COMMON_SIZE

_MOST_PIXELS = 2**22
"""Of a padded image. Multiply-adds of larger ones are not counted: the pass takes too much time and memory."""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", help=f"{CHECKPOINT}; or {CONFIG}")
    add_overrides(parser, "model.num_queries=100")


def run(arguments: Namespace) -> None:
    """Print one line per property."""
    rows = describe(arguments.source, arguments.overrides)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")


def describe(source: str, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(property, value) pairs of a checkpoint or a configuration.

    Multiply-adds are counted on one noise image of 480 x 640, resized as in evaluation, at the smallest and the largest
    budget.

    Args:
        source: a YAML file, anything that `Detector.from_checkpoint` accepts, or the name of a shipped configuration.
        overrides: settings that take precedence over those of the source.

    Raises UserError if there is no such source or it cannot be read.
    """
    if _is_config(source):
        config = load_config(source, overrides)
        model = build_without_fetching(config, COCO_CLASSES).eval()
        return [
            ("configuration", source),
            *_about_model(config, model),
            ("training", _training(config)),
            ("data", f"{config.data.kind}, {config.data.root}; classes are read from its annotations"),
        ]
    path = resolve_checkpoint(source)
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, path, overrides)
    model = load_detector(config, checkpoint, path)
    return [
        ("checkpoint", str(path)),
        *_about_model(config, model),
        ("classes", _classes(ClassMap.from_dict(checkpoint["classes"]), checkpoint)),
        ("training", _progress(config, checkpoint)),
        *_metrics(checkpoint.get("metrics") or {}),
    ]


def _is_config(source: str) -> bool:
    """A run takes precedence over the shipped configuration of the same name."""
    if Path(source).suffix in (".yaml", ".yml"):
        return True
    if source not in shipped_configs():
        return False
    try:
        resolve_checkpoint(source)
    except UserError:
        return True
    return False


def _about_model(config: Config, model: Detr) -> list[tuple[str, str]]:
    size = config.model
    data = config.data
    layers = f"{size.num_encoder_layers} encoder and {size.num_decoder_layers} decoder layers"
    return [
        ("model", name_of_model(size)),
        ("size", f"{layers}, width {size.width}, {size.num_queries} queries, {size.num_levels} levels"),
        ("parameters", f"{num_parameters(model) / 1e6:.2f} M"),
        ("multiply-adds", _multiply_adds(config, model)),
        ("input", f"shorter side {data.short_side}, longer at most {data.long_side} pixels"),
    ]


def _multiply_adds(config: Config, model: Detr) -> str:
    height, width = resized_size(COMMON_SIZE, config.data.short_side, config.data.long_side)
    padded = bucket_size((height, width), config.data.size_multiple)
    if math.prod(padded) > _MOST_PIXELS:
        return f"not counted: an image of {width} x {height}, padded to {padded[1]} x {padded[0]}, takes too long"
    images = torch.zeros(1, 3, *padded)
    images[..., :height, :width] = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    batch = ImageBatch(images, [(height, width)])
    parts = []
    selector = model.selector
    for ratio in sorted({selector.min_ratio, selector.max_ratio}) if selector is not None else [1.0]:
        flops = count_flops(model, batch, keep_ratio=ratio)
        kept = "" if selector is None else f" keeping {ratio:.0%}"
        parts.append(f"{flops.total:.4g} G{kept} (encoder {flops.encoder:.3g})")
    return f"{', '.join(parts)}, for an image of {width} x {height}"


def _classes(classes: ClassMap, checkpoint: Mapping[str, Any]) -> str:
    names = classes.names
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    rows = "" if len(names) == checkpoint["num_classes"] else f" of {checkpoint['num_classes']} class indices"
    return f"{len(names)}{rows}: {listed}"


def _training(config: Config) -> str:
    train = config.train
    batch = f"{config.data.batch_size} images per process and step"
    return f"{train.epochs} epochs, {batch}, learning rate {train.learning_rate:g}"


def _progress(config: Config, checkpoint: Mapping[str, Any]) -> str:
    if checkpoint.get("published"):
        return "by the published code"
    if "converted_from" in checkpoint:
        return f"converted from {checkpoint['converted_from']}"
    epochs = f"{checkpoint['epoch']} of {config.train.epochs} epochs"
    minutes = checkpoint.get("train_seconds", 0.0) / 60
    return f"{config.name}, {epochs}" + (f", {minutes:.0f} minutes" if minutes >= 1 else "")


def _metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    if metrics.get("AP") is None:
        return []
    kept = f", keeping {metrics['mean_keep_ratio']:.1%} of the tokens" if "mean_keep_ratio" in metrics else ""
    return [("when finished", f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}{kept}")]
