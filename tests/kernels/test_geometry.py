"""Geometry of tokens: the kernels against the definitions, and these against the padding mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_detr.batch import ImageBatch
from ats_detr.kernels import TokenPlan, encode_boxes, refine_boxes, token_geometry

from .cases import DEVICE

pytest.importorskip("triton")
SIDES = st.integers(1, 40)
ATOL = 2e-6  # of sines: angles up to 2 pi, rounded in float32


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), st.data())
def test_kernels_match_the_definitions(sizes, data):
    padded = max(h for h, _ in sizes), max(w for _, w in sizes)
    level = st.tuples(*(st.integers(1, side) for side in padded))
    shapes = data.draw(st.lists(level, min_size=1, max_size=5))
    sizes_B2 = torch.tensor(sizes, device=DEVICE)
    ours = token_geometry(sizes_B2, padded, shapes, backend="triton")
    expected = token_geometry(sizes_B2, padded, shapes, backend="reference")
    for name in ("counts_BL2", "valid_ratios_BL2", "num_valid_B", "padding_mask_BS", "allowed_BS"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    torch.testing.assert_close(ours.proposals_BS4, expected.proposals_BS4, atol=1e-6, rtol=1e-6)
    images = ImageBatch(torch.empty(len(sizes), 3, *padded, device=DEVICE), sizes)
    masks = F.interpolate(images.padding_mask_BHW[:, None].float(), shapes[0]).flatten(1).bool()
    assert torch.equal(expected.padding_mask_BS[:, : masks.shape[1]], masks)

    width, dtype = data.draw(
        st.sampled_from([(4, torch.float32), (36, torch.bfloat16), (256, torch.float32)])
    )
    embed = torch.randn(len(shapes), width, device=DEVICE)
    valid_BS = ~ours.padding_mask_BS
    capacity = data.draw(st.sampled_from([None, valid_BS.numel() // 2]))
    plan = data.draw(st.sampled_from([None, TokenPlan.from_mask(valid_BS, capacity)]))
    used = valid_BS.flatten() if plan is None else slice(int(plan.offsets_B1[-1]))
    results = []
    for geometry, backend in ((ours, "triton"), (expected, "reference")):
        leaf = embed.clone().requires_grad_()
        positions, references = geometry.rows(plan, leaf, dtype, backend=backend)
        assert positions.dtype == dtype and not references.requires_grad
        gradient = torch.zeros(())
        if plan is None or plan.exact:
            (gradient,) = torch.autograd.grad((positions[used].float() ** 2).sum(), leaf)
        results.append((positions[used].detach(), references[used], gradient))
    atol = ATOL if dtype == torch.float32 else 0.04  # the interpreter truncates bfloat16
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=atol, rtol=1e-6)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        results[0][2], results[1][2], atol=1e-3 + rtol * valid_BS.sum().item(), rtol=rtol
    )


@pytest.mark.parametrize("width", [4, 20, 256])
@pytest.mark.parametrize("shape", [(0, 4), (3, 7, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boxes_are_encoded_like_the_definition(width, shape, dtype):
    boxes = torch.rand(*shape, device=DEVICE).to(dtype)
    ours, expected = (encode_boxes(boxes, width, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 77, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boxes_are_refined_like_the_definition(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    offset, reference = (torch.randn(2, *shape, generator=generator) * 4).to(DEVICE)
    if reference.numel():
        reference.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 50.0])
    ratios = torch.rand(shape[0], 3, 2, generator=generator).to(DEVICE)
    arguments = offset.to(dtype), reference, ratios
    ours, expected = (refine_boxes(*arguments, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    leaf = arguments[0].clone().requires_grad_()
    boxes, logits, on_levels = refine_boxes(leaf, reference, ratios)
    assert boxes.requires_grad and not logits.requires_grad and not on_levels.requires_grad


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"sizes .* must be \[B, 2\], integers"):
        token_geometry(torch.ones(2, 2), (1, 1), [(1, 1)])
    geometry = token_geometry(torch.ones(1, 2, dtype=torch.int64), (1, 1), [(1, 1)])
    with pytest.raises(ValueError, match=r"level_embed .* must be \[1, a multiple of 4\]"):
        geometry.rows(None, torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"boxes .* must be \[..., 4\]"):
        encode_boxes(torch.zeros(3), 4)
