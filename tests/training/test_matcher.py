"""The matcher finds the assignment of lowest cost for each layer and image, or raises an error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ats_detr.batch import Target
from ats_detr.training.matcher import HungarianMatcher, PredictionRows, concatenated


def random_target(num_objects: int, num_classes: int, generator: torch.Generator) -> Target:
    size = torch.rand(num_objects, 2, generator=generator) * 0.3 + 0.05
    centre = torch.rand(num_objects, 2, generator=generator) * (1 - size) + size / 2
    labels = torch.randint(num_classes, (num_objects,), generator=generator)
    return Target(7, (480, 640), labels, torch.cat([centre, size], dim=1))


def random_layer(
    name: str, counts: list[int], num_classes: int, generator: torch.Generator
) -> PredictionRows:
    rows = sum(counts)
    return PredictionRows(
        name=name,
        logits_RT=torch.randn(rows, num_classes, generator=generator),
        boxes_R4=torch.rand(rows, 4, generator=generator) * 0.4 + 0.2,
        starts=[0, *itertools.accumulate(counts)],
    )


def pair_cost(logit: float, box: list[float], object_box: list[float]) -> float:
    """The published cost of one prediction and one object, in Python floats."""
    p = 1 / (1 + math.exp(-logit))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(a - b) for a, b in zip(box, object_box, strict=True))
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (box, object_box)
    )
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return 2 * focal + 5 * l1 - 2 * (overlap / union - (hull - union) / hull)


def cheapest(cost: list[list[float]]) -> set[tuple[int, int]]:
    """The (row, object) pairs of the assignment of lowest cost, by exhaustive search."""
    num_rows, num_objects = len(cost), len(cost[0])
    if num_rows >= num_objects:
        options = [
            set(zip(rows, range(num_objects), strict=True))
            for rows in itertools.permutations(range(num_rows), num_objects)
        ]
    else:
        options = [
            set(zip(range(num_rows), objects, strict=True))
            for objects in itertools.permutations(range(num_objects), num_rows)
        ]
    return min(options, key=lambda pairs: sum(cost[row][obj] for row, obj in pairs))


@pytest.mark.parametrize("seed", range(4))
def test_every_layer_and_image_has_the_assignment_of_lowest_cost(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    targets = [random_target(n, 5, g) for n in (3, 0, 4, 1)]
    layers = [
        random_layer("dense", [6, 6, 6, 6], 5, g),
        random_layer("ragged, one image with fewer rows than objects", [5, 7, 2, 1], 5, g),
    ]
    matches = HungarianMatcher()(layers, targets)
    first_object = [0, 3, 3, 7]
    for layer, match in zip(layers, matches, strict=True):
        expected = set()
        for image, target in enumerate(targets):
            start, end = layer.starts[image], layer.starts[image + 1]
            if not len(target.labels_N):
                continue
            cost = [
                [
                    pair_cost(float(layer.logits_RT[row, label]), layer.boxes_R4[row].tolist(), box.tolist())
                    for label, box in zip(target.labels_N, target.boxes_N4, strict=True)
                ]
                for row in range(start, end)
            ]
            expected |= {(start + row, first_object[image] + obj) for row, obj in cheapest(cost)}
        assert set(zip(match.rows_M.tolist(), match.objects_M.tolist(), strict=True)) == expected


def test_a_class_agnostic_layer_is_matched_by_its_class_0() -> None:
    g = torch.Generator().manual_seed(0)
    target = random_target(3, 5, g)
    layer = random_layer("proposals", [8], 5, g)
    layer.boxes_R4[:] = torch.tensor([0.5, 0.5, 0.2, 0.2])  # equal boxes
    layer.logits_RT[:, 0] = torch.tensor([0.0, 4, -2, 5, -3, 1, 6, 2])
    agnostic = PredictionRows(**{**vars(layer), "class_agnostic": True})
    (match,) = HungarianMatcher()([agnostic], [target])
    assert match.rows_M.tolist() == [1, 3, 6]


def test_a_batch_without_objects_matches_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [random_layer("a", [4, 4], 3, g), random_layer("b", [2, 5], 3, g)]
    matches = HungarianMatcher()(layers, [random_target(0, 3, g), random_target(0, 3, g)])
    assert [(m.rows_M.shape, m.rows_M.dtype, m.objects_M.shape) for m in matches] == [
        ((0,), torch.int64, (0,))
    ] * 2


@pytest.mark.parametrize(
    ("culprit", "message"),
    [
        ("logits", r"logits of decoder layer 3 hold 2 NaN or infinite values for image 1 .*id 7"),
        ("boxes", r"boxes of decoder layer 3 hold 1 NaN or infinite values for image 1"),
        ("target", r"target boxes hold 4 NaN or infinite values for image 1"),
        ("area", r"image 1 .* zero area"),
    ],
)
def test_a_cost_that_is_not_finite_is_reported_with_the_tensor(culprit: str, message: str) -> None:
    g = torch.Generator().manual_seed(0)
    targets = [random_target(2, 3, g), random_target(3, 3, g)]
    layers = [random_layer("decoder layer 2", [5, 5], 3, g), random_layer("decoder layer 3", [5, 5], 3, g)]
    broken = layers[1]
    if culprit == "logits":
        broken.logits_RT[7, :2] = float("nan")
        targets[1].labels_N[:] = 0
    elif culprit == "boxes":
        broken.boxes_R4[8, 2] = float("inf")
    elif culprit == "target":
        targets[1].boxes_N4[2] = float("nan")
    else:
        targets[1].boxes_N4[0, 2:] = 0
        broken.boxes_R4[6] = targets[1].boxes_N4[0]
    with pytest.raises(FloatingPointError, match=message):
        HungarianMatcher()(layers, targets)


def test_half_precision_predictions_are_matched_in_float32() -> None:
    g = torch.Generator().manual_seed(3)
    target = random_target(4, 3, g)
    layer = random_layer("a", [12], 3, g)
    half = PredictionRows(
        name="a",
        logits_RT=layer.logits_RT.bfloat16(),
        boxes_R4=layer.boxes_R4.bfloat16(),
        starts=layer.starts,
    )
    assert HungarianMatcher().costs([half], [target], *concatenated([half])).dtype == torch.float32
