"""Dual teacher supervision (ATS-DETR): a weak teacher says how hard an image is, a strong one what to see.

The weak teacher keeps the fewest tokens. Where its detections are good enough, few tokens suffice, and the
student's budget head learns to say so. The strong teacher keeps the most; the student's memory is drawn
towards its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ats_detr.batch import ImageBatch, Target
from ats_detr.boxes import cxcywh_to_xyxy, iou
from ats_detr.distributed import sum_over_processes
from ats_detr.model import Detr
from ats_detr.model.output import Detections, DetectorOutput, top_detections

# Shapes: B images, R budgets, S tokens of the pyramid, C channels, N objects and D detections of an image
# (padded).


class DualTeacher:
    """Two frozen detectors and the losses they give a student.

    Not a module: its weights must not turn up among the student's parameters or in its checkpoints.
    """

    def __init__(
        self,
        weak: Detr,
        strong: Detr,
        *,
        bias: float = 1.0,
        num_budgets: int = 2,
        level_weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
        num_detections: int = 100,
        precision: torch.dtype = torch.float32,
        cache_difficulty: bool = False,
    ) -> None:
        """Freezes both teachers.

        Args:
            bias: the average precision of the weak teacher from which on an image counts as easy.
            level_weights: weight of each pyramid level in the memory loss.
            num_detections: detections of the weak teacher that are judged.
            precision: of the teachers' passes; bfloat16 by autocast.
            cache_difficulty: judge each image once only.
        """
        self.weak = weak.eval().requires_grad_(False)
        self.strong = strong.eval().requires_grad_(False)
        self.bias = bias
        self.num_budgets = num_budgets
        self.level_weights = tuple(level_weights)
        self.num_detections = num_detections
        self.precision = precision
        self.difficulty = DifficultyCache() if cache_difficulty else None

    def __call__(
        self,
        batch: ImageBatch,
        targets: Sequence[Target],
        student: DetectorOutput,
        *,
        most_of_a_class: int | None = None,
    ) -> dict[str, Tensor]:
        """`loss_budget` (cross entropy of the budget logits) and `loss_memory`, float32 scalars of weight 1.

        The teachers see the same augmented batch as the student, whose forward pass has to come first.

        Args:
            most_of_a_class: see `image_average_precision`.
        """
        device = batch.images_B3HW.device.type
        with torch.inference_mode(), torch.autocast(device, self.precision, self.precision != torch.float32):
            strong_memory = self.strong.encode(batch.images_B3HW, batch.padding_mask_BHW)
            precision_B = self._precision_of_weak(batch, targets, most_of_a_class)
        labels_B = budget_labels(precision_B, self.bias, self.num_budgets)
        assert student.adapted_memory_BSC is not None, "the student needs an adaption layer"
        assert student.selection is not None and student.selection.budget_logits_BR is not None
        with torch.autocast(device, enabled=False):
            loss_budget = F.cross_entropy(student.selection.budget_logits_BR.float(), labels_B)
            loss_memory = memory_loss(
                student.adapted_memory_BSC,
                strong_memory,
                student.padding_mask_BS,
                student.level_shapes,
                self.level_weights,
            )
        return {"loss_budget": loss_budget, "loss_memory": loss_memory}

    def _precision_of_weak(
        self, batch: ImageBatch, targets: Sequence[Target], most_of_a_class: int | None
    ) -> Tensor:
        """float32 [B] average precision of the weak teacher on each image."""
        image_ids = [target.image_id for target in targets]
        known_B = self.difficulty.get(image_ids) if self.difficulty is not None else None
        if known_B is not None:
            return known_B
        sizes = [target.original_size for target in targets]
        detections = top_detections(self.weak(batch).last, sizes, self.num_detections)
        precision_B = image_average_precision(detections, targets, most_of_a_class=most_of_a_class)
        if self.difficulty is not None:
            self.difficulty.put(image_ids, precision_B)
        return precision_B

    def share_frozen_stages(self, student: Detr) -> list[str]:
        """Let the teachers read what the student's frozen stages made of the batch. Returns the teachers that do.

        Only where the stages are equal, to the bit, and do the same in training as in evaluation. The student has to
        see a batch before its teachers from now on.
        """
        teachers = {"weak": self.weak, "strong": self.strong}
        return [name for name, teacher in teachers.items() if _share_frozen_stages(student, teacher)]


def _share_frozen_stages(student: Detr, teacher: Detr) -> bool:
    own: Any = student.backbone.body
    other: Any = teacher.backbone.body
    names = student.backbone.frozen_stages()
    if not names or not isinstance(other, nn.ModuleDict) or not set(names) <= set(other):
        return False
    for name in names:
        a, b = own[name].state_dict(), other[name].state_dict()
        if repr(own[name]) != repr(other[name]) or any(not torch.equal(a[key], b[key]) for key in a):
            return False
        if any(isinstance(module, _DIFFERENT_IN_TRAINING) for module in own[name].modules()):
            return False
    for name in names:
        is_read = name == names[-1] or name in own.return_layers
        other[name] = _Recall(own[name]) if is_read else nn.Identity()
    return True


_DIFFERENT_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.Dropout, DropPath)


class _Recall(nn.Module):
    """Whatever its input: what another module put out last."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.output: Tensor | None = None
        source.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        assert self.output is not None, "the student has to see the batch first"
        return self.output


