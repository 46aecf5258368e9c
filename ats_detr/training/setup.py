"""A training run: what it is made of, at its start or where its checkpoint left it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from ats_detr import distributed
from ats_detr.checkpoint import build_without_fetching, make_folder, read_file
from ats_detr.config import Config, save_config
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.evaluation import warn_of_limits
from ats_detr.model import Detr, build_model
from ats_detr.model.backbone import load_weights as load_backbone_weights
from ats_detr.training.criterion import SetCriterion, build_criterion
from ats_detr.training.datasets import Loaders, build_loaders
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.guards import KeptStatistics, StepWatch, check_annotations
from ats_detr.training.optim import MovingAverage, build_optimizer
from ats_detr.training.resume import Progress, State, load_resumable, restore
from ats_detr.training.run_log import RunLog, console, say
from ats_detr.training.transfer import transfer_weights

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Teachers:
    """The teachers of a student, and what their checkpoints say of them."""

    supervision: DualTeacher
    weights: Mapping[str, str]
    """Digest of each one's weights, by name."""
    classes: Mapping[str, ClassMap]
    """What the class rows mean of those that say it, by name."""


@dataclass
class Run:
    """One training under way."""

    config: Config
    folder: Path
    name: str
    device: torch.device
    facts: Mapping[str, Any]
    """What its checkpoints hold beside the settings and must find again."""
    is_new: bool
    """It starts now; otherwise it goes on from a checkpoint."""
    loaders: Loaders
    criterion: SetCriterion
    teachers: DualTeacher | None
    state: State
    trained: nn.Module
    """The model as the processes train it together."""
    statistics: KeptStatistics
    watch: StepWatch
    signals: StopSignals
    log: RunLog

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return len(self.loaders.train) // self.config.train.accumulate

    @property
    def precision(self) -> torch.dtype:
        return PRECISIONS[self.config.train.precision]


def prepare(
    config: Config,
    folder: Path,
    name: str,
    device: torch.device,
    teachers: Teachers | None,
    init_from: Path | None,
    signals: StopSignals,
) -> Run:
    """A run at its start, or where its checkpoint left it; refuses what cannot be trained before writing anything."""
    loaders = build_loaders(config.data, config.seed, pin_memory=device.type == "cuda")
    facts: dict[str, Any] = {
        "classes": loaders.class_map.to_dict(),
        "num_processes": distributed.world_size(),
        "teacher_weights": dict(teachers.weights) if teachers is not None else {},
    }
    checkpoint = load_resumable(config, facts, folder)
    torch.manual_seed(config.seed)  # the same weights on every process ...
    if checkpoint is None:
        model = prepare_model(config, loaders.class_map, init_from).to(device)
    else:
        model = build_without_fetching(config, checkpoint["num_classes"]).to(device)
    torch.manual_seed(config.seed + distributed.rank())  # ... but other augmentations and dropout
    if teachers is not None:
        check_classes(teachers, model, loaders.class_map)
    check_annotations(loaders.train.dataset, model.num_classes)
    warn_of_limits(loaders.train.dataset, config.model.num_queries)
    warn_of_limits(loaders.val.dataset, config.model.num_queries, config.evaluation.max_detections)
    if len(loaders.train) < config.train.accumulate:
        raise UserError(
            f"train.accumulate = {config.train.accumulate}: an epoch has only {len(loaders.train)} batches; lower it"
        )
    average = MovingAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = build_optimizer(model, config.train, global_batch(config))
    supervision = teachers.supervision if teachers is not None else None
    difficulty = supervision.difficulty if supervision is not None else None
    state = State(model, optimizer, average, Progress(), difficulty)
    if checkpoint is not None:
        restore(checkpoint, state, device)
    if distributed.is_main():
        make_folder(folder)
        save_config(config, folder / "config.yaml")
    if supervision is not None:
        supervision.precision = PRECISIONS[config.train.precision]
        sharing = supervision.share_frozen_stages(model)
        if sharing:
            logger.info(
                "the frozen stages of the backbone run once for the student and its teachers (%s)",
                ", ".join(sharing),
            )
    model.encoder.recompute = model.decoder.recompute = config.train.recompute
    if config.train.compile:
        compile_layers(model)
    return Run(
        config=config,
        folder=folder,
        name=name,
        device=device,
        facts=facts,
        is_new=checkpoint is None,
        loaders=loaders,
        criterion=build_criterion(config, model.num_classes),
        teachers=supervision,
        state=state,
        trained=distributed.parallel(model, device),
        statistics=KeptStatistics(model),
        watch=StepWatch(config.train.max_skipped_steps),
        signals=signals,
        log=RunLog(folder, name, state.progress.step, evaluated=state.progress.epoch_step == 0),
    )


