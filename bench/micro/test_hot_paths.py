"""Micro benchmarks of the CPU paths of training and inference.

    python -m pytest bench/micro --benchmark-only
    python -m pytest bench/micro --benchmark-only --benchmark-compare=bench/micro/baseline.json \\
        --benchmark-compare-fail=min:50%
    python -m pytest bench/micro --benchmark-only --benchmark-json=bench/micro/baseline.json     a new baseline

Times are in units of a calibration loop (see conftest.py), so the committed baseline is approximately valid on other
machines, whose ratio of arithmetic to memory speed may differ. A slowdown of 50 % is significant; one of 10 % is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ats_detr.batch import ImageBatch, Target
from ats_detr.config import load_config
from ats_detr.kernels import select_tokens, token_geometry
from ats_detr.model import build_without_fetching
from ats_detr.model.encoder import Encoder
from ats_detr.model.output import Prediction, top_detections
from ats_detr.model.tokens import Tokens
from ats_detr.training.average_precision import image_average_precision
from ats_detr.training.criterion import SetCriterion
from ats_detr.training.distillation import budget_labels
from ats_detr.training.matcher import HungarianMatcher, PredictionRows

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 91
LEVELS = ((50, 67), (25, 34), (13, 17), (7, 9))
"""Of a 400 x 533 image."""


def random_targets(num_images: int, num_objects: int, num_classes: int = NUM_CLASSES) -> list[Target]:
    generator = torch.Generator().manual_seed(1)
    targets = []
    for image_id in range(num_images):
        centre = torch.rand(num_objects, 2, generator=generator) * 0.6 + 0.2
        size = torch.rand(num_objects, 2, generator=generator) * 0.2 + 0.05
        labels = torch.randint(num_classes, (num_objects,), generator=generator)
        targets.append(Target(image_id, (800, 1066), labels, torch.cat([centre, size], -1)))
    return targets


def random_prediction(batch: int, num_queries: int) -> Prediction:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(batch, num_queries, NUM_CLASSES, generator=generator) - 4
    return Prediction(logits, torch.rand(batch, num_queries, 4, generator=generator) * 0.4 + 0.1)


def random_tokens(padded_size: tuple[int, int], levels: tuple[tuple[int, int], ...], width: int) -> Tokens:
    """The tokens of one image without padding."""
    generator = torch.Generator().manual_seed(3)
    num_tokens = sum(height * width for height, width in levels)
    features_BSC = torch.randn(1, num_tokens, width, generator=generator)
    geometry = token_geometry(torch.tensor([padded_size]), padded_size, levels)
    return Tokens(features_BSC, geometry, torch.zeros(len(levels), width))


def test_matching(benchmark: Any) -> None:
    """Six decoder layers of 300 queries, two images of 20 objects."""
    prediction = random_prediction(2, 300)
    logits, boxes = prediction.logits.flatten(0, 1), prediction.boxes.flatten(0, 1)
    layers = [
        PredictionRows(
            name=f"layer {i}", logits_RT=logits.roll(i, 0), boxes_R4=boxes.roll(i, 0), starts=(0, 300, 600)
        )
        for i in range(6)
    ]
    matches = benchmark(HungarianMatcher(), layers, random_targets(2, 20))
    assert [len(match.rows_M) for match in matches] == [40] * 6


def test_criterion(benchmark: Any) -> None:
    """Matching and losses of 2 encoder and 3 decoder layers, and their gradients by the outputs of a small model."""
    overrides = ["model.num_encoder_layers=2", "model.num_decoder_layers=3"]
    config = load_config(ROOT / "configs/quickstart_weak.yaml", overrides)
    torch.manual_seed(0)
    model = build_without_fetching(config, 8)
    batch = ImageBatch.collate(list(torch.randn(4, 3, 128, 128)))
    with torch.no_grad():
        output = model(batch, supervision=True)
    layers = [output.last, *output.decoder_auxiliary, output.encoder, *output.encoder_auxiliary]
    for layer in layers:
        layer.logits, layer.boxes = layer.logits.requires_grad_(), layer.boxes.requires_grad_()
    criterion = SetCriterion(
        8,
        class_specific_proposals=config.model.class_specific_proposals,
        num_decoder_layers=config.model.num_decoder_layers,
        num_encoder_layers=config.model.num_encoder_layers,
    )
    targets = random_targets(4, 8, num_classes=8)

    def step() -> Tensor:
        losses = criterion(output, targets, 32.0)
        total = sum(weight * losses[key] for key, weight in criterion.weights.items() if key in losses)
        assert isinstance(total, Tensor)
        total.backward()
        return total

    assert benchmark(step).isfinite()


def test_budget_labels(benchmark: Any) -> None:
    """How hard eight images are, from the detections of a teacher."""
    targets = random_targets(8, 15)
    detections = top_detections(random_prediction(8, 300), [target.original_size for target in targets])
    labels = benchmark(lambda: budget_labels(image_average_precision(detections, targets)))
    assert labels.shape == (8,)


def test_collate(benchmark: Any) -> None:
    """Four photographs into one padded batch."""
    images = [torch.rand(3, *size) for size in ((800, 1066), (780, 1060), (800, 1050), (790, 1066))]
    batch = benchmark(ImageBatch.collate, images, 64)
    assert batch.images_B3HW.shape == (4, 3, 832, 1088)


def test_decode(benchmark: Any) -> None:
    """The best 100 detections of four images from 300 queries of 91 classes."""
    detections = benchmark(top_detections, random_prediction(4, 300), [(480, 640)] * 4)
    assert len(detections[0].scores_N) == 100


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_selection(benchmark: Any, share: float) -> None:
    """Of four images of 17,821 tokens."""
    scores = torch.randn(4, 17821, generator=torch.Generator().manual_seed(0))
    num_keep = torch.full((4,), int(share * 17821))
    plan = benchmark(select_tokens, scores, num_keep, torch.zeros(4, 17821, dtype=torch.bool))
    assert len(plan.token_index_K) == num_keep.sum()


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_packed_encoder(benchmark: Any, share: float) -> None:
    """Two layers of the published width on a 400 x 533 image."""
    torch.manual_seed(0)
    layer = {
        "width": 256,
        "num_heads": 8,
        "num_levels": 4,
        "num_points": 4,
        "feedforward_width": 1024,
        "dropout": 0.0,
    }
    encoder = Encoder(2, **layer).eval()
    tokens = random_tokens((400, 533), LEVELS, 256)
    num_tokens = tokens.features_BSC.shape[1]
    plan = select_tokens(torch.randn(1, num_tokens), torch.tensor([int(share * num_tokens)]))
    with torch.inference_mode():
        memory, _ = benchmark(encoder, tokens, plan)
    assert memory.shape == tokens.features_BSC.shape
