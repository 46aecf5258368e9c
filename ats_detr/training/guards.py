"""Guards of a run: checks of annotations, out-of-memory errors with their cause, and steps that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.batch import NO_IMAGE, ImageBatch, Target
from ats_detr.config import DataConfig, ModelConfig
from ats_detr.data.coco import CocoDetection
from ats_detr.data.loader import TrainingLoader
from ats_detr.data.transforms import resized_size
from ats_detr.errors import UserError

_ROUNDING = 1e-4
"""Tolerance of normalised boxes."""


# ---------------------------------------------------------------------------------------------- labels and boxes
def check_annotations(dataset: CocoDetection, num_classes: int) -> None:
    """Raise UserError, with image and value, where a class of the training annotations is out of range."""
    annotations = dataset.annotations
    wrong = ~annotations.crowd & ((dataset.label_rows < 0) | (dataset.label_rows >= num_classes))
    if wrong.any():
        first = int(wrong.argmax())
        raise UserError(
            f"{annotations.file}: image {annotations.image_ids[annotations.image_of_annotation()[first]]} has an object"
            f" with category_id {annotations.category_ids[first]}, beyond the model's {num_classes} classes"
            f" ({int(wrong.sum())} such objects): correct the annotations"
        )


def check_targets(targets: Sequence[Target], num_classes: int) -> None:
    """Raise UserError, with image and value, where a target of a batch (on the host) is out of range."""
    for target in targets:
        labels, boxes = np.asarray(target.labels_N), np.asarray(target.boxes_N4)
        if len(labels) == 0:
            continue
        if labels.min() < 0 or labels.max() >= num_classes:
            bad = int(labels[(labels < 0) | (labels >= num_classes)][0])
            raise UserError(
                f"image {target.image_id}: label {bad} must be in [0, {num_classes}), the model's"
                " classes; correct the data"
            )
        inside = np.isfinite(boxes) & (boxes >= -_ROUNDING) & (boxes <= 1 + _ROUNDING)
        if not inside.all():
            bad_box = boxes[~inside.all(1)][0].tolist()
            raise UserError(
                f"image {target.image_id}: box {bad_box} (cx, cy, w, h) must be in [0, 1]; correct the data"
            )


# ------------------------------------------------------------------------------------------------------- out of memory
@contextmanager
def explain_out_of_memory(batch: ImageBatch, targets: Sequence[Target]) -> Iterator[None]:
    """Raise UserError, with the sizes of the batch, in place of an out-of-memory error."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        height, width = batch.images_B3HW.shape[-2:]
        objects = sum(len(target.labels_N) for target in targets)
        ids = ", ".join(str(target.image_id) for target in targets)
        which = (
            "the largest batch, tried before the first step"
            if targets[0].image_id == NO_IMAGE
            else f"images {ids}"
        )
        raise UserError(
            f"out of memory with {len(batch)} images of {height} x {width} pixels (padded) and {objects} objects"
            f" ({which}): lower data.batch_size and raise train.accumulate as much, or set train.recompute=true or"
            " train.precision=bfloat16"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU, or on the host as reported by torch's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest_batch(
    loader: TrainingLoader, config: DataConfig, epochs: Iterable[int], device: torch.device
) -> tuple[ImageBatch, list[Target]]:
    """Images of zeros and objects of class 0, for the memory preflight.

    The images have the largest padded size, and the batch the largest number of objects, that the batches of this
    process can have in any of the epochs: at the largest scale, with the most elongated crops.
    """
    counts = np.diff(loader.dataset.annotations.starts)
    sizes = _largest_sizes(loader, config)
    largest, most = (0, 0), 0
    for epoch in epochs:
        share_NB = np.array(loader.global_batches(epoch))[:, loader.rank :: loader.world_size]
        most = max(most, int(counts[share_NB].sum(1).max()))
        # The sides of a batch are those of its largest images, which may be different ones.
        size_N2 = (
            sizes[:, share_NB].max(2).max(0)
            if share_NB.shape[1] > 1
            else sizes[:, share_NB[:, 0]].reshape(-1, 2)
        )
        candidate = size_N2[size_N2.prod(1).argmax()].tolist()
        largest = max(largest, (candidate[0], candidate[1]), key=math.prod)
    height, width = largest
    images = torch.zeros(loader.batch_size, 3, height, width, device=device)
    per_image = np.bincount(np.arange(most) % loader.batch_size, minlength=loader.batch_size)
    targets = [
        Target(
            NO_IMAGE,
            (height, width),
            torch.zeros(int(count), dtype=torch.int64),
            torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(int(count), 1),
        )
        for count in per_image
    ]
    return ImageBatch(images, [(height, width)] * loader.batch_size), targets


def _largest_sizes(loader: TrainingLoader, config: DataConfig) -> np.ndarray:
    """int64 [variants, images, 2] largest (height, width) of each image: whole, and the highest and widest crops."""
    short_side, long_side = max(config.train_short_sides), config.long_side
    smallest, largest = config.crop_size
    variants: list[list[tuple[int, int]]] = []
    for size in map(loader.dataset.size, range(len(loader.dataset))):
        own = [resized_size(size, short_side, long_side)]
        if config.crop_short_sides:
            before = resized_size(size, max(config.crop_short_sides))
            height, width = (min(side, largest) for side in before)
            own += [
                resized_size(crop, short_side, long_side)
                for crop in ((height, min(smallest, width)), (min(smallest, height), width))
            ]
        if config.rotate_90:
            own += [(width, height) for height, width in own]
        variants.append(own)
    return np.array(variants).transpose(1, 0, 2)


