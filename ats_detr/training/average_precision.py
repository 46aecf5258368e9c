"""Average precision of the detections on single images, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ats_detr.batch import Target
from ats_detr.boxes import cxcywh_to_xyxy, iou
from ats_detr.model.output import Detections

# Shapes: B images, N objects and D detections of an image (padded).


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
