"""What stops a run early, in words, or keeps one bad batch from spoiling it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.batch import NO_IMAGE, ImageBatch, Target
from ats_detr.data.coco import CocoDetection
from ats_detr.data.loader import TrainingLoader
from ats_detr.data.transforms import resized_size
from ats_detr.errors import UserError

_TOLERATED_EXCESS = 0.05
"""Boxes may reach outside their image by this share of its side and a pixel: annotators do that, and it is clipped."""
_MIN_SHARE = -1e-4
"""Rounding of normalised boxes."""


# ---------------------------------------------------------------------------------------------- labels and boxes
def check_annotations(dataset: CocoDetection, num_classes: int) -> None:
    """Stop, before anything is trained, at a label or box that cannot be. Raises UserError naming image and value."""
    annotations = dataset.annotations
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
    height, width = annotations.sizes[image_of_box].T
    x, y, w, h = annotations.boxes_xywh.T
    excess_x = np.maximum(-x, x + w - width) > 1 + _TOLERATED_EXCESS * width
    excess_y = np.maximum(-y, y + h - height) > 1 + _TOLERATED_EXCESS * height
    counted = ~annotations.crowd
    wrong_box = counted & ((w < 0) | (h < 0) | excess_x | excess_y)
    wrong_label = counted & ((dataset.label_rows < 0) | (dataset.label_rows >= num_classes))
    for wrong, what in ((wrong_label, "category"), (wrong_box, "box")):
        if wrong.any():
            first = int(wrong.argmax())
            image = image_of_box[first]
            value = (
                f"bbox {annotations.boxes_xywh[first].tolist()} outside of its {width[first]} x {height[first]} pixels"
                if what == "box"
                else f"category_id {annotations.category_ids[first]}, beyond the model's {num_classes} class rows"
            )
            raise UserError(
                f"{annotations.file}: image {annotations.image_ids[image]} has an object with {value}"
                f" ({int(wrong.sum())} such objects): mend the annotations"
            )


def check_targets(targets: Sequence[Target], num_classes: int) -> None:
    """The same for the targets of a batch, on the host. Raises UserError naming the image."""
    for target in targets:
        labels, boxes = np.asarray(target.labels_N), np.asarray(target.boxes_N4)
        if len(labels) == 0:
            continue
        if labels.min() < 0 or labels.max() >= num_classes:
            bad = int(labels[(labels < 0) | (labels >= num_classes)][0])
            raise UserError(
                f"image {target.image_id}: label {bad} is not among the model's {num_classes} class rows; mend the data"
            )
        inside = np.isfinite(boxes) & (boxes >= _MIN_SHARE) & (boxes <= 1 - _MIN_SHARE)
        if not inside.all():
            bad_box = boxes[~inside.all(1)][0].tolist()
            raise UserError(
                f"image {target.image_id}: box {bad_box} (cx, cy, w, h) is not within 0..1 of the image; mend the data"
            )


# ------------------------------------------------------------------------------------------------------- out of memory
@contextmanager
def naming_the_batch(batch: ImageBatch, targets: Sequence[Target]) -> Iterator[None]:
    """Out of memory becomes a UserError that names the batch and its sizes."""
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
    """Of a GPU, or of the host as torch's allocator says it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest_batch(
    loader: TrainingLoader, short_side: int, long_side: int, device: torch.device
) -> tuple[ImageBatch, list[Target]]:
    """Noise of the largest padded size that a batch of this process's first epoch can have, with as many objects.

    Sizes are those at the largest training scale, which augmentation may not reach.
    """
    dataset = loader.dataset
    sizes = np.array([resized_size(dataset.size(i), short_side, long_side) for i in range(len(dataset))])
    counts = np.diff(dataset.annotations.starts)
    shares = [batch[loader.rank :: loader.world_size] for batch in loader.global_batches(0)]
    height, width = max((tuple(sizes[share].max(0)) for share in shares), key=math.prod)
    num_objects = max(int(counts[share].sum()) for share in shares)
    images = torch.zeros(loader.batch_size, 3, int(height), int(width), device=device)
    per_image = np.bincount(np.arange(num_objects) % loader.batch_size, minlength=loader.batch_size)
    targets = [
        Target(
            NO_IMAGE,
            (int(height), int(width)),
            torch.zeros(int(count), dtype=torch.int64),
            torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(int(count), 1),
        )
        for count in per_image
    ]
    return ImageBatch(images, [(int(height), int(width))] * loader.batch_size), targets


