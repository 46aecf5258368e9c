"""What a training comes from: its settings and other facts. Another origin is another training, to be refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ats_detr.config import Config, config_to_dict
from ats_detr.errors import UserError
from ats_detr.training.checkpoint import config_of

WITHOUT_INFLUENCE = (
    *("name", "output_dir", "device", "summary", "num_pictures"),
    *("teachers.weak.config", "teachers.weak.checkpoint"),  # their weights are compared instead
    *("teachers.strong.config", "teachers.strong.checkpoint"),
    *("data.num_workers", "data.cache_images", "data.on_bad_image", "data.eval_batch_size"),
    *("train.resume", "train.checkpoint_every", "train.checkpoint_every_steps", "train.evaluate_every"),
    *("train.log_every", "train.max_skipped_steps", "train.recompute", "train.compile", "deterministic"),
)
"""Settings that a finished training may differ in."""
ADJUSTABLE = (
    *WITHOUT_INFLUENCE,
    *("train.epochs", "train.learning_rate", "train.backbone_learning_rate"),
    *("train.offset_learning_rate_factor", "train.scale_learning_rate", "train.weight_decay"),
    *(
        "train.clip_norm",
        "train.precision",
        "train.ema_decay",
        "train.schedule",
        "train.drop_epochs",
        "train.drop_factor",
        "train.warmup_share",
    ),
)
"""Settings that may change when a training goes on: those of its optimiser and schedule too."""


def check_same_origin(
    checkpoint: Mapping[str, Any],
    path: Path,
    config: Config,
    facts: Mapping[str, Any],
    may_change: Sequence[str],
) -> None:
    """Refuse a checkpoint of another training than the one that is asked for. Raises UserError naming what differs.

    Args:
        facts: what the checkpoint must hold under these keys, beside an equal configuration.
        may_change: settings, or groups of settings, that are not compared.
    """
    was = config_to_dict(config_of(checkpoint, path)) | {key: checkpoint.get(key) for key in facts}
    changes = [
        f"{key} = {old!r}, now {new!r}"
        for key, old, new in differences(was, config_to_dict(config) | dict(facts))
        if not any(key == free or key.startswith(f"{free}.") for free in may_change)
    ]
    if changes:
        mend = "choose another output_dir, delete this folder, or train again with train.resume=never"
        shown = "; ".join(changes[:3])
        raise UserError(f"{path.parent} was trained with other settings ({shown}): {mend}")


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each plain value in which two trees of dictionaries and lists differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new


def digest(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that tell these weights from others."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
