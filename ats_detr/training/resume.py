"""Resuming: checkpoints of everything that training changes, and the check that they belong to this training."""

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
from torch.optim import Optimizer

from ats_detr import distributed
from ats_detr.checkpoint import (
    FINISHED,
    config_of,
    load_checkpoint,
    load_weights,
    not_finite,
    save_checkpoint,
    write_json,
)
from ats_detr.config import Config, config_to_dict
from ats_detr.errors import UserError
from ats_detr.files import delete_temporary_files, exclusive_use
from ats_detr.model import Detr
from ats_detr.text import shortened
from ats_detr.training.distillation import DifficultyCache
from ats_detr.training.optim import MovingAverage

logger = logging.getLogger(__name__)

RESUMABLE = "checkpoint.pt"
"""In the folder of a stage: the state that a run resumes from."""
PREVIOUS = "checkpoint.previous.pt"
"""The checkpoint before it, used where RESUMABLE is damaged."""
BEST = "best.pt"
"""Weights of the evaluation with the highest AP, where that was not the last one."""
RESULTS = (FINISHED, BEST, RESUMABLE, PREVIOUS, "metrics.json")
OUTDATED = "outdated"
"""Marks a folder whose results are to be replaced by a training with `train.resume=never`."""
_STATE = {"epoch": int, "epoch_step": int, "step": int, "optimizer": dict, "rng": list}
"""Keys that a checkpoint to resume from needs, beside those of every checkpoint."""
WITHOUT_INFLUENCE = (
    *("name", "output_dir", "device", "summary", "num_pictures"),
    *("teachers.weak.config", "teachers.weak.checkpoint"),  # their weights are compared instead
    *("teachers.strong.config", "teachers.strong.checkpoint"),
    *("data.num_workers", "data.cache_images", "data.on_bad_image", "data.eval_batch_size"),
    *("data.max_image_pixels", "data.on_bad_annotation", "data.val_annotations", "data.val_images"),
    *("data.test_annotations", "data.test_images"),
    *("data.short_side", "data.size_multiple", "data.synthetic.num_val", "evaluation"),
    *("train.resume", "train.checkpoint_every", "train.checkpoint_every_steps", "train.evaluate_every"),
    *("train.log_every", "train.max_skipped_steps", "train.recompute", "train.compile", "deterministic"),
    "train.timeout_minutes",
)
"""Settings that do not change the trained weights: a finished training may differ in them."""
DATA_PATHS = (
    *("data.root", "data.train_annotations", "data.train_images", "data.val_share", "data.split_seed"),
)
"""Settings that may differ where the training images are the same."""
ADJUSTABLE = (
    *WITHOUT_INFLUENCE,
    *("train.epochs", "train.learning_rate", "train.backbone_learning_rate"),
    *("train.offset_learning_rate_factor", "train.scale_learning_rate", "train.weight_decay"),
    *("train.clip_norm", "train.precision", "train.ema_decay", "train.schedule"),
    *("train.drop_epochs", "train.drop_factor", "train.warmup_share"),
)
"""Settings that may change on resuming: also those of optimiser and schedule."""


@dataclass
class Progress:
    """Counters of a run, stored in its checkpoints."""

    epoch: int = 0
    """Completed epochs."""
    epoch_step: int = 0
    """Completed steps of the current epoch; with the seed, they determine the position of the sampler."""
    step: int = 0
    """Completed steps."""
    train_seconds: float = 0.0
    best_ap: float | None = None
    """Highest AP (0..1) of all evaluations."""
    skipped_steps: int = 0
    """Steps skipped because their gradient was not finite."""
    is_evaluated: bool = True
    """False from the end of an epoch to the end of the evaluation after it."""