# ------------------------------------------------------------------------------------------- losses and gradients
@dataclass
class _Watched:
    """What the host knows of a step whose verdict is still on the device."""

    step: int
    epoch: int
    image_ids: list[int]
    problem: str | None
    is_bad: Tensor


class StepWatch:
    """Decides on the device, without waiting for it, whether a step counts, and tells the host later.

    A step whose gradient is not finite changes neither weights nor statistics. Once in a while `report` reads which
    steps were skipped, and remembers of the first one the losses and the norm of every parameter's gradient.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.first_of_row = ""
        self._since_report: list[_Watched] = []
        self._loss_names: list[str] = []
        self._parameter_names: list[str] = []
        self._seen: Tensor | None = None
        self._evidence: Tensor | None = None
        """[losses + parameters] of the first bad step since the last report."""

    def judge(
        self,
        step: int,
        epoch: int,
        image_ids: list[int],
        losses: Mapping[str, Tensor],
        gradient_norms: Mapping[str, Tensor],
        total_norm: Tensor,
        problem: str | None,
    ) -> Tensor:
        """float32 scalar, 1 where the step must be skipped: the same on every process, as gradients are.

        Args:
            problem: what the host already found, if anything.
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
        self._since_report.append(_Watched(step, epoch, image_ids, problem, is_bad))
        return is_bad.float()

    def num_skipped(self) -> Tensor:
        """float32 scalar: steps skipped since the last report, on the device."""
        return torch.stack([watched.is_bad for watched in self._since_report]).sum().float()

    def report(self, any_skipped: bool) -> list[dict[str, Any]]:
        """A record of each step skipped since the last report; call it on every process.

        Args:
            any_skipped: whether `num_skipped` was above 0; without, nothing is fetched.
        """
        watched, self._since_report = self._since_report, []
        evidence, self._evidence, self._seen = self._evidence, None, None
        if not any_skipped or evidence is None:
            self.in_a_row = 0
            return []
        flags = torch.stack([entry.is_bad for entry in watched]).tolist()
        numbers = evidence.tolist()
        shares = distributed.gather([(entry.image_ids, entry.problem) for entry in watched])
        records: list[dict[str, Any]] = []
        for i, (entry, is_bad) in enumerate(zip(watched, flags, strict=True)):
            if not is_bad:
                self.in_a_row = 0
                continue
            record: dict[str, Any] = {
                "step": entry.step,
                "epoch": entry.epoch,
                "images": [image_id for share in shares for image_id in share[i][0]],
            }
            problems = [share[i][1] for share in shares if share[i][1] is not None]
            if not records:  # the evidence is of the first
                record |= self._statistics(numbers)
            record["tensor"] = problems[0] if problems else record.get("tensor", "a gradient")
            records.append(record)
            self.in_a_row += 1
            images = ", ".join(map(str, record["images"]))
            if self.in_a_row == 1:
                self.first_of_row = f"step {entry.step}, images {images}: {record['tensor']}"
        return records

    def stop_if_diverged(self) -> None:
        """Raise UserError after too many skipped steps in a row, naming the first tensor that was not finite."""
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(
                f"training diverged: no finite gradient in {self.in_a_row} steps in a row, from {self.first_of_row};"
                " lower train.learning_rate, and go on from the last checkpoint"
            )

    def _statistics(self, numbers: list[float]) -> dict[str, Any]:
        losses = dict(zip(self._loss_names, numbers, strict=False))
        norms = dict(zip(self._parameter_names, numbers[len(losses) :], strict=True))
        bad_losses = [name for name, value in losses.items() if name != "loss" and not math.isfinite(value)]
        # Gradients flow from the last layers to the first: the last bad one is nearest to where it began.
        bad_norms = [name for name, value in norms.items() if not math.isfinite(value)]
        where = (
            bad_losses[0] if bad_losses else f"the gradient of {bad_norms[-1]}" if bad_norms else "a gradient"
        )
        return {"tensor": where, "losses": _in_json(losses), "gradient_norms": _in_json(norms)}


def _in_json(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


class KeptStatistics:
    """The running statistics of batch norms, to be put back after a step that does not count."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self._before: list[Tensor] = []

    def keep(self) -> None:
        """Before the forward pass."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def restore(self, is_bad: Tensor | None = None) -> None:
        """After it. `is_bad`: only where this scalar is not 0."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before if is_bad is None else torch.where(is_bad > 0, before, buffer))