def prepare_model(config: Config, class_map: ClassMap, init_from: Path | None = None) -> Detr:
    """The model at the start of training, on the CPU."""
    num_classes = config.model.num_classes or class_map.num_rows
    if num_classes < class_map.num_rows:
        raise UserError(
            f"model.num_classes = {num_classes}: the annotations have {class_map.num_rows} class rows;"
            " raise it, or set it to null to have them counted"
        )
    if init_from is not None:
        model = build_without_fetching(config, num_classes)
        transfer = transfer_weights(model, class_map, init_from)
        if not transfer.lacks_backbone:  # nothing would be left of weights that were fetched for it
            if config.model.backbone.weights is not None:
                say(f"model.backbone.weights is not read: {init_from} holds the whole backbone")
            console.print(transfer.table())
            return model
    model = build_model(config.model, num_classes)
    if config.model.backbone.weights is not None:
        weights = config.model.backbone.weights
        say(load_backbone_weights(model.backbone, read_file(weights), weights))
    if init_from is not None:
        console.print(transfer_weights(model, class_map, init_from).table())
    return model


def check_classes(teachers: Teachers, student: Detr, class_map: ClassMap) -> None:
    """The teachers' class rows mean what the student's mean. Raises UserError."""
    other = "was trained on other classes than the student's data has"
    for name, teacher in (("weak", teachers.supervision.weak), ("strong", teachers.supervision.strong)):
        if teacher.num_classes != student.num_classes:
            rows = f"{teacher.num_classes} class rows, the student {student.num_classes}"
            raise UserError(f"the {name} teacher {other}: {rows}")
        if name in teachers.classes:
            for row in range(student.num_classes):
                taught, own = teachers.classes[name].name_of_row(row), class_map.name_of_row(row)
                if taught != own:
                    raise UserError(
                        f"the {name} teacher {other}: row {row} is {taught!r} there, here {own!r}"
                    )


def global_batch(config: Config) -> int:
    """Images of one step."""
    return config.data.batch_size * distributed.world_size() * config.train.accumulate


def describe_run(run: Run) -> str:
    """One line: what is trained, on what, and with which effective batch size and learning rates."""
    config, progress, model = run.config, run.state.progress, run.state.model
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rates = ", ".join(f"{group['name']} {group['base_lr']:.2g}" for group in run.state.optimizer.param_groups)
    factors = [f"{config.data.batch_size} images"]
    factors += [f"{distributed.world_size()} processes"] if distributed.world_size() > 1 else []
    factors += [f"{config.train.accumulate} accumulated"] if config.train.accumulate > 1 else []
    batch = f"{global_batch(config)}" + (f" ({' x '.join(factors)})" if len(factors) > 1 else "")
    return (
        f"{run.name}: {parameters / 1e6:.1f} M trained parameters, {model.num_classes} class rows,"
        f" {len(run.loaders.train.dataset)} images for training and {len(run.loaders.val.dataset)} for evaluation,"
        f" {config.train.epochs - progress.epoch} epochs of {run.num_steps} steps, batch {batch}, lr {rates}"
    )


CANNOT_COMPILE = (TorchDynamoException, InductorError)
"""Raised when a compiled layer first runs."""


def compile_layers(model: Detr) -> None:
    """Compile the layers of encoder and decoder for any sizes, when they run first."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.compile(dynamic=True)


def uncompile_layers(model: Detr) -> None:
    """Let them run as they are again."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer._compiled_call_impl = None


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Between entry and exit only algorithms that give the same bits in every run; PyTorch raises where it has none."""
    if not wanted:
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


class StopSignals:
    """Between entry and exit the signals are noted instead of ending the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first one."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
