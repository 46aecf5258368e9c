"""Deformable attention: the Triton kernels against the reference in float64, outputs and every gradient."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from ats_detr.kernels import deformable_attention, multi_scale_deformable_attention
from ats_detr.kernels.reference import sampling_locations

from .cases import DEVICE, TOLERANCE, AttentionCase, relative_error

tuning = pytest.importorskip("ats_detr.kernels.gpu.tuning", reason="triton is not installed")
gpu = pytest.importorskip("ats_detr.kernels.gpu.attention", reason="triton is not installed")
problems = pytest.importorskip("ats_detr.kernels.gpu.problem", reason="triton is not installed")
value_gradient = pytest.importorskip("ats_detr.kernels.gpu.value_gradient", reason="triton is not installed")
TRITON = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
by_kernel = pytest.mark.skipif(
    DEVICE == "cpu" and TRITON < (3, 8),
    reason="triton 3.6's interpreter lets NaN through minimum, unlike a GPU, and cannot loop beside NumPy 2.4",
)

HALF, BRAIN = torch.float16, torch.bfloat16
WIDE = ((30, 44), (15, 22), (8, 11))  # samples of a few queries spread over many tiles

CASES = {
    "packed": AttentionCase(),
    "boxes": AttentionCase(reference=4),
    "equal counts, no image index": AttentionCase(counts=(4, 4)),
    "an image without queries": AttentionCase(counts=(0, 5, 0, 2)),
    "one query": AttentionCase(counts=(1,)),
    "tiles of many samples": AttentionCase(levels=((5, 6),), counts=(330,), heads=1, head_dim=8, spread=0.3),
    "many samples, few, and none": AttentionCase(
        levels=((20, 20), (3, 3), (1, 1)), counts=(500, 0, 3), heads=1, head_dim=8
    ),
    "bfloat16": AttentionCase(dtype=BRAIN, coordinates=BRAIN),
    "bfloat16 with float32 coordinates": AttentionCase(dtype=BRAIN, reference=4),
    "float16": AttentionCase(dtype=HALF, coordinates=HALF),
    "float16 boxes": AttentionCase(dtype=HALF, reference=4, head_dim=16),
    "one level, one point": AttentionCase(levels=((9, 7),), points=1),
    "eight levels": AttentionCase(levels=tuple((9 - i, 10 - i) for i in range(8)), points=2, head_dim=8),
    "sixteen points": AttentionCase(points=16, heads=1, counts=(3, 2)),
    "three points, five heads": AttentionCase(points=3, heads=5, head_dim=8),
    "levels of width or height 1": AttentionCase(levels=((1, 9), (8, 1), (1, 1)), counts=(9, 8)),
    "thin bfloat16": AttentionCase(levels=((1, 9), (8, 1), (1, 1)), dtype=BRAIN, reference=4),
    "head width 1": AttentionCase(head_dim=1),
    "head width 5": AttentionCase(head_dim=5),
    "head width 30, bfloat16": AttentionCase(head_dim=30, dtype=BRAIN),
    "head width 71, bfloat16": AttentionCase(head_dim=71, dtype=BRAIN, heads=1),
    "head width 48, float16": AttentionCase(head_dim=48, dtype=HALF),
    "head width 256": AttentionCase(head_dim=256, heads=1, counts=(3, 2)),
    "head width 256, bfloat16": AttentionCase(head_dim=256, heads=1, counts=(3, 2), dtype=BRAIN),
    "slices of larger projections": AttentionCase(strided=True),
    "slices, bfloat16": AttentionCase(strided=True, dtype=BRAIN, coordinates=BRAIN),
    "far samples": AttentionCase(spread=40.0, counts=(9, 6)),
    "every sample in one tile": AttentionCase(
        levels=((5, 6),), counts=(70,), heads=1, head_dim=8, spread=0.3
    ),
    "sides of whole tiles": AttentionCase(
        levels=((16, 24), (14, 7), (8, 8)), counts=(40, 25), heads=1, head_dim=8
    ),
    "wide": AttentionCase(levels=WIDE, spread=6.0, counts=(20, 13), heads=1, head_dim=16),
}
METHODS = ("atomic", "shared pixels", "owned pixels", "deterministic")


def choose(method: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes the value's gradient be summed this way; whether the call shall be deterministic."""
    monkeypatch.setattr(tuning, "TILES_FROM", 10**9 if method == "atomic" else 0)
    monkeypatch.setattr(tuning, "_chosen", {})
    config = dict(tuning.CONFIGS["value_tiles"][0], owned=method == "owned pixels")
    monkeypatch.setitem(tuning.CONFIGS, "value_tiles", [config])
    monkeypatch.setitem(tuning.INTERPRETED, "value_tiles", config)
    return method == "deterministic"