def largest_ratios(config: ModelConfig, num_images: int) -> Tensor | None:
    """float32 [num_images] the largest keep ratio of a training step for each image; None where budgets are fixed."""
    selector = config.selector
    if selector is None or not (selector.adaptive or selector.train_ratios):
        return None
    largest = selector.train_ratios[1] if selector.train_ratios else selector.max_ratio
    assert largest is not None
    return torch.full((num_images,), largest)


# ------------------------------------------------------------------------------------------- losses and gradients
@dataclass
class _PendingStep:
    """A step whose `is_bad` is still on the device."""

    step: int
    epoch: int
    image_ids: list[int]
    problem: str | None
    is_bad: Tensor


class StepGuard:
    """Skips steps whose gradient is not finite, without device-to-host synchronisation.

    A skipped step changes neither weights nor statistics. `report` transfers which steps were skipped and, of the first
    one, the losses and the gradient norm of every parameter.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.first_of_row = ""
        self._since_report: list[_PendingStep] = []
        self._loss_names: list[str] = []
        self._parameter_names: list[str] = []
        self._seen: Tensor | None = None
        self._evidence: Tensor | None = None
        """float32 [losses + parameters] losses and gradient norms of the first bad step since the last report."""

    def check(
        self,
        step: int,
        epoch: int,
        image_ids: list[int],
        losses: Mapping[str, Tensor],
        gradient_norms: Mapping[str, Tensor],
        total_norm: Tensor,
        problem: str | None,
    ) -> Tensor:
        """float32 scalar on the device, 1 where the step must be skipped; equal on all processes, as gradients are.

        Args:
            step: reported if it is skipped, like `epoch` and `image_ids`.
            epoch: counted from 0.
            image_ids: of the batch.
            losses: scalars by name.
            gradient_norms: scalars by parameter name, in the order of the forward pass.
            total_norm: norm of the whole gradient before clipping.
            problem: description of a tensor that is known not to be finite.
        """
        is_bad = ~total_norm.isfinite()
        self._loss_names = [name for name in losses if name.startswith("loss")]
        self._parameter_names = list(gradient_norms)
        values = [*(losses[name].detach() for name in self._loss_names), *gradient_norms.values()]
        evidence = torch.stack(values)
        if self._evidence is None or self._seen is None:
            self._evidence, self._seen = evidence, is_bad
        else:
            self._evidence = torch.where(is_bad & ~self._seen, evidence, self._evidence)
            self._seen = self._seen | is_bad
        self._since_report.append(_PendingStep(step, epoch, image_ids, problem, is_bad))
        return is_bad.float()

    def num_skipped(self) -> Tensor:
        """float32 scalar on the device: steps skipped since the last report."""
        return torch.stack([step.is_bad for step in self._since_report]).sum().float()

    def report(self, any_skipped: bool) -> list[dict[str, Any]]:
        """A record of each step skipped since the last report, with the `reason` as a clause. Collective.

        Args:
            any_skipped: whether `num_skipped` was > 0; if False, nothing is transferred.
        """
        steps, self._since_report = self._since_report, []
        evidence, self._evidence, self._seen = self._evidence, None, None
        if not any_skipped or evidence is None:
            self.in_a_row = 0
            return []
        flags = torch.stack([entry.is_bad for entry in steps]).tolist()
        numbers = evidence.tolist()
        shares = distributed.gather([(entry.image_ids, entry.problem) for entry in steps])
        records: list[dict[str, Any]] = []
        for i, (entry, is_bad) in enumerate(zip(steps, flags, strict=True)):
            if not is_bad:
                self.in_a_row = 0
                continue
            record: dict[str, Any] = {
                "step": entry.step,
                "epoch": entry.epoch,
                "images": [image_id for share in shares for image_id in share[i][0]],
            }
            problems = [share[i][1] for share in shares if share[i][1] is not None]
            if not records:  # the evidence belongs to the first one
                record |= self._statistics(numbers)
            record["tensor"] = problems[0] if problems else record.get("tensor", "a gradient")
            record["reason"] = problems[0] if problems else f"{record['tensor']} is not finite"
            records.append(record)
            self.in_a_row += 1
            images = ", ".join(map(str, record["images"]))
            if self.in_a_row == 1:
                self.first_of_row = f"step {entry.step}, images {images}: {record['reason']}"
        return records

    def stop_if_diverged(self) -> None:
        """Raise UserError, with the first tensor that was not finite, after too many skipped steps in a row."""
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(
                f"training diverged: no finite gradient in {self.in_a_row} steps in a row, from {self.first_of_row};"
                " lower train.learning_rate and resume from the last checkpoint"
            )

    def _statistics(self, numbers: list[float]) -> dict[str, Any]:
        losses = dict(zip(self._loss_names, numbers, strict=False))
        norms = dict(zip(self._parameter_names, numbers[len(losses) :], strict=True))
        bad_losses = [name for name, value in losses.items() if name != "loss" and not math.isfinite(value)]
        # Gradients flow from the last layers to the first: the last bad one is closest to the cause.
        bad_norms = [name for name, value in norms.items() if not math.isfinite(value)]
        where = (
            bad_losses[0] if bad_losses else f"the gradient of {bad_norms[-1]}" if bad_norms else "a gradient"
        )
        return {"tensor": where, "losses": _in_json(losses), "gradient_norms": _in_json(norms)}


def _in_json(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


class BatchNormSnapshot:
    """The running statistics of batch norms, saved before a forward pass and restored after a skipped step."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self._before: list[Tensor] = []

    def save(self) -> None:
        """Copy the statistics. Call it before the forward pass."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def restore(self, is_bad: Tensor | None = None) -> None:
        """Put the saved statistics back; with `is_bad`, a scalar on the device, only where it is not 0."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before if is_bad is None else torch.where(is_bad > 0, before, buffer))
