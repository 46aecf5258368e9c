"""The training loop: one model, from its first step to its finished checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.checkpoint import FINISHED
from ats_detr.config import ModelConfig
from ats_detr.console import say
from ats_detr.data.loader import Batch
from ats_detr.errors import Stopped, UserError
from ats_detr.evaluation import evaluate, warn_of_minimum
from ats_detr.precompile import compile_kernels
from ats_detr.text import first_line
from ats_detr.training.criterion import compute_losses
from ats_detr.training.distillation import calibrated, training_ratios
from ats_detr.training.guards import (
    check_targets,
    explain_out_of_memory,
    is_out_of_memory,
    largest_batch,
    largest_ratios,
)
from ats_detr.training.optim import learning_rate_factor, set_learning_rates
from ats_detr.training.resume import BEST, delete_results, restore_rng, rng_state
from ats_detr.training.setup import (
    CANNOT_COMPILE,
    Run,
    Stage,
    Teachers,
    describe_run,
    determinism,
    global_batch,
    prepare,
    uncompile_layers,
)
from ats_detr.training.signals import Interrupted

logger = logging.getLogger(__name__)


def train(
    stage: Stage, device: torch.device, teachers: Teachers | None = None, *, outdated: Sequence[Path] = ()
) -> None:
    """Train a stage until its folder holds the finished checkpoint and metrics.json. Collective.

    Resumes from the checkpoint in the folder unless `train.resume` is `never`.

    Args:
        outdated: folders whose results are deleted, with the stage's own, when the training starts from step 0.

    Raises:
        Stopped: after one of the STOP_SIGNALS; the checkpoint is written.
    """
    with determinism(stage.config.deterministic):
        run = prepare(stage, device, teachers)
        with run.resources:
            say(describe_run(run))
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine share Triton's cache
                compile_kernels(stage.config, device, ["train"], num_classes=run.state.model.num_classes)
            distributed.barrier()
            preflight_memory(run)
            if run.is_new:
                for replaced in (stage.folder, *outdated):
                    delete_results(replaced)
            with run.signals, closing(run.loaders):
                train_epochs(run)
                distributed.barrier()


def train_epochs(run: Run) -> None:
    """The epochs that are left, each followed by a checkpoint and an evaluation where they are due.

    Raises Stopped after one of the STOP_SIGNALS; the checkpoint is written.
    """
    config, progress = run.config.train, run.state.progress
    while True:
        is_last = progress.epoch == config.epochs
        if is_last or not progress.is_evaluated:
            evaluate_run(run, is_last=is_last)
        if is_last:
            if any(distributed.gather(run.signals.received is not None)):
                raise stopped(run)
            return
        try:
            train_epoch(run, progress.epoch)
        except Interrupted:
            report_skipped(run, any_skipped=True)
            run.checkpoints.save(run.state, run.device)
            raise stopped(run) from None
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        every = config.evaluate_every
        progress.is_evaluated = progress.epoch < config.epochs and not (every and progress.epoch % every == 0)
        is_stopping = any(distributed.gather(run.signals.received is not None))
        # Before the evaluation, so that a fault in it does not lose the epoch.
        if is_stopping or not progress.is_evaluated or progress.epoch % config.checkpoint_every == 0:
            run.checkpoints.save(run.state, run.device)
        if is_stopping:
            raise stopped(run)


def train_epoch(run: Run, epoch: int) -> None:
    """One pass over the training images, or the rest of it after resuming.

    Raises Stopped after one of the STOP_SIGNALS; the checkpoint is written.
    """
    config, progress, num_steps = run.config.train, run.state.progress, run.num_steps
    started, seconds_before = time.monotonic(), progress.train_seconds
    last_logged, last_time = progress.step, started
    if run.budgets is not None:
        run.budgets.reset()
    limits = (step * config.accumulate for step in (progress.epoch_step, num_steps))
    batches = run.signals.interruptible(run.loaders.train.epoch(epoch, *limits))
    steps = _in_groups(batches, config.accumulate)
    for micro_batches in run.log.track(steps, num_steps, epoch, config.epochs, start=progress.epoch_step):
        is_last = progress.epoch_step + 1 == num_steps
        is_logged = (progress.step + 1) % config.log_every == 0 or is_last
        values = train_step(run, epoch, micro_batches, metrics=is_logged)
        progress.step += 1
        progress.epoch_step += 1
        progress.train_seconds = seconds_before + time.monotonic() - started
        is_stopping = run.signals.stops_after(progress.step)
        every = config.checkpoint_every_steps
        is_saving = not is_last and every > 0 and progress.epoch_step % every == 0
        if is_logged or is_saving or is_stopping:
            numbers = read_values(run, values)
        if is_logged:
            seconds, last_time = time.monotonic() - last_time, time.monotonic()
            num_images = (progress.step - last_logged) * global_batch(run.config)
            last_logged = progress.step
            rate = run.state.optimizer.param_groups[0]["lr"]
            rates = {"learning_rate": rate, "images_per_second": num_images / seconds}
            if all(map(math.isfinite, numbers.values())):
                run.log.write(progress.step, epoch, {**numbers, **rates})
        if is_saving or (is_stopping and not is_last):
            run.checkpoints.save(run.state, run.device)
            if is_stopping:
                raise stopped(run)
    problem = run.budgets.problem() if run.budgets is not None else None
    if problem is not None:
        logger.warning("epoch %d: %s", epoch + 1, problem)


def train_step(run: Run, epoch: int, micro_batches: Sequence[Batch], *, metrics: bool) -> dict[str, Tensor]:
    """One optimiser step on the gradient of all micro batches. Returns the values to log, scalars on the device."""
    state, config = run.state, run.config.train
    progress, model = state.progress, state.model
    run.parallel_model.train()
    set_learning_rates(state.optimizer, learning_rate_factor(config, progress.step, run.num_steps))
    run.batch_norms.save()
    values, problem = accumulate_gradients(run, micro_batches, metrics=metrics)

    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    norms = torch._foreach_norm([p.grad for p in trained.values() if p.grad is not None])
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(trained.values(), config.clip_norm, total_norm)
    image_ids = [target.image_id for _, targets in micro_batches for target in targets]
    norm_of = dict(zip(trained, norms, strict=True))
    skip = run.guard.check(progress.step + 1, epoch, image_ids, values, norm_of, total_norm, problem)
    state.optimizer.found_inf = skip  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad()
    run.batch_norms.restore(skip)
    if state.average is not None:
        state.average.update(model, progress.step)
    return {**values, "gradient_norm": total_norm}


def accumulate_gradients(
    run: Run,
    micro_batches: Sequence[Batch],
    *,
    metrics: bool,
    ratios: Callable[[ModelConfig, int], Tensor | None] = training_ratios,
) -> tuple[dict[str, Tensor], str | None]:
    """Add the gradients of all micro batches to the parameters' `grad`.

    Args:
        metrics: add values that are only logged.
        ratios: gives the keep ratios of a batch of this many images.

    Returns:
        The losses and metrics of the micro batches taken as one batch, and which tensor was not finite, if any.
    """
    targets_of_step = [target for _, targets in micro_batches for target in targets]
    check_targets(targets_of_step, run.state.model.num_classes)
    num_boxes = distributed.global_num_boxes(targets_of_step, run.device)
    share = 1 / len(micro_batches)
    values: dict[str, Tensor] = {}
    problem: str | None = None
    for index, (host_batch, targets) in enumerate(micro_batches):
        batch = host_batch.to(run.device)
        is_last = index + 1 == len(micro_batches)
        keep_ratio = ratios(run.config.model, len(batch))
        with (
            distributed.gradient_averaging(run.parallel_model, enabled=is_last),
            explain_out_of_memory(batch, targets),
        ):
            output, losses, own_problem = compute_losses(
                run.parallel_model,
                run.criterion,
                run.teachers,
                batch,
                targets,
                num_boxes=num_boxes,
                share=share,
                precision=run.precision,
                metrics=metrics,
                keep_ratio=None if keep_ratio is None else keep_ratio.to(run.device, non_blocking=True),
            )
            losses["loss"].backward()
        problem = problem or own_problem
        if output.selection is not None:
            losses["keep_ratio"] = output.selection.keep_ratio_B.mean() * share
            if run.budgets is not None and output.selection.budget_logits is not None:
                run.budgets.add(output.selection.budget_logits, losses["easy_images"] / share)
        for key, value in losses.items():
            values[key] = values[key] + value.detach() if key in values else value.detach()
    return values, problem


def _in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def read_values(run: Run, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers to log, in one transfer. Reports skipped steps, too."""
    numbers = mean_on_host({**values, "skipped": run.guard.num_skipped()})
    report_skipped(run, numbers.pop("skipped") > 0)
    return numbers


