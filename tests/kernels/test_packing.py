"""Pack, scatter and the attention map: kernels against reference, round trips, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_detr.kernels import (
    TokenPlan,
    affine_relu_,
    deformable_attention_map,
    pack_tokens,
    packed_linear,
    scatter_tokens,
    zero_padding,
)
from ats_detr.kernels.dispatch import _KNOWS_EXPORT

from .cases import DEVICE, AttentionCase, relative_error

pytest.importorskip("triton")


@st.composite
def plans(draw):
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = torch.rand(batch, num_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return TokenPlan.from_mask(keep.to(DEVICE)), generator


@settings(max_examples=15, deadline=None, derandomize=True)
@given(plans(), st.sampled_from([1, 3, 32, 100, 256]))
def test_pack_and_scatter_match_the_reference_with_gradients(drawn, width: int) -> None:
    plan, generator = drawn
    shape = plan.slot_BS.shape

    def random(*extra: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, *extra, generator=generator).to(DEVICE, dtype).requires_grad_()

    dense = [random(width), random(4, 2), random(width, dtype=torch.bfloat16), random(), random(5)]
    rows = torch.randn(len(plan.token_index_K), width, generator=generator).to(DEVICE).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        packed = pack_tokens(plan, *dense, backend=backend)
        merged = scatter_tokens(plan, dense[0], rows * packed[0], backend=backend)
        total = sum((tensor.float() ** 2).sum() for tensor in (*packed, merged))
        gradients = torch.autograd.grad(total, [*dense, rows])
        results.append((*packed, merged, *gradients))
    for result, expected in zip(*results, strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(plans())
def test_scatter_undoes_pack(drawn) -> None:
    plan, generator = drawn
    memory = torch.randn(*plan.slot_BS.shape, 6, generator=generator).to(DEVICE)
    (rows,) = pack_tokens(plan, memory, backend="triton")
    assert torch.equal(scatter_tokens(plan, memory, rows, backend="triton"), memory)
    doubled = scatter_tokens(plan, memory, 2 * rows, backend="triton")
    kept = (plan.slot_BS >= 0)[..., None]
    assert torch.equal(doubled, torch.where(kept, 2 * memory, memory))
    assert torch.equal(pack_tokens(plan, doubled, backend="triton")[0], 2 * rows)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_scatter_in_place(backend: str, contiguous: bool) -> None:
    keep = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    plan = TokenPlan.from_mask(keep)
    memory = torch.zeros(2, 50, 8, device=DEVICE)
    if not contiguous:
        memory = torch.zeros(2, 50, 16, device=DEVICE)[..., ::2]
    rows = torch.randn(len(plan.token_index_K), 8, device=DEVICE)
    expected = scatter_tokens(plan, memory, rows, backend="reference")
    assert scatter_tokens(plan, memory, rows, in_place=True, backend=backend) is memory
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("count", [0, 1, 23, 40])
def test_rows_past_the_count_are_neither_read_nor_written(count: int) -> None:
    from ats_detr.kernels.gpu import packing

    keep = torch.zeros(2, 60, dtype=torch.bool, device=DEVICE)
    keep.view(-1)[torch.randperm(120, generator=torch.Generator().manual_seed(0))[:count]] = True
    plan = TokenPlan.from_mask(keep, capacity=40)
    memory = torch.randn(2, 60, 8, device=DEVICE)
    poisoned = torch.full((40, 8), torch.nan, device=DEVICE)
    packing._launch_moves(
        plan.token_index_K, plan.image_index_K, plan.num_rows, [memory], [poisoned], into_dense=False
    )
    assert torch.equal(poisoned[:count], memory[keep])
    assert poisoned[count:].isnan().all()
    for in_place in (True, False):
        target = memory.clone()
        result = scatter_tokens(plan, target, poisoned, in_place=in_place, backend="triton")
        assert torch.equal(result, memory)  # no NaN of an unused row arrives anywhere


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float32), (45, torch.bfloat16)])
def test_zeroed_padding(share: float, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 37, generator=generator) < share).to(DEVICE)
    wide = torch.randn(2, 37, 3, width, generator=generator).to(DEVICE, dtype)
    wide[0, 0, 1] = torch.nan
    mask[0, 0] = share > 0
    for dense in (
        wide[:, :, 1],
        wide.transpose(2, 3)[..., 1],
        wide[:, :0, 0],
        wide[:, 0],
    ):  # the last: far apart
        masked = mask[:, : dense.shape[1]]
        expected = dense.masked_fill(masked[..., None], 0.0)
        assert zero_padding(dense, masked, backend="triton") is dense
        torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("dense", "mask", "message"),
    [
        (torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.bool), "padding mask"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5), "padding mask"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, dtype=torch.bool), "padding mask"),
        (torch.zeros(5), torch.zeros(5, dtype=torch.bool), "tensor"),
        (torch.zeros(1, 5, 3).expand(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool), "share memory"),
    ],
)
def test_paddings_that_do_not_fit_are_refused(dense, mask, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_padding(dense.to(DEVICE), mask.to(DEVICE), backend=backend)


def test_zeroed_padding_gets_no_gradient() -> None:
    mask = torch.tensor([[False, True]], device=DEVICE)
    leaf = torch.ones(1, 2, 3, device=DEVICE, requires_grad=True)
    zero_padding(leaf * 2, mask, backend="triton").sum().backward()
    assert leaf.grad[0].tolist() == [[2.0] * 3, [0.0] * 3]


def test_capacity_plans_refuse_gradients() -> None:
    plan = TokenPlan.from_mask(torch.ones(1, 4, dtype=torch.bool, device=DEVICE), capacity=4)
    memory = torch.randn(1, 4, 3, device=DEVICE, requires_grad=True)
    for result in (
        pack_tokens(plan, memory, backend="triton")[0],
        scatter_tokens(plan, memory, torch.zeros(4, 3, device=DEVICE), backend="triton"),
    ):
        with pytest.raises(RuntimeError, match="inference"):
            result.sum().backward()


def test_plan_of_another_size_is_refused() -> None:
    plan = TokenPlan.from_mask(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="for a plan"):
        pack_tokens(plan, torch.zeros(1, 5, 3))


# ---------------------------------------------------------------------------------------------------- the attention map
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(counts=(6, 6)),
        AttentionCase(counts=(5, 5), reference=4, coordinates=torch.bfloat16),
        AttentionCase(counts=(4,), levels=((1, 5), (4, 1)), points=3, heads=5, spread=3.0),
        AttentionCase(counts=(3, 3), spread=50.0, strided=True),
    ],
    ids=["points", "boxes", "thin", "far"],
)
def test_attention_map(case: AttentionCase) -> None:
    tensors = case.tensors()
    raw = (tensors["reference"], tensors["offsets"], tensors["logits"])
    with torch.no_grad():
        tensors["offsets"][0, 0, 0, 0, 0] = torch.nan
    arguments = (case.levels, len(case.counts))
    expected = deformable_attention_map(*raw, *arguments, backend="reference")
    result = deformable_attention_map(*raw, *arguments, backend="triton")
    assert result.dtype == torch.float32 and result.isfinite().all()
    assert relative_error(result, expected) < 1e-5
    again = deformable_attention_map(*raw, *arguments, into=result, backend="triton")
    assert again is result and relative_error(result, 2 * expected) < 1e-5


def test_deterministic_attention_map_does_not_depend_on_the_order_of_its_sums() -> None:
    case = AttentionCase(counts=(60,), heads=8, spread=1.0)
    tensors = case.tensors()
    raw = [tensors[name].detach() for name in ("reference", "offsets", "logits")]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def map_of(*inputs: torch.Tensor, backend: str = "triton") -> torch.Tensor:
        return deformable_attention_map(*inputs, case.levels, 1, backend=backend)

    expected = map_of(*raw, backend="reference")
    torch.use_deterministic_algorithms(True)
    try:
        straight, shuffled = map_of(*raw), map_of(*(tensor[order] for tensor in raw))
        raw[2][:2, 0] = torch.nan
        poisoned = map_of(*raw)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(straight, shuffled) and relative_error(straight, expected) < 1e-5
    expected = map_of(*raw, backend="reference")
    assert expected.isnan().any() and torch.equal(poisoned.isnan(), expected.isnan())


# --------------------------------------------------------------------------------------------------- in-place operators
def _mask() -> torch.Tensor:
    return torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool, device=DEVICE)


def _zero(dense: torch.Tensor, mask: torch.Tensor, backend: str) -> torch.Tensor:
    return zero_padding(dense, mask, backend=backend)


def _scatter(memory: torch.Tensor, rows: torch.Tensor, backend: str) -> torch.Tensor:
    return scatter_tokens(TokenPlan.from_mask(_mask()), memory, rows, in_place=True, backend=backend)


def _project(memory: torch.Tensor, *layer: torch.Tensor, backend: str) -> torch.Tensor:
    return packed_linear(*layer, memory_BSF=memory, plan=TokenPlan.from_mask(_mask()), backend=backend)


def _affine(x: torch.Tensor, bias=None, scale=None, residual=None, *, backend: str) -> torch.Tensor:
    return affine_relu_(x, bias, scale_C=scale, residual_BCHW=residual, relu=False, backend=backend)


def _add_map(into: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, backend: str) -> torch.Tensor:
    centre = torch.full((4, 1, 2), 0.5, device=DEVICE)
    return deformable_attention_map(centre, offsets, logits, ((3, 4),), 2, into=into, backend=backend)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _channels_last() -> torch.Tensor:
    return _random(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)


IN_PLACE = {  # operator, target, the other arguments as views of the target
    "padding mask": (_zero, lambda: _random(2, 5, 3) > 0, lambda d: [d[..., 0]]),
    "packed rows": (_scatter, lambda: _random(2, 5, 3), lambda d: [d.flatten(0, 1)[:5]]),
    "layer": (_project, lambda: _random(2, 5, 3), lambda d: [d.flatten(0, 1)[:5], d[0, :3], d[1, 0]]),
    "bias": (_affine, _channels_last, lambda d: [d[0, :, 0, 0]]),
    "scale": (_affine, _channels_last, lambda d: [None, d[0, :, 0, 0]]),
    "residual": (_affine, _channels_last, lambda d: [None, None, d]),
    "transposed residual": (_affine, lambda: _random(1, 1, 4, 4), lambda d: [None, None, d.mT]),
    "offsets": (
        _add_map,
        lambda: _random(2, 12),
        lambda d: [d.view(4, 1, 1, 3, 2), d.view(4, 1, 1, 3, 2)[..., 0]],
    ),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_arguments_that_share_memory_with_the_target_are_read_before_it_is_written(case, backend) -> None:
    operator, make, views_of = IN_PLACE[case]
    target, apart = make(), make()
    copies = [None if view is None else view.clone() for view in views_of(apart)]
    expected = operator(apart, *copies, backend="reference")
    result = operator(target, *views_of(target), backend=backend)
    assert result is target
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tensors_of_inference_mode_are_written_to_within_it_only(backend: str) -> None:
    with torch.inference_mode():
        dense = torch.ones(2, 5, 3, device=DEVICE)
        assert zero_padding(dense, _mask(), backend=backend).sum() == 15
    with pytest.raises(RuntimeError, match="(?i)inference"):
        zero_padding(dense, _mask(), backend=backend)
    ordinary = torch.ones(2, 5, 3, device=DEVICE)
    version = ordinary._version
    with torch.inference_mode():
        zero_padding(ordinary[:, :], _mask(), backend=backend)
    assert ordinary.sum() == 15 and ordinary._version > version


@pytest.mark.skipif(not _KNOWS_EXPORT, reason="this PyTorch cannot tell strict export from torch.compile")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_scatter_writes_to_a_new_tensor(strict: bool) -> None:
    class Scatter(torch.nn.Module):
        def forward(self, memory: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            plan = TokenPlan.from_mask(keep, 3)
            return scatter_tokens(plan, memory, rows, in_place=True)

    inputs = (torch.zeros(2, 4, 5), torch.ones(3, 5), torch.eye(4)[:2].bool())
    program = torch.export.export(Scatter(), inputs, strict=strict)
    assert "ats_detr.scatter.default" in str(program.graph)
    assert "ats_detr.scatter_.default" not in str(program.graph)


def test_calls_that_nothing_records_launch_their_kernels_directly(monkeypatch) -> None:
    from ats_detr.kernels import packing

    def refuse(*_: object) -> None:
        raise AssertionError("the dispatcher was called")

    monkeypatch.setattr(packing._zero_padding_in_place, "packet", refuse)
    dense, mask = torch.ones(1, 3, 4, device=DEVICE), torch.tensor([[True, False, True]], device=DEVICE)
    version = dense._version
    assert zero_padding(dense, mask, backend="triton").sum().item() == 4
    assert dense._version > version, "autograd must notice the change"
    monkeypatch.setattr(packing._pack, "packet", refuse)
    plan = TokenPlan.from_mask(~mask)
    assert pack_tokens(plan, dense, backend="triton")[0].shape == (1, 4)
    with pytest.raises(AssertionError, match="the dispatcher was called"):
        pack_tokens(plan, dense.requires_grad_(), backend="triton")
