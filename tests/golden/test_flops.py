"""The published counts of `python -m bench.flops --compare-published` are those of the published counter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ats_detr.flops import count_flops, num_parameters
from bench.flops import PUBLISHED_COUNTS, TOLERANCE, published_models, published_subject, random_image

from .conftest import golden_folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, dict]:
    folder = golden_folder(request.config)
    path = (folder or Path()) / "gflops.json"
    if not path.exists():
        pytest.skip("no golden GFLOPs: give their folder with --golden")
    return json.loads(path.read_text())["models"]


def test_the_shipped_counts_equal_the_published_counter(golden: dict[str, dict]) -> None:
    shipped = json.loads(PUBLISHED_COUNTS.read_text())["models"]
    for name, counts in shipped.items():
        assert counts == {
            "gflops": golden[name]["total"],
            "encoder_gflops": golden[name]["encoder_layers"],
            "params": golden[name]["n_params"],
            "published_gflops": golden[name].get("published_gflops"),
        }, name


def test_every_published_model_is_compared_and_has_the_published_number_of_parameters() -> None:
    assert set(published_models()) == set(json.loads(PUBLISHED_COUNTS.read_text())["models"])
    for key in published_models():
        with torch.device("meta"):
            subject = published_subject(key)
        assert num_parameters(subject.model) == subject.published["params"], subject.config


def test_an_adaptive_model_agrees_with_the_published_counter() -> None:
    subject = published_subject("ats_adaptive_0.1_0.2_max")
    counts, published = count_flops(subject.model, random_image(), as_published=True), subject.published
    assert counts.keep_ratio == pytest.approx(0.2, abs=1e-3)
    assert counts.total == pytest.approx(published["gflops"], rel=TOLERANCE)
    assert counts.encoder == pytest.approx(published["encoder_gflops"], rel=1e-5)
    assert counts.dense_encoder == pytest.approx(85.9866, rel=1e-5)
