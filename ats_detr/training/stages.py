"""The chain of trainings behind one config: an adaptive student needs a weak and a strong teacher first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ats_detr.checkpoint import config_of, load_checkpoint, load_detector, resolve_checkpoint
from ats_detr.config import Config, TeacherConfig, TeachersConfig, load_config
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.model import Detr
from ats_detr.training.datasets import describe_images, open_dataset
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.resume import (
    DATA_PATHS,
    WITHOUT_INFLUENCE,
    check_same_origin,
    delete_leftovers,
    digest,
    is_resuming,
    mark_outdated,
)
from ats_detr.training.setup import Stage, Teachers
from ats_detr.training.trainer import train

logger = logging.getLogger(__name__)

_STUDENT_ONLY = (
    *("name", "output_dir", "summary", "teachers", "model.selector", "model.adaption"),
    *("loss.budget_weight", "loss.memory_weight", "loss.difficulty_iou"),
)
"""Overrides of these keys do not apply to the teachers."""


def plan_stages(config: Config, overrides: Sequence[str] = ()) -> dict[str, Stage]:
    """The stages of a config by name, in order.

    Overrides given for the config apply to its teachers too, except those of _STUDENT_ONLY.
    """
    folder = config.run_dir
    if not isinstance(config.teachers, TeachersConfig):
        return {config.name: _plan(config.name, config, folder, {})}
    stages: dict[str, Stage] = {}
    for name, teacher in (("weak", config.teachers.weak), ("strong", config.teachers.strong)):
        own = load_config(teacher.config, [text for text in overrides if _reaches_teachers(text)])
        _check_budget(name, own, teacher, config)
        stages[name] = _plan(name, own, folder / name, stages, given=_given(name, teacher))
    stages["student"] = _plan("student", config, folder / "student", stages)
    return stages


def _plan(
    name: str, config: Config, folder: Path, earlier: Mapping[str, Stage], *, given: Path | None = None
) -> Stage:
    """One stage; `weak` and `strong` in `train.init_from` become the finished checkpoint of that stage."""
    source = config.train.init_from
    if source in ("weak", "strong"):
        if source not in earlier:
            raise UserError(f"train.init_from = {source!r}: {name} is trained before there is such a teacher")
        source = str(earlier[source].checkpoint)
    return Stage(name, config, folder, init_from=source or None, given=given)


def _given(name: str, teacher: TeacherConfig) -> Path | None:
    """The checkpoint that the config names for a teacher, fetched if it is not on this machine. Raises UserError."""
    if not teacher.checkpoint:
        return None
    try:
        return resolve_checkpoint(teacher.checkpoint)
    except UserError as error:
        raise UserError(f"teachers.{name}.checkpoint = {error}") from None


def _check_budget(name: str, config: Config, teacher: TeacherConfig, student: Config) -> None:
    """Raise UserError unless the weak teacher keeps the student's min_ratio and the strong one its max_ratio."""
    if config.model.selector is None or config.model.adaptive:
        raise UserError(f"{teacher.config}: a teacher needs model.selector.keep_ratio, a fixed budget")
    assert student.model.selector is not None
    key = "min_ratio" if name == "weak" else "max_ratio"
    own, wanted = config.model.selector.keep_ratio, getattr(student.model.selector, key)
    if own != wanted:
        raise UserError(
            f"teachers.{name}.config = {teacher.config!r}: has model.selector.keep_ratio {own}, must equal"
            f" model.selector.{key} {wanted} of its student"
        )


def _reaches_teachers(override: str) -> bool:
    key, _, value = override.partition("=")
    if key == "train.init_from" and value in ("weak", "strong"):
        return False
    return not any(key == own or key.startswith(f"{own}.") for own in _STUDENT_ONLY)


