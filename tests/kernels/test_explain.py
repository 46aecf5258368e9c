"""`explain` reports what ran, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ats_detr.kernels import Choice, dispatch, explain, multi_scale_deformable_attention
from tests.kernels.cases import DEVICE


def arguments(dtype: torch.dtype = torch.float32, num_points: int = 2) -> tuple:
    torch.manual_seed(0)
    value = torch.randn(1, 6, 2, 8, dtype=dtype, device=DEVICE)
    locations = torch.rand(1, 3, 2, 1, num_points, 2, device=DEVICE)
    return value, [(2, 3)], locations, locations[..., 0]


def test_reason_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*args: object, **keywords: object) -> tuple[str, str]:
        (choice,) = (choice for choice in explain(*args, **keywords).calls if choice.name == "msda")
        return choice.chosen, choice.reason

    monkeypatch.delenv("ATS_DETR_BACKEND", raising=False)
    if DEVICE == "cpu":
        assert reason(*arguments()) == ("reference", "the tensors are not on a CUDA device")
    assert reason(*arguments(), backend="triton") == ("triton", "backend=triton")
    assert reason(*arguments(torch.float64), backend="triton") == ("reference", "a tensor is float64")
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    assert reason(*arguments()) == ("triton", "ATS_DETR_BACKEND=triton")
    too_many = arguments(num_points=17)
    assert reason(*too_many) == ("reference", "17 points exceed the maximum of 16")
    monkeypatch.setattr(dispatch, "FAULTY", {("msda", arguments()[0].device)})
    assert reason(*arguments()) == ("reference", "a self-check found the kernels to be wrong on this device")
    monkeypatch.setenv("ATS_DETR_BACKEND", "reference")
    assert reason(*arguments()) == ("reference", "ATS_DETR_BACKEND=reference")


def test_operators_and_kernels_of_a_pass_and_its_gradient() -> None:
    value, shapes, locations, weights = arguments()
    value.requires_grad_()

    def step(value: Tensor) -> None:
        for _ in range(2):
            multi_scale_deformable_attention(
                value, shapes, locations, weights, backend="triton"
            ).sum().backward()

    explanation = explain(value, function=step)
    names = [choice.name for choice in explanation.calls]
    assert names[:3] == ["msda", "msda_forward", "msda_backward"]
    assert set(explanation.calls.values()) == {2}
    assert explanation.calls[Choice("msda", "triton", "backend=triton")] == 2
    lines = str(explanation).splitlines()
    assert lines[0] == "msda: triton (backend=triton), 2 calls"
    if DEVICE == "cpu":
        assert (
            lines[1] == "    msda_forward: num_warps=1, unroll=1, multiple=8 (Triton's interpreter), 2 calls"
        )
    assert dispatch.recorder is None


def test_nothing_is_recorded_after_an_error() -> None:
    with pytest.raises(ValueError, match="value_BSHD"):
        explain(torch.zeros(1), *arguments()[1:])
    assert dispatch.recorder is None
    assert str(explain(function=lambda: None)) == "no operator was called"
