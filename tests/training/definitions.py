"""The definitions of matching, losses and labels, as papers state them: slow, plain, one layer or pair at a time.

What the package computes at once is tested against them, and timed against them (`python -m bench.training`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from ats_detr.batch import Target
from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.model import Detections, DetectorOutput
from ats_detr.training.criterion import most_attended, prediction_layers
from ats_detr.training.matcher import PredictionRows


# ------------------------------------------------------------------------------------------------ the set criterion
@torch.no_grad()
def layer_matching(layer: PredictionRows, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Matched rows and objects of one layer: all costs of the batch, then one assignment per image."""
    labels = torch.cat([target.labels_N for target in targets])
    boxes = torch.cat([target.boxes_N4 for target in targets]).float()
    if layer.class_agnostic:
        labels = torch.zeros_like(labels)
    p = layer.logits_RT.float().sigmoid()
    found = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    missed = 0.75 * p**2 * -(1 - p + 1e-8).log()
    class_cost = found[:, labels] - missed[:, labels]
    own = layer.boxes_R4.float()
    giou = generalized_box_iou(cxcywh_to_xyxy(own), cxcywh_to_xyxy(boxes))
    cost = (2 * class_cost + 5 * torch.cdist(own, boxes, p=1) - 2 * giou).cpu()
    rows, objects, first = [], [], 0
    for image, target in enumerate(targets):
        start, end = layer.starts[image], layer.starts[image + 1]
        block = cost[start:end, first : first + len(target.labels_N)]
        i, j = linear_sum_assignment(block.numpy())
        rows.append(torch.from_numpy(i) + start)
        objects.append(torch.from_numpy(j) + first)
        first += len(target.labels_N)
    device = layer.boxes_R4.device
    return torch.cat(rows).to(device), torch.cat(objects).to(device)


def layer_losses(
    layer: PredictionRows, targets: Sequence[Target], num_boxes: float, suffix: str
) -> dict[str, Tensor]:
    """The three losses and the logged metrics of one layer."""
    rows, objects = layer_matching(layer, targets)
    logits = layer.logits_RT.float()
    labels = torch.cat([target.labels_N for target in targets])
    if layer.class_agnostic:
        labels = torch.zeros_like(labels)
    wanted = torch.zeros_like(logits)
    wanted[rows, labels[objects]] = 1
    own = layer.boxes_R4[rows].float()
    boxes = torch.cat([target.boxes_N4 for target in targets]).float()[objects]
    giou = torch.diag(generalized_box_iou(cxcywh_to_xyxy(own), cxcywh_to_xyxy(boxes)))
    with torch.no_grad():
        best = logits.argmax(1)
        counts = [b - a for a, b in zip(layer.starts, layer.starts[1:], strict=False)]
        num_found = torch.stack([(part != logits.shape[1] - 1).sum() for part in best.split(counts)])
        num_objects = torch.tensor([len(target.labels_N) for target in targets], device=num_found.device)
    losses = {
        "loss_ce": sigmoid_focal_loss(logits, wanted, 0.25, 2, reduction="sum") / num_boxes,
        "loss_bbox": F.l1_loss(own, boxes, reduction="sum") / num_boxes,
        "loss_giou": (1 - giou).sum() / num_boxes,
        "cardinality_error": (num_found - num_objects).abs().float().mean(),
    }
    if not suffix:
        losses["class_error"] = 100 * (best[rows] != labels[objects]).float().mean()
    return {key + suffix: value for key, value in losses.items()}


def set_losses(output: DetectorOutput, targets: Sequence[Target], num_boxes: float) -> dict[str, Tensor]:
    """The losses of every layer, computed sequentially, and of the selector."""
    losses: dict[str, Tensor] = {}
    for suffix, layer in prediction_layers(output, class_specific_proposals=True).items():
        losses |= layer_losses(layer, targets, num_boxes, suffix)
    assert output.selection is not None and output.attention_map_BS is not None
    wanted = most_attended(output.attention_map_BS, output.selection.num_kept_B, output.padding_mask_BS)
    scores = output.selection.scores_BS
    losses["loss_mask_prediction"] = F.multilabel_soft_margin_loss(scores, wanted.float())
    return losses


# ------------------------------------------------------------------------------------- average precision of an image
def nested_loops_ap(found: Detections, target: Target, threshold: float) -> float:
    """The definition of the average precision of an image: nested loops over classes, detections and objects.

    Each comparison synchronises with the device, as in the published code.
    """
    height, width = target.original_size
    scale = target.boxes_N4.new_tensor([width, height, width, height])
    objects = cxcywh_to_xyxy(target.boxes_N4) * scale
    precisions = []
    for label in sorted(set(target.labels_N.tolist())):
        own = [i for i in range(len(objects)) if int(target.labels_N[i]) == label]
        free, num_hits, num_seen, recall_before, area = set(own), 0, 0, 0.0, 0.0
        for i in range(len(found.labels_N)):
            if int(found.labels_N[i]) != label:
                continue
            num_seen += 1
            best, best_iou = None, -1.0
            for j in own:
                if j in free:
                    iou = float(box_iou(found.boxes_xyxy_N4[i : i + 1], objects[j : j + 1]))
                    if iou > best_iou:
                        best, best_iou = j, iou
            if best is not None and best_iou >= threshold:
                free.remove(best)
                num_hits += 1
            recall = num_hits / len(own)
            area += (recall - recall_before) * num_hits / num_seen
            recall_before = recall
        precisions.append(area)
    return sum(precisions) / len(precisions) if precisions else 1.0
