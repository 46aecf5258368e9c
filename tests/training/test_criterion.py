"""The set criterion against its formulas for each layer, and invariances of its losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.batch import Target
from ats_detr.boxes import cxcywh_to_xyxy, iou
from ats_detr.checkpoint import config_of
from ats_detr.config import Config, LossConfig, config_to_dict
from ats_detr.kernels import TokenPlan
from ats_detr.model import DetectorOutput, Prediction, TokenScores, build_model
from ats_detr.training import trainer
from ats_detr.training.criterion import (
    SetCriterion,
    attention_coverage,
    build_criterion,
    compute_losses,
    most_attended,
    prediction_layers,
)
from ats_detr.training.matcher import PredictionRows
from tests.training.small import random_batch, small_config, small_run

SHAPES = ((4, 5), (2, 3), (1, 2), (1, 1))
NUM_TOKENS = sum(height * width for height, width in SHAPES)
NUM_CLASSES = 5


def random_targets(counts: tuple[int, ...], g: torch.Generator) -> list[Target]:
    targets = []
    for image, n in enumerate(counts):
        size = torch.rand(n, 2, generator=g) * 0.3 + 0.05
        centre = torch.rand(n, 2, generator=g) * (1 - size) + size / 2
        labels = torch.randint(NUM_CLASSES, (n,), generator=g)
        targets.append(Target(image, (100, 200), labels, torch.cat([centre, size], dim=1)))
    return targets


def random_prediction(*shape: int, g: torch.Generator) -> Prediction:
    boxes = torch.rand(*shape, 4, generator=g) * 0.4 + 0.2
    return Prediction(torch.randn(*shape, NUM_CLASSES, generator=g).requires_grad_(), boxes.requires_grad_())


def random_output(num_kept: tuple[int, ...] = (6, 9), *, seed: int = 0) -> DetectorOutput:
    """A complete output: two decoder layers, proposals, two auxiliary encoder layers, a selector."""
    g = torch.Generator().manual_seed(seed)
    batch = len(num_kept)
    scores = torch.randn(batch, NUM_TOKENS, generator=g)
    padding = torch.zeros(batch, NUM_TOKENS, dtype=torch.bool)
    padding[-1, [4, 9, 14, 19]] = True
    kept = torch.zeros(batch, NUM_TOKENS, dtype=torch.bool)
    for image, k in enumerate(num_kept):
        kept[image, scores[image].masked_fill(padding[image], -10).topk(k).indices] = True
    plan = TokenPlan.from_mask(kept)
    return DetectorOutput(
        last=random_prediction(batch, 8, g=g),
        level_shapes=SHAPES,
        padding_mask_BS=padding,
        memory_BSC=torch.randn(batch, NUM_TOKENS, 4, generator=g),
        decoder_auxiliary=[random_prediction(batch, 8, g=g)],
        encoder=random_prediction(batch, NUM_TOKENS, g=g),
        encoder_auxiliary=[random_prediction(sum(num_kept), g=g) for _ in range(2)],
        selection=TokenScores(scores.requires_grad_(), (~padding).sum(1), torch.tensor(num_kept), None, plan),
        attention_map_BS=torch.rand(batch, NUM_TOKENS, generator=g),
    )


def criterion(loss: LossConfig | None = None, **changes: int) -> SetCriterion:
    return SetCriterion(NUM_CLASSES, loss, class_specific_proposals=True, **changes)


# ----------------------------------------------------------------------------------------------------- the formulas
def formula_losses(
    logits: Tensor,
    boxes: Tensor,
    wanted: dict[int, tuple[int, list[float]]],
    *,
    matchability_aware: bool = False,
) -> dict[str, float]:
    """Sums over rows in Python floats. `wanted` maps rows to the (label, box) of their objects."""
    loss_bbox = loss_giou = 0.0
    overlaps = {}
    for row, (_, target) in wanted.items():
        box = boxes[row].tolist()
        loss_bbox += sum(abs(a - b) for a, b in zip(box, target, strict=True))
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
            (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (box, target)
        )
        overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
        union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
        hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
        loss_giou += 1 - overlap / union + (hull - union) / hull
        overlaps[row] = overlap / union
    loss_ce = 0.0
    for row, row_logits in enumerate(logits.tolist()):
        for label, x in enumerate(row_logits):
            p = 1 / (1 + math.exp(-x))
            is_object = wanted.get(row, (None,))[0] == label
            if matchability_aware:
                t = overlaps[row] ** 1.5 if is_object else 0.0
                loss_ce -= (t if is_object else 0) * math.log(p)
                loss_ce -= (1 - t if is_object else p**1.5) * math.log(1 - p)
            elif is_object:
                loss_ce += 0.25 * (1 - p) ** 2 * -math.log(p)
            else:
                loss_ce += 0.75 * p**2 * -math.log(1 - p)
    return {"loss_ce": loss_ce, "loss_bbox": loss_bbox, "loss_giou": loss_giou}


@pytest.mark.parametrize("matchability_aware", [False, True])
def test_the_losses_of_every_layer_equal_their_formulas(matchability_aware: bool) -> None:
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    own = criterion(LossConfig(class_loss="matchability_aware" if matchability_aware else "focal"))
    losses = own(output, targets, num_boxes=2.5)
    layers = prediction_layers(output, class_specific_proposals=True)
    assert list(layers) == ["", "_0", "_enc", "_enc_0", "_enc_1"]
    labels = torch.cat([t.labels_N for t in targets]).tolist()
    boxes = torch.cat([t.boxes_N4 for t in targets]).tolist()
    for (suffix, layer), match in zip(
        layers.items(), own.matcher(list(layers.values()), targets), strict=True
    ):
        assert sorted(match.objects_M.tolist()) == [0, 1, 2, 3, 4]
        wanted = {
            row: (labels[obj], boxes[obj])
            for row, obj in zip(match.rows_M.tolist(), match.objects_M.tolist(), strict=True)
        }
        formulas = formula_losses(
            layer.logits_RT, layer.boxes_R4, wanted, matchability_aware=matchability_aware
        )
        for key, value in formulas.items():
            assert losses[key + suffix].item() == pytest.approx(value / 2.5, rel=1e-5), key + suffix
    scores, k = output.selection.scores_BS, output.selection.num_kept_B
    total = 0.0
    for image in range(2):
        attention = output.attention_map_BS[image].masked_fill(output.padding_mask_BS[image], -1)
        looked_at = set(attention.topk(int(k[image])).indices.tolist())
        for token, score in enumerate(scores[image].tolist()):
            total += math.log1p(math.exp(-score if token in looked_at else score))
    assert losses["loss_mask_prediction"].item() == pytest.approx(total / (2 * NUM_TOKENS), rel=1e-5)


def test_every_loss_has_a_weight_and_logged_metrics_have_none() -> None:
    targets = random_targets((3, 2), torch.Generator().manual_seed(1))
    own = criterion(num_decoder_layers=2, num_encoder_layers=3)
    losses = own(random_output(), targets, 5)
    assert set(own.weights) == {key for key in losses if key.startswith("loss_")} | {
        "loss_budget",
        "loss_memory",
    }
    assert all(losses[key].requires_grad for key in own.weights.keys() & losses.keys())
    logged = {key for key in losses if key not in own.weights}
    assert {"class_error", "cardinality_error_enc_1", "attention_coverage", "attention_coverage_3"} <= logged
    assert not any(losses[key].requires_grad for key in logged)


def test_the_matchability_aware_loss_has_the_gradient_of_its_formula() -> None:
    """The overlap is a constant: boxes have no gradient from the class loss."""
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    own = criterion(LossConfig(class_loss="matchability_aware"))
    own(output, targets, 1)["loss_ce"].backward()
    assert output.last.boxes.grad is None or not output.last.boxes.grad.any()

    layer = prediction_layers(output, class_specific_proposals=True)[""]
    (match,) = own.matcher([layer], targets)
    x = layer.logits_RT.detach().double().requires_grad_()
    labels, boxes = torch.cat([t.labels_N for t in targets]), torch.cat([t.boxes_N4 for t in targets])
    overlap = iou(*map(cxcywh_to_xyxy, (layer.boxes_R4[match.rows_M].detach(), boxes[match.objects_M])))
    entries = match.rows_M, labels[match.objects_M]
    wanted, weight = torch.zeros_like(x), x.sigmoid().pow(1.5)
    wanted[entries] = overlap.double() ** 1.5
    is_object = torch.zeros_like(x, dtype=torch.bool)
    is_object[entries] = True
    loss = F.binary_cross_entropy_with_logits(x, wanted, reduction="none")
    (loss * torch.where(is_object, 1.0, weight)).sum().backward()
    torch.testing.assert_close(output.last.logits.grad.flatten(0, 1), x.grad.float())


def test_class_agnostic_proposals_have_class_0() -> None:
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    agnostic = SetCriterion(NUM_CLASSES)(output, targets, 5)
    for target in targets:
        target.labels_N.zero_()
    expected = criterion()(output, targets, 5)
    for key in ("loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"):
        assert agnostic[key].item() == expected[key].item()
    assert agnostic["loss_ce"].item() != expected["loss_ce"].item()


# -------------------------------------------------------------------------------------- what must make no difference
def test_a_batch_without_objects_gives_zero_box_losses_and_gradients_to_every_head() -> None:
    """With DDP, a process without objects must reduce the gradient of every parameter, too."""
    output, targets = random_output(), random_targets((0, 0), torch.Generator())
    own = criterion()
    losses = own(output, targets, 1)
    assert losses["loss_bbox"].item() == losses["loss_giou_enc_1"].item() == 0
    assert losses["class_error"].item() == 100
    sum(own.weights[key] * losses[key] for key in own.weights if key in losses).backward()
    for prediction in (output.last, *output.decoder_auxiliary, output.encoder, *output.encoder_auxiliary):
        assert (prediction.boxes.grad == 0).all()
        assert prediction.logits.grad.abs().sum() > 0


def test_losses_of_an_image_do_not_depend_on_the_budgets_of_its_batch() -> None:
    """The auxiliary encoder losses use the kept tokens of each image only."""
    output = random_output((6, 9))
    targets = random_targets((3, 2), torch.Generator().manual_seed(1))
    together = criterion()(output, targets, 5)
    alone = []
    starts = output.selection.plan.starts_on_host()
    for image, rows in enumerate(map(slice, starts, starts[1:])):
        one = slice(image, image + 1)
        selection = output.selection
        single = DetectorOutput(
            last=Prediction(output.last.logits[one], output.last.boxes[one]),
            level_shapes=SHAPES,
            padding_mask_BS=output.padding_mask_BS[one],
            memory_BSC=output.memory_BSC[one],
            encoder=Prediction(output.encoder.logits[one], output.encoder.boxes[one]),
            encoder_auxiliary=[Prediction(p.logits[rows], p.boxes[rows]) for p in output.encoder_auxiliary],
            selection=TokenScores(
                selection.scores_BS[one],
                selection.num_valid_B[one],
                selection.num_kept_B[one],
                None,
                TokenPlan.from_mask(selection.plan.slot_BS[one] >= 0),
            ),
            attention_map_BS=output.attention_map_BS[one],
        )
        alone.append(criterion()(single, targets[one], 5))
    for key in alone[0]:
        if key.startswith("loss_"):
            combine = (lambda a, b: (a + b) / 2) if key == "loss_mask_prediction" else (lambda a, b: a + b)
            assert together[key].item() == pytest.approx(
                combine(*(x[key].item() for x in alone)), rel=1e-5
            ), key


def test_losses_do_not_depend_on_the_order_of_queries_and_objects() -> None:
    output, targets = random_output(), random_targets((4, 3), torch.Generator().manual_seed(2))
    expected = criterion()(output, targets, 7)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    output.last = Prediction(output.last.logits[:, order], output.last.boxes[:, order])
    for target in targets:
        target.labels_N, target.boxes_N4 = target.labels_N.flip(0), target.boxes_N4.flip(0)
    for key, value in criterion()(output, targets, 7).items():
        assert value.item() == pytest.approx(expected[key].item(), rel=1e-5), key


def test_the_losses_are_float32_under_autocast() -> None:
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    expected = criterion()(output, targets, 5)
    output.last.logits = output.last.logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion()(output, targets, 5)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert losses["loss_ce_0"].item() == expected["loss_ce_0"].item()
    assert losses["loss_ce"].item() == pytest.approx(expected["loss_ce"].item(), rel=0.02)


# ------------------------------------------------------------------------------------------------------ the selector
def test_padded_tokens_are_never_targets_even_if_more_tokens_are_kept_than_valid() -> None:
    attention = torch.tensor([[5.0, 1, 9, 3], [5.0, 1, 9, 3]])
    padding = torch.tensor([[False, False, True, False], [True, True, True, False]])
    wanted = most_attended(attention, torch.tensor([2, 3]), padding)
    assert wanted.tolist() == [[True, False, False, True], [False, False, False, True]]


def test_attention_coverage_is_the_share_of_attention_on_kept_tokens() -> None:
    attention = torch.tensor([[1.0, 3, 4, 0], [2.0, 2, 0, 0]])
    kept = torch.tensor([[True, False, True, True], [True, True, False, False]])
    coverage = attention_coverage(attention, kept, ((1, 2), (1, 2)))
    assert {key: value.item() for key, value in coverage.items()} == {
        "attention_coverage": pytest.approx((5 / 8 + 1) / 2),
        "attention_coverage_0": pytest.approx((1 / 4 + 1) / 2),
        "attention_coverage_1": pytest.approx((1 + 0) / 2),  # without attention: 0, not NaN
    }


def test_a_selector_without_an_attention_map_is_an_error() -> None:
    output = random_output()
    output.attention_map_BS = None
    with pytest.raises(ValueError, match="supervision=True"):
        criterion()(output, random_targets((1, 1), torch.Generator()), 2)


# ------------------------------------------------------------------------------------------------------ the settings
def config_with(tmp_path: Path, loss: dict[str, object], **model: object) -> Config:
    return small_config(tmp_path, loss=loss, model=model)


def losses_of(config: Config) -> dict[str, Tensor]:
    """The losses of one batch with the weights of seed 0."""
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=3).train()
    batch, targets = random_batch(seed=0, num_objects=[3, 1], size=64)
    return compute_losses(model, build_criterion(config, 3), None, batch, targets)[1]


def test_each_loss_weight_scales_its_losses_in_the_total(tmp_path: Path) -> None:
    keys = {"class_weight": "loss_ce", "bbox_weight": "loss_bbox", "giou_weight": "loss_giou"}
    keys["selector_weight"] = "loss_mask_prediction"
    losses = losses_of(config_with(tmp_path, {}))
    for setting, key in keys.items():
        value = getattr(LossConfig(), setting)
        doubled = losses_of(config_with(tmp_path, {setting: 2 * value}))
        added = value * sum(loss for name, loss in losses.items() if name.startswith(key))
        torch.testing.assert_close(doubled["loss"] - losses["loss"], added, msg=setting)


def test_focal_alpha_and_gamma_reach_loss_and_cost(tmp_path: Path) -> None:
    own = build_criterion(config_with(tmp_path, {"focal_alpha": 0.5, "focal_gamma": 0.0}), 3)
    assert (own.matcher.loss.focal_alpha, own.matcher.loss.focal_gamma) == (0.5, 0.0)
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    plain = criterion(LossConfig(focal_alpha=0.5, focal_gamma=0.0))
    pending = plain.start(output, targets)
    loss = pending.finish(5)["loss_ce"]
    match = plain.matcher([pending.layers[""]], targets)[0]
    logits = pending.layers[""].logits_RT
    wanted = torch.zeros_like(logits)
    labels = torch.cat([target.labels_N for target in targets])
    wanted[match.rows_M, labels[match.objects_M]] = 1
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / 5
    torch.testing.assert_close(loss, expected)  # gamma 0 and alpha 0.5: half of the binary cross entropy


def test_the_class_loss_of_the_settings_is_used(tmp_path: Path) -> None:
    output, targets = random_output(), random_targets((3, 2), torch.Generator().manual_seed(1))
    for name in ("focal", "matchability_aware"):
        config = config_with(tmp_path, {"class_loss": name})
        expected = criterion(LossConfig(class_loss=name))(output, targets, 5)["loss_ce"]
        assert build_criterion(config, NUM_CLASSES)(output, targets, 5)["loss_ce"] == expected


@pytest.mark.parametrize("only", ["class_cost", "bbox_cost", "giou_cost"])
def test_the_costs_determine_the_matching(tmp_path: Path, only: str) -> None:
    """Row 0 has the best class, row 1 the best L1 distance, row 2 the best GIoU."""
    zero = dict.fromkeys(("class_cost", "bbox_cost", "giou_cost"), 0.0)
    matcher = build_criterion(config_with(tmp_path, {**zero, only: 1.0}), 1).matcher
    rows = PredictionRows(
        name="rows",
        logits_RT=torch.tensor([[5.0], [0.0], [-5.0]]),
        boxes_R4=torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.56, 0.5, 0.1, 0.1], [0.5, 0.5, 0.15, 0.15]]),
        starts=(0, 3),
    )
    target = Target(0, (64, 64), torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.1, 0.1]]))
    (match,) = matcher([rows], [target])
    assert match.rows_M.tolist() == [("class_cost", "bbox_cost", "giou_cost").index(only)]


def test_without_auxiliary_losses_only_the_last_decoder_layer_has_losses(tmp_path: Path) -> None:
    every, last = (losses_of(config_with(tmp_path, {"decoder_auxiliary": on})) for on in (True, False))
    assert every.keys() - last.keys() >= {"loss_ce_0", "loss_bbox_0", "loss_giou_0"}
    assert all(torch.equal(last[key], every[key]) for key in last.keys() - {"loss"})
    assert {"loss_ce", "loss_ce_enc", "loss_ce_enc_0"} <= last.keys()


@pytest.mark.parametrize("box_refine", [True, False])
def test_without_auxiliary_losses_every_parameter_has_a_gradient(
    tmp_path: Path, box_refine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """DistributedDataParallel needs a gradient of every trained parameter."""
    model = {"box_refine": box_refine, "encoder_auxiliary": box_refine}
    run = small_run(tmp_path, config_with(tmp_path, {"decoder_auxiliary": False}, **model))
    assert ("model.box_refine = True has no effect: loss.decoder_auxiliary" in caplog.text) == box_refine
    trainer.accumulate_gradients(run, [random_batch(0, [3, 0, 2, 1], size=64)], metrics=False)
    trained = {name: p for name, p in run.state.model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(name.startswith("decoder_heads.") for name in trained)


def test_a_checkpoint_without_a_loss_section_has_the_published_losses(tmp_path: Path) -> None:
    tree = config_to_dict(small_config(tmp_path))
    del tree["loss"]
    assert config_of({"config": tree}, "a.pt").loss == LossConfig()
