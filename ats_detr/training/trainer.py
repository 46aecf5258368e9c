"""The training loop: one model, from its first step to its finished checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from ats_detr import distributed
from ats_detr.batch import ImageBatch, Target
from ats_detr.config import Config, config_to_dict, save_config
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.evaluation import Metrics, evaluate
from ats_detr.model import Detr, build_model
from ats_detr.model.backbone import load_weights as load_backbone_weights
from ats_detr.model.output import DetectorOutput
from ats_detr.training.checkpoint import (
    build_without_fetching,
    load_checkpoint,
    load_weights,
    read_file,
    save_checkpoint,
    write_json,
)
from ats_detr.training.criterion import SetCriterion
from ats_detr.training.datasets import Loaders, build_loaders
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.logging import RunLog, console, say
from ats_detr.training.optim import build_optimizer, learning_rate_factor, set_learning_rates
from ats_detr.training.origin import ADJUSTABLE, check_same_origin
from ats_detr.training.transfer import transfer_weights

logger = logging.getLogger(__name__)

RESUMABLE = "checkpoint.pt"
"""In a stage's folder: the state to go on from."""
FINISHED = "final.pt"
"""In a stage's folder: the weights at the end. Its existence says that the stage is finished."""


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside the weights and the optimiser."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps."""
    train_seconds: float = 0.0


@dataclass(frozen=True)
class Teachers:
    """The teachers of a student, and what their checkpoints say of them."""

    supervision: DualTeacher
    weights: Mapping[str, str]
    """Digest of each one's weights, by name."""
    classes: Mapping[str, ClassMap]
    """What the class rows mean of those that say it, by name."""


def train(
    config: Config,
    folder: Path,
    name: str,
    device: torch.device,
    teachers: Teachers | None = None,
    *,
    init_from: Path | None = None,
) -> None:
    """Train the model of `config` until `folder` holds its finished checkpoint and metrics.json.

    Goes on from the folder's checkpoint unless `train.resume` is `never`. Every process of a run calls it.

    Args:
        name: shown to the user.
        init_from: the file that `train.init_from` means.
    """
    loaders = build_loaders(config.data, config.seed, pin_memory=device.type == "cuda")
    facts: dict[str, Any] = {
        "classes": loaders.class_map.to_dict(),
        "num_processes": distributed.world_size(),
        "teacher_weights": dict(teachers.weights) if teachers is not None else {},
    }
    checkpoint = find_checkpoint(config, facts, folder / RESUMABLE)
    torch.manual_seed(config.seed)  # the same weights on every process ...
    if checkpoint is None:
        model = prepare_model(config, loaders.class_map, init_from).to(device)
    else:
        model = build_without_fetching(config, checkpoint["num_classes"]).to(device)
    torch.manual_seed(config.seed + distributed.rank())  # ... but other augmentations and dropout
    global_batch = config.data.batch_size * distributed.world_size()
    optimizer = build_optimizer(model, config.train, global_batch)
    if teachers is not None:
        check_classes(teachers, model, loaders.class_map)
    criterion = build_criterion(config, model.num_classes)
    progress = Progress()
    if checkpoint is not None:
        progress = resume(checkpoint, folder / RESUMABLE, model, optimizer, device)
    if distributed.is_main():
        make_folder(folder)
        save_config(config, folder / "config.yaml")
    if checkpoint is None:
        discard_results(folder)
    log = RunLog(folder, name, progress.step)
    say(describe_run(config, name, model, optimizer, loaders, progress))

    metrics: dict[str, Any] = {}
    trained = parallel(model, device)
    for epoch in range(progress.epoch, config.train.epochs):
        started = time.monotonic()
        supervision = teachers.supervision if teachers is not None else None
        train_epoch(config, epoch, trained, criterion, supervision, optimizer, loaders, progress, log, device)
        progress.train_seconds += time.monotonic() - started
        progress.epoch = epoch + 1
        is_last = progress.epoch == config.train.epochs
        if is_last or (config.train.evaluate_every and progress.epoch % config.train.evaluate_every == 0):
            found = evaluate(model, loaders.val, device)
            warn_of_minimum(config, found)
            metrics = found.to_dict()
            log.write(progress.step, progress.epoch, metrics, kind="evaluation")
            say(f"{name} epoch {progress.epoch}: {describe_metrics(metrics)}")
        if is_last or progress.epoch % config.train.checkpoint_every == 0:
            final_metrics = metrics if is_last else None
            save(config, facts, folder, model, optimizer, progress, final_metrics, device)
    log.close()
    distributed.barrier()


