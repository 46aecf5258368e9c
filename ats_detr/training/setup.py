"""Setup of a training run: data, model, teachers and state, initial or restored from a checkpoint."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from ats_detr import distributed
from ats_detr.checkpoint import FINISHED, read_file, save_config
from ats_detr.config import Config, SyntheticConfig, TeachersConfig, config_to_dict
from ats_detr.console import console, say
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.evaluation import warn_of_limits
from ats_detr.files import delete_temporary_files, exclusive_use, make_folder
from ats_detr.model import Detr, build_model, build_without_fetching
from ats_detr.model.backbone import load_weights as load_backbone_weights
from ats_detr.training.criterion import SetCriterion, build_criterion
from ats_detr.training.datasets import Loaders, build_loaders, describe_images
from ats_detr.training.distillation import BudgetCounts, DualTeacher, SelfTaught
from ats_detr.training.guards import BatchNormSnapshot, StepGuard, check_annotations
from ats_detr.training.optim import MovingAverage, build_optimizer
from ats_detr.training.resume import Checkpoints, Progress, State, restore
from ats_detr.training.run_log import RunLog
from ats_detr.training.signals import StopSignals
from ats_detr.training.transfer import transfer_weights

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CANNOT_COMPILE = (TorchDynamoException, InductorError)
"""Raised by the first forward pass of a compiled layer that cannot be compiled."""


@dataclass(frozen=True)
class Stage:
    """One training: `weak`, `strong` or `student` in a chain, otherwise the only one."""

    name: str
    """Name of the stage in the chain; without a chain, the name of the config."""
    config: Config
    folder: Path
    """Folder of everything the training writes."""
    init_from: str | Path | None = None
    """Checkpoint of the initial weights, with `weak` and `strong` in `train.init_from` resolved to a file."""
    given: Path | None = None
    """Finished checkpoint, a file or a model folder, named in the config; the stage is then not trained here."""

    @property
    def checkpoint(self) -> Path:
        """Checkpoint of the finished model."""
        return self.given or self.folder / FINISHED


@dataclass(frozen=True)
class Teachers:
    """The teachers of a student and the facts from their checkpoints."""

    supervision: DualTeacher
    weights: Mapping[str, str]
    """Digest of the weights of each teacher, by name."""
    classes: Mapping[str, ClassMap]
    """Classes of each teacher whose checkpoint stores them, by name."""

    def check_classes(self, student: Detr, class_map: ClassMap) -> None:
        """Raise UserError unless each class index means the same to teachers and student."""
        other = "was trained on other classes than the student's data has"
        for name, teacher in (("weak", self.supervision.weak), ("strong", self.supervision.strong)):
            if teacher.num_classes != student.num_classes:
                counts = f"{teacher.num_classes} classes, the student {student.num_classes}"
                raise UserError(f"the {name} teacher {other}: {counts}")
            for row in range(student.num_classes if name in self.classes else 0):
                taught, own = self.classes[name].name_of_row(row), class_map.name_of_row(row)
                if taught != own:
                    raise UserError(
                        f"the {name} teacher {other}: class {row} is {taught!r} there, {own!r} here"
                    )


@dataclass
class Run:
    """A training in progress."""

    stage: Stage
    device: torch.device
    is_new: bool
    """Starts from step 0; False: resumed from a checkpoint."""
    loaders: Loaders
    criterion: SetCriterion
    teachers: DualTeacher | SelfTaught | None
    budgets: BudgetCounts | None
    """Of the current epoch, where there are teachers."""
    state: State
    checkpoints: Checkpoints
    parallel_model: nn.Module
    """The model, wrapped so that gradients are averaged over processes where there are several."""
    batch_norms: BatchNormSnapshot
    guard: StepGuard
    log: RunLog
    signals: StopSignals
    resources: ExitStack
    """The lock of the folder, and the log."""

    @property
    def config(self) -> Config:
        return self.stage.config

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        return len(self.loaders.train) // self.config.train.accumulate

    @property
    def precision(self) -> torch.dtype:
        return PRECISIONS[self.config.train.precision]


def prepare(stage: Stage, device: torch.device, teachers: Teachers | None) -> Run:
    """The run of a stage, new or resumed. Everything that can be rejected is rejected before anything is written.

    Raises UserError.
    """
    config = stage.config
    loaders = build_loaders(config, pin_memory=device.type == "cuda")
    facts = run_facts(loaders, teachers)
    checkpoints = Checkpoints(config, stage.folder, facts)
    checkpoint = checkpoints.load_resumable()
    model = seeded_model(stage, loaders.class_map, checkpoint, device)
    if teachers is not None:
        teachers.check_classes(model, loaders.class_map)
    check_data(config, loaders, model)
    supervision = teachers.supervision if teachers is not None else self_taught(config, model)
    state = build_state(config, model, supervision)
    if checkpoint is not None:
        restore(checkpoint, state, device)
    if isinstance(supervision, DualTeacher):
        connect_teachers(supervision, model, config)
    resources = ExitStack()
    if distributed.is_main():
        make_folder(stage.folder)
        resources.enter_context(exclusive_use(stage.folder))
        delete_temporary_files(stage.folder)
        save_config(config, stage.folder / "config.yaml")
    log = RunLog(stage.folder, stage.name, state.progress.step, evaluated=state.progress.is_evaluated)
    resources.callback(log.close)
    configure_layers(model, config)
    return Run(
        stage=stage,
        device=device,
        is_new=checkpoint is None,
        loaders=loaders,
        criterion=build_criterion(config, model.num_classes),
        teachers=supervision,
        budgets=BudgetCounts(supervision.num_budgets, device)
        if isinstance(supervision, DualTeacher)
        else None,
        state=state,
        checkpoints=checkpoints,
        parallel_model=distributed.parallel(model, device),
        batch_norms=BatchNormSnapshot(model),
        guard=StepGuard(config.train.max_skipped_steps),
        log=log,
        signals=StopSignals(),
        resources=resources,
    )


# ------------------------------------------------------------------------------------------------------------- data
def check_data(config: Config, loaders: Loaders, model: Detr) -> None:
    """Raise UserError where the training images cannot be trained on."""
    check_annotations(loaders.train.dataset, model.num_classes)
    for text in settings_without_effect(config, model, len(loaders.train) // config.train.accumulate):
        logger.warning("%s", text)
    warn_of_limits(loaders.train.dataset, config.model.num_queries)
    warn_of_limits(loaders.val.dataset, config.model.num_queries, config.evaluation.max_detections)
    if len(loaders.train) < config.train.accumulate:
        raise UserError(
            f"train.accumulate = {config.train.accumulate}: must be <= {len(loaders.train)}, the batches of an epoch"
        )


def settings_without_effect(config: Config, model: Detr, num_steps: int) -> list[str]:
    """A sentence about each setting with no effect on this run, with the reason. `num_steps`: steps per epoch."""
    data, train, loss, selector = config.data, config.train, config.loss, config.model.selector
    late = [epoch for epoch in train.drop_epochs if epoch >= train.epochs]
    better = [max(1, int(0.8 * train.epochs))] if train.epochs > 1 else []
    is_step, is_fixed = train.schedule == "step", selector is not None and not selector.adaptive
    num_layers, is_single = config.model.num_decoder_layers, config.model.num_decoder_layers == 1
    is_frozen = not any(parameter.requires_grad for parameter in model.backbone.parameters())

    # Reported even with their default values, which depend on other settings.
    reasons = {
        "train.drop_epochs": is_step and late and f"the run has {train.epochs} epochs; set it to {better}",
        "data.short_side": data.short_side > data.long_side and "it is limited by data.long_side",
        "data.train_short_sides": len(data.train_short_sides) > 1
        and min(data.train_short_sides) >= data.long_side
        and "they are limited by data.long_side",
        "data.synthetic": data.kind == "coco" and data.synthetic != SyntheticConfig() and "data.kind is coco",
        "model.box_refine": config.model.box_refine
        and not (is_single or loss.decoder_auxiliary)
        and f"loss.decoder_auxiliary = False trains the head of one of {num_layers} decoder layers",
    }
    # Reported where they differ from their default values.
    changed = {
        "train.drop_epochs": not is_step and "train.schedule is one_cycle",
        "train.drop_factor": not (is_step and train.drop_epochs) and "the learning rates have no drops",
        "train.warmup_share": is_step and "train.schedule is step",
        "train.checkpoint_every_steps": train.checkpoint_every_steps >= num_steps
        and f"an epoch has {num_steps} steps",
        "train.backbone_learning_rate": is_frozen and "the backbone is frozen",
        "data.crop_size": not data.crop_short_sides and "data.crop_short_sides is empty",
        "model.selector.num_budgets": is_fixed and "model.selector.keep_ratio is a fixed budget",
        "model.selector.min_tokens": is_fixed and "model.selector.keep_ratio is a fixed budget",
        "model.selector.mean_ratio": is_fixed and "model.selector.keep_ratio is a fixed budget",
        "loss.memory_weight": config.teachers == "self" and "there is no strong teacher",
        "model.encoder_auxiliary": config.model.num_encoder_layers == 1 and "there is one encoder layer",
        "loss.decoder_auxiliary": is_single and "there is one decoder layer",
        "teachers.cache_difficulty": train.epochs == 1
        and isinstance(config.teachers, TeachersConfig)
        and "there is one epoch",
    }
    for key, reason in changed.items():
        *parents, name = key.split(".")
        if reason:
            section = functools.reduce(getattr, parents, config)
            is_default = getattr(section, name) in (getattr(type(section), name), ())
            reasons[key] = reasons.get(key) or (not is_default and reason)
    tree = config_to_dict(config)
    return [
        f"{key} = {functools.reduce(dict.__getitem__, key.split('.'), tree)} has no effect: {reason}"
        for key, reason in reasons.items()
        if reason
    ]


def run_facts(loaders: Loaders, teachers: Teachers | None) -> dict[str, Any]:
    """Entries of the run's checkpoints, beside the config, that must be equal on resuming."""
    return {
        "training_images": describe_images(loaders.train.dataset),
        "classes": loaders.class_map.to_dict(),
        "num_processes": distributed.world_size(),
        "teacher_weights": dict(teachers.weights) if teachers is not None else {},
    }