class DifficultyCache:
    """What the weak teacher achieved on each image that it has seen. The host knows which, the device how much."""

    def __init__(self) -> None:
        self._place: dict[int, tuple[int, int]] = {}
        """(batch, position in it) of each image id."""
        self._batches: list[Tensor] = []

    def get(self, image_ids: Sequence[int]) -> Tensor | None:
        """float32 [B], or None unless all are known."""
        if not all(image_id in self._place for image_id in image_ids):
            return None
        places = [self._place[image_id] for image_id in image_ids]
        return torch.stack([self._batches[batch][position] for batch, position in places])

    def put(self, image_ids: Sequence[int], precision_B: Tensor) -> None:
        """Keep what is not known yet. Negative ids, of images that are not the data's, are left out."""
        for position, image_id in enumerate(image_ids):
            if image_id >= 0:
                self._place.setdefault(image_id, (len(self._batches), position))
        self._batches.append(precision_B)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; waits for the device."""
        image_ids = list(self._place)
        precision = self.get(image_ids) if image_ids else None
        return {
            "image_ids": torch.tensor(image_ids, dtype=torch.int64),
            "precision": torch.zeros(0) if precision is None else precision.cpu(),
        }

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Inverse of `state`."""
        self._batches = [state["precision"].to(device)]
        self._place = {image_id: (0, i) for i, image_id in enumerate(state["image_ids"].tolist())}


# --------------------------------------------------------------------------------------- how hard an image is
def budget_labels(average_precision_B: Tensor, bias: float = 1.0, num_budgets: int = 2) -> Tensor:
    """int64 [B] budget class of each image, 0 the smallest: how many of R-1 thresholds its precision misses.

    The thresholds are bias * (1, 1 - 1/(R-1), 1 - 2/(R-1), ...): an image whose precision reaches `bias` is
    easy, and what is missing to it is divided evenly among the larger budgets. With two budgets that is the
    published rule.
    """
    steps = torch.arange(num_budgets - 1, device=average_precision_B.device)
    thresholds = bias * (1 - steps / max(num_budgets - 1, 1))
    return (average_precision_B[:, None] < thresholds).sum(1)


