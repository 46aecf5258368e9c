"""The chain of trainings behind one config: an adaptive student needs a weak and a strong teacher first."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ats_detr.config import Config, TeacherConfig, config_to_dict, load_config
from ats_detr.errors import UserError
from ats_detr.model import Detr
from ats_detr.training.checkpoint import config_of, load_checkpoint, load_detector
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.trainer import FINISHED, train

logger = logging.getLogger(__name__)

_STUDENT_ONLY = ("name", "output_dir", "summary", "teachers", "model.selector", "model.adaption")
"""Overrides of these keys do not reach the teachers."""
_HARMLESS = (
    *("name", "output_dir", "device", "summary", "num_pictures", "teachers", "model.backbone.pretrained"),
    *("data.num_workers", "data.cache_images", "data.on_bad_image", "data.eval_batch_size"),
    *("train.resume", "train.init_from", "train.checkpoint_every", "train.evaluate_every", "train.log_every"),
)
"""A finished stage may differ from its config in these and still be used."""


@dataclass(frozen=True)
class Stage:
    """One training of the chain."""

    name: str
    """`weak`, `strong` or `student`; the config's own name where there is no chain."""
    config: Config
    folder: Path
    checkpoint: Path
    """Of the finished model."""
    is_given: bool = False
    """The checkpoint was named in the config: it is never trained here."""


def plan_stages(config: Config, overrides: Sequence[str] = ()) -> dict[str, Stage]:
    """The stages of a config by name, in order. Overrides given for the config reach its teachers too, but for those
    of the student's name, folder, teachers and selector.
    """
    folder = config.run_dir
    if config.teachers is None:
        return {config.name: Stage(config.name, config, folder, folder / FINISHED)}
    stages = {
        "weak": _plan_teacher("weak", config.teachers.weak, folder, overrides),
        "strong": _plan_teacher("strong", config.teachers.strong, folder, overrides),
        "student": Stage("student", config, folder / "student", folder / "student" / FINISHED),
    }
    return {name: _resolve_init(stage, stages) for name, stage in stages.items()}


def _plan_teacher(name: str, teacher: TeacherConfig, folder: Path, overrides: Sequence[str]) -> Stage:
    config = load_config(teacher.config, [text for text in overrides if _reaches_teachers(text)])
    if config.model.selector is None or config.model.adaptive:
        raise UserError(f"{teacher.config}: a teacher needs model.selector.keep_ratio, a fixed budget")
    own = folder / name
    given = Path(teacher.checkpoint) if teacher.checkpoint else None
    return Stage(name, config, own, given or own / FINISHED, is_given=given is not None)


def _reaches_teachers(override: str) -> bool:
    key, _, value = override.partition("=")
    if key == "train.init_from" and value in ("weak", "strong"):
        return False
    return not any(key == own or key.startswith(f"{own}.") for own in _STUDENT_ONLY)


def _resolve_init(stage: Stage, stages: dict[str, Stage]) -> Stage:
    """`train.init_from: weak` becomes the file that the weak teacher's training leaves."""
    source = stage.config.train.init_from
    if source not in ("weak", "strong"):
        return stage
    if source == stage.name:
        raise UserError(f"train.init_from = {source!r}: the {source} teacher cannot start from itself")
    train_config = dataclasses.replace(stage.config.train, init_from=str(stages[source].checkpoint))
    return dataclasses.replace(stage, config=dataclasses.replace(stage.config, train=train_config))


def train_stages(stages: dict[str, Stage], wanted: str, device: torch.device) -> None:
    """Train the wanted stage, or `all`, each after those it needs; stages with a finished checkpoint are skipped."""
    if wanted != "all" and wanted not in stages:
        raise UserError(f"--stage {wanted}: this config has no such stage, only {', '.join(stages)}")
    for stage in stages.values():
        if stage.is_given and not stage.checkpoint.exists():
            raise UserError(
                f"teachers.{stage.name}.checkpoint = {str(stage.checkpoint)!r}: there is no such file"
            )
    for stage in stages.values():
        if wanted not in ("all", stage.name):
            continue
        if is_finished(stage):
            logger.info("%s: finished already, using %s", stage.name, stage.checkpoint)
            continue
        teachers = load_teachers(stage.config, stages, device) if stage.config.teachers is not None else None
        train(stage.config, stage.folder, stage.name, device, teachers)


def is_finished(stage: Stage) -> bool:
    """Whether the stage's checkpoint can be used. Raises UserError where it came from other settings."""
    if stage.is_given:
        return True
    if not stage.checkpoint.exists() or stage.config.train.resume == "never":
        return False
    trained = config_of(load_checkpoint(stage.checkpoint), stage.checkpoint)
    changes = [
        f"{key} = {was!r}, now {now!r}"
        for key, was, now in differences(config_to_dict(trained), config_to_dict(stage.config))
        if not any(key == harmless or key.startswith(f"{harmless}.") for harmless in _HARMLESS)
    ]
    if changes:
        mend = "choose another output_dir, delete this folder, or train again with train.resume=never"
        raise UserError(f"{stage.folder} was trained with other settings ({'; '.join(changes[:3])}): {mend}")
    return True


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting in which two configurations, as dictionaries, differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new


def load_teachers(config: Config, stages: dict[str, Stage], device: torch.device) -> DualTeacher:
    """The two teachers of a student, frozen and on the device."""
    assert config.teachers is not None and config.model.selector is not None
    weak, strong = (load_teacher(stages[name], config).to(device) for name in ("weak", "strong"))
    return DualTeacher(
        weak,
        strong,
        bias=config.teachers.difficulty_bias,
        num_budgets=config.model.selector.num_budgets,
        level_weights=config.teachers.level_weights,
    )


def load_teacher(stage: Stage, student: Config) -> Detr:
    """The finished teacher of a stage. Raises UserError when its checkpoint is of another architecture."""
    if not stage.checkpoint.exists():
        raise UserError(
            f"{stage.checkpoint}: the {stage.name} teacher is not trained yet; run --stage {stage.name}"
        )
    for key in ("width", "num_levels"):
        own, wanted = getattr(stage.config.model, key), getattr(student.model, key)
        if own != wanted:
            raise UserError(
                f"the {stage.name} teacher has model.{key} = {own}, its student {wanted}: they must agree"
            )
    return load_detector(stage.config, load_checkpoint(stage.checkpoint), stage.checkpoint)