def global_batch(config: Config) -> int:
    """Images per step, over all processes."""
    return config.data.batch_size * distributed.world_size() * config.train.accumulate


# ------------------------------------------------------------------------------------------------------------ model
def seeded_model(
    stage: Stage, class_map: ClassMap, checkpoint: Mapping[str, Any] | None, device: torch.device
) -> Detr:
    """The model on the device, with equal weights on every process; sets the seeds of initialisation and training."""
    config = stage.config
    torch.manual_seed(config.seed)
    if checkpoint is None:
        model = initial_model(config, class_map, stage.init_from)
    else:
        model = build_without_fetching(config, checkpoint["num_classes"])
    model = model.to(device)
    freeze_unused_heads(model, config)
    torch.manual_seed(config.seed + distributed.rank())  # own augmentations and dropout on each process
    return model


def initial_model(config: Config, class_map: ClassMap, init_from: str | Path | None = None) -> Detr:
    """The model before its first step, on the CPU. Raises UserError where the weights of the config do not fit."""
    num_classes = config.model.num_classes or class_map.num_rows
    if num_classes < class_map.num_rows:
        raise UserError(
            f"model.num_classes = {num_classes}: must be >= {class_map.num_rows}, the classes in the annotations;"
            " null counts them"
        )
    weights = config.model.backbone.weights
    if init_from is not None:
        model = build_without_fetching(config, num_classes)
        transfer = transfer_weights(model, class_map, init_from)
        if not transfer.lacks_backbone:  # no weights to fetch: all of them would be replaced
            if weights is not None:
                say(f"model.backbone.weights is not read: {init_from} holds the whole backbone")
            console.print(transfer.table())
            return model
    model = build_model(config.model, num_classes)
    if weights is not None:
        say(load_backbone_weights(model.backbone, read_file(weights), weights))
    if init_from is not None:
        console.print(transfer_weights(model, class_map, init_from).table())
    return model


