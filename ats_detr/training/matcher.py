"""Assignment of predictions to objects (DETR), for all prediction layers of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ats_detr.batch import Target
from ats_detr.boxes import cxcywh_to_xyxy, generalized_iou
from ats_detr.config import LossConfig

# Shapes: B images; T classes; N objects, padded to the largest number per image; M matched pairs; R prediction rows of
# the batch, ordered by image, of one layer or of all layers concatenated.


@dataclass(frozen=True, kw_only=True)
class PredictionRows:
    """The predictions of one layer, ordered by image."""

    name: str
    """Name of the layer in errors."""
    logits_RT: Tensor
    boxes_R4: Tensor
    """cxcywh, in [0, 1] of the unpadded image."""
    starts: Sequence[int]
    """[Bp1] first row of each image, then the number of rows; on the host."""
    class_agnostic: bool = False
    """The layer only separates objects from background: all its targets have class 0."""
    repeats: int = 1
    """Rows that each object is matched to."""


@dataclass(frozen=True)
class Match:
    """Matched pairs of one layer, int64: prediction row `rows_M[i]` belongs to object `objects_M[i]`."""

    rows_M: Tensor
    """Index into the rows of the layer."""
    objects_M: Tensor
    """Index into the objects of the batch, ordered by image."""


@dataclass(frozen=True)
class HungarianMatcher:
    """Minimum-cost assignment per layer and image: focal class cost, L1 on cxcywh, negative GIoU, in float32.

    A row belongs to one object at most, an object to `PredictionRows.repeats` rows.

    The costs of all layers are computed on the device as one table, which `PendingMatches` transfers at once. While it
    is transferred, and while scipy solves the assignments on the host, the device can run other work.
    """

    loss: LossConfig = field(default_factory=LossConfig)
    """The weights of the costs, and the focal loss."""

    def __call__(self, layers: Sequence[PredictionRows], targets: Sequence[Target]) -> list[Match]:
        """The matches of each layer. Where an image has fewer rows than objects, some objects remain unmatched.

        Raises:
            FloatingPointError: a cost is NaN or infinite; the message names the tensor that caused it.
        """
        pending = PendingMatches(layers, targets, self.costs(layers, targets, *concatenated(layers)))
        matches = pending.finish()
        if pending.problem is not None:
            raise FloatingPointError(pending.problem)
        return matches

    @torch.no_grad()
    def costs(
        self,
        layers: Sequence[PredictionRows],
        targets: Sequence[Target],
        logits_RT: Tensor,
        boxes_R4: Tensor,
    ) -> Tensor:
        """float32 [R, N] cost of each row of all layers for each object of its image; arbitrary for padded objects.

        `logits_RT` and `boxes_R4` are those of all layers, see `concatenated`. No device-to-host synchronisation.
        """
        labels_BN = pad_sequence([target.labels_N for target in targets], batch_first=True)
        boxes_BN4 = pad_sequence([target.boxes_N4.float() for target in targets], batch_first=True)
        images = [np.repeat(np.arange(len(targets)), np.diff(layer.starts)) for layer in layers]
        is_agnostic = np.repeat([layer.class_agnostic for layer in layers], [len(rows) for rows in images])
        on_host = torch.from_numpy(np.stack([np.concatenate(images), is_agnostic]))
        image_R, agnostic_R = on_host.to(boxes_R4.device, non_blocking=True).unbind()

        labels_RN = labels_BN[image_R] * (1 - agnostic_R)[:, None]
        p = logits_RT.gather(1, labels_RN).sigmoid()
        found = (1 - p).pow(self.loss.focal_gamma).mul_((p + 1e-8).log_()).mul_(-self.loss.focal_alpha)
        missed = p.pow(self.loss.focal_gamma).mul_((1 - p).add_(1e-8).log_()).mul_(self.loss.focal_alpha - 1)
        costs_RN = found.sub_(missed).mul_(self.loss.class_cost)

        own_R14, wanted_RN4 = _coordinates_first(boxes_R4[:, None]), _coordinates_first(boxes_BN4, image_R)
        for own_R1, wanted_RN in zip(own_R14.unbind(-1), wanted_RN4.unbind(-1), strict=True):
            costs_RN.add_((own_R1 - wanted_RN).abs_(), alpha=self.loss.bbox_cost)
        own_R14 = _coordinates_first(cxcywh_to_xyxy(boxes_R4)[:, None])
        wanted_RN4 = _coordinates_first(cxcywh_to_xyxy(boxes_BN4), image_R)
        return costs_RN.sub_(generalized_iou(own_R14, wanted_RN4), alpha=self.loss.giou_cost)


def concatenated(layers: Sequence[PredictionRows]) -> tuple[Tensor, Tensor]:
    """float32 logits [R, T] and boxes [R, 4] of all layers."""
    logits_RT = torch.cat([layer.logits_RT for layer in layers]).float()
    return logits_RT, torch.cat([layer.boxes_R4 for layer in layers]).float()


def _coordinates_first(boxes: Tensor, index: Tensor | None = None) -> Tensor:
    """The boxes [..., 4], or those at `index`, each coordinate contiguous in memory: 4x faster on a CPU."""
    coordinates = boxes.movedim(-1, 0).contiguous()
    return (coordinates if index is None else coordinates[:, index]).movedim(0, -1)


class PendingMatches:
    """Matches whose costs are being transferred to the host."""

    def __init__(self, layers: Sequence[PredictionRows], targets: Sequence[Target], costs_RN: Tensor) -> None:
        self.layers, self.targets = layers, targets
        self.problem: str | None = None
        """Set by `finish` where a cost is not finite: the tensor that caused it. The matches are then arbitrary."""
        self.all_pairs: Tensor | None = None
        """int64 [2, M], set by `finish`: rows of all layers concatenated, and objects, of the pairs of all layers."""
        self.costs_RN = costs_RN.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self.arrived: torch.cuda.Event | None = None
        if costs_RN.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def finish(self) -> list[Match]:
        """Wait for the costs and solve the assignments."""
        if self.arrived is not None:
            self.arrived.synchronize()
        costs_RN = np.asarray(self.costs_RN)
        num_objects = [len(target.labels_N) for target in self.targets]
        first_object = np.cumsum([0, *num_objects])
        matched: list[np.ndarray] = []
        first_row = 0
        for layer in self.layers:
            pairs = [np.zeros((2, 0), np.int64)]
            for image, count in enumerate(num_objects):
                start, end = layer.starts[image], layer.starts[image + 1]
                cost = costs_RN[first_row + start : first_row + end, :count]
                if not np.isfinite(cost).all():
                    self.problem = self.problem or _describe_problem(layer, image, self.targets[image])
                    cost = np.nan_to_num(cost, nan=0.0, posinf=0.0, neginf=0.0)
                rows, objects = linear_sum_assignment(np.tile(cost, layer.repeats))
                objects %= max(count, 1)
                pairs.append(np.stack([rows + start, objects + first_object[image]]))
            pairs_of_layer = np.concatenate(pairs, axis=1)
            matched.append(np.concatenate([pairs_of_layer, pairs_of_layer[:1] + first_row]))
            first_row += layer.starts[-1]
        on_host = torch.from_numpy(np.concatenate(matched, axis=1))
        on_device = on_host.to(self.layers[0].boxes_R4.device, non_blocking=True)
        self.all_pairs = torch.stack([on_device[2], on_device[1]])
        return [Match(*part) for part in on_device[:2].split([pairs.shape[1] for pairs in matched], dim=1)]


def _describe_problem(layer: PredictionRows, image: int, target: Target) -> str:
    rows = slice(layer.starts[image], layer.starts[image + 1])
    suspects = {
        f"logits of {layer.name}": layer.logits_RT[rows],
        f"boxes of {layer.name}": layer.boxes_R4[rows],
        "target boxes": target.boxes_N4,
    }
    where = f"image {image} of the batch (id {target.image_id})"
    for name, tensor in suspects.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            return f"{name} hold {bad} NaN or infinite values for {where}"
    return f"the cost of {layer.name} is not finite for {where}: a predicted and a target box both have zero area"
