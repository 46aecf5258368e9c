"""Everything a run needs to go on exactly where it was, written to its checkpoint and read back."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ats_detr import distributed
from ats_detr.checkpoint import (
    FINISHED,
    config_of,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_json,
)
from ats_detr.config import Config, config_to_dict
from ats_detr.errors import UserError
from ats_detr.model import Detr
from ats_detr.training.distillation import DifficultyCache
from ats_detr.training.optim import MovingAverage

logger = logging.getLogger(__name__)

RESUMABLE = "checkpoint.pt"
"""In a stage's folder: the state to go on from."""
PREVIOUS = "checkpoint.previous.pt"
"""The one before it, for the case that it turns out to be damaged."""
BEST = "best.pt"
"""The weights of the best evaluation, where that was not the last."""
RESULTS = (FINISHED, BEST, RESUMABLE, PREVIOUS, "metrics.json")
OUTDATED = "outdated"
"""Marks a folder whose results a start with `train.resume=never` is going to replace."""


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


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights, optimiser and random numbers."""

    epoch: int = 0
    """Completed epochs."""
    epoch_step: int = 0
    """Completed steps of the epoch after those: with the seed, all that the sampler's position depends on."""
    step: int = 0
    """Completed steps."""
    train_seconds: float = 0.0
    best_ap: float | None = None
    """Of all evaluations so far."""
    skipped_steps: int = 0
    """Steps without a finite gradient."""


@dataclass
class State:
    """What training changes."""

    model: Detr
    optimizer: AdamW
    average: MovingAverage | None
    progress: Progress
    difficulty: DifficultyCache | None = None
    """What the weak teacher has found so far, of this process, where that is kept."""

    @property
    def evaluated(self) -> Detr:
        """The model whose detections count: the average where there is one."""
        return self.model if self.average is None else self.average.model


def load_resumable(config: Config, facts: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The run's own checkpoint, if there is one to go on from; the one before it where that is damaged.

    Raises UserError where it is of another training, or where there are checkpoints of which none can be read.
    """
    if not is_resuming(config, folder):
        return None
    damage: UserError | None = None
    for path in (folder / RESUMABLE, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path, verify=True)
        except UserError as error:
            damage = damage or error
            continue
        if damage is not None:
            logger.warning("%s; using the one before it, %s", damage, path)
        check_same_origin(checkpoint, path, config, facts, ADJUSTABLE)
        if checkpoint["epoch"] >= config.train.epochs:
            raise UserError(
                f"{path}: has done {checkpoint['epoch']} epochs, but train.epochs = {config.train.epochs}:"
                f" give more than {checkpoint['epoch']}, or train again with train.resume=never"
            )
        return checkpoint | {"path": path}
    if damage is not None:
        raise UserError(
            f"{damage}; there is no other to go on from: delete it, or train again with train.resume=never"
        )
    return None


def is_resuming(config: Config, folder: Path) -> bool:
    """Whether what is in the run's folder counts. What a launcher starts again after a crash goes on too, but not
    from what was there before its first start."""
    return config.train.resume == "auto" or (distributed.is_restarted() and not (folder / OUTDATED).exists())


def mark_outdated(folder: Path) -> None:
    """Results in the folder do not count, but stay until a training is about to replace them."""
    if distributed.is_main() and folder.exists():
        (folder / OUTDATED).touch()


def restore(checkpoint: Mapping[str, Any], state: State, device: torch.device) -> None:
    """Restore everything that training changes from the run's own checkpoint. Strict: nothing may be missing.

    Learning rates and weight decay stay as the optimiser was built: they may have been changed since.
    """
    path = checkpoint["path"]
    load_weights(state.model, checkpoint["model"], path)
    if state.average is not None:
        load_weights(state.average.model, checkpoint.get("average", checkpoint["model"]), path)
    optimizer = state.optimizer
    asked = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)
    restore_rng(checkpoint["rng"][distributed.rank()], device)
    if state.difficulty is not None and checkpoint.get("difficulty"):
        state.difficulty.load(checkpoint["difficulty"][distributed.rank()], device)
    known = {field.name for field in dataclasses.fields(Progress)} & checkpoint.keys()
    state.progress = Progress(**{name: checkpoint[name] for name in known})
    within = f", {state.progress.epoch_step} steps into the next" if state.progress.epoch_step else ""
    logger.info("going on from %s after epoch %d%s", path, state.progress.epoch, within)


def save(config: Config, facts: Mapping[str, Any], folder: Path, state: State, device: torch.device) -> None:
    """Write the checkpoint to go on from. Every process calls it."""
    rng = distributed.gather(rng_state(device))
    difficulty = None if state.difficulty is None else distributed.gather(state.difficulty.state())
    if not distributed.is_main():
        return
    checkpoint = _common(config, facts, state, state.model)
    checkpoint |= {"optimizer": state.optimizer.state_dict(), "rng": rng, "finished": False}
    if state.average is not None:
        checkpoint["average"] = state.average.model.state_dict()
    if difficulty is not None:
        checkpoint["difficulty"] = difficulty
    save_checkpoint(checkpoint, folder / RESUMABLE, previous=folder / PREVIOUS)


def save_result(
    config: Config,
    facts: Mapping[str, Any],
    folder: Path,
    state: State,
    metrics: Mapping[str, Any],
    name: str,
) -> None:
    """Write the evaluated weights and what was measured of them, as `best.pt` or `final.pt`."""
    if not distributed.is_main():
        return
    checkpoint = _common(config, facts, state, state.evaluated) | {"metrics": metrics, "finished": True}
    if name == FINISHED:
        write_json(metrics, folder / "metrics.json")
    save_checkpoint(checkpoint, folder / name)
    if name == FINISHED:
        for path in (RESUMABLE, PREVIOUS):
            (folder / path).unlink(missing_ok=True)


def discard_results(folder: Path) -> None:
    """Remove what an earlier training left: nobody may take it for the result of the one that starts now."""
    distributed.barrier()  # every process has read what it needs of it
    if distributed.is_main():
        for name in (*RESULTS, OUTDATED):
            (folder / name).unlink(missing_ok=True)


def _common(config: Config, facts: Mapping[str, Any], state: State, model: Detr) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "config": config_to_dict(config),
        "num_classes": model.num_classes,
        **facts,
        **dataclasses.asdict(state.progress),
    }


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


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the random number generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
