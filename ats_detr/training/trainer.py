"""The training loop: one model, from its first step to its finished checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.config import Config
from ats_detr.data.loader import Batch
from ats_detr.errors import Stopped
from ats_detr.evaluation import evaluate, warn_of_minimum
from ats_detr.training.criterion import compute_losses
from ats_detr.training.guards import check_targets, largest_batch, naming_the_batch
from ats_detr.training.optim import learning_rate_factor, set_learning_rates
from ats_detr.training.resume import (
    BEST,
    FINISHED,
    discard_results,
    restore_rng,
    rng_state,
    save,
    save_result,
)
from ats_detr.training.run_log import say
from ats_detr.training.setup import (
    CANNOT_COMPILE,
    Run,
    StopSignals,
    Teachers,
    describe_run,
    determinism,
    global_batch,
    prepare,
    uncompile_layers,
)

logger = logging.getLogger(__name__)


def train(
    config: Config,
    folder: Path,
    name: str,
    device: torch.device,
    teachers: Teachers | None = None,
    *,
    init_from: Path | None = None,
    outdated: Sequence[Path] = (),
) -> None:
    """Train the model of `config` until `folder` holds its finished checkpoint and metrics.json.

    Goes on from the folder's checkpoint unless `train.resume` is `never`. Every process of a run calls it.

    Args:
        name: shown to the user.
        init_from: the file that `train.init_from` means.
        outdated: folders whose results go, with its own, when this training starts afresh.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; the checkpoint is written.
    """
    with determinism(config.deterministic), StopSignals() as signals:
        run = prepare(config, folder, name, device, teachers, init_from, signals)
        progress = run.state.progress
        say(describe_run(run))
        rehearse(run)
        if run.is_new:
            for replaced in (folder, *outdated):
                discard_results(replaced)
        for epoch in range(progress.epoch, config.train.epochs):
            train_epoch(run, epoch)
            progress.epoch, progress.epoch_step = epoch + 1, 0
            if progress.epoch == config.train.epochs:
                metrics = evaluate_run(run, is_last=True)
                save_result(config, run.facts, folder, run.state, metrics, FINISHED)
                break
            every = config.train.evaluate_every
            if every and progress.epoch % every == 0:
                evaluate_run(run, is_last=False)
            is_stopping = any(distributed.gather(signals.received is not None))
            if is_stopping or progress.epoch % config.train.checkpoint_every == 0:
                save(config, run.facts, folder, run.state, device)
            if is_stopping:
                raise stopped(run)
        run.log.close()
        distributed.barrier()


def train_epoch(run: Run, epoch: int) -> None:
    """One pass over the training images, or what is left of it.

    Raises Stopped where a signal asks for it, once the checkpoint is written.
    """
    config, progress, num_steps = run.config.train, run.state.progress, run.num_steps
    started, seconds_before = time.monotonic(), progress.train_seconds
    last_logged, last_time = progress.step, started
    batches = run.loaders.train.epoch(epoch, start=progress.epoch_step * config.accumulate)
    steps = itertools.islice(_in_groups(batches, config.accumulate), num_steps - progress.epoch_step)
    for micro_batches in run.log.track(steps, num_steps, epoch, config.epochs, start=progress.epoch_step):
        is_last = progress.epoch_step + 1 == num_steps
        is_logged = (progress.step + 1) % config.log_every == 0 or is_last
        values = train_step(run, epoch, micro_batches, metrics=is_logged)
        progress.step += 1
        progress.epoch_step += 1
        is_stopping = distributed.world_size() == 1 and run.signals.received is not None
        every = config.checkpoint_every_steps
        is_saving = not is_last and every > 0 and progress.epoch_step % every == 0
        if is_logged or is_saving or is_stopping:
            numbers, is_stopping = read_values(run, values)
        if is_logged:
            seconds, last_time = time.monotonic() - last_time, time.monotonic()
            num_images = (progress.step - last_logged) * global_batch(run.config)
            last_logged = progress.step
            rate = run.state.optimizer.param_groups[0]["lr"]
            rates = {"learning_rate": rate, "images_per_second": num_images / seconds}
            if all(map(math.isfinite, numbers.values())):
                run.log.write(progress.step, epoch, {**numbers, **rates})
        if is_saving or (is_stopping and not is_last):
            progress.train_seconds = seconds_before + time.monotonic() - started
            save(run.config, run.facts, run.folder, run.state, run.device)
            if is_stopping:
                raise stopped(run)
    progress.train_seconds = seconds_before + time.monotonic() - started


def train_step(run: Run, epoch: int, micro_batches: Sequence[Batch], *, metrics: bool) -> dict[str, Tensor]:
    """One update of the weights by the gradient of all micro batches. Returns what to log, on the device."""
    state, settings = run.state, run.config.train
    progress, model = state.progress, state.model
    run.trained.train()
    factor = learning_rate_factor(settings, progress.step, run.num_steps)
    set_learning_rates(state.optimizer, factor)
    run.statistics.keep()
    values, problem = accumulate_gradients(run, micro_batches, metrics=metrics)

    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    norms = torch._foreach_norm([p.grad for p in trained.values() if p.grad is not None])
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(trained.values(), settings.clip_norm, total_norm)
    image_ids = [target.image_id for _, targets in micro_batches for target in targets]
    evidence = dict(zip(trained, norms, strict=True))
    skip = run.watch.judge(progress.step + 1, epoch, image_ids, values, evidence, total_norm, problem)
    state.optimizer.found_inf = skip  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad()
    run.statistics.restore(skip)
    if state.average is not None:
        state.average.update(model, progress.step)
    return {**values, "gradient_norm": total_norm}


def accumulate_gradients(
    run: Run, micro_batches: Sequence[Batch], *, metrics: bool
) -> tuple[dict[str, Tensor], str | None]:
    """Add the gradients of all micro batches. Returns their losses as of one batch, and what was not finite."""
    targets_of_step = [target for _, targets in micro_batches for target in targets]
    check_targets(targets_of_step, run.state.model.num_classes)
    num_boxes = distributed.global_num_boxes(targets_of_step, run.device)
    share = 1 / len(micro_batches)
    values: dict[str, Tensor] = {}
    problem: str | None = None
    for index, (host_batch, targets) in enumerate(micro_batches):
        batch = host_batch.to(run.device)
        is_last = index + 1 == len(micro_batches)
        with distributed.gradients_averaged(run.trained, is_last), naming_the_batch(batch, targets):
            output, losses, found = compute_losses(
                run.trained,
                run.criterion,
                run.teachers,
                batch,
                targets,
                num_boxes=num_boxes,
                share=share,
                precision=run.precision,
                metrics=metrics,
            )
            losses["loss"].backward()
        problem = problem or found
        if output.selection is not None:
            losses["keep_ratio"] = output.selection.keep_ratio_B.mean() * share
        for key, value in losses.items():
            values[key] = values[key] + value.detach() if key in values else value.detach()
    return values, problem


def _in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def read_values(run: Run, values: Mapping[str, Tensor]) -> tuple[dict[str, float], bool]:
    """Numbers to log, and whether any process was asked to stop, in one transfer. Tells of skipped steps, too."""
    # Filled on the device, so nothing waits.
    stopping = torch.full((), float(run.signals.received is not None), device=run.device)
    numbers = mean_on_host({**values, "skipped": run.watch.num_skipped(), "stopping": stopping})
    is_stopping = numbers.pop("stopping") > 0
    report_skipped(run, numbers.pop("skipped") > 0)
    return numbers, is_stopping


def mean_on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Python numbers of many scalars, each the mean over processes, in one transfer."""
    vector = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    mean = distributed.sum_over_processes(vector) / distributed.world_size()
    return dict(zip(values, mean.tolist(), strict=True))


