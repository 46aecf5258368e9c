"""Dual teacher supervision (ATS-DETR): a weak teacher says how hard an image is, a strong one what to see.

The weak teacher keeps the fewest tokens. Where its detections are good enough, few tokens suffice, and the
student's budget head learns to say so. The strong teacher keeps the most; the student's memory is drawn
towards its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from ats_detr.batch import ImageBatch, Target
from ats_detr.boxes import cxcywh_to_xyxy
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
    ) -> None:
        """Freezes both teachers.

        Args:
            bias: the average precision of the weak teacher from which on an image counts as easy.
            level_weights: weight of each pyramid level in the memory loss.
            num_detections: detections of the weak teacher that are judged.
        """
        self.weak = weak.eval().requires_grad_(False)
        self.strong = strong.eval().requires_grad_(False)
        self.bias = bias
        self.num_budgets = num_budgets
        self.level_weights = tuple(level_weights)
        self.num_detections = num_detections

    def __call__(
        self, batch: ImageBatch, targets: Sequence[Target], student: DetectorOutput
    ) -> dict[str, Tensor]:
        """`loss_budget` (cross entropy of the budget logits) and `loss_memory`, float32 scalars of weight 1.

        The teachers see the same augmented batch as the student.
        """
        with torch.no_grad():
            weak = self.weak(batch)
            strong_memory = self.strong.encode(batch.images_B3HW, batch.padding_mask_BHW)
            sizes = [target.original_size for target in targets]
            detections = top_detections(weak.last, sizes, self.num_detections)
            labels_B = budget_labels(
                image_average_precision(detections, targets), self.bias, self.num_budgets
            )
        assert student.adapted_memory_BSC is not None, "the student needs an adaption layer"
        with torch.autocast(strong_memory.device.type, enabled=False):
            loss_budget = F.cross_entropy(student.selection.budget_logits_BR.float(), labels_B)
            loss_memory = memory_loss(
                student.adapted_memory_BSC,
                strong_memory,
                student.padding_mask_BS,
                student.level_shapes,
                self.level_weights,
            )
        return {"loss_budget": loss_budget, "loss_memory": loss_memory}


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
    detections: Sequence[Detections], targets: Sequence[Target], iou_threshold: float = 0.5
) -> Tensor:
    """float32 [B] average precision of each single image, mean over the classes it shows; 1 without objects.

    Detections are taken in the given order, best score first; each claims the unclaimed object of its class
    with the highest IoU, if that reaches `iou_threshold`. The precision of a class is summed over its
    recall steps without interpolation. Everything stays on the device and nothing waits for it.
    """
    label_BD = pad_sequence([found.labels_N for found in detections], batch_first=True, padding_value=-1)
    boxes_BD4 = pad_sequence([found.boxes_xyxy_N4 for found in detections], batch_first=True).float()
    label_BN = pad_sequence([target.labels_N for target in targets], batch_first=True, padding_value=-2)
    boxes_BN4 = pad_sequence([_pixel_boxes(target) for target in targets], batch_first=True)
    if not label_BN.shape[1]:
        return boxes_BN4.new_ones(len(targets))
    if not label_BD.shape[1]:
        return (label_BN < 0).all(1).float()

    same_class_BDN = label_BD[:, :, None] == label_BN[:, None, :]
    iou_BDN = torch.where(same_class_BDN, torch.stack(list(map(box_iou, boxes_BD4, boxes_BN4))), -1.0)
    is_hit_BD = greedy_match(torch.where(iou_BDN >= iou_threshold, iou_BDN, -1.0))

    of_same_class_BDD = (label_BD[:, :, None] == label_BD[:, None, :]).tril()
    hits_so_far_BD = (of_same_class_BDD & is_hit_BD[:, None, :]).sum(2)
    gain_BD = torch.where(is_hit_BD, hits_so_far_BD / of_same_class_BDD.sum(2), 0.0)

    # The precision of a class stands at each of its objects; the first one speaks for the class. Sums, not
    # means of means: a perfect image must come out as exactly 1.
    objects_of_class_BNN = label_BN[:, :, None] == label_BN[:, None, :]
    precision_BN = (gain_BD[:, :, None] * same_class_BDN).sum(1) / objects_of_class_BNN.sum(2)
    speaks_BN = (objects_of_class_BNN.tril(-1).sum(2) == 0) & (label_BN >= 0)
    num_classes_B = speaks_BN.sum(1)
    return torch.where(num_classes_B > 0, (precision_BN * speaks_BN).sum(1) / num_classes_B.clamp(min=1), 1.0)


def greedy_match(iou_BDN: Tensor) -> Tensor:
    """bool [B, D]: which detections get an object, each in turn taking the free object of highest IoU.

    Negative IoUs are no match. All detections bid at once: each for its best object that no earlier
    detection holds, and each object goes to its earliest bidder. Round r settles the r-th detection that
    gets an object at all (the holders before it are settled, so it can lose its bid to none of them again):
    N rounds are enough.
    """
    batch, num_detections, num_objects = iou_BDN.shape
    rank_D = torch.arange(num_detections, device=iou_BDN.device)
    holder_BN = torch.full((batch, num_objects), num_detections, device=iou_BDN.device)
    for _ in range(min(num_detections, num_objects)):
        open_BDN = holder_BN[:, None, :] >= rank_D[:, None]
        best_BD, object_BD = torch.where(open_BDN, iou_BDN, -1.0).max(2)
        bid_BD = torch.where(best_BD >= 0, rank_D, num_detections)
        holder_BN = holder_BN.scatter_reduce(1, object_BD, bid_BD, "amin")
    holds_BD = torch.zeros(batch, num_detections + 1, dtype=torch.bool, device=iou_BDN.device)
    return holds_BD.scatter(1, holder_BN, True)[:, :num_detections]


def _pixel_boxes(target: Target) -> Tensor:
    """float32 [N, 4] xyxy in pixels of the original image."""
    height, width = target.original_size
    left, top, right, bottom = cxcywh_to_xyxy(target.boxes_N4.float()).unbind(-1)
    return torch.stack([left * width, top * height, right * width, bottom * height], dim=-1)


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
    loss = student_BSC.new_zeros((), dtype=torch.float32)
    parts = (tensor.split(sizes, dim=1) for tensor in (student_BSC, teacher_BSC, padding_mask_BS))
    for weight, student, teacher, padding in zip(level_weights, *parts, strict=True):
        both = torch.cat([student.float(), teacher.float()], dim=2)  # the processes then meet half as often
        student, teacher = standardise(both, ~padding).split([student.shape[2], teacher.shape[2]], dim=2)
        loss = loss + weight * F.mse_loss(student, teacher) / 2
    return loss


def standardise(features_BSC: Tensor, valid_BS: Tensor, eps: float = 1e-6) -> Tensor:
    """Each channel with zero mean and unit (population) deviation over the valid positions, 0 elsewhere.

    The positions are those of all processes, so that several train like one (the published code: each its own).
    A channel that is constant over them becomes 0 and passes no gradient; the published code passes NaN.
    """
    valid_BS1 = valid_BS[..., None]
    sum_C = torch.where(valid_BS1, features_BSC, 0).sum((0, 1))
    sum_C, num_valid = sum_over_processes(torch.cat([sum_C, valid_BS.sum().to(sum_C)[None]])).split(
        [len(sum_C), 1]
    )
    num_valid = num_valid.clamp(min=1)
    mean_C = sum_C / num_valid
    centred_BSC = torch.where(valid_BS1, features_BSC - mean_C, 0)
    variance_C = sum_over_processes(centred_BSC.square().sum((0, 1))) / num_valid
    varies_C = variance_C > 0
    deviation_C = torch.where(varies_C, variance_C, 1).sqrt() + eps
    return torch.where(varies_C, centred_BSC / deviation_C, 0)
