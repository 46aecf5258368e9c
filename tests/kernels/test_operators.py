"""The custom operators: registration, fullgraph compilation, FLOP counts, and the choice of the backend."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ats_detr.kernels import (
    deformable_attention,
    deformable_attention_map,
    multi_scale_deformable_attention,
    pack_tokens,
    scatter_tokens,
    select_tokens,
)
from ats_detr.kernels.dispatch import choose_backend

from .cases import DEVICE, AttentionCase, relative_error

CASE = AttentionCase(levels=((5, 6), (3, 4)), counts=(4, 2), head_dim=8, points=2)
SIZES = [side for level in CASE.levels for side in level]
BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    tensors = CASE.tensors()
    inputs = [tensors[name].requires_grad_() for name in ("value", "offsets", "logits")]
    torch.library.opcheck(
        torch.ops.ats_detr.msda.default,
        (
            inputs[0],
            SIZES,
            None,
            tensors["reference"],
            inputs[1],
            inputs[2],
            tensors["image"],
            None,
            None,
            [],
            backend,
        ),
    )
    scores, keep = torch.randn(2, 42, device=DEVICE), torch.tensor([5, 9], device=DEVICE)
    torch.library.opcheck(torch.ops.ats_detr.select.default, (scores, keep, None, 20, backend))
    plan = select_tokens(scores, keep)
    memory = torch.randn(2, 42, 8, device=DEVICE, requires_grad=True)
    rows = torch.randn(14, 8, device=DEVICE, requires_grad=True)
    index = (plan.token_index_K, plan.image_index_K)
    torch.library.opcheck(torch.ops.ats_detr.pack.default, (*index, plan.slot_BS, None, [memory], backend))
    torch.library.opcheck(
        torch.ops.ats_detr.scatter.default, (memory, rows, *index, plan.slot_BS, None, backend)
    )
    for some in ((memory, None), (None, rows)):
        torch.library.opcheck(
            torch.ops.ats_detr.scatter.default, (*some, *index, plan.slot_BS, None, backend)
        )
    torch.library.opcheck(
        torch.ops.ats_detr.scatter_.default,
        (memory.detach().clone(), rows.detach(), *index, plan.slot_BS, None, backend),
    )
    torch.library.opcheck(
        torch.ops.ats_detr.zero_padding_.default, (memory.detach().clone(), scores > 0, backend)
    )
    equal = AttentionCase(levels=CASE.levels, counts=(3, 3), head_dim=8, points=2).tensors()
    torch.library.opcheck(
        torch.ops.ats_detr.add_attention_map.default,
        (
            torch.zeros(2, 42, device=DEVICE),
            equal["reference"],
            equal["offsets"],
            equal["logits"],
            SIZES,
            None,
            backend,
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operator_compiles_into_one_graph(backend: str) -> None:
    tensors = CASE.tensors()
    names = ("value", "offsets", "logits")

    def step(value, offsets, logits, scores, keep):
        plan = select_tokens(scores, keep, capacity=14, backend=backend)
        attended = deformable_attention(
            value, CASE.levels, tensors["reference"], offsets, logits, tensors["image"], backend=backend
        )
        memory = value.detach().flatten(2)
        (rows,) = pack_tokens(plan, memory, backend=backend)
        merged = scatter_tokens(plan, memory, rows * 2, backend=backend)
        raw = (tensors["reference"], offsets, logits)
        received = deformable_attention_map(*raw, CASE.levels, 2, backend=backend)
        classical = multi_scale_deformable_attention(
            value, CASE.levels, offsets.unflatten(0, (2, 3)), logits.unflatten(0, (2, 3)), backend=backend
        )
        return attended.sum() + classical.square().sum(), merged, received

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    scores, keep = torch.randn(2, 42, device=DEVICE), torch.tensor([5, 9], device=DEVICE)
    results = []
    for function in (step, compiled):
        inputs = [tensors[name].detach().clone().requires_grad_() for name in names]
        loss, *rest = function(*inputs, scores, keep)
        loss.backward()
        results.append([loss.detach(), *rest, *(tensor.grad for tensor in inputs)])
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tensors = CASE.tensors()
    grads = []
    for keep in (False, True):
        value = tensors["value"].detach().clone().requires_grad_()
        arguments = (
            value,
            CASE.levels,
            tensors["reference"],
            tensors["offsets"],
            tensors["logits"],
            tensors["image"],
        )
        run = (
            deformable_attention
            if keep
            else lambda *a: checkpoint(deformable_attention, *a, use_reentrant=False)
        )
        run(*arguments).square().sum().backward()
        grads.append(value.grad)
    assert torch.equal(*grads)


def test_flops_count_four_corners_of_every_sample() -> None:
    tensors = CASE.tensors()
    arguments = (tensors["value"], SIZES, None, tensors["reference"], tensors["offsets"], tensors["logits"])
    with FlopCounterMode(display=False) as counter:
        torch.ops.ats_detr.msda(*arguments, tensors["image"], None, None, [], "reference")
    forward = counter.get_flop_counts()["Global"][torch.ops.ats_detr.msda]
    assert forward == 2 * 4 * 6 * 2 * 2 * 2 * 8  # queries, heads, levels, points, channels
    out = torch.zeros(6, 16, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        torch.ops.ats_detr.msda_backward(out, out, *arguments, tensors["image"], True, None, [], "reference")
    assert counter.get_flop_counts()["Global"] == {torch.ops.ats_detr.msda_backward: 2 * forward}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_are_the_same_while_operations_are_counted(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = CASE.tensors()
    out, grad = torch.zeros(2, 6, 16, device=DEVICE)
    raw = (tensors["reference"], tensors["offsets"], tensors["logits"], tensors["image"])
    arguments = (grad + 1, out, tensors["value"], SIZES, None, *raw, True, None, [], backend)
    expected = torch.ops.ats_detr.msda_backward(*arguments)
    with FlopCounterMode(display=False):
        result = torch.ops.ats_detr.msda_backward(*arguments)
    for tensor, want in zip(result, expected, strict=True):
        assert relative_error(tensor, want) < 1e-6


def test_backend_is_chosen_by_argument_then_environment_then_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.zeros(1)
    monkeypatch.delenv("ATS_DETR_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(cpu) == "reference"
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    assert choose_backend(cpu) == "triton"
    assert choose_backend(cpu, "reference") == "reference"
    assert choose_backend(cpu.double(), "triton") == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choose_backend(cpu)
    monkeypatch.setenv("ATS_DETR_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'"):
        choose_backend(cpu)


def test_without_triton_everything_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from ats_detr.kernels import dispatch

    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.delenv("ATS_DETR_BACKEND", raising=False)
    assert choose_backend(torch.zeros(1, device=DEVICE)) == "reference"
    with pytest.raises(ValueError, match="pip install triton"):
        choose_backend(torch.zeros(1), "triton")
