"""`adapt` on every architecture of transformers that has deformable attention, small and random."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ats_detr.kernels import adapt
from ats_detr.kernels import multi_scale_deformable_attention as attention
from tests.kernels.cases import DEVICE

pytest.importorskip("transformers", reason="transformers is not installed")
from tests.kernels.small_transformers import MODELS, architectures

OUTPUTS, GRADIENTS = 1e-5, 1e-4
"""Largest difference, relative to the largest number of a tensor: another order of summation in float32."""
QUICK = ("Deformable DETR", "RT-DETRv2", "D-FINE, 3, 6, 3 points", "Mask2Former", "RF-DETR")
"""One model of each way in which transformers calls the operator, and one level of 16-channel heads."""


def tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(part)


class Trial:
    """A small model with inputs, and what it computes: outputs in inference and training, gradients."""

    def __init__(self, title: str) -> None:
        torch.manual_seed(0)
        _, build, inputs = MODELS[title]
        self.model = build().to(DEVICE)
        self.inputs = {name: tensor.to(DEVICE) for name, tensor in inputs().items()}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "sampling_offsets" in name or "attention_weights" in name:
                    # initial offsets lie on whole pixels, where the derivative is one-sided
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                # initial weights are so small that the outputs would hardly depend on attention
                elif parameter.ndim == 4:
                    nn.init.kaiming_normal_(parameter)
                elif parameter.ndim == 2 and re.search("decoder|class_embed|bbox_embed|score_head", name):
                    parameter.add_(torch.randn_like(parameter) * 0.15)

    def results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs, and gradients by parameter."""
        model = self.model.eval().requires_grad_()
        with torch.no_grad():
            outputs = list(tensors_in(dict(model(**self.inputs))))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
                module.eval()
        for module in model.modules():
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        torch.manual_seed(1)
        trained = list(tensors_in(dict(model(**self.inputs))))
        model.zero_grad()
        ramp = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x) for x in trained]
        sum(
            (x * w)[x.isfinite()].sum() for x, w in zip(trained, ramp, strict=True) if x.requires_grad
        ).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return [x.detach().clone() for x in outputs + trained], gradients

    def check(self, expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
        outputs, gradients = self.results()
        for output, correct in zip(outputs, expected[0], strict=True):
            output, correct = output.nan_to_num(0, 0, 0), correct.nan_to_num(0, 0, 0)
            assert (output - correct).abs().max() <= OUTPUTS * correct.abs().max().clamp(min=1e-3)
        assert gradients.keys() == expected[1].keys()
        largest = max(gradient.abs().max() for gradient in expected[1].values())
        for name, correct in expected[1].items():
            # a bias before a norm has no gradient but rounding
            scale = torch.maximum(correct.abs().max(), 0.01 * largest)
            assert (gradients[name] - correct).abs().max() <= GRADIENTS * scale, name


def test_every_architecture_of_transformers_is_covered() -> None:
    assert architectures() == {architecture for architecture, *_ in MODELS.values()}


@pytest.mark.parametrize(
    "title",
    [title if title in QUICK else pytest.param(title, marks=pytest.mark.slow) for title in MODELS],
)
def test_adapted_model_computes_the_same_and_is_restored(title: str) -> None:
    trial = Trial(title)
    expected = trial.results()
    state = {name: id(tensor) for name, tensor in trial.model.state_dict(keep_vars=True).items()}
    with adapt(trial.model, backend="reference") as adaptation:
        attentions = [
            name for name, module in trial.model.named_modules() if hasattr(module, "sampling_offsets")
        ]
        assert len(adaptation.names) == len(attentions) > 0
        trial.check(expected)
    restored = trial.results()
    assert all(map(torch.equal, map(torch.nan_to_num, restored[0]), map(torch.nan_to_num, expected[0])))
    assert all(torch.equal(restored[1][name], gradient) for name, gradient in expected[1].items())
    assert state == {name: id(tensor) for name, tensor in trial.model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize(
    "title",
    [
        "RF-DETR",
        *(pytest.param(title, marks=pytest.mark.slow) for title in MODELS if title != "RF-DETR"),
    ],
)
def test_kernels_compute_the_same(title: str) -> None:
    trial = Trial(title)
    expected = trial.results()
    with adapt(trial.model, backend="triton"):
        trial.check(expected)


@pytest.mark.parametrize(
    "title",
    [
        title if title in ("RF-DETR", "RT-DETRv2") else pytest.param(title, marks=pytest.mark.slow)
        for title in MODELS
    ],
)
def test_the_comparison_notices_an_operator_that_is_one_percent_off(
    title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(title)
    expected = trial.results()
    module = importlib.import_module("ats_detr.kernels.adapt")
    monkeypatch.setattr(module, attention.__name__, lambda *a, **k: 1.01 * attention(*a, **k))
    with adapt(trial.model), pytest.raises(AssertionError):
        trial.check(expected)