def train_stages(stages: dict[str, Stage], wanted: str, device: torch.device) -> None:
    """Train one stage, or `all` in order. A stage with a finished checkpoint is skipped. Collective."""
    if wanted != "all" and wanted not in stages:
        raise UserError(f"--stage {wanted}: this config has no such stage, only {', '.join(stages)}")
    chosen = [stage for stage in stages.values() if wanted in ("all", stage.name)]
    afresh = [
        stage.folder
        for stage in chosen
        if stage.given is None and not is_resuming(stage.config, stage.folder)
    ]
    for folder in afresh:
        mark_outdated(folder)
    for number, stage in enumerate(chosen, start=1):
        if is_finished(stage, stages):
            logger.info("%s: already finished, using %s", stage.name, stage.checkpoint)
            if stage.given is None:
                delete_leftovers(stage.folder)
            continue
        teachers = (
            load_teachers(stage.config, stages, device)
            if isinstance(stage.config.teachers, TeachersConfig)
            else None
        )
        later = [other.folder for other in chosen[number:] if other.folder in afresh]
        train(stage, device, teachers, outdated=later)


def is_finished(stage: Stage, stages: Mapping[str, Stage]) -> bool:
    """Whether the stage has a finished checkpoint. Raises UserError where its settings or teachers were others."""
    if stage.given is not None:
        return True
    if not stage.checkpoint.exists() or not is_resuming(stage.config, stage.folder):
        return False
    facts: dict[str, Any] = {}
    teachers = (
        [stages[name].checkpoint for name in ("weak", "strong")]
        if isinstance(stage.config.teachers, TeachersConfig)
        else []
    )
    if teachers and all(path.exists() for path in teachers):
        weak, strong = (digest(load_checkpoint(path)["model"]) for path in teachers)
        facts["teacher_weights"] = {"weak": weak, "strong": strong}
    checkpoint = load_checkpoint(stage.checkpoint)
    stored = config_of(checkpoint, stage.checkpoint).data
    if any(getattr(stored, key[5:]) != getattr(stage.config.data, key[5:]) for key in DATA_PATHS):
        facts["training_images"] = describe_images(open_dataset(stage.config.data, "train"))
    check_same_origin(checkpoint, stage.checkpoint, stage.config, facts, WITHOUT_INFLUENCE)
    return True


def load_teachers(config: Config, stages: Mapping[str, Stage], device: torch.device) -> Teachers:
    """The two teachers of a student, frozen and on the device."""
    assert isinstance(config.teachers, TeachersConfig) and config.model.selector is not None
    for name in ("weak", "strong"):
        if not (path := stages[name].checkpoint).exists():
            raise UserError(f"{path}: the {name} teacher is not trained yet; run --stage {name}")
    checkpoints = {name: load_checkpoint(stages[name].checkpoint) for name in ("weak", "strong")}
    weak, strong = (load_teacher(stages[name], config, checkpoints[name]) for name in ("weak", "strong"))
    return Teachers(
        DualTeacher(
            weak.to(device),
            strong.to(device),
            bias=config.teachers.difficulty_bias,
            num_budgets=config.model.selector.num_budgets,
            level_weights=config.teachers.level_weights,
            iou_threshold=config.loss.difficulty_iou,
            cache_difficulty=config.teachers.cache_difficulty,
        ),
        weights={name: digest(checkpoint["model"]) for name, checkpoint in checkpoints.items()},
        classes={
            name: ClassMap.from_dict(checkpoint["classes"])
            for name, checkpoint in checkpoints.items()
            if not checkpoint.get("published")  # published checkpoints do not store their classes
        },
    )


def load_teacher(stage: Stage, student: Config, checkpoint: Mapping[str, Any]) -> Detr:
    """The teacher of a stage. Raises UserError where its checkpoint has another architecture or budget."""
    for key in ("width", "num_levels"):
        own, wanted = getattr(stage.config.model, key), getattr(student.model, key)
        if own != wanted:
            raise UserError(
                f"the {stage.name} teacher has model.{key} = {own}, its student {wanted}: they must be equal"
            )
    model = load_detector(stage.config, checkpoint, stage.checkpoint)
    stored, wanted = (
        config.model.selector.keep_ratio if config.model.selector is not None else None
        for config in (config_of(checkpoint, stage.checkpoint), stage.config)
    )
    if stored != wanted:
        fix = "choose another checkpoint"
        if checkpoint.get("published"):
            fix += (
                f", or convert this one with model.selector.keep_ratio={wanted} if it was trained with that"
            )
        raise UserError(
            f"{stage.checkpoint}: has model.selector.keep_ratio {stored}, but the {stage.name} teacher needs"
            f" {wanted}: {fix}"
        )
    return model
