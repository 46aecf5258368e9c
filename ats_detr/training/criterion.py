"""The losses of a detector: the set criterion of DETR, the loss of the token scores, and the sum over all losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.batch import ImageBatch, Target, most_of_a_class, targets_to
from ats_detr.boxes import cxcywh_to_xyxy, generalized_iou, iou
from ats_detr.config import Config, LossConfig
from ats_detr.model.output import DetectorOutput, Prediction
from ats_detr.training.distillation import DualTeacher, SelfTaught
from ats_detr.training.matcher import HungarianMatcher, Match, PendingMatches, PredictionRows, concatenated

# Shapes: B images; S tokens of the pyramid; T classes; N objects; R prediction rows of a layer; M matched pairs.

SUMS_OVER_OBJECTS = ("loss_ce", "loss_bbox", "loss_giou")
"""Losses divided by the number of objects; all others are means over images."""


def compute_losses(
    model: nn.Module,
    criterion: SetCriterion,
    teachers: DualTeacher | SelfTaught | None,
    batch: ImageBatch,
    targets: Sequence[Target],
    *,
    num_boxes: Tensor | None = None,
    share: float = 1.0,
    precision: torch.dtype = torch.float32,
    metrics: bool = True,
    keep_ratio: Tensor | None = None,
) -> tuple[DetectorOutput, dict[str, Tensor], str | None]:
    """One forward pass with all losses.

    The gradient of `loss`, averaged over processes, is the gradient of the batches of all processes taken as one batch.
    Where a prediction or a target is not finite, the gradient is NaN on every process.

    Args:
        batch: on the device.
        targets: on the host.
        num_boxes: objects of the step, see `distributed.global_num_boxes`. None: objects of this batch and of those of
            the other processes.
        share: fraction of the step's images in this batch, by which means over images are multiplied.
        metrics: add values that are only logged.
        keep_ratio: float [B] ratios that replace the budgets.

    Returns:
        The output; float32 scalar losses by name, with their weighted sum as `loss`; and a description of the tensor
        that was not finite, if any.
    """
    device = batch.images_B3HW.device
    if num_boxes is None:
        num_boxes = distributed.global_num_boxes(targets, device)
    on_device = targets_to(targets, device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        output = model(batch, keep_ratio=keep_ratio)
    pending = criterion.start(output, on_device, metrics=metrics)
    # Between start and finish: the device runs the teachers while the host solves the matching.
    distillation = {}
    if isinstance(teachers, SelfTaught):
        distillation = teachers(targets, output)
    elif teachers is not None:
        distillation = teachers(batch, on_device, output, most_of_a_class=most_of_a_class(targets))
    losses = pending.finish(num_boxes) | distillation
    if share != 1.0:
        losses = {k: v if k.startswith(SUMS_OVER_OBJECTS) else v * share for k, v in losses.items()}
    weights = {key: weight for key, weight in criterion.weights.items() if key in losses}
    factors = torch.tensor(list(weights.values())).to(device, non_blocking=True)
    total = (torch.stack([losses[key] for key in weights]) * factors).sum()
    # A loss that is not finite may have finite gradients, which the other processes would use.
    is_good = total.detach().isfinite() & (pending.matches.problem is None)
    total = total * torch.where(is_good, 1.0, torch.nan)
    return output, {"loss": total, **losses}, pending.matches.problem


class SetCriterion(nn.Module):
    """Class, L1 and GIoU losses of every prediction layer, each with its own matching, and the loss of the selector.

    Each prediction layer has `loss_ce`, `loss_bbox` and `loss_giou` with a suffix: none for the last decoder layer;
    `_0`, `_1`, ... for the decoder layers before it; `_enc` for the two-stage proposals (over all tokens, padded and
    invalid ones included, as published); `_enc_0`, ... for the encoder layers before the last (over the kept tokens of
    each image only: the published code adds surplus tokens where the images of a batch keep different numbers);
    `_many`, `_many_0`, ... for the second group of queries (see `one_to_many`), divided by the repetitions, too.
    `loss_mask_prediction` trains the token scores to predict the tokens with the most decoder attention.
    """

    weights: dict[str, float]
    """Weight of each loss in the total: sum(weights[key] * losses[key] for key in weights if key in losses)."""

    def __init__(
        self,
        num_classes: int,
        loss: LossConfig | None = None,
        *,
        class_specific_proposals: bool = False,
        num_decoder_layers: int = 6,
        num_encoder_layers: int = 6,
    ) -> None:
        """
        Args:
            loss: matching costs, weights and options. None: as published.
            class_specific_proposals: the proposals predict all classes; False: class 0 stands for any object.
        """
        super().__init__()
        self.num_classes = num_classes
        self.loss = loss = loss or LossConfig()
        self.class_specific_proposals = class_specific_proposals
        self.matcher = HungarianMatcher(loss)
        decoder_layers = ["", *(f"_{i}" for i in range(num_decoder_layers - 1))]
        second_group = [f"_many{suffix}" for suffix in decoder_layers if loss.one_to_many]
        suffixes = [*decoder_layers, *second_group, "_enc"]
        suffixes += [f"_enc_{i}" for i in range(num_encoder_layers - 1)]
        per_layer = {
            "loss_ce": loss.class_weight,
            "loss_bbox": loss.bbox_weight,
            "loss_giou": loss.giou_weight,
        }
        self.weights = {key + suffix: weight for suffix in suffixes for key, weight in per_layer.items()}
        self.weights["loss_mask_prediction"] = loss.selector_weight
        # Computed by the supervision of an adaptive model.
        self.weights |= {"loss_budget": loss.budget_weight, "loss_memory": loss.memory_weight}

    def forward(
        self,
        output: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: Tensor | float,
        *,
        metrics: bool = True,
    ) -> dict[str, Tensor]:
        """The losses by name, float32 scalars also under autocast.

        Args:
            num_boxes: objects of all processes, at least 1, divided by the number of processes.
            metrics: add values that are only logged and have no gradient.

        Returns:
            The losses of `weights` that this model has. With `metrics` also `class_error` (percent of the matched
            queries with another class, 100 without objects), `cardinality_error` of each layer (mean absolute
            difference between the number of objects and the number of rows whose best class is not the last one) and
            `attention_coverage` (see the function of that name).

        Raises:
            FloatingPointError: predictions or target boxes are not finite; the message names the tensor.
            ValueError: the model has a selector but was run without its attention map.
        """
        pending = self.start(output, targets, metrics=metrics)
        losses = pending.finish(num_boxes)
        if pending.matches.problem is not None:
            raise FloatingPointError(pending.matches.problem)
        return losses

    def start(
        self, output: DetectorOutput, targets: Sequence[Target], *, metrics: bool = True
    ) -> PendingLosses:
        """Start the matching without device-to-host synchronisation; work launched before `finish` overlaps it."""
        with torch.autocast(output.memory_BSC.device.type, enabled=False):
            layers = prediction_layers(
                output,
                class_specific_proposals=self.class_specific_proposals,
                decoder_auxiliary=self.loss.decoder_auxiliary,
                one_to_many=self.loss.one_to_many,
            )
            rows = list(layers.values())
            logits_RT, boxes_R4 = concatenated(rows)
            matches = PendingMatches(rows, targets, self.matcher.costs(rows, targets, logits_RT, boxes_R4))
            counts = [len(layer.logits_RT) for layer in rows]
            if self.loss.class_loss == "matchability_aware":
                background = background_loss(logits_RT, counts, 0.0, MATCHABILITY_GAMMA)
            else:
                background = background_loss(logits_RT, counts, self.loss.focal_alpha, self.loss.focal_gamma)
            others = self._selector_losses(output, metrics) if output.selection is not None else {}
            return PendingLosses(
                self, layers, targets, matches, logits_RT, boxes_R4, background, others, metrics
            )

    def _selector_losses(self, output: DetectorOutput, metrics: bool) -> dict[str, Tensor]:
        selection, attention = output.selection, output.attention_map_BS
        if attention is None:
            raise ValueError(
                "the loss of the token scores needs the attention map: run the model with supervision=True"
            )
        attention = attention.float()
        wanted = most_attended(attention, selection.num_kept_B, output.padding_mask_BS)
        loss = F.binary_cross_entropy_with_logits(selection.scores_BS.float(), wanted.float())
        losses = {"loss_mask_prediction": loss}
        if metrics:
            losses |= attention_coverage(attention, selection.plan.slot_BS >= 0, output.level_shapes)
        return losses


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """The criterion of a config."""
    return SetCriterion(
        num_classes,
        config.loss,
        class_specific_proposals=config.model.class_specific_proposals,
        num_decoder_layers=config.model.num_decoder_layers,
        num_encoder_layers=config.model.num_encoder_layers,
    )


@dataclass
class PendingLosses:
    """The losses of one output while its costs are being transferred."""

    criterion: SetCriterion
    layers: dict[str, PredictionRows]
    targets: Sequence[Target]
    matches: PendingMatches
    logits_RT: Tensor
    """float32, of all layers."""
    boxes_R4: Tensor
    """float32, of all layers."""
    background: tuple[Tensor, Tensor]
    """`background_loss` of all layers."""
    others: dict[str, Tensor]
    """Losses that need no matching."""
    metrics: bool

    def finish(self, num_boxes: Tensor | float) -> dict[str, Tensor]:
        """The losses of `SetCriterion.forward`. If `matches.problem` is set afterwards, they are meaningless."""
        with torch.autocast(self.logits_RT.device.type, enabled=False):
            matches = self.matches.finish()
            labels = torch.cat([target.labels_N for target in self.targets])
            target_boxes = torch.cat([target.boxes_N4 for target in self.targets]).float()
            # Of the pairs of all layers: rows of the concatenated layers, and objects.
            rows_M, objects_M = self.matches.all_pairs.unbind()
            counts = [len(match.rows_M) for match in matches]
            own, wanted = self.boxes_R4[rows_M], target_boxes[objects_M]
            class_loss = self._class_losses(labels[objects_M], rows_M, counts, own, wanted)
            values = {"loss_ce": class_loss, **box_losses(own, wanted, counts)}
            losses = {
                key + suffix: loss if layer.repeats == 1 else loss / layer.repeats
                for key, loss_of_layers in values.items()
                for (suffix, layer), loss in zip(
                    self.layers.items(), (loss_of_layers / num_boxes).unbind(), strict=True
                )
            }
            if self.metrics:
                with torch.no_grad():
                    losses |= self._metrics(matches[0], labels)
            return losses | self.others

    def _class_losses(
        self, labels_M: Tensor, rows_M: Tensor, counts: list[int], own_M4: Tensor, wanted_M4: Tensor
    ) -> Tensor:
        """The sum over the pairs and the background of each layer. `own_M4`, `wanted_M4`: boxes of the pairs."""
        agnostic = [layer.class_agnostic for layer in self.layers.values()]
        if any(agnostic):
            parts = zip(labels_M.split(counts), agnostic, strict=True)
            labels_M = torch.cat([torch.zeros_like(part) if zero else part for part, zero in parts])
        num_rows = [len(layer.logits_RT) for layer in self.layers.values()]
        with torch.no_grad():
            logits_M = self.logits_RT[rows_M, labels_M]
            if self.criterion.loss.class_loss == "matchability_aware":
                overlap_M = iou(cxcywh_to_xyxy(own_M4), cxcywh_to_xyxy(wanted_M4))
                of_objects = matchability_loss(logits_M, overlap_M)
            else:
                loss = self.criterion.loss
                of_objects = focal_loss(logits_M, loss.focal_alpha, loss.focal_gamma)
        return ClassLoss.apply(
            self.logits_RT, *self.background, rows_M, labels_M, *of_objects, num_rows, counts
        )

    def _metrics(self, match: Match, labels: Tensor) -> dict[str, Tensor]:
        """Metrics of all layers; `match` belongs to the last decoder layer."""
        num_objects_B = torch.tensor([len(target.labels_N) for target in self.targets]).to(
            labels.device, non_blocking=True
        )
        best = self.logits_RT.argmax(1).split([len(layer.logits_RT) for layer in self.layers.values()])
        found = {
            "cardinality_error" + suffix: _cardinality_error(
                own, layer.starts, num_objects_B, self.criterion.num_classes
            )
            for (suffix, layer), own in zip(self.layers.items(), best, strict=True)
            if layer.repeats == 1
        }
        wrong = (best[0][match.rows_M] != labels[match.objects_M]).float()
        found["class_error"] = 100 * wrong.mean() if len(wrong) else wrong.new_tensor(100.0)
        return found


def prediction_layers(
    output: DetectorOutput,
    *,
    class_specific_proposals: bool,
    decoder_auxiliary: bool = True,
    one_to_many: int = 0,
) -> dict[str, PredictionRows]:
    """The prediction layers of an output as rows, by the suffix of their losses."""

    def dense(name: str, prediction: Prediction, **changes: Any) -> PredictionRows:
        batch, num_rows = prediction.boxes.shape[:2]
        starts = range(0, batch * num_rows + 1, num_rows)
        logits, boxes = prediction.logits.flatten(0, 1), prediction.boxes.flatten(0, 1)
        return PredictionRows(name=name, logits_RT=logits, boxes_R4=boxes, starts=starts, **changes)

    starts: Sequence[int]
    layers = {"": dense("the last decoder layer", output.last)}
    for i, prediction in enumerate(output.decoder_auxiliary if decoder_auxiliary else ()):
        layers[f"_{i}"] = dense(f"decoder layer {i}", prediction)
    if output.one_to_many:
        *earlier, last = (
            dense(f"the second group, decoder layer {i}", prediction, repeats=one_to_many)
            for i, prediction in enumerate(output.one_to_many)
        )
        layers["_many"] = last
        layers |= {f"_many_{i}": layer for i, layer in enumerate(earlier if decoder_auxiliary else ())}
    if output.encoder is not None:
        agnostic = not class_specific_proposals
        layers["_enc"] = dense("the encoder's proposals", output.encoder, class_agnostic=agnostic)
    if output.encoder_auxiliary:
        if output.selection is not None:
            starts = output.selection.plan.starts_on_host()
        else:
            batch, num_tokens = output.padding_mask_BS.shape
            starts = range(0, batch * num_tokens + 1, num_tokens)
        for i, prediction in enumerate(output.encoder_auxiliary):
            layers[f"_enc_{i}"] = PredictionRows(
                name=f"encoder layer {i}",
                logits_RT=prediction.logits,
                boxes_R4=prediction.boxes,
                starts=starts,
            )
    return layers


def most_attended(attention_BS: Tensor, num_tokens_B: Tensor, padding_mask_BS: Tensor) -> Tensor:
    """bool [B, S]: the num_tokens_B[i] tokens of image i with the most attention, without padded tokens."""
    order = attention_BS.masked_fill(padding_mask_BS, -1).argsort(dim=1, descending=True, stable=True)
    by_rank = torch.arange(order.shape[1], device=order.device) < num_tokens_B[:, None]
    return torch.zeros_like(by_rank).scatter(1, order, by_rank) & ~padding_mask_BS


def attention_coverage(
    attention_BS: Tensor, kept_BS: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """Fraction of the decoder's attention on kept tokens, mean over images, in total and per level (`_0`, ...).

    Attention on padded tokens counts in the denominator. A level without attention has coverage 0.
    """
    total_BS, kept_part_BS = attention_BS, attention_BS * kept_BS
    ends = list(accumulate(height * width for height, width in level_shapes))
    spans = {"": slice(None), **{f"_{i}": slice(a, b) for i, (a, b) in enumerate(pairwise([0, *ends]))}}
    tiny = torch.finfo(attention_BS.dtype).tiny
    return {
        "attention_coverage" + suffix: (
            kept_part_BS[:, span].sum(1) / total_BS[:, span].sum(1).clamp(min=tiny)
        ).mean()
        for suffix, span in spans.items()
    }


def _cardinality_error(
    best_R: Tensor, starts: Sequence[int], num_objects_B: Tensor, num_classes: int
) -> Tensor:
    """Mean over images of |rows whose best class is not the last - objects|, as in DETR."""
    counts = [end - start for start, end in pairwise(starts)]
    num_found_B = torch.stack([part.sum() for part in (best_R != num_classes - 1).split(counts)])
    return (num_found_B - num_objects_B).abs().float().mean()


def box_losses(own_M4: Tensor, wanted_M4: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    """L1 and GIoU losses of pairs of boxes (cxcywh), summed over those of each layer, of `counts` pairs."""
    distance = F.l1_loss(own_M4, wanted_M4, reduction="none").sum(1)
    giou = 1 - generalized_iou(cxcywh_to_xyxy(own_M4), cxcywh_to_xyxy(wanted_M4))
    return {"loss_bbox": sums_of_parts(distance, counts), "loss_giou": sums_of_parts(giou, counts)}


# --------------------------------------------------------------------------------------------------------- class loss
MATCHABILITY_GAMMA = 1.5


def sums_of_parts(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The sum of each of the consecutive parts of `values`, of `counts` entries of the first axis."""
    runs = [(len(list(run)), count) for count, run in groupby(counts)]  # equal counts are summed together
    parts = zip(values.split([length * count for length, count in runs]), runs, strict=True)
    return torch.cat([part.unflatten(0, run).flatten(1).sum(1) for part, run in parts])