def check(result: dict, expected: dict, case: AttentionCase) -> None:
    for name, tensor in result.items():
        dtype = case.dtype if name in ("out", "value") else case.coordinates
        # the gradient of logits passes through the rounded output
        tolerance = TOLERANCE[case.dtype if name == "logits" else dtype]
        assert tensor.dtype == dtype, name
        error = relative_error(tensor, expected[name])
        assert error < tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}"


EVERY_METHOD = (
    "boxes",
    "an image without queries",
    "tiles of many samples",
    "many samples, few, and none",
    "float16",
    "levels of width or height 1",
    "head width 30, bfloat16",
    "sides of whole tiles",
    "wide",
)
"""Cases where the ways to sort samples differ; of the others, two ways are slow tests."""


def _is_slow(name: str, method: str) -> bool:
    return method in METHODS[2:] and name not in EVERY_METHOD


@by_kernel
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[pytest.mark.slow] if _is_slow(name, method) else [])
        for name in CASES
        for method in METHODS
    ],
)
def test_fused_attention_and_gradients(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = choose(method, monkeypatch)
    case = CASES[name]
    result = case.run(backend="triton", deterministic=deterministic)
    check(result, case.run(exact=True), case)


@by_kernel
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
def test_classical_operator_and_gradients(dtype, method, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = choose(method, monkeypatch)
    case = AttentionCase(counts=(6, 6), dtype=dtype)
    result = case.run(fused=False, backend="triton", deterministic=deterministic)
    check(result, case.run(fused=False, exact=True), case)


@by_kernel
@pytest.mark.parametrize("method", METHODS)
def test_samples_on_the_borders_of_tiles_and_maps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whole pixels and one rounding step beside them: where a wrong tile is another row, level or image."""
    deterministic = choose(method, monkeypatch)
    levels, counts = ((8, 16), (7, 14)), (50, 30)
    generator = torch.Generator().manual_seed(0)
    borders = torch.tensor([-1.0, 0.0, 6.0, 7.0, 8.0, 13.0, 14.0, 15.0, 16.0])
    near = torch.cat([borders, *(borders.nextafter(torch.tensor(way)) for way in (-99.0, 99.0))]).to(DEVICE)
    sides = torch.tensor([[width, height] for height, width in levels]).float()
    reference = (
        (0.5 / sides).expand(sum(counts), 2, 2).to(DEVICE)
    )  # offsets are pixels then, to a rounding step
    offsets = near[torch.randint(len(near), (sum(counts), 1, 2, 3, 2), generator=generator)]
    case = AttentionCase(levels=levels, counts=counts, heads=1, head_dim=8, points=3)
    tensors = {**case.tensors(), "reference": reference, "offsets": offsets}
    monkeypatch.setattr(AttentionCase, "tensors", lambda self: dict(tensors))
    result, expected = case.run(backend="triton", deterministic=deterministic), case.run(exact=True)
    for name in ("out", "value"):  # others jump at whole pixels
        assert relative_error(result[name], expected[name]) < TOLERANCE[torch.float32]


@by_kernel
@pytest.mark.parametrize("method", ["shared pixels", "owned pixels"])
def test_tiles_of_many_samples_are_shared_between_programs(method, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every level, on the coarse one, on none (of those that own their pixels)."""
    choose(method, monkeypatch)
    for counts in ((280, 240), (150, 130), (30, 30)):
        case = AttentionCase(
            levels=((16, 8), (3, 4)), counts=counts, heads=1, head_dim=8, points=6, spread=4.0
        )
        check(case.run(backend="triton"), case.run(exact=True), case)


def test_tiles_own_their_pixels_where_samples_are_few() -> None:
    """Each sample may be in four tiles: of a dense encoder's, that would be a gigabyte."""
    key = ("bfloat16", 8, 32, 4, 4, True)
    for num_samples, num_pixels, few in ((799, 100, True), (800, 100, False), (5 << 20, 9 << 20, False)):
        candidates = tuning.configurations("value_tiles", (*key, tuning.density(num_samples, num_pixels)))
        assert any(config["owned"] for config in candidates) == few
        assert not candidates[0]["owned"]


def test_queries_are_ordered_image_by_image_and_along_the_map() -> None:
    """Sums do not show it: a wrong order only makes more of them."""
    for counts in ((50,), (20, 0, 30), (1,) * 300):
        case = AttentionCase(levels=((4, 5),), counts=counts, heads=1, head_dim=8)
        tensors = case.tensors()
        problem = problems.prepare(
            tensors["value"],
            case.levels,
            tensors["reference"],
            tensors["offsets"],
            tensors["logits"],
            tensors["image"],
        )
        order = value_gradient.spatial_order(problem).long()
        assert torch.equal(order.sort().values, torch.arange(sum(counts), device=DEVICE))
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(DEVICE)[order]
        assert len(image.unique_consecutive()) == len(image.unique())
        if len(counts) < 50:  # neighbours in the order are nearer to each other than others are
            place = tensors["reference"][order, 0]
            step, jump = (place[1:] - place[:-1]).norm(dim=1), (place[10:] - place[:-10]).norm(dim=1)
            assert step.mean() < 0.7 * jump.mean()


def test_no_queries_and_no_images() -> None:
    for counts in ((0, 0), ()):
        case = AttentionCase(counts=counts)
        result = case.run(backend="triton")
        assert result["out"].shape == (0, 64)
        assert not result["value"].any()


@by_kernel
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("fused", [True, False])
def test_bad_coordinates_poison_their_row_only(backend: str, fused: bool) -> None:
    case = AttentionCase(counts=(8,), heads=2)
    tensors = case.tensors()
    offsets, reference = tensors["offsets"], tensors["reference"]
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    if not fused:
        offsets = sampling_locations(reference, offsets, case.levels)
    clean = offsets.clone()
    offsets[torch.arange(3), 0, 1, 2, 0] = bad
    offsets[torch.arange(3) + 3, 1, 0, 3, 1] = bad
    outs = []
    for coordinates in (offsets, clean):
        if fused:
            out = deformable_attention(
                tensors["value"], case.levels, reference, coordinates, tensors["logits"], backend=backend
            )
        else:
            out = multi_scale_deformable_attention(
                tensors["value"], case.levels, coordinates[None], tensors["logits"][None], backend=backend
            )[0]
        outs.append(out.view(8, 2, -1))
    expected = torch.zeros(8, 2, dtype=torch.bool, device=DEVICE)
    expected[:3, 0] = expected[3:6, 1] = True
    assert torch.equal(outs[0].isnan().all(-1), expected)
    assert torch.equal(outs[0][~expected], outs[1][~expected])


@by_kernel
@pytest.mark.parametrize("method", METHODS)
def test_bad_coordinates_leave_the_other_gradients_alone(method, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = choose(method, monkeypatch)
    case = AttentionCase(counts=(8,))
    tensors = case.tensors()
    inputs = [tensors[name].clone().requires_grad_() for name in ("value", "offsets", "logits")]
    with torch.no_grad():
        inputs[1][0, 0, 1, 2, 0] = float("nan")
        inputs[1][1, 1, 0, 0, 1] = float("inf")
    out = deformable_attention(
        inputs[0],
        case.levels,
        tensors["reference"],
        inputs[1],
        inputs[2],
        backend="triton",
        deterministic=deterministic,
    )
    out[2:].sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (inputs[0],))
    assert inputs[1].grad[2:].isfinite().all() and inputs[2].grad[2:].isfinite().all()


def test_gradient_of_learned_references() -> None:
    for size in (2, 4):
        case = AttentionCase(reference=size, counts=(3, 3))
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            tensors = case.tensors()
            reference = tensors["reference"].to(dtype).requires_grad_()
            value, offsets, logits = (tensors[name].to(dtype) for name in ("value", "offsets", "logits"))
            deformable_attention(
                value, case.levels, reference, offsets, logits, backend=backend
            ).sum().backward()
            grads.append(reference.grad)
        assert relative_error(*grads) < 1e-5


def test_frozen_value_gets_no_gradient() -> None:
    case = AttentionCase()
    tensors = case.tensors()
    offsets = tensors["offsets"].requires_grad_()
    out = deformable_attention(
        tensors["value"],
        case.levels,
        tensors["reference"],
        offsets,
        tensors["logits"],
        tensors["image"],
        backend="triton",
    )
    out.backward(tensors["gradient"])
    assert relative_error(offsets.grad, case.run(exact=True)["offsets"]) < TOLERANCE[torch.float32]
    assert tensors["value"].grad is None


def test_rows_past_the_count_are_not_written() -> None:
    case = AttentionCase(counts=(9, 6))
    tensors = case.tensors()
    arguments = (tensors["value"], case.levels, tensors["reference"], tensors["offsets"], tensors["logits"])
    full = deformable_attention(*arguments, tensors["image"], backend="triton")
    for count in (0, 1, 8, 15):
        problem = problems.prepare(tensors["value"], case.levels, *arguments[2:], tensors["image"])
        poisoned = torch.full_like(full, torch.nan)
        num_rows = torch.tensor([count], dtype=torch.int32, device=DEVICE)
        out = gpu.forward(problem, num_rows, out=poisoned)
        assert torch.equal(out[:count], full[:count])
        assert out[count:].isnan().all()
        reference = deformable_attention(*arguments, tensors["image"], num_rows=num_rows, backend="reference")
        assert torch.allclose(reference[:count], full[:count], atol=1e-5)


def test_capacity_plans_refuse_gradients() -> None:
    case = AttentionCase()
    tensors = case.tensors()
    out = deformable_attention(
        tensors["value"].requires_grad_(),
        case.levels,
        tensors["reference"],
        tensors["offsets"],
        tensors["logits"],
        tensors["image"],
        num_rows=torch.tensor([4], dtype=torch.int32, device=DEVICE),
        backend="triton",
    )
    with pytest.raises(RuntimeError, match="inference"):
        out.sum().backward()


@by_kernel
def test_deterministic_mode_follows_torch_and_repeats_bit_for_bit() -> None:
    case = AttentionCase(levels=WIDE, counts=(40, 23), heads=1, head_dim=16, spread=3.0)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = case.run(backend="triton"), case.run(backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    asked = case.run(backend="triton", deterministic=True)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and torch.equal(tensor, asked[name]), name


def test_autocast_casts_the_value_and_keeps_coordinates() -> None:
    case = AttentionCase(spread=9.0)
    with torch.autocast(DEVICE, dtype=BRAIN):
        result = case.run(backend="triton")
    expected = dataclasses.replace(case, dtype=BRAIN).run(exact=True)
    assert result["out"].dtype == BRAIN
    assert result["offsets"].dtype == torch.float32
    assert relative_error(result["offsets"], expected["offsets"]) < 1e-2  # bfloat16 gradient of the output
    assert relative_error(result["out"], expected["out"]) < TOLERANCE[BRAIN]


def test_bfloat16_value_does_not_round_the_references_coordinates() -> None:
    case = AttentionCase(levels=((3, 3000),), dtype=BRAIN, heads=1)
    error = relative_error(case.run(backend="reference")["out"], case.run(exact=True)["out"])
    assert error < 4e-3  # bfloat16 locations would be wrong by many pixels


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_large_packed_attention_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ((100, 134), (50, 67), (25, 34), (13, 17))
    for dtype in (torch.float32, BRAIN):
        case = AttentionCase(levels=levels, counts=(3000, 1100), heads=8, dtype=dtype)
        expected = case.run(exact=True)
        for method in METHODS:
            check(case.run(deterministic=choose(method, monkeypatch)), expected, case)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_backward_in_a_cuda_graph(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = choose(method, monkeypatch)
    case = AttentionCase()
    tensors = case.tensors()
    value = tensors["value"].requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = deformable_attention(
            value,
            case.levels,
            tensors["reference"],
            tensors["offsets"],
            tensors["logits"],
            tensors["image"],
            deterministic=deterministic,
        )
        return out, torch.autograd.grad(out, value, tensors["gradient"])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for result, want in zip(captured, expected, strict=True):
        assert relative_error(result, want) < 1e-6
