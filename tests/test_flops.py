"""Operation counts against manual sums."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from ats_detr.batch import ImageBatch
from ats_detr.config import BackboneConfig, ModelConfig, SelectorConfig
from ats_detr.flops import count_flops, num_parameters
from ats_detr.model import Detr, build_model

WIDTH, HIDDEN, HEADS, LAYERS, QUERIES = 32, 48, 4, 2, 10


def small_model(selector: SelectorConfig | None, **changes: object) -> Detr:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet10t", pretrained=False, options={"channels": [8, 8, 16, 16]}),
        selector=selector,
        width=WIDTH,
        num_heads=HEADS,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        feedforward_width=HIDDEN,
        num_queries=QUERIES,
        two_stage=True,
        box_refine=True,
        queries_from_memory=True,
        class_specific_proposals=True,
        **changes,
    )
    return build_model(config, num_classes=3)


def batch() -> ImageBatch:
    g = torch.Generator().manual_seed(0)
    return ImageBatch.collate([torch.randn(3, 128, 96, generator=g), torch.randn(3, 80, 128, generator=g)])


def encoder_by_hand(num_tokens: int, num_kept: int, projected_twice: int) -> int:
    """Multiply-adds of the encoder layers for one image, without norms."""
    points = HEADS * 4 * 4
    value = num_tokens * WIDTH * WIDTH
    queries = num_kept * WIDTH * (points * 2 + points + WIDTH) + num_kept * 2 * WIDTH * HIDDEN
    return (
        LAYERS * (value + queries + 4 * num_kept * 16 * WIDTH)
        + projected_twice * (LAYERS - 1) * WIDTH * WIDTH
    )


@pytest.mark.parametrize("keep_ratio", [0.1, 0.4, None])
def test_the_encoder_count_is_that_of_its_kept_tokens(keep_ratio: float | None) -> None:
    model = small_model(None if keep_ratio is None else SelectorConfig(keep_ratio=keep_ratio))
    output = model.eval()(batch())
    num_tokens = output.memory_BSC.shape[1]
    kept = output.selection.num_kept_B.tolist() if output.selection else [num_tokens] * 2
    for as_published in (False, True):
        again = 0 if as_published or keep_ratio is None else 1
        by_hand = sum(encoder_by_hand(num_tokens, k, again * k) for k in kept) / 2
        norms = 5 * 2 * LAYERS * WIDTH * sum(kept) / 2  # five operations per normalised value
        result = count_flops(model, batch(), as_published=as_published)
        assert result.encoder * 1e9 == pytest.approx(by_hand + norms, rel=1e-9)
        share = 1.0 if output.selection is None else output.selection.keep_ratio_B.mean().item()
        assert result.keep_ratio == share


def test_the_dense_encoder_count_is_derived_from_a_sparse_one() -> None:
    sparse, dense = (
        count_flops(small_model(selector), batch()) for selector in (SelectorConfig(keep_ratio=0.1), None)
    )
    assert sparse.encoder < 0.6 * dense.encoder
    assert sparse.dense_encoder == pytest.approx(dense.encoder, rel=1e-9)
    assert dense.dense_encoder == pytest.approx(dense.encoder, rel=1e-9)


def test_the_published_convention_includes_training_outputs() -> None:
    model = small_model(SelectorConfig(keep_ratio=0.3), encoder_auxiliary=True, adaption=True)
    published = count_flops(model, batch(), as_published=True)
    needed = count_flops(model, batch())
    output = model.eval()(batch())
    num_tokens, rows = output.memory_BSC.shape[1], output.selection.num_kept_B.sum().item()
    head = 2 * WIDTH * WIDTH + WIDTH * (4 + 3)
    assert published.by_module["adaption"] * 2e9 == pytest.approx(2 * num_tokens * WIDTH * WIDTH)
    assert published.by_module["encoder_heads.0"] * 2e9 == pytest.approx(rows * head)
    assert not {"adaption", "encoder_heads.0"} & needed.by_module.keys()
    # Not needed for detections: class logits of decoder layers before the last, and boxes of tokens without a query.
    unused = 2 * QUERIES * WIDTH * 3
    assert (published.by_module["decoder"] - needed.by_module["decoder"]) * 2e9 == pytest.approx(unused)
    boxes = 2 * (num_tokens - QUERIES) * (2 * WIDTH * WIDTH + WIDTH * 4)
    projections = (
        (2 * num_tokens - rows) * WIDTH * WIDTH
    )  # of the adaption layer, less those repeated in inference
    saved = published.total - needed.total
    assert saved * 2e9 == pytest.approx(unused + boxes + rows * head + projections)


def test_the_count_equals_that_of_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for self-attention of the decoder, whose fused operator fvcore does not count."""
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = small_model(SelectorConfig(keep_ratio=0.3)).eval()

    class Predictions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images_B3HW: torch.Tensor, sizes_B2: torch.Tensor) -> tuple[torch.Tensor, ...]:
            last = self.model.detect(images_B3HW, sizes_B2).last
            return last.logits, last.boxes

    images = batch()
    monkeypatch.setenv("ATS_DETR_BACKEND", "reference")
    analysis = fvcore.FlopCountAnalysis(Predictions(), (images.images_B3HW, images.sizes_B2))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = count_flops(model, images)
    for name in ("backbone", "selector", "encoder", "encoder.layers.0.feedforward"):
        expected = analysis.by_module()[f"model.{name}"] / len(images)
        assert counted.by_module[name] * 1e9 == pytest.approx(expected, rel=1e-9), name
    self_attention = 2 * LAYERS * QUERIES * QUERIES * WIDTH
    expected = analysis.total() / len(images) + self_attention
    assert counted.total * 1e9 == pytest.approx(expected, rel=1e-9)


def test_counting_does_not_modify_the_model() -> None:
    model = small_model(SelectorConfig(keep_ratio=0.3)).train()
    count_flops(model, batch())
    assert model.training
    assert model.level_embed.requires_grad
    assert num_parameters(model, trainable_only=True) < num_parameters(model)


def test_the_count_does_not_depend_on_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are opaque to the counter and would not be counted."""
    model = small_model(SelectorConfig(keep_ratio=0.3))
    expected = count_flops(model, batch())
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    assert count_flops(model, batch()) == expected
    assert os.environ["ATS_DETR_BACKEND"] == "triton"