@dataclass
class State:
    """Everything that training changes."""

    model: Detr
    optimizer: Optimizer
    average: MovingAverage | None
    progress: Progress
    difficulty: DifficultyCache | None = None
    """Results of the weak teacher on this process's images, where `teachers.cache_difficulty` is set."""

    @property
    def evaluated(self) -> Detr:
        """The model that is evaluated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.model


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in its folder."""

    config: Config
    folder: Path
    facts: Mapping[str, Any]
    """Further entries of each checkpoint that must be equal on resuming: classes, processes, teachers' weights."""

    def load_resumable(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, with its `path`; the previous one where it is damaged; None for a new run.

        Raises UserError where it belongs to another training, or where all checkpoints are damaged.
        """
        if not is_resuming(self.config, self.folder):
            return None
        damage: UserError | None = None
        for path in (self.folder / RESUMABLE, self.folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                checkpoint = load_checkpoint(path, verify=True)
                _check_resumable(checkpoint, path)
            except UserError as error:
                damage = damage or error
                continue
            if damage is not None:
                logger.warning("%s; using the previous checkpoint, %s", damage, path)
            check_same_origin(checkpoint, path, self.config, self.facts, ADJUSTABLE)
            started = checkpoint["epoch"] + (checkpoint["epoch_step"] > 0)
            if started > self.config.train.epochs:
                raise UserError(
                    f"train.epochs = {self.config.train.epochs}: must be >= {started}, the epochs that {path} has"
                    " started; to train from the start set train.resume=never"
                )
            return checkpoint | {"path": path}
        if damage is not None:
            raise UserError(
                f"{damage}; there is no other checkpoint to resume from: delete it, or set train.resume=never"
            )
        return None

    def save(self, state: State, device: torch.device) -> None:
        """Write the checkpoint to resume from. Collective: every process calls it.

        The statistics of batch norms are those of rank 0 afterwards, also on the other processes. Raises UserError
        where a weight is not finite: a run could only be resumed from an earlier checkpoint.
        """
        for model in (state.model, state.evaluated):
            distributed.broadcast_buffers(model)
        if (name := not_finite(state.model.state_dict())) is not None:
            raise UserError(
                f"training diverged: {name} is not finite after step {state.progress.step}; lower train.learning_rate"
                " and resume from the last checkpoint"
            )
        rng = distributed.gather(rng_state(device))
        difficulty = None if state.difficulty is None else distributed.gather(state.difficulty.state())
        if not distributed.is_main():
            return
        checkpoint = self._common(state, state.model)
        checkpoint |= {"optimizer": state.optimizer.state_dict(), "rng": rng, "finished": False}
        if state.average is not None:
            checkpoint["average"] = state.average.model.state_dict()
        if difficulty is not None:
            checkpoint["difficulty"] = difficulty
        save_checkpoint(checkpoint, self.folder / RESUMABLE, previous=self.folder / PREVIOUS)

    def save_result(self, state: State, metrics: Mapping[str, Any], name: str) -> None:
        """Write the evaluated weights and their metrics as `best.pt` or `final.pt`."""
        if not distributed.is_main():
            return
        checkpoint = self._common(state, state.evaluated) | {"metrics": metrics, "finished": True}
        if name == FINISHED:
            write_json(metrics, self.folder / "metrics.json")
        save_checkpoint(checkpoint, self.folder / name)
        if name == FINISHED:
            for path in (RESUMABLE, PREVIOUS):
                (self.folder / path).unlink(missing_ok=True)

    def _common(self, state: State, model: Detr) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "config": config_to_dict(self.config),
            "num_classes": model.num_classes,
            **self.facts,
            **dataclasses.asdict(state.progress),
        }


# ----------------------------------------------------------------------------------------------- results in a folder
def is_resuming(config: Config, folder: Path) -> bool:
    """Whether checkpoints in the folder are used. A restart by torchrun resumes even with `train.resume=never`, but
    only from checkpoints written since the first start."""
    return config.train.resume == "auto" or (distributed.is_restarted() and not (folder / OUTDATED).exists())


def mark_outdated(folder: Path) -> None:
    """Ignore the results in the folder from now on; they are deleted when a training replaces them."""
    if distributed.is_main() and folder.exists():
        (folder / OUTDATED).touch()


def delete_leftovers(folder: Path) -> None:
    """Delete what a process left that was killed after it had written the finished checkpoint."""
    names = [name for name in (RESUMABLE, PREVIOUS) if (folder / name).exists()]
    if names and distributed.is_main():
        with exclusive_use(folder):
            delete_temporary_files(folder)
            for name in names:
                (folder / name).unlink(missing_ok=True)


def delete_results(folder: Path) -> None:
    """Delete the results of an earlier training, which could be mistaken for those of the one that starts now."""
    distributed.barrier()  # every process has read its checkpoint
    if distributed.is_main():
        for name in (*RESULTS, OUTDATED):
            (folder / name).unlink(missing_ok=True)


def _check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless a checkpoint has the state of a training."""
    for key, kind in _STATE.items():
        value = checkpoint.get(key)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise UserError(f"{path}: not a checkpoint to resume from: invalid content under {key!r}")


# ------------------------------------------------------------------------------------------------------------- state
def restore(checkpoint: Mapping[str, Any], state: State, device: torch.device) -> None:
    """Load a checkpoint into the state. Strict: raises UserError where a tensor is missing or unknown.

    Learning rates and weight decay keep their new values, which may differ from those of the checkpoint.
    """
    path = checkpoint["path"]
    load_weights(state.model, checkpoint["model"], path)
    if state.average is not None:
        load_weights(state.average.model, checkpoint.get("average", checkpoint["model"]), path)
    optimizer = state.optimizer
    new_settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        restore_rng(checkpoint["rng"][distributed.rank()], device)
        if state.difficulty is not None and checkpoint.get("difficulty"):
            state.difficulty.load(checkpoint["difficulty"][distributed.rank()], device)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        fix = "delete this file, or set train.resume=never"
        raise UserError(f"{path}: the state of optimiser or random numbers is invalid; {fix}") from error
    for group, settings in zip(optimizer.param_groups, new_settings, strict=True):
        group.update(settings)
    known = {field.name for field in dataclasses.fields(Progress)} & checkpoint.keys()
    state.progress = Progress(**{name: checkpoint[name] for name in known})
    within = f", step {state.progress.epoch_step} of the next" if state.progress.epoch_step else ""
    logger.info("resuming from %s after epoch %d%s", path, state.progress.epoch, within)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the random number generators used in training."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`; the state of another device type is ignored."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ------------------------------------------------------------------------------------------------------------ origin
def check_same_origin(
    checkpoint: Mapping[str, Any],
    path: Path,
    config: Config,
    facts: Mapping[str, Any],
    may_change: Sequence[str],
) -> None:
    """Raise UserError, listing the differences, where a checkpoint was trained with other settings, data or teachers.

    Args:
        facts: entries that the checkpoint must hold beside an equal configuration. Those that an older version did not
            store are not compared.
        may_change: settings, or groups of settings, that are not compared.
    """
    known = {key: value for key, value in facts.items() if key in checkpoint}
    if "training_images" in known:
        may_change = (*may_change, *DATA_PATHS)
    stored = config_to_dict(config_of(checkpoint, path)) | {key: checkpoint[key] for key in known}
    changes = {
        key: f"{key} = {shortened(old)}, now {shortened(new)}"
        for key, old, new in differences(stored, config_to_dict(config) | known)
        if not any(key == free or key.startswith(f"{free}.") for free in may_change)
    }
    fix = "choose another output_dir, delete this folder, or train again with train.resume=never"
    if any(key.startswith("training_images.") for key in changes):
        old, new = (images["training_images"]["number"] for images in (stored, known))
        raise UserError(
            f"{path.parent} was trained on other images ({old} images, now {new}; their ids or sizes differ): restore"
            f" the annotation file, {fix}"
        )
    if checkpoint["finished"] and "train.epochs" in changes and config.train.epochs > checkpoint["epoch"]:
        fix = f"to train further, set train.init_from={path} and another output_dir; otherwise {fix}"
    if changes:
        listed = "; ".join(list(changes.values())[:3])
        raise UserError(f"{path.parent} was trained with other settings ({listed}): {fix}")


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each leaf in which two trees of dictionaries and lists differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new


def digest(state: Mapping[str, Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of names and weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
