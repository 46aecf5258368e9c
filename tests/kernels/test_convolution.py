"""Convolutions with their epilogue: the Triton kernels against the definitions in float64, and the arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ats_detr.kernels import affine_relu_, affine_relu_max_pool, convolution, fused_convolution
from ats_detr.kernels import reference as definitions

from .cases import DEVICE, TOLERANCE, relative_error

pytest.importorskip("triton")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A convolution drawn from a seed; fields as of `fused_convolution`."""

    shape: tuple[int, int, int, int] = (2, 24, 5, 7)
    out: int = 40
    kernel: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = SINGLE
    scale: bool = True
    bias: bool = True
    residual: torch.dtype | None = SINGLE
    """Its dtype."""
    relu: bool = True
    channels_last: bool = True

    def tensors(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(sum(self.shape) + self.out)

        def normal(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        x = normal(*self.shape, dtype=self.dtype)
        depth = self.shape[1] // self.groups
        weight = normal(self.out, depth, self.kernel, self.kernel) / (depth * self.kernel**2) ** 0.5
        out = F.conv2d(x.float(), weight, None, self.stride, self.padding, self.dilation, self.groups)
        return {
            "x_BCHW": x.contiguous(memory_format=torch.channels_last) if self.channels_last else x,
            "weight_FCHW": weight.to(self.dtype),
            "bias_F": normal(self.out) if self.bias else None,
            "scale_F": normal(self.out) if self.scale else None,
            "residual_BFHW": normal(*out.shape, dtype=self.residual) if self.residual else None,
        }

    def run(self, exact: bool = False, backend: str | None = "triton") -> Tensor:
        """`exact`: by the definition in float64."""
        tensors = self.tensors()
        if exact:
            double = {n: None if t is None else t.double() for n, t in tensors.items()}
            return definitions.fused_convolution(**double, relu=self.relu, **self._layout())
        return fused_convolution(**tensors, relu=self.relu, backend=backend, **self._layout())

    def _layout(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


CASES = {
    "float32": Case(),
    "float16": Case(dtype=HALF, residual=HALF),
    "bfloat16": Case(dtype=BRAIN, residual=BRAIN),
    "float32 residual": Case(dtype=BRAIN),
    "no epilogue": Case(scale=False, bias=False, residual=None, relu=False),
    "bias only": Case(scale=False, residual=None, relu=False, dtype=BRAIN),
    "residual only": Case(scale=False, bias=False, residual=BRAIN, dtype=BRAIN),
    "one pixel, one channel": Case(shape=(1, 1, 1, 1), out=1),
    "odd widths": Case(shape=(1, 37, 3, 11), out=131),
    "several tiles": Case(shape=(3, 70, 9, 13), out=200, dtype=HALF, residual=HALF),
    "stride 2, odd sides": Case(shape=(2, 20, 7, 9), stride=(2, 2)),
    "stride 3 by 1": Case(shape=(2, 20, 8, 4), stride=(3, 1), dtype=BRAIN, residual=None),
    "not channels-last": Case(channels_last=False),
    "3x3": Case(kernel=3, padding=(1, 1), stride=(2, 2)),
    "3x3, bfloat16": Case(kernel=3, padding=(1, 1), dtype=BRAIN, residual=BRAIN),
    "3x3, no epilogue": Case(kernel=3, scale=False, bias=False, residual=None, relu=False),
    "7x7": Case(kernel=7, padding=(3, 3), shape=(1, 3, 9, 14), stride=(2, 2), channels_last=False),
    "dilated, groups": Case(kernel=3, padding=(2, 0), dilation=(2, 1), groups=4),
    "1x1, groups": Case(groups=8),
    "1x1, padded": Case(padding=(1, 0)),
    "bias and residual": Case(kernel=3, scale=False, padding=(1, 1)),
    "bias and ReLU": Case(kernel=3, scale=False, residual=None, padding=(1, 1), channels_last=False),
    "residual, no ReLU": Case(scale=False, bias=False, relu=False, groups=8),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_definition(name: str) -> None:
    case = CASES[name]
    expected = case.run(exact=True)
    for backend in ("triton", "reference", None):
        result = case.run(backend=backend)
        assert result.shape == expected.shape and result.dtype == case.dtype
        assert relative_error(result, expected) < TOLERANCE[case.dtype]


def test_maps_of_the_backbone() -> None:
    """ResNet-50's widths at one size each; stem, 1x1 and 3x3."""
    for case in (
        Case(shape=(1, 256, 9, 14), out=512, stride=(2, 2), dtype=BRAIN, residual=None),
        Case(shape=(1, 512, 5, 6), out=2048, dtype=BRAIN, residual=BRAIN),
    ):
        assert relative_error(case.run(), case.run(exact=True)) < TOLERANCE[BRAIN]


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
@pytest.mark.parametrize("shape", [(2, 24, 5, 8), (1, 3, 1, 1), (2, 300, 4, 7)])
def test_max_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    x.view(-1)[-1] = torch.nan
    scale, bias = torch.randn(2, shape[1], device=DEVICE) - 0.5
    result = affine_relu_max_pool(x, bias, scale_C=scale, backend="triton")
    expected = definitions.affine_relu_max_pool(x.double(), scale.double(), bias.double())
    assert torch.equal(result.isnan(), expected.isnan()) and result.isnan().any()
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) < TOLERANCE[dtype]
    plain = affine_relu_max_pool(x, backend="triton")
    assert torch.equal(plain.nan_to_num(), F.max_pool2d(x.relu(), 3, 2, 1).nan_to_num())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_epilogue_is_in_place_and_keeps_nan(backend: str) -> None:
    x = torch.randn(2, 6, 3, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    expected = (x * 2 + x).relu()
    bias, scale = torch.zeros(6, device=DEVICE), torch.full((6,), 2.0, device=DEVICE)
    assert affine_relu_(x, bias, scale_C=scale, residual_BCHW=x, backend=backend) is x
    torch.testing.assert_close(x, expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_residuals_that_overlap_the_target_are_read_first(backend: str) -> None:
    memory = torch.randn(3, 4, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x, residual = memory[1:], memory[:2]
    expected = (x + residual).relu()
    torch.testing.assert_close(affine_relu_(x, residual_BCHW=residual, backend=backend), expected)


def plain(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, *layout: object) -> Tensor:
    """What cuDNN's convolutions with an epilogue compute, on any device."""
    assert bias is None or bias.dtype == x.dtype, "cuDNN takes one dtype"
    stride, padding, dilation, groups = layout
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return (out if residual is None else out + residual).relu().contiguous(memory_format=torch.channels_last)


def failing(*_: object) -> Tensor:
    raise RuntimeError("GET was unable to find an engine to execute this computation")


STAND_INS: dict[str, tuple[Callable[..., Tensor], float, str]] = {
    "right": (plain, 1.0, "used"),
    "slower": (plain, 3.0, "3.0000 instead of 2.0000 ms"),
    "wrong": (lambda *arguments: plain(*arguments) * 1.01, 1.0, "differs by 0.0"),
    "wrong in one place": (lambda *arguments: plain(*arguments).index_fill(3, torch.tensor([2]), 0.0), 1.0, "differs"),
    "without NaN": (lambda *arguments: plain(*arguments).nan_to_num(), 1.0, "NaN is lost"),
    "failing": (failing, 1.0, "unable to find an engine"),
}  # fmt: skip


@pytest.mark.parametrize("residual", [None, BRAIN], ids=["", "residual"])
@pytest.mark.parametrize("name", STAND_INS)
def test_cudnn_is_used_where_a_probe_finds_it_right_and_fast(
    name: str, residual: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in, milliseconds, outcome = STAND_INS[name]
    calls: list[torch.Size] = []

    def called(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        calls.append(x.shape)
        z, bias = (others[0], others[2]) if residual else (None, others[0])
        return stand_in(x, weight, z, bias, *others[-4:])

    operator = "cudnn_convolution_add_relu" if residual else "cudnn_convolution_relu"
    monkeypatch.setattr(torch.ops.aten, operator, called)
    monkeypatch.setattr(convolution, "_cudnn_pays", {})
    monkeypatch.setattr(convolution, "_may_use_cudnn", lambda *_: True)
    times = iter([milliseconds, 2.0])
    monkeypatch.setattr(convolution, "_milliseconds", lambda *_: next(times))
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    caplog.set_level(logging.INFO)
    case = Case(kernel=3, padding=(1, 1), stride=(2, 2), dtype=BRAIN, residual=residual, scale=False)
    error = TOLERANCE[BRAIN]
    assert relative_error(case.run(backend=None), case.run(exact=True)) < error
    assert not calls, "nothing is probed outside of the context"
    with convolution.probing():
        assert relative_error(case.run(backend=None), case.run(exact=True)) < error
    (record,) = caplog.records
    assert outcome in record.message
    calls.clear()
    with convolution.probing():  # the outcome is known
        assert relative_error(case.run(backend=None), case.run(exact=True)) < error
    assert len(calls) == (name == "right")
    for other in (Case(scale=True, kernel=3), Case(scale=False, kernel=3, relu=False)):
        with convolution.probing():
            other.run(backend=None)
    assert len(calls) == (name == "right"), "cuDNN has neither a scale nor an epilogue without a ReLU"


def test_a_probe_without_memory_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory")]

    def called(x: Tensor, weight: Tensor, bias: Tensor | None, *layout: object) -> Tensor:
        if errors:
            raise errors.pop()
        return plain(x, weight, None, bias, *layout)

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", called)
    monkeypatch.setattr(convolution, "_cudnn_pays", {})
    monkeypatch.setattr(convolution, "_may_use_cudnn", lambda *_: True)
    monkeypatch.setattr(convolution, "_milliseconds", lambda *_: 1.0)
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    case = Case(kernel=3, dtype=BRAIN, residual=None, scale=False)
    for outcomes in ([], [True]):
        with convolution.probing():
            assert relative_error(case.run(backend=None), case.run(exact=True)) < TOLERANCE[BRAIN]
        assert [*convolution._cudnn_pays.values()] == outcomes


def test_cudnn_is_not_used_where_algorithms_have_to_be_deterministic() -> None:
    class OnGpu:
        is_cuda = True

    def may_use_cudnn() -> bool:
        return convolution._may_use_cudnn(OnGpu(), None)  # type: ignore[arg-type]

    assert may_use_cudnn()
    torch.use_deterministic_algorithms(True)
    try:
        assert not may_use_cudnn()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(deterministic=True):
        assert not may_use_cudnn()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_probed_convolutions_match_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    for residual in (None, dtype):
        case = Case(
            shape=(2, 64, 50, 84), out=64, kernel=3, padding=(1, 1), dtype=dtype, residual=residual, scale=False
        )  # fmt: skip
        with torch.backends.cudnn.flags(allow_tf32=False), convolution.probing():
            assert relative_error(case.run(backend=None), case.run(exact=True)) < TOLERANCE[dtype]


def test_empty_batches() -> None:
    x = torch.zeros(0, 6, 5, 7, device=DEVICE)
    for kernel in (1, 3):
        weight = torch.zeros(4, 6, kernel, kernel, device=DEVICE)
        assert fused_convolution(x, weight, backend="triton").shape == (0, 4, 6 - kernel, 8 - kernel)
    assert affine_relu_max_pool(x, backend="triton").shape == (0, 6, 3, 4)


def test_autocast() -> None:
    case = Case(residual=None)
    tensors = case.tensors()
    with torch.autocast(DEVICE, BRAIN), torch.no_grad():
        result = fused_convolution(**tensors, relu=True, backend="triton")
    assert result.dtype == BRAIN
    assert relative_error(result, case.run(exact=True)) < 2 * TOLERANCE[BRAIN]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck_and_flops(backend: str) -> None:
    t = Case(stride=(2, 2)).tensors()
    x, vector = t["x_BCHW"], torch.ones(24, device=DEVICE)
    operators = torch.ops.ats_detr
    pointwise = (x, t["weight_FCHW"], t["scale_F"], t["bias_F"], t["residual_BFHW"], True, [2, 2], backend)
    torch.library.opcheck(operators.pointwise_convolution.default, pointwise)
    torch.library.opcheck(operators.affine_relu_.default, (x.clone(), vector, None, x, True, backend))
    torch.library.opcheck(operators.affine_relu_max_pool.default, (x, None, vector, backend))
    with FlopCounterMode(display=False) as counter:
        operators.pointwise_convolution(*pointwise)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 24 * 40


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_into_one_graph(backend: str) -> None:
    t = Case(kernel=3).tensors()
    last = torch.randn(8, 40, 1, 1, device=DEVICE)

    def step(x: Tensor) -> Tensor:
        x = fused_convolution(x, t["weight_FCHW"], t["bias_F"], scale_F=t["scale_F"], backend=backend)
        x = fused_convolution(x, last, relu=True, backend=backend)
        return affine_relu_max_pool(x, backend=backend)

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(t["x_BCHW"])
        assert relative_error(compiled, step(t["x_BCHW"])) < 1e-6


def test_gradients_are_refused() -> None:
    tensors = Case().tensors()
    tensors["weight_FCHW"].requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        fused_convolution(**tensors)
    with pytest.raises(RuntimeError, match="no_grad"):
        affine_relu_(torch.zeros(1, 2, 3, 3, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_BCHW=torch.zeros(24, 5, 7)), r"x \[24, 5, 7\].*\[B, C, H, W\]"),
        (dict(x_BCHW=torch.zeros(2, 24, 5, 7).int()), "floating point"),
        (dict(weight_FCHW=torch.zeros(40, 23, 1, 1)), r"weight \[40, 23, 1, 1\].*\[F, 24, height, width\]"),
        (dict(weight_FCHW=torch.zeros(40, 24, 1, 1).half()), "of x's torch.float32"),
        (dict(weight_FCHW=torch.zeros(4, 24, 6, 1)), r"as large as the kernel \[6, 1\]"),
        (dict(groups=7), "a multiple of groups = 7"),
        (dict(groups=0), "groups = 0 >= 1"),
        (dict(bias_F=torch.zeros(39)), r"bias \[39\].*\[40\]"),
        (dict(scale_F=torch.zeros(40, 1)), r"scale \[40, 1\].*\[40\]"),
        (dict(residual_BFHW=torch.zeros(2, 40, 5, 1)), r"residual \[2, 40, 5, 1\].*\[2, 40, 5, 7\]"),
        (dict(stride=(0, 1)), r"stride \(0, 1\): must be two integers >= 1"),
        (dict(padding=(-1, 0)), r"padding \(-1, 0\): must be two integers >= 0"),
        (dict(bias_F=torch.zeros(40, device="meta")), "one device"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict(x_BCHW=torch.zeros(2, 24, 5, 7), weight_FCHW=torch.zeros(40, 24, 1, 1))
    with pytest.raises(ValueError, match=message):
        fused_convolution(**{**arguments, **change}, backend="triton")


def test_wrong_maps_of_the_passes_are_named() -> None:
    with pytest.raises(ValueError, match=r"residual \[1, 2, 3, 1\].*\[1, 2, 3, 3\]"):
        affine_relu_(torch.zeros(1, 2, 3, 3), residual_BCHW=torch.zeros(1, 2, 3, 1))
    with pytest.raises(ValueError, match="expanded"):
        affine_relu_(torch.zeros(1, 2, 3, 1).expand(1, 2, 3, 3))
    with pytest.raises(ValueError, match="channels-last"):
        affine_relu_(torch.zeros(1, 2, 3, 3), backend="triton")
    with pytest.raises(ValueError, match="at least one pixel"):
        affine_relu_max_pool(torch.zeros(1, 2, 0, 3))
