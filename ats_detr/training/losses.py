"""The losses of a batch: what its objects say of the output, and what the teachers do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.batch import ImageBatch, Target, most_of_a_class, targets_to
from ats_detr.model.output import DetectorOutput
from ats_detr.training.criterion import SetCriterion
from ats_detr.training.distillation import DualTeacher

SUMS_OVER_OBJECTS = ("loss_ce", "loss_bbox", "loss_giou")
"""Losses that are divided by the number of objects; all others are means over images."""


def compute_losses(
    model: nn.Module,
    criterion: SetCriterion,
    teachers: DualTeacher | None,
    batch: ImageBatch,
    targets: Sequence[Target],
    *,
    num_boxes: Tensor | None = None,
    share: float = 1.0,
    precision: torch.dtype = torch.float32,
    metrics: bool = True,
) -> tuple[DetectorOutput, dict[str, Tensor], str | None]:
    """The model's output; its losses by name with `loss`, their weighted sum; and what was not finite, if anything.

    The mean over processes of the gradient of `loss` is the gradient for the batches of all processes taken as one.
    Where something is not finite the gradient is NaN, on every process.

    Args:
        batch: on the device.
        targets: on the host.
        num_boxes: objects of the step, see `distributed.global_num_boxes`. None: those of `targets` and of the batches
            that other processes have.
        share: of this batch in the step, by which means over images (not sums over objects) are multiplied.
        metrics: add what is only logged.
    """
    device = batch.images_B3HW.device
    if num_boxes is None:
        num_boxes = distributed.global_num_boxes(targets, device)
    on_device = targets_to(targets, device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        output = model(batch)
    pending = criterion.start(output, on_device, metrics=metrics)
    # Between start and finish: the device has these to do while the host solves the matching.
    taught = {}
    if teachers is not None:
        taught = teachers(batch, on_device, output, most_of_a_class=most_of_a_class(targets))
    losses = pending.finish(num_boxes) | taught
    if share != 1.0:
        losses = {k: v if k.startswith(SUMS_OVER_OBJECTS) else v * share for k, v in losses.items()}
    weights = criterion.weights | dict.fromkeys(taught, 1.0)
    total = torch.stack([weight * losses[key] for key, weight in weights.items() if key in losses]).sum()
    # A loss that is not finite may still have finite gradients, which other processes would take for good.
    is_good = total.detach().isfinite() & (pending.matches.problem is None)
    total = total * torch.where(is_good, 1.0, torch.nan)
    return output, {"loss": total, **losses}, pending.matches.problem