def image_average_precision(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    iou_threshold: float = 0.5,
    *,
    most_of_a_class: int | None = None,
) -> Tensor:
    """float32 [B] average precision of each single image, mean over the classes it shows; 1 without objects.

    Detections are taken in the given order, best score first; each claims the unclaimed object of its class
    with the highest IoU, if that reaches `iou_threshold`. The precision of a class is summed over its
    recall steps without interpolation. Everything stays on the device and nothing waits for it.

    `most_of_a_class`: no image has more objects of one class than this (see `ats_detr.batch.most_of_a_class`); saves
    work.
    """
    label_BD = _padded([found.labels_N for found in detections], -1)
    boxes_BD4 = _padded([found.boxes_xyxy_N4 for found in detections], 0).float()
    label_BN = _padded([target.labels_N for target in targets], -2)
    boxes_BN4 = _padded([target.boxes_N4 for target in targets], 0).float()
    if not label_BN.shape[1]:
        return boxes_BN4.new_ones(len(targets))
    if not label_BD.shape[1]:
        return (label_BN < 0).all(1).float()
    sizes = [(width, height, width, height) for height, width in (target.original_size for target in targets)]
    scale_B14 = torch.tensor(sizes).to(boxes_BN4, non_blocking=True)[:, None]
    boxes_BN4 = cxcywh_to_xyxy(boxes_BN4) * scale_B14

    same_class_BDN = label_BD[:, :, None] == label_BN[:, None, :]
    iou_BDN = iou(boxes_BD4[:, :, None], boxes_BN4[:, None])
    can_match_BDN = same_class_BDN & (iou_BDN >= iou_threshold)
    is_hit_BD = greedy_match(torch.where(can_match_BDN, iou_BDN, -1.0), most_of_a_class).float()

    # Counts as products of matrices of zeros and ones: exact in float32, and few operations.
    same_class_BDN = same_class_BDN.float()
    seen_before_BDD = (label_BD[:, :, None] == label_BD[:, None, :]).float().tril()
    hits_so_far_BD, seen_so_far_BD = (
        seen_before_BDD @ torch.stack([is_hit_BD, torch.ones_like(is_hit_BD)], dim=-1)
    ).unbind(-1)
    gain_BD = is_hit_BD * hits_so_far_BD / seen_so_far_BD

    # The precision of a class stands at each of its objects; the first one speaks for the class. Sums, not
    # means of means: a perfect image must come out as exactly 1.
    objects_of_class_BNN = (label_BN[:, :, None] == label_BN[:, None, :]).float()
    precision_BN = (gain_BD[:, None] @ same_class_BDN)[:, 0] / objects_of_class_BNN.sum(2)
    speaks_BN = (objects_of_class_BNN.tril(-1).sum(2) == 0) & (label_BN >= 0)
    num_classes_B = speaks_BN.sum(1)
    return torch.where(num_classes_B > 0, (precision_BN * speaks_BN).sum(1) / num_classes_B.clamp(min=1), 1.0)


def _padded(parts: Sequence[Tensor], value: float) -> Tensor:
    """The parts as rows of one tensor, the shorter ones filled up with `value`."""
    if len({len(part) for part in parts}) == 1:  # the detections of a batch, as a rule
        return torch.stack(list(parts))
    return pad_sequence(list(parts), batch_first=True, padding_value=value)