def train_epoch(
    config: Config,
    epoch: int,
    model: nn.Module,
    criterion: SetCriterion,
    teachers: DualTeacher | None,
    optimizer: AdamW,
    loaders: Loaders,
    progress: Progress,
    log: RunLog,
    device: torch.device,
) -> None:
    """One pass over the training images."""
    model.train()
    num_steps = len(loaders.train)
    last_logged, last_time = progress.step, time.monotonic()
    for batch, targets in log.track(loaders.train.epoch(epoch), num_steps, epoch, config.train.epochs):
        set_learning_rates(optimizer, learning_rate_factor(config.train, progress.step, num_steps))
        batch, targets = batch.to(device), [target.to(device) for target in targets]
        try:
            output, losses = compute_losses(model, criterion, teachers, batch, targets)
        except FloatingPointError as error:
            raise diverged(str(error), progress.step + 1) from error
        losses["loss"].backward()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1

        if progress.step % config.train.log_every == 0 or progress.step % num_steps == 0:
            values = mean_on_host({**losses, "gradient_norm": gradient_norm, **selection_values(output)})
            stop_if_not_finite(values, progress.step, targets)
            seconds, last_time = time.monotonic() - last_time, time.monotonic()
            images = (progress.step - last_logged) * len(targets) * distributed.world_size()
            last_logged = progress.step
            rates = {"learning_rate": optimizer.param_groups[0]["lr"], "images_per_second": images / seconds}
            log.write(progress.step, epoch, {**values, **rates})


def compute_losses(
    model: nn.Module,
    criterion: SetCriterion,
    teachers: DualTeacher | None,
    batch: ImageBatch,
    targets: Sequence[Target],
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """The model's output, and its losses by name with `loss`, their weighted sum.

    The mean over processes of the gradient of `loss` is the gradient for the batches of all processes taken as one.
    """
    output = model(batch)
    losses = criterion(output, targets, distributed.global_num_boxes(targets, batch.images_B3HW.device))
    total = sum(weight * losses[key] for key, weight in criterion.weights.items() if key in losses)
    if teachers is not None:
        taught = teachers(batch, targets, output)
        losses |= taught
        total = total + sum(taught.values())
    return output, {"loss": total, **losses}


def selection_values(output: DetectorOutput) -> dict[str, Tensor]:
    """What to log of the token selection."""
    if output.selection is None:
        return {}
    return {"keep_ratio": output.selection.keep_ratio_B.mean()}


def mean_on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Python numbers of many scalars, each the mean over processes, in one transfer."""
    vector = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    mean = distributed.sum_over_processes(vector) / distributed.world_size()
    return dict(zip(values, mean.tolist(), strict=True))


def stop_if_not_finite(values: dict[str, float], step: int, targets: Sequence[Target]) -> None:
    """Stop before a checkpoint is spoiled; on every process, as `values` are the same on all."""
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        shares = distributed.gather([target.image_id for target in targets])
        images = ", ".join(str(image_id) for share in shares for image_id in share)
        raise diverged(f"{bad[0]} is {values[bad[0]]} (images {images})", step)


def diverged(what: str, step: int) -> UserError:
    """The end of a run whose numbers are no longer finite."""
    return UserError(
        f"training diverged in step {step}: {what}; lower train.learning_rate, and go on from the last checkpoint"
    )


def warn_of_minimum(config: Config, metrics: Metrics) -> None:
    """Say so where the budgets are without effect because images keep `min_tokens` whatever they choose."""
    selector = config.model.selector
    if selector is None or not selector.adaptive:
        return
    at_minimum = sum(record.num_kept_tokens <= selector.min_tokens for record in metrics.images)
    if 2 * at_minimum > len(metrics.images):
        logger.warning(
            "%d of %d images keep model.selector.min_tokens = %d tokens, or all they have, whatever their budget is:"
            " lower it, or give larger images",
            at_minimum,
            len(metrics.images),
            selector.min_tokens,
        )


def make_folder(folder: Path) -> None:
    """Make a folder for results, with those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make this folder ({error.strerror}); choose another one"
        ) from error