@torch.no_grad()
def background_loss(
    logits_RT: Tensor, counts: Sequence[int], alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """The sigmoid focal loss (Lin et al. 2017) of all entries as background: the sum of each layer, of `counts` rows,
    and the derivative [R, T].

    (1 - alpha) p^gamma softplus(x), whose derivative is (1 - alpha) p^gamma (gamma (1 - p) softplus(x) + p).
    Independent of the matching, so the device computes it while the host solves the assignments.
    """
    p = logits_RT.sigmoid()
    cost = F.softplus(logits_RT)
    weight = p.pow(gamma).mul_(1 - alpha)
    totals = sums_of_parts(weight * cost, counts)
    derivative = cost.mul_(1 - p).mul_(gamma).add_(p).mul_(weight)
    return totals, derivative


def focal_loss(logits_M: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The sigmoid focal loss of entries that are objects, minus that as background; and the derivative as objects, [M].

    The difference is added to the total of `background_loss`; the derivative replaces that of the background.
    """
    p, cost = logits_M.sigmoid(), F.softplus(-logits_M)
    weight = alpha * (1 - p).pow(gamma)
    as_background = (1 - alpha) * p.pow(gamma) * F.softplus(logits_M)
    return weight * cost - as_background, -weight * (gamma * p * cost + (1 - p))


def matchability_loss(logits_M: Tensor, overlap_M: Tensor) -> tuple[Tensor, Tensor]:
    """As `focal_loss`, the matchability-aware loss of DEIM (Huang et al. 2025, equation 3).

    The target of an object is t = overlap^gamma, the IoU of its predicted box to the power of MATCHABILITY_GAMMA:
    -t log p - (1 - t) log(1 - p), with the derivative p - t. So the score of a box predicts how well it fits, and an
    object whose best box is bad still has a loss. Background has the focal loss with alpha 0 and this gamma, whose
    weight is differentiated, as in the focal loss.
    """
    p, target = logits_M.sigmoid(), overlap_M.pow(MATCHABILITY_GAMMA)
    cost = F.softplus(logits_M)  # of the background; that of an object is cost - x
    return cost - target * logits_M - p.pow(MATCHABILITY_GAMMA) * cost, p - target


class ClassLoss(torch.autograd.Function):
    """Sum of each layer's class loss where the entries (rows_M[i], labels_M[i]), all distinct, are objects.

    Takes the results of `background_loss` for the same logits, those of `focal_loss` or `matchability_loss` for these
    entries, and the numbers of rows and of pairs of each layer. The backward pass scales the derivative of the
    background and replaces the entries of objects.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_RT: Tensor,
        background: Tensor,
        derivative_RT: Tensor,
        rows_M: Tensor,
        labels_M: Tensor,
        change_M: Tensor,
        of_objects_M: Tensor,
        num_rows: Sequence[int],
        num_pairs: Sequence[int],
    ) -> Tensor:
        ctx.num_rows = num_rows
        ctx.save_for_backward(derivative_RT, rows_M, labels_M, of_objects_M)
        return background + sums_of_parts(change_M, num_pairs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        derivative_RT, rows_M, labels_M, of_objects_M = ctx.saved_tensors
        parts = zip(gradient.unbind(), ctx.num_rows, strict=True)
        gradient_R1 = torch.cat([of_layer.expand(count) for of_layer, count in parts])[:, None]
        grad_RT = derivative_RT * gradient_R1
        grad_RT[rows_M, labels_M] = of_objects_M * gradient_R1[rows_M, 0]
        return grad_RT, *(None,) * 8