def freeze_unused_heads(model: Detr, config: Config) -> None:
    """Without auxiliary losses, the heads of the decoder layers before the last have no gradient."""
    if config.loss.decoder_auxiliary or len(model.decoder_heads) == 1:
        return
    for head in model.decoder_heads[:-1]:
        head.requires_grad_(False)


def configure_layers(model: Detr, config: Config) -> None:
    """The queries of the training; activation checkpointing and compilation of the encoder and decoder layers."""
    model.one_to_many = config.loss.one_to_many
    model.encoder.recompute = model.decoder.recompute = config.train.recompute
    if config.train.compile:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.compile(dynamic=True)  # compiled by the first forward pass, for all sizes


def uncompile_layers(model: Detr) -> None:
    """Run the layers without compilation again."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer._compiled_call_impl = None


# --------------------------------------------------------------------------------------------------------- teachers
def connect_teachers(supervision: DualTeacher, student: Detr, config: Config) -> None:
    """Optimise the teachers, and let them reuse the student's frozen stages where these are equal."""
    sharing = supervision.connect(student, PRECISIONS[config.train.precision])
    if sharing:
        logger.info(
            "the frozen backbone stages run once for the student and its teachers (%s)", ", ".join(sharing)
        )


def self_taught(config: Config, model: Detr) -> SelfTaught | None:
    """The supervision of `teachers: self`."""
    if config.teachers != "self":
        return None
    assert model.selector is not None
    return SelfTaught(model.selector, config.model.num_queries)