def discard_results(folder: Path) -> None:
    """Remove what an earlier training left: nobody may take it for the result of the one that starts now."""
    distributed.barrier()  # every process has read what it needs of it
    if distributed.is_main():
        for name in (FINISHED, RESUMABLE, "metrics.json"):
            (folder / name).unlink(missing_ok=True)


def prepare_model(config: Config, class_map: ClassMap, init_from: Path | None = None) -> Detr:
    """The model at the start of training, on the CPU."""
    num_classes = config.model.num_classes or class_map.num_rows
    if num_classes < class_map.num_rows:
        raise UserError(
            f"model.num_classes = {num_classes}: the annotations have {class_map.num_rows} class rows;"
            " raise it, or set it to null to have them counted"
        )
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


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """The criterion for the model of a config."""
    return SetCriterion(
        num_classes,
        class_specific_proposals=config.model.class_specific_proposals,
        num_decoder_layers=config.model.num_decoder_layers,
        num_encoder_layers=config.model.num_encoder_layers,
    )


def parallel(model: Detr, device: torch.device) -> nn.Module:
    """The model as the processes of a distributed run train it together."""
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def find_checkpoint(config: Config, facts: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The run's own checkpoint, if there is one to go on from. Raises UserError where it is of another training."""
    if config.train.resume == "never" or not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    check_same_origin(checkpoint, path, config, facts, ADJUSTABLE)
    if checkpoint["epoch"] >= config.train.epochs:
        raise UserError(
            f"{path}: has done {checkpoint['epoch']} epochs, but train.epochs = {config.train.epochs}:"
            f" give more than {checkpoint['epoch']}, or train again with train.resume=never"
        )
    return checkpoint


def resume(
    checkpoint: Mapping[str, Any], path: Path, model: Detr, optimizer: AdamW, device: torch.device
) -> Progress:
    """Restore everything that training changes from the run's own checkpoint. Strict: nothing may be missing.

    Learning rates and weight decay stay as the optimiser was built: they may have been changed since.
    """
    load_weights(model, checkpoint["model"], path)
    asked = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)
    restore_rng(checkpoint["rng"][distributed.rank()], device)
    progress = {field.name: checkpoint[field.name] for field in dataclasses.fields(Progress)}
    logger.info("going on from %s after epoch %d", path, progress["epoch"])
    return Progress(**progress)


def save(
    config: Config,
    facts: Mapping[str, Any],
    folder: Path,
    model: Detr,
    optimizer: AdamW,
    progress: Progress,
    metrics: dict[str, Any] | None,
    device: torch.device,
) -> None:
    """Write the checkpoint to go on from; with `metrics`, the finished one instead."""
    rng = distributed.gather(rng_state(device))
    if not distributed.is_main():
        return
    checkpoint: dict[str, Any] = {
        "model": model.state_dict(),
        "config": config_to_dict(config),
        "num_classes": model.num_classes,
        **facts,
        **dataclasses.asdict(progress),
        "finished": metrics is not None,
    }
    if metrics is None:
        checkpoint |= {"optimizer": optimizer.state_dict(), "rng": rng}
        save_checkpoint(checkpoint, folder / RESUMABLE)
        return
    write_json(metrics, folder / "metrics.json")
    save_checkpoint(checkpoint | {"metrics": metrics}, folder / FINISHED)
    (folder / RESUMABLE).unlink(missing_ok=True)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the random number generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def describe_run(
    config: Config, name: str, model: Detr, optimizer: AdamW, loaders: Loaders, progress: Progress
) -> str:
    """One line: what is trained, on what, and with which effective batch size and learning rates."""
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rates = ", ".join(f"{group['name']} {group['base_lr']:.2g}" for group in optimizer.param_groups)
    batch = config.data.batch_size * distributed.world_size()
    return (
        f"{name}: {parameters / 1e6:.1f} M trained parameters, {model.num_classes} class rows,"
        f" {len(loaders.train.dataset)} images for training and {len(loaders.val.dataset)} for evaluation,"
        f" {config.train.epochs - progress.epoch} epochs of {len(loaders.train)} steps, batch {batch}, lr {rates}"
    )


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """One line of what an evaluation found."""
    if metrics["AP"] is None:
        return f"{metrics['num_images']} images without any object, so no AP"
    return f"AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  mean keep ratio {metrics['mean_keep_ratio']:.1%}"
