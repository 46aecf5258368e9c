"""Adaptive selection: the kernels against the stable sort of the reference, plan against plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


@st.composite
def selections(draw):
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 37, 300, 1023, 1025, 2500]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(batch, num_tokens, generator=generator)
    if draw(st.booleans()):  # many ties
        scores = scores.round()
    if draw(st.booleans()):
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42])
        where = torch.randint(0, num_tokens, (batch, 6), generator=generator)
        scores.scatter_(1, where, special.expand(batch, 6))
    scores = scores.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    mask = torch.rand(batch, num_tokens, generator=generator) < share if draw(st.booleans()) else None
    keep = draw(st.lists(st.integers(0, num_tokens + 3), min_size=batch, max_size=batch))
    capacity = draw(st.one_of(st.none(), st.integers(0, batch * num_tokens + 5)))
    return (
        scores.to(DEVICE),
        torch.tensor(keep, device=DEVICE),
        None if mask is None else mask.to(DEVICE),
        capacity,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(selections())
def test_plans_equal_the_references(selection) -> None:
    scores, num_keep, mask, capacity = selection
    plan = check(scores, num_keep, mask, capacity)
    kept = plan.slot_BS >= 0
    if capacity is None:
        assert torch.equal(kept.sum(1), num_keep.clamp(max=scores.shape[1]))
        assert torch.equal(
            plan.flat_index_K, kept.flatten().nonzero().squeeze(1)
        )  # ascending, image after image
        if mask is not None:  # a padded token only where no valid one is left
            taken_padding, left_valid = (kept & mask).any(1), (~kept & ~mask).any(1)
            assert not (taken_padding & left_valid).any()


def test_every_image_its_own_budget_without_a_capacity_or_with() -> None:
    scores = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    num_keep = torch.tensor([5, 500, 0], device=DEVICE)
    plan = check(scores, num_keep, None)
    assert plan.exact and plan.num_rows is None
    assert plan.counts_B.tolist() == [5, 500, 0]
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
    assert plan.counts_B.tolist() == [300, 17821, 0, 1782]