# ------------------------------------------------------------------------------------------------------------ state
def build_state(config: Config, model: Detr, supervision: DualTeacher | SelfTaught | None) -> State:
    """Optimiser, moving average and progress at step 0."""
    average = MovingAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = build_optimizer(model, config.train, global_batch(config))
    difficulty = supervision.difficulty if isinstance(supervision, DualTeacher) else None
    return State(model, optimizer, average, Progress(), difficulty)


def describe_run(run: Run) -> str:
    """One line: model, data, effective batch size and learning rates."""
    config, progress, model = run.config, run.state.progress, run.state.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    parameters = f"{trained / 1e6:.2f} M trained and {frozen / 1e6:.2f} M frozen parameters"
    rates = ", ".join(f"{group['name']} {group['base_lr']:.2g}" for group in run.state.optimizer.param_groups)
    factors = [f"{config.data.batch_size} images"]
    factors += [f"{distributed.world_size()} processes"] if distributed.world_size() > 1 else []
    factors += [f"{config.train.accumulate} accumulated"] if config.train.accumulate > 1 else []
    num_train, num_val = len(set(run.loaders.train.indices)), sum(map(len, run.loaders.val.global_batches))
    batch = f"{global_batch(config)}" + (f" ({' x '.join(factors)})" if len(factors) > 1 else "")
    return (
        f"{run.stage.name}: {parameters}, {model.num_classes} classes,"
        f" {num_train} images for training and {num_val} for evaluation,"
        f" {config.train.epochs - progress.epoch} epochs of {run.num_steps} steps, batch {batch}, lr {rates}"
    )


# ---------------------------------------------------------------------------------------------------------- process
@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Within the context PyTorch uses deterministic algorithms only, and raises where it has none."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