def report_skipped(run: Run, any_skipped: bool) -> None:
    """Say and log which steps were skipped since the last report. Raises UserError after too many in a row."""
    for record in run.watch.report(any_skipped):
        run.state.progress.skipped_steps += 1
        images = ", ".join(map(str, record["images"]))
        logger.warning(
            "step %d skipped, %s is not finite (images %s); %d skipped so far",
            record["step"],
            record["tensor"],
            images,
            run.state.progress.skipped_steps,
        )
        step, epoch = record.pop("step"), record.pop("epoch")
        run.log.write(step, epoch, record, kind="skipped")
    run.watch.stop_if_diverged()


def stopped(run: Run) -> Stopped:
    """The end of a run that was asked to stop, its checkpoint written."""
    run.log.close()
    signal = next((name for name in distributed.gather(run.signals.received) if name), "a signal")
    return Stopped(
        f"{run.name}: stopped by {signal} after step {run.state.progress.step}; the same command goes on from there"
    )


def rehearse(run: Run) -> None:
    """Losses and gradients of the largest batch there will be, thrown away: out of memory now rather than in hours."""
    data = run.config.data
    batch, targets = largest_batch(run.loaders.train, max(data.train_short_sides), data.long_side, run.device)
    rng = rng_state(run.device)
    run.statistics.keep()
    run.trained.train()
    try:
        accumulate_gradients(run, [(batch, targets)], metrics=False)
    except CANNOT_COMPILE as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("train.compile is OFF, this model cannot be compiled here: %s", reason)
        uncompile_layers(run.state.model)
        accumulate_gradients(run, [(batch, targets)], metrics=False)
    run.state.optimizer.zero_grad()
    run.statistics.restore()
    restore_rng(rng, run.device)


def evaluate_run(run: Run, is_last: bool) -> dict[str, Any]:
    """Measure the model on the validation images, and keep it if it is the best so far but not the last."""
    state, progress = run.state, run.state.progress
    found = evaluate(
        state.evaluated, run.loaders.val, run.device, max_detections=run.config.evaluation.max_detections
    )
    warn_of_minimum(found, run.config.model.selector)
    metrics = found.to_dict()
    run.log.write(progress.step, progress.epoch, metrics, kind="evaluation")
    say(f"{run.name} epoch {progress.epoch}: {describe_metrics(metrics)}")
    ap = metrics["AP"]
    if ap is not None and (progress.best_ap is None or ap > progress.best_ap):
        progress.best_ap = ap
        if not is_last:
            save_result(run.config, run.facts, run.folder, state, metrics, BEST)
        elif distributed.is_main():
            (run.folder / BEST).unlink(missing_ok=True)
    return metrics


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """One line of what an evaluation found."""
    if metrics["AP"] is None:
        return f"{metrics['num_images']} images without any object, so no AP"
    return f"AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  mean keep ratio {metrics['mean_keep_ratio']:.1%}"
