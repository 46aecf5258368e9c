"""A small detector for tests, with random weights that give images different budgets and detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ats_detr.config import config_from_dict, config_to_dict
from ats_detr.data.coco import ClassMap
from ats_detr.detector import Detector
from ats_detr.model import build_model
from tests.training.small import ADAPTIVE, SMALL_MODEL, merged

CLASSES = ClassMap.from_categories({3: "cup", 5: "cat", 9: "kite"})

SMALL = [
    "model.backbone.name=resnet18", "model.backbone.pretrained=false", "model.backbone.frozen_stages=0",
    "model.backbone.frozen_norm=false", "model.backbone.options={}",
    "model.width=32", "model.num_heads=8", "model.num_encoder_layers=2", "model.num_decoder_layers=2",
    "model.feedforward_width=32", "model.num_queries=20", "model.selector.min_tokens=4",
    "data.short_side=64", "data.long_side=64", "data.train_short_sides=[64]", "data.crop_short_sides=[]",
    "data.size_multiple=32", "data.num_workers=0", "data.synthetic.num_train=16", "data.synthetic.num_val=6",
    "data.synthetic.image_size=64", "data.synthetic.max_objects=4", "train.epochs=1", "train.drop_epochs=[]",
    "num_pictures=1", "device=cpu",
]  # fmt: skip
"""Overrides with which any configuration trains within seconds on a CPU."""


def small_detector(*, seed: int = 5, **changes: Any) -> Detector:
    """A detector for images of up to 64 x 128 (multiples of 32) that keeps 30 or 60 % of the tokens.

    `changes` are settings of the model.
    """
    tree = {
        "name": "small",
        "model": merged(merged(SMALL_MODEL, {**ADAPTIVE, "adaption": False}), changes),
        "data": {"short_side": 64, "long_side": 128, "size_multiple": 32},
    }
    config = config_from_dict(tree)
    torch.manual_seed(seed)
    model = build_model(config.model, CLASSES.num_rows).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "backbone" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for head in model.decoder_heads:
            head.classify.bias.fill_(-1.0)
        if model.selector is not None and model.selector.budget is not None:
            model.selector.budget[-1].weight.mul_(100)  # amplifies small differences between the images
    classes = CLASSES.to_dict()
    facts = {
        "config": config_to_dict(config),
        "num_classes": CLASSES.num_rows,
        "classes": classes,
        "epoch": 1,
        "finished": True,
    }
    return Detector(model, config, CLASSES, facts)


def save_small_detector(path: Path, **changes: Any) -> Path:
    small_detector(**changes).save(path)
    return path
