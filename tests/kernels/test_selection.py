"""Adaptive selection: the kernels against the stable sort of the reference, plan against plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ats_detr.kernels import TokenPlan, select_tokens

from .cases import DEVICE

pytest.importorskip("triton")


def assert_same(plan: TokenPlan, expected: TokenPlan) -> None:
    for field in dataclasses.fields(TokenPlan):
        result, want = getattr(plan, field.name), getattr(expected, field.name)
        if isinstance(want, torch.Tensor):
            assert result.dtype == torch.int32 and torch.equal(result, want), field.name
        else:
            assert result == want, field.name


def check(scores, num_keep, mask, capacity=None) -> TokenPlan:
    plan = select_tokens(scores, num_keep, mask, capacity=capacity, backend="triton")
    assert_same(plan, select_tokens(scores, num_keep, mask, capacity=capacity, backend="reference"))
    return plan


def test_every_image_its_own_budget_without_a_capacity_or_with() -> None:
    scores = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    num_keep = torch.tensor([5, 500, 0], device=DEVICE)
    plan = check(scores, num_keep, None)
    assert plan.exact and plan.num_rows is None
    assert plan.offsets_B1.diff().tolist() == [5, 500, 0]
    roomy = check(scores, num_keep, None, capacity=800)
    assert not roomy.exact and roomy.num_rows.tolist() == [505]
    assert torch.equal(roomy.flat_index_K[:505], plan.flat_index_K)
    tight = check(scores, num_keep, None, capacity=100)
    assert tight.offsets_B1.tolist() == [0, 5, 100, 100]


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.zeros(1, 2100, device=DEVICE)
    scores[0, 2000] = 1.0
    plan = check(scores, torch.tensor([4], device=DEVICE), None)
    assert plan.token_index_K.tolist() == [0, 1, 2, 2000]


def test_images_too_large_for_one_program_take_the_reference() -> None:
    scores = torch.randn(1, 40000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plan = select_tokens(scores, torch.tensor([7], device=DEVICE))
    expected = scores[0].topk(7).indices.sort().values
    assert torch.equal(plan.token_index_K.long(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_capacity_never_waits_for_the_device() -> None:
    scores = torch.randn(4, 17821, device=DEVICE)
    num_keep = torch.tensor([300, 17821, 0, 1782], device=DEVICE)
    check(scores, num_keep, None, capacity=30000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = select_tokens(scores, num_keep, capacity=30000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plan.offsets_B1.diff().tolist() == [300, 17821, 0, 1782]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores_BS=torch.zeros(6)), "scores"),
        (dict(scores_BS=torch.zeros(2, 6, dtype=torch.int64)), "scores"),
        (dict(num_keep_B=torch.tensor([1])), "num_keep"),
        (dict(num_keep_B=torch.tensor([[1, 2]])), "num_keep"),
        (dict(num_keep_B=torch.tensor([1.0, 2.0])), "num_keep"),
        (dict(num_keep_B=torch.tensor([True, False])), "num_keep"),
        (dict(padding_mask_BS=torch.zeros(2, 6, dtype=torch.uint8)), "padding mask"),
        (dict(padding_mask_BS=torch.zeros(2, 5, dtype=torch.bool)), "padding mask"),
        (dict(padding_mask_BS=torch.zeros(6, dtype=torch.bool)), "padding mask"),
        (dict(capacity=-1), "capacity -1: must be >= 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str, backend: str) -> None:
    arguments = {"scores_BS": torch.zeros(2, 6), "num_keep_B": torch.tensor([1, 2]), **change}
    arguments = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments, backend=backend)
