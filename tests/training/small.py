"""A small detector, batches and configs for training tests."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from ats_detr.batch import ImageBatch, Target
from ats_detr.config import Config, config_from_dict
from ats_detr.training.setup import Run, Stage, prepare

SMALL_MODEL: dict[str, Any] = {
    "backbone": {
        "name": "resnet10t",
        "pretrained": False,
        "frozen_stages": 0,
        "options": {"channels": [16, 16, 32, 32], "stem_width": 16},
    },
    "selector": {"keep_ratio": 0.3},
    "width": 32,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "feedforward_width": 32,
    "dropout": 0.0,
    "num_queries": 20,
    "two_stage": True,
    "box_refine": True,
    "queries_from_memory": True,
    "class_specific_proposals": True,
    "encoder_auxiliary": True,
}
SMALL_DATA: dict[str, Any] = {
    "kind": "synthetic",
    "short_side": 64,
    "long_side": 64,
    "train_short_sides": [64],
    "crop_short_sides": [],
    "size_multiple": 32,
    "batch_size": 4,
    "eval_batch_size": 4,
    "num_workers": 0,
    "synthetic": {"num_train": 16, "num_val": 7, "image_size": 64, "num_classes": 3, "max_objects": 4},
}
SMALL_TRAIN: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-3,
    "scale_learning_rate": False,
    "log_every": 1,
}
ADAPTIVE: dict[str, Any] = {
    "selector": {"keep_ratio": None, "min_ratio": 0.3, "max_ratio": 0.6, "min_tokens": 4},
    "adaption": True,
}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` updated recursively by `above`."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def small_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run with data and results in `folder`."""
    data = merged(SMALL_DATA, {"root": str(folder / "data")})
    base = {"model": SMALL_MODEL, "data": data, "train": SMALL_TRAIN, "output_dir": str(folder / "run")}
    return merged({**base, "name": "small", "num_pictures": 1, "device": "cpu"}, changes)


def small_config(folder: Path, **changes: Any) -> Config:
    """The same as a Config."""
    return config_from_dict(small_tree(folder, **changes))


def small_run(folder: Path, config: Config | None = None, device: str = "cpu", **changes: Any) -> Run:
    """A run of a small config, or of `config`, in `folder`/run."""
    stage = Stage("small", config or small_config(folder, **changes), folder / "run")
    return prepare(stage, torch.device(device), None)


def write_small_chain(folder: Path, **changes: Any) -> Path:
    """Write YAML files of two teachers and their student. Returns the path of the student's file."""
    tree = small_tree(folder, **changes)
    strong = {"model": {"selector": {"keep_ratio": 0.6}}, "train": {"init_from": "weak"}}
    teachers = {name: {"config": f"{name}.yaml"} for name in ("weak", "strong")}
    student = {"model": ADAPTIVE, "train": {"init_from": "strong"}, "teachers": teachers}
    for name, own in (("weak", {}), ("strong", strong), ("student", student)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(merged(tree, own)))
    return folder / "student.yaml"


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Context in which writes beyond this file size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def random_batch(
    seed: int, num_objects: list[int], size: int = 128, num_classes: int = 3
) -> tuple[ImageBatch, list[Target]]:
    """Square noise images of equal size with the given numbers of objects."""
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, size, size, generator=g) for _ in num_objects]
    targets = [
        Target(
            image_id=i,
            original_size=(size, size),
            labels_N=torch.randint(num_classes, (n,), generator=g),
            boxes_N4=torch.rand(n, 4, generator=g) * 0.3 + 0.3,
        )
        for i, n in enumerate(num_objects)
    ]
    return ImageBatch.collate(images), targets