def greedy_match(iou_BDN: Tensor, num_rounds: int | None = None) -> Tensor:
    """bool [B, D]: which detections get an object, each in turn taking the free object of highest IoU.

    Negative IoUs are no match. All detections bid at once: each for its best object that no earlier
    detection holds, and each object goes to its earliest bidder. Round r settles the r-th detection that
    gets an object at all (the holders before it are settled, so it can lose its bid to none of them again):
    as many rounds are enough as objects that one detection could compete for (`num_rounds`; None: all N).
    """
    batch, num_detections, num_objects = iou_BDN.shape
    rank_BD = torch.arange(num_detections, device=iou_BDN.device, dtype=torch.int32).expand(batch, -1)
    rank_B1D = rank_BD.unsqueeze(1)
    # One more object, worth more than no match and never taken, for those who find nothing: M = N + 1.
    iou_BMD = F.pad(iou_BDN.transpose(1, 2), (0, 0, 0, 1), value=-1e-9)
    taken_M1 = F.pad(iou_BDN.new_full((num_objects, 1), -1.0), (0, 0, 0, 1), value=-1e-9)
    holder_BM = rank_BD.new_full((batch, num_objects + 1), num_detections)
    may_look = iou_BDN.device.type == "cpu"  # elsewhere the host would wait for the answer
    for _ in range(min(num_detections, num_objects, num_rounds or num_objects)):
        is_open_BMD = holder_BM.unsqueeze(2) >= rank_B1D
        bid_BD = torch.where(is_open_BMD, iou_BMD, taken_M1).max(1).indices  # faster than argmax on a CPU
        holder_before_BM, holder_BM = holder_BM, holder_BM.scatter_reduce(1, bid_BD, rank_BD, "amin")
        if may_look and torch.equal(holder_before_BM, holder_BM):
            break
    holds_BD = torch.zeros(batch, num_detections + 1, dtype=torch.bool, device=iou_BDN.device)
    return holds_BD.scatter(1, holder_BM[:, :num_objects].long(), True)[:, :num_detections]


# ------------------------------------------------------------------------------- what the strong teacher sees
def memory_loss(
    student_BSC: Tensor,
    teacher_BSC: Tensor,
    padding_mask_BS: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    level_weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
) -> Tensor:
    """Distance of two memories up to scale and offset of each channel, float32 (PKD, Cao et al. 2022).

    Per level: both normalised by `standardise`, then half their mean squared difference over all elements,
    padding included (as published: there both are 0).
    """
    sizes = [height * width for height, width in level_shapes]
    both_BSC = torch.cat([student_BSC.float(), teacher_BSC.float()], dim=2)
    width = student_BSC.shape[2]
    loss = student_BSC.new_zeros((), dtype=torch.float32)
    levels = standardise(both_BSC.split(sizes, dim=1), (~padding_mask_BS).split(sizes, dim=1))
    for weight, level_BSC in zip(level_weights, levels, strict=True):
        student, teacher = level_BSC.split([width, level_BSC.shape[2] - width], dim=2)
        loss = loss + weight * F.mse_loss(student, teacher) / 2
    return loss


def standardise(levels_BSC: Sequence[Tensor], valid_BS: Sequence[Tensor], eps: float = 1e-6) -> list[Tensor]:
    """Per level, each channel with zero mean and unit (population) deviation over the valid positions, 0 elsewhere.

    The positions are those of all processes, so that several train like one (the published code: each its own); they
    meet twice, for all levels at once. A channel that is constant over them becomes 0 and passes no gradient; the
    published code passes NaN.
    """
    pairs = [(level, valid[..., None]) for level, valid in zip(levels_BSC, valid_BS, strict=True)]
    sum_LC = torch.stack([torch.where(valid, level, 0).sum((0, 1)) for level, valid in pairs])
    num_valid_L1 = torch.stack([valid.sum().to(sum_LC) for _, valid in pairs])[:, None]
    totals = sum_over_processes(torch.cat([sum_LC, num_valid_L1], dim=1))
    sum_LC, num_valid_L1 = totals.split([sum_LC.shape[1], 1], dim=1)
    num_valid_L1 = num_valid_L1.clamp(min=1)
    mean_LC = sum_LC / num_valid_L1
    centred = [
        torch.where(valid, level - mean_C, 0) for (level, valid), mean_C in zip(pairs, mean_LC, strict=True)
    ]
    variance_LC = sum_over_processes(torch.stack([x.square().sum((0, 1)) for x in centred])) / num_valid_L1
    varies_LC = variance_LC > 0
    deviation_LC = torch.where(varies_LC, variance_LC, 1).sqrt() + eps
    parts = zip(centred, varies_LC, deviation_LC, strict=True)
    return [torch.where(varies_C, x / deviation_C, 0) for x, varies_C, deviation_C in parts]
