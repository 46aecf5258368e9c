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

# Shapes: B images; N objects and R detections (prediction rows) of an image, padded; Np1 is N + 1.


def image_average_precision(
    detections: Sequence[Detections],
    targets: Sequence[Target],
    iou_threshold: float = 0.5,
    *,
    most_of_a_class: int | None = None,
) -> Tensor:
    """float32 [B] average precision of each image, mean over the classes in it; 1 without objects.

    Detections are matched in the given order, best score first: each takes the free object of its class with the
    highest IoU, if that is >= `iou_threshold`. The precision is summed over the recall steps of a class without
    interpolation. No device-to-host synchronisation.

    Args:
        most_of_a_class: largest number of objects of one class in an image (see `ats_detr.batch.most_of_a_class`),
        which
            limits the rounds of the matching. None: N.
    """
    label_BR = _padded([found.labels_N for found in detections], -1)
    boxes_BR4 = _padded([found.boxes_xyxy_N4 for found in detections], 0).float()
    label_BN = _padded([target.labels_N for target in targets], -2)
    boxes_BN4 = _padded([target.boxes_N4 for target in targets], 0).float()
    if not label_BN.shape[1]:
        return boxes_BN4.new_ones(len(targets))
    if not label_BR.shape[1]:
        return (label_BN < 0).all(1).float()
    sizes = [(width, height, width, height) for height, width in (target.original_size for target in targets)]
    scale_B14 = torch.tensor(sizes).to(boxes_BN4, non_blocking=True)[:, None]
    boxes_BN4 = cxcywh_to_xyxy(boxes_BN4) * scale_B14

    same_class_BRN = label_BR[:, :, None] == label_BN[:, None, :]
    iou_BRN = iou(boxes_BR4[:, :, None], boxes_BN4[:, None])
    can_match_BRN = same_class_BRN & (iou_BRN >= iou_threshold)
    is_hit_BR = greedy_match(torch.where(can_match_BRN, iou_BRN, -1.0), most_of_a_class).float()

    # Counts as matrix products of zeros and ones: exact in float32, with few kernels.
    same_class_BRN = same_class_BRN.float()
    seen_before_BRR = (label_BR[:, :, None] == label_BR[:, None, :]).float().tril()
    hits_so_far_BR, seen_so_far_BR = (
        seen_before_BRR @ torch.stack([is_hit_BR, torch.ones_like(is_hit_BR)], dim=-1)
    ).unbind(-1)
    gain_BR = is_hit_BR * hits_so_far_BR / seen_so_far_BR

    # Each object holds the precision of its class; only the first object of a class counts. Sums instead of means of
    # means: a perfect image has exactly 1.
    objects_of_class_BNN = (label_BN[:, :, None] == label_BN[:, None, :]).float()
    precision_BN = (gain_BR[:, None] @ same_class_BRN)[:, 0] / objects_of_class_BNN.sum(2)
    is_first_BN = (objects_of_class_BNN.tril(-1).sum(2) == 0) & (label_BN >= 0)
    num_classes_B = is_first_BN.sum(1)
    return torch.where(
        num_classes_B > 0, (precision_BN * is_first_BN).sum(1) / num_classes_B.clamp(min=1), 1.0
    )


def _padded(parts: Sequence[Tensor], value: float) -> Tensor:
    """The parts as rows of one tensor, padded with `value`."""
    if len({len(part) for part in parts}) == 1:  # the detections of a batch, as a rule
        return torch.stack(list(parts))
    return pad_sequence(list(parts), batch_first=True, padding_value=value)


def greedy_match(iou_BRN: Tensor, num_rounds: int | None = None) -> Tensor:
    """bool [B, R]: which detections are matched when each in turn takes the free object of highest IoU.

    Negative IoUs never match. In each round every detection bids for its best object that no earlier detection holds,
    and each object goes to its earliest bidder. After round r the r-th matched detection is final, because all matched
    detections before it are. The number of rounds needed is at most the number of objects that one detection can
    compete for (`num_rounds`; None: N).
    """
    batch, num_detections, num_objects = iou_BRN.shape
    rank_BR = torch.arange(num_detections, device=iou_BRN.device, dtype=torch.int32).expand(batch, -1)
    rank_B1R = rank_BR.unsqueeze(1)
    # A dummy object N, better than no match and never taken, for detections without an object.
    iou_BNp1R = F.pad(iou_BRN.transpose(1, 2), (0, 0, 0, 1), value=-1e-9)
    taken_Np11 = F.pad(iou_BRN.new_full((num_objects, 1), -1.0), (0, 0, 0, 1), value=-1e-9)
    holder_BNp1 = rank_BR.new_full((batch, num_objects + 1), num_detections)
    may_stop_early = iou_BRN.device.type == "cpu"  # elsewhere the test would synchronise
    for _ in range(min(num_detections, num_objects, num_rounds or num_objects)):
        is_open_BNp1R = holder_BNp1.unsqueeze(2) >= rank_B1R
        offer_BNp1R = torch.where(is_open_BNp1R, iou_BNp1R, taken_Np11)
        bid_BR = offer_BNp1R.max(1).indices  # faster than argmax on a CPU
        holder_before_BNp1, holder_BNp1 = holder_BNp1, holder_BNp1.scatter_reduce(1, bid_BR, rank_BR, "amin")
        if may_stop_early and torch.equal(holder_before_BNp1, holder_BNp1):
            break
    holds_BR = torch.zeros(batch, num_detections + 1, dtype=torch.bool, device=iou_BRN.device)
    return holds_BR.scatter(1, holder_BNp1[:, :num_objects].long(), True)[:, :num_detections]