def mean_on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars averaged over processes, as Python numbers, in one transfer."""
    vector = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    mean = distributed.sum_over_processes(vector) / distributed.world_size()
    return dict(zip(values, mean.tolist(), strict=True))


def report_skipped(run: Run, any_skipped: bool) -> None:
    """Log the steps skipped since the last report. Raises UserError after too many in a row."""
    for record in run.guard.report(any_skipped):
        run.state.progress.skipped_steps += 1
        step, epoch, reason = (record.pop(key) for key in ("step", "epoch", "reason"))
        logger.warning(
            "step %d was skipped because %s (images %s); %d skipped so far",
            step,
            reason,
            ", ".join(map(str, record["images"])),
            run.state.progress.skipped_steps,
        )
        run.log.write(step, epoch, record, kind="skipped")
    run.guard.stop_if_diverged()


def stopped(run: Run) -> Stopped:
    """The exception that ends a run after a stop signal; its checkpoint is written."""
    signal = next((name for name in distributed.gather(run.signals.received) if name), "a signal")
    step = run.state.progress.step
    run.signals.outcome = Stopped(
        f"{run.stage.name}: stopped by {signal} after step {step}; run the same command to resume",
        exit_code=130 if signal == "SIGINT" else 0,
    )
    return run.signals.outcome


def preflight_memory(run: Run) -> None:
    """Losses and gradients of the largest batch at the largest budget, discarded: a run that lacks memory fails now.

    Layers that cannot be compiled are found here, too, and run without compilation.
    """
    epochs, state = range(run.state.progress.epoch, run.config.train.epochs), run.state
    if not epochs:  # all that is left is an evaluation
        return
    batch, targets = largest_batch(run.loaders.train, run.config.data, epochs, run.device)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = [torch.empty_like(p) for p in parameters for _ in range(0 if state.optimizer.state else 2)]
    rng = rng_state(run.device)
    run.batch_norms.save()
    run.parallel_model.train()
    try:
        accumulate_gradients(run, [(batch, targets)], metrics=False, ratios=largest_ratios)
    except CANNOT_COMPILE as error:
        logger.warning("train.compile is OFF, this model cannot be compiled here: %s", first_line(error))
        uncompile_layers(state.model)
        accumulate_gradients(run, [(batch, targets)], metrics=False, ratios=largest_ratios)
    del moments  # of the optimiser, which makes its own in the first step
    state.optimizer.zero_grad()
    run.batch_norms.restore()
    restore_rng(rng, run.device)


def evaluate_run(run: Run, is_last: bool) -> None:
    """Evaluate on the validation images. The weights with the highest AP are kept, the last ones in any case.

    Self-taught budgets are calibrated before. Raises Stopped after one of the STOP_SIGNALS.
    """
    selector, loader = run.config.model.selector, run.loaders.calibration
    budgets: AbstractContextManager[None] = nullcontext()
    if loader is not None:
        assert selector is not None and selector.mean_ratio is not None
        stop = run.signals.is_requested
        budgets = calibrated(run.state.evaluated, loader, selector.mean_ratio, run.device, should_stop=stop)
    try:
        with budgets:
            _evaluate_and_save(run, is_last)
    except Stopped:
        raise stopped(run) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory in the evaluation: lower data.eval_batch_size and resume") from error


def _evaluate_and_save(run: Run, is_last: bool) -> None:
    state, progress = run.state, run.state.progress
    found = evaluate(
        state.evaluated,
        run.loaders.val,
        run.device,
        max_detections=run.config.evaluation.max_detections,
        should_stop=run.signals.is_requested,
    )
    warn_of_minimum(found, run.config.model.selector)
    metrics = found.to_dict()
    run.log.write(progress.step, progress.epoch, metrics, kind="evaluation")
    say(f"{run.stage.name} epoch {progress.epoch}: {describe_metrics(metrics)}")
    ap = metrics["AP"]
    if ap is not None and (progress.best_ap is None or ap > progress.best_ap):
        progress.best_ap = ap
        if not is_last:
            run.checkpoints.save_result(state, metrics, BEST)
        elif distributed.is_main():
            (run.stage.folder / BEST).unlink(missing_ok=True)
    progress.is_evaluated = True
    if is_last:
        run.checkpoints.save_result(state, metrics, FINISHED)


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """One line about an evaluation."""
    if metrics["AP"] is None:
        return f"{metrics['num_images']} images without any object, so no AP"
    return f"AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  mean keep ratio {metrics['mean_keep_ratio']:.1%}"
