"""The curve over budgets: shared passes, jackknife errors, comparison at an equal mean, costs, and its files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr.batch import ImageBatch
from ats_detr.checkpoint import save_checkpoint
from ats_detr.cli import main
from ats_detr.config import config_to_dict, load_config
from ats_detr.curve import Point, budget_curve, curve_findings, with_gflops
from ats_detr.data.coco import CocoDetection
from ats_detr.data.loader import EvaluationLoader
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.errors import UserError
from ats_detr.evaluation import (
    DetectionTable,
    ImageRecord,
    Metrics,
    average_precision,
    average_precision_without,
    evaluate,
    evaluate_budgets,
)
from ats_detr.flops import count_flops
from ats_detr.model import CompiledDetr, build_without_fetching
from ats_detr.model.output import BudgetOptions
from tests.model.test_detr import small_model
from tests.training.small import write_small_chain

NUM_IMAGES = 24
SIZES = {"short_side": 64, "long_side": 128, "size_multiple": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    root = synthetic_dataset(
        tmp_path_factory.mktemp("synthetic"), num_train=1, num_val=NUM_IMAGES, image_size=64, max_objects=6
    )
    return CocoDetection(root / "val2017", root / "annotations/instances_val2017.json")


def noisy_detections(dataset: CocoDetection, noise: float, seed: int) -> DetectionTable:
    """The annotated objects with random shifts, as the detections of a model of this `noise`."""
    random, tables = np.random.default_rng(seed), []
    for index in range(len(dataset)):
        boxes, rows = (np.asarray(part, np.float64) for part in dataset.objects(index))
        boxes_xywh = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
        boxes_xywh += noise * random.normal(size=boxes_xywh.shape) * boxes_xywh[:, 2:].mean()
        ids = dataset.class_map.category_ids_of(rows.astype(np.int64))
        tables.append(
            DetectionTable(np.full(len(ids), index), ids, boxes_xywh, random.uniform(size=len(ids)))
        )
    return DetectionTable.concatenate(tables)


def evaluated(dataset: CocoDetection, noise: float, ratios: np.ndarray, num_budgets: int):
    table = noisy_detections(dataset, noise, seed=int(1000 * noise))
    records = tuple(
        ImageRecord(
            image_id=dataset.image_id(i), num_objects=1, num_valid_tokens=1000,
            num_kept_tokens=round(1000 * ratio), budget_class=None,
        )
        for i, ratio in enumerate(ratios)
    )  # fmt: skip
    precision = average_precision(dataset.annotations, table)
    return Metrics(precision=precision, images=records, num_budgets=num_budgets, num_skipped=0), table


def test_replicates_are_the_precision_of_the_other_images(dataset: CocoDetection) -> None:
    table = noisy_detections(dataset, 0.1, seed=0)
    groups = np.arange(NUM_IMAGES) % 3
    found = average_precision_without(groups, dataset.annotations, table, range(NUM_IMAGES))
    for group, ap in enumerate(found):
        left = np.flatnonzero(groups != group).tolist()
        chosen = np.isin(table.image_indices, left)
        rest = DetectionTable(*(column[chosen] for column in vars(table).values()))
        assert ap == pytest.approx(average_precision(dataset.annotations, rest, indices=left).ap, abs=1e-9)
    assert len(set(found)) == 3


def test_gains_compare_with_static_ratios_at_an_equal_mean(dataset: CocoDetection) -> None:
    half = np.where(np.arange(NUM_IMAGES) % 2, 0.1, 0.3)
    results = [
        (0.1, *evaluated(dataset, 0.12, np.full(NUM_IMAGES, 0.1), 0)),
        (0.3, *evaluated(dataset, 0.06, np.full(NUM_IMAGES, 0.3), 0)),
        ("auto", *evaluated(dataset, 0.08, half, 2)),
        ("mean:0.6", *evaluated(dataset, 0.08, np.full(NUM_IMAGES, 0.6), 2)),
    ]
    low, high, auto, beyond = budget_curve(results, dataset.annotations)
    assert auto.mean_keep_ratio == pytest.approx(0.2)
    assert auto.gain == pytest.approx(auto.ap - (low.ap + high.ap) / 2)
    assert 0 < auto.gain_error < 0.2 and all(point.ap_error > 0 for point in (low, high, auto))
    assert (low.is_static, high.is_static, auto.is_static) == (True, True, False)
    assert math.isnan(low.gain) and math.isnan(beyond.gain)
    first, second = curve_findings([low, high, auto, beyond])
    assert f"{auto.gain:+.4f} +- {auto.gain_error:.4f} against static ratios" in first
    assert "no static ratios on both sides" in second
    assert Point.from_dict(json.loads(json.dumps(auto.to_dict()))) == auto

    # An adaptive budget with the detections of a static one at its ratio has no gain, in every replicate.
    same = dataclasses.replace(results[0][1], num_budgets=2)
    (_, _, equal) = budget_curve([*results[:2], ("auto", same, results[0][2])], dataset.annotations)
    assert equal.gain == equal.gain_error == 0
    assert equal.ap_error == low.ap_error > 0


def test_the_error_is_that_of_a_mean_for_an_average_over_images() -> None:
    """Of keep ratios without static points: the jackknife error of a mean is its standard error."""
    from ats_detr.curve import _error, _groups

    values = np.random.default_rng(0).normal(size=40)
    groups = _groups(40)
    left = np.array([values[groups != group].mean() for group in range(40)])
    assert _error(left) == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert math.isnan(_error(left[:1]))


def test_budgets_that_share_a_backbone_pass_equal_single_evaluations(dataset: CocoDetection) -> None:
    model = small_model(num_queries=20)
    budgets: list[BudgetOptions] = [{}, {"keep_ratio": 0.2}, {"cost": 50.0}, {"cost": -50.0}]
    together = evaluate_budgets(model, EvaluationLoader(dataset, **SIZES), "cpu", budgets)
    for budget, (metrics, detections) in zip(budgets, together, strict=True):
        alone = evaluate(model, EvaluationLoader(dataset, **SIZES), "cpu", budget=budget)
        assert metrics.images == alone.images and metrics.precision == alone.precision
        assert detections is not None and metrics.num_budgets == (0 if "keep_ratio" in budget else 2)
    compiled = evaluate_budgets(CompiledDetr(model), EvaluationLoader(dataset, **SIZES), "cpu", budgets[1:3])
    assert [metrics.images for metrics, _ in compiled] == [metrics.images for metrics, _ in together[1:3]]
    assert together[2][0].budget_histogram == [NUM_IMAGES, 0]
    assert together[3][0].budget_histogram == [0, NUM_IMAGES]


def test_multiply_adds_at_a_mean_equal_those_of_that_ratio() -> None:
    model, size = small_model(), (64, 96)
    batch = ImageBatch(torch.zeros(1, 3, *size), [size])
    tokens = count_flops(model, batch, keep_ratio=0.5)
    ratio = (int(tokens.num_tokens * 0.4) + 1) / tokens.num_tokens
    point = Point(budget="0.4", is_static=True, num_images=1, mean_keep_ratio=ratio, ap=0.0, ap_error=0.0)
    (counted,) = with_gflops([point], model, size)
    expected = count_flops(model, batch, keep_ratio=0.4)
    assert counted.gflops == pytest.approx(expected.total, rel=1e-6)
    assert counted.encoder_gflops == pytest.approx(expected.encoder, rel=1e-6)


def test_multiply_adds_are_constant_where_the_minimum_of_tokens_decides() -> None:
    model, size = small_model(), (64, 96)
    assert model.selector is not None
    model.selector.min_tokens = 10_000
    point = Point(budget="0.4", is_static=True, num_images=1, mean_keep_ratio=1.0, ap=0.0, ap_error=0.0)
    (counted,) = with_gflops([point], model, size)
    expected = count_flops(model, ImageBatch(torch.zeros(1, 3, *size), [size]), keep_ratio=0.4)
    assert counted.gflops == pytest.approx(expected.total, rel=1e-6)


def test_eval_writes_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(write_small_chain(tmp_path))
    root = synthetic_dataset(config.data.root, **dataclasses.asdict(config.data.synthetic))
    classes = CocoDetection(root / "val2017", root / "annotations/instances_val2017.json").class_map
    torch.manual_seed(0)
    model = build_without_fetching(config, classes.num_rows)
    facts = {"config": config_to_dict(config), "num_classes": classes.num_rows, "classes": classes.to_dict()}
    path = tmp_path / "final.pt"
    save_checkpoint({**facts, "epoch": 1, "finished": True, "model": model.state_dict()}, path)
    main(["eval", "--checkpoint", str(path), "--budgets", "0.1,0.9,auto", "--output", str(tmp_path / "out")])
    points = json.loads((tmp_path / "out" / "budget_curve.json").read_text())["points"]
    assert [point["budget"] for point in points] == ["0.1", "0.9", "auto"]
    assert points[0]["gflops"] < points[2]["gflops"] < points[1]["gflops"]
    assert points[2]["gain"] is not None and points[0]["gain"] is None
    report = (tmp_path / "out" / "budget_curve.md").read_text()
    assert re.findall(r"!\[.*\]\((\w+)\.png\)", report) == ["ap_mean_keep_ratio", "ap_gflops"]
    assert "| auto |" in report
    for key in ("ap_mean_keep_ratio", "ap_gflops"):
        with Image.open(tmp_path / "out" / f"{key}.png") as picture:
            assert picture.width == 1800
    assert "auto keeps" in capsys.readouterr().out
    with pytest.raises(UserError, match="not calibrated; run ats-detr calibrate"):
        main(["eval", "--checkpoint", str(path), "--budgets", "0.1,mean:0.2"])
    with pytest.raises(UserError, match="budget '0.1,0.2': must be auto"):
        main(["eval", "--checkpoint", str(path), "--budget", "0.1,0.2"])
    with pytest.raises(UserError, match="--budgets excludes --budget"):
        main(["eval", "--checkpoint", str(path), "--budgets", "0.1", "--budget", "0.2"])
