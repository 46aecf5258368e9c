"""Linear layers of packed rows: the Triton kernels against the definitions in float64, and what they leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.utils.flop_counter import FlopCounterMode

from ats_detr.kernels import TokenPlan, packed_feedforward, packed_linear, packed_linear_norm

from .cases import DEVICE, TOLERANCE, relative_error

pytest.importorskip("triton")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """Rows and layers drawn from a seed; `count` rows of the capacity are in use (None: all, no capacity)."""

    capacity: int = 37
    count: int | None = 23
    width: int = 64
    """C."""
    hidden: int = 80
    """Outputs of the linear layer, hidden channels of the feed-forward network."""
    dtype: torch.dtype = SINGLE
    """Of the weights."""
    rows: torch.dtype | None = None
    """Of rows and residuals; None: as the weights."""
    strided: bool = False
    """Rows, residuals and memory are slices of wider ones."""
    images: int = 2

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.capacity * 1000 + self.width)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            wide = self.strided and scale == 1.0
            drawn = torch.randn(*shape[:-1], shape[-1] * (3 if wide else 1), generator=generator) * scale
            drawn = drawn.to(DEVICE, dtype)
            return drawn[..., shape[-1] : 2 * shape[-1]] if wide else drawn

        rows, width, hidden = self.rows or self.dtype, self.width, self.hidden
        tensors = {
            "x": normal(self.capacity, width, dtype=rows),
            "add": normal(self.capacity, width, dtype=rows),
            "wide": normal(self.capacity, hidden, dtype=rows),
            "weight1": normal(hidden, width, dtype=self.dtype, scale=width**-0.5),
            "bias1": normal(hidden, dtype=self.dtype, scale=0.5),
            "weight2": normal(width, hidden, dtype=self.dtype, scale=hidden**-0.5),
            "bias2": normal(width, dtype=self.dtype, scale=0.5),
            "norm_weight": normal(width, dtype=self.dtype, scale=0.8),
            "norm_bias": normal(width, dtype=self.dtype, scale=0.5),
            "memory": normal(self.images, self.capacity, hidden, dtype=self.dtype),
        }
        if self.count is not None:
            for name in ("x", "add", "wide"):
                tensors[name][self.count :] = torch.nan
        return tensors

    def plan(self) -> TokenPlan:
        """Keeps `count` tokens spread over the images."""
        used = self.capacity if self.count is None else self.count
        keep = torch.zeros(self.images * self.capacity, dtype=torch.bool)
        keep[torch.randperm(keep.numel(), generator=torch.Generator().manual_seed(1))[:used]] = True
        capacity = None if self.count is None else self.capacity
        return TokenPlan.from_mask(keep.view(self.images, -1).to(DEVICE), capacity)

    def run(
        self, operator: str, exact: bool = False, memory: Tensor | None = None, backend: str = "triton"
    ) -> Tensor:
        """'linear', 'linear_norm' or 'feedforward' by the kernel; `exact`: used rows by the definition in float64."""
        t, plan = self.tensors(), self.plan()
        count = plan.num_rows
        if exact:
            used = self.capacity if self.count is None else self.count
            t = {name: tensor.double() for name, tensor in t.items()}
            t.update({name: t[name][:used] for name in ("x", "add", "wide")})
            count, backend = None, "reference"
        norm = (t["norm_weight"], t["norm_bias"], 1e-5, count)
        if operator == "linear":
            target = {} if memory is None else dict(memory_BSF=memory, plan=plan)
            return packed_linear(
                t["x"], t["weight1"], t["bias1"], count, add_KC=t["add"], backend=backend, **target
            )
        if operator == "linear_norm":
            return packed_linear_norm(t["wide"], t["weight2"], t["bias2"], t["x"], *norm, backend=backend)
        layers = (t["weight1"], t["bias1"], t["weight2"], t["bias2"])
        return packed_feedforward(t["x"], *layers, *norm, backend=backend)


OPERATORS = ("linear", "linear_norm", "feedforward")
CASES = {
    "float32": Case(),
    "float16": Case(dtype=HALF),
    "bfloat16": Case(dtype=BRAIN),
    "no rows": Case(capacity=0, count=None),
    "one row": Case(capacity=1, count=None),
    "all rows, prime": Case(capacity=131, count=None),
    "none of a capacity": Case(count=0),
    "one of a capacity": Case(count=1, dtype=BRAIN),
    "a whole capacity": Case(count=37),
    "several tiles": Case(capacity=200, count=130, hidden=200),
    "tiles past the count": Case(capacity=400, count=64, dtype=BRAIN),
    "a tile and a row": Case(capacity=300, count=65, dtype=HALF),
    "width 96": Case(width=96, dtype=BRAIN),
    "odd widths": Case(width=37, hidden=101),
    "odd widths, float16": Case(width=37, hidden=101, dtype=HALF),
    "width 1": Case(width=1, hidden=3),
    "R50": Case(capacity=70, count=67, width=256, hidden=1024, dtype=BRAIN),
    "R50, float32": Case(capacity=70, count=67, width=256, hidden=384),
    "slices": Case(strided=True),
    "slices, bfloat16": Case(strided=True, dtype=BRAIN),
    "float32 rows, bfloat16 weights": Case(dtype=BRAIN, rows=SINGLE),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_rows_in_use(name: str, operator: str) -> None:
    case = CASES[name]
    result, expected = case.run(operator), case.run(operator, exact=True)
    assert result.shape == (case.capacity, expected.shape[1])
    assert result.dtype == (case.dtype if operator == "linear" else case.rows or case.dtype)
    assert relative_error(result[: len(expected)], expected) < TOLERANCE[case.dtype]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU rounds the factors")
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_float32_feedforward_in_one_kernel(dtype: torch.dtype) -> None:
    """float32 weights take two launches by choice; the fused kernel's arithmetic is proved without rounding here."""
    from ats_detr.kernels.gpu import linear as gpu

    case = Case(capacity=150, count=97, width=96, hidden=300, rows=SINGLE, dtype=dtype)
    t = case.tensors()
    layers = (t["weight1"], t["bias1"], t["weight2"], t["bias2"], t["norm_weight"], t["norm_bias"])
    result = gpu.fused_feedforward(t["x"], *layers, 1e-5, case.plan().num_rows)
    assert relative_error(result[:97], case.run("feedforward", exact=True)) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("count", [0, 1, 64, 65, 130, 200])
@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_past_the_count_are_neither_read_nor_written(
    operator: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs past the count are NaN (see `Case.tensors`), outputs there keep their poison."""
    case = Case(capacity=200, count=count, dtype=HALF)
    for name in ("new_empty", "empty"):
        owner = Tensor if name == "new_empty" else torch
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=original, **k: make(*a, **k).fill_(-77.0))
    result = case.run(operator)
    monkeypatch.undo()
    assert (result[count:] == -77.0).all() and result[count:].numel() == (200 - count) * result.shape[1]
    assert relative_error(result[:count], case.run(operator, exact=True)) < TOLERANCE[HALF]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("count", [0, 1, 30, 37])
def test_only_tokens_of_rows_in_use_are_written_to_the_memory(count: int, strided: bool) -> None:
    case = Case(count=count, strided=strided, rows=SINGLE, dtype=HALF)
    before, plan = case.tensors()["memory"], case.plan()
    memory, rows = before.clone(memory_format=torch.preserve_format), case.run("linear", exact=True)
    if strided:
        memory = before._base.clone()[..., before.shape[-1] : 2 * before.shape[-1]]
        surroundings = memory._base.clone()
    assert case.run("linear", memory=memory) is memory
    kept = plan.slot_BS >= 0
    assert torch.equal(memory[~kept], before[~kept])
    assert relative_error(memory[kept], rows) < TOLERANCE[HALF]
    if strided:
        width = memory.shape[-1]
        assert torch.equal(memory._base[..., :width], surroundings[..., :width])
        assert torch.equal(memory._base[..., 2 * width :], surroundings[..., 2 * width :])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_memory_with_tokens_of_uneven_distance(backend: str) -> None:
    case = Case(dtype=SINGLE)
    memory = case.tensors()["memory"]
    memory = torch.cat([memory, memory], dim=1)[:, : case.capacity]  # images farther apart than their tokens
    case.run("linear", memory=memory, backend=backend)
    kept = case.plan().slot_BS >= 0
    assert relative_error(memory[kept], case.run("linear", exact=True)) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("operator", OPERATORS)
def test_definition_is_the_plain_module(operator: str) -> None:
    case = Case(count=None)
    t = {name: tensor.double() for name, tensor in case.tensors().items()}
    norm = ((case.width,), t["norm_weight"], t["norm_bias"], 1e-5)
    expected = {
        "linear": lambda: linear(t["x"] + t["add"], t["weight1"], t["bias1"]),
        "linear_norm": lambda: layer_norm(t["x"] + linear(t["wide"], t["weight2"], t["bias2"]), *norm),
        "feedforward": lambda: layer_norm(
            t["x"] + linear(linear(t["x"], t["weight1"], t["bias1"]).relu(), t["weight2"], t["bias2"]), *norm
        ),
    }[operator]()
    assert torch.allclose(case.run(operator, exact=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_result_of_another_dtype(backend: str) -> None:
    """16-bit factors are multiplied exactly: a rounded result would have ties."""
    case = Case(dtype=BRAIN)
    t = case.tensors()
    result = packed_linear(
        t["x"], t["weight1"], t["bias1"], case.plan().num_rows, dtype=SINGLE, backend=backend
    )
    exact = linear(t["x"][:23].double(), t["weight1"].double(), t["bias1"].double())
    assert result.dtype == SINGLE and relative_error(result[:23], exact) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_casts_weights_and_keeps_the_residual_stream(backend: str) -> None:
    case = Case(dtype=SINGLE)
    for operator in OPERATORS:
        with torch.autocast(DEVICE, dtype=BRAIN), torch.no_grad():
            result = case.run(operator, backend=backend)
        assert result.dtype == (BRAIN if operator == "linear" else SINGLE)
        # weights and hidden channels are rounded: 2^-9, by truncation in the interpreter
        assert relative_error(result[:23], case.run(operator, exact=True)) < TOLERANCE[BRAIN]


def test_the_library_computes_exact_plans_and_the_kernels_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    from ats_detr.kernels.dispatch import choose_backend

    class OnCuda:
        dtype, is_cuda = SINGLE, True

    monkeypatch.delenv("ATS_DETR_BACKEND", raising=False)
    assert choose_backend([OnCuda()]) == "triton"
    assert choose_backend([OnCuda()], kernel_pays=False) == "reference"
    assert choose_backend([OnCuda()], "triton", kernel_pays=False) == "triton"


def test_kernels_compute_where_they_were_measured_faster() -> None:
    from ats_detr.kernels.linear import _kernel_pays

    assert _kernel_pays(torch.zeros(1, dtype=BRAIN))
    assert not _kernel_pays(torch.zeros(1, dtype=HALF), fused=False)
    assert not _kernel_pays(torch.zeros(1))


# ------------------------------------------------------------------------------------------------------------ operators
BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case = Case(capacity=20, count=None, width=32, hidden=48)
    t, plan = case.tensors(), case.plan()
    count = torch.tensor([20], dtype=torch.int32, device=DEVICE)
    norm = (t["norm_weight"], t["norm_bias"], 1e-5, count)
    operators = torch.ops.ats_detr
    layer = (t["x"], t["weight1"], t["bias1"], count, t["add"])
    torch.library.opcheck(operators.packed_linear.default, (*layer, SINGLE, True, backend))
    index = (plan.token_index_K, plan.image_index_K, plan.slot_BS)
    torch.library.opcheck(operators.packed_linear_.default, (t["memory"], *layer, *index, backend))
    layer2 = (t["wide"], t["weight2"], t["bias2"], t["x"], *norm)
    torch.library.opcheck(operators.packed_linear_norm.default, (*layer2, backend))
    layers = (t["x"], t["weight1"], t["bias1"], t["weight2"], t["bias2"], *norm)
    torch.library.opcheck(operators.packed_feedforward.default, (*layers, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    case = Case()
    t, plan = case.tensors(), case.plan()

    def step(x: Tensor, count: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        norm = (t["norm_weight"], t["norm_bias"], 1e-5, count)
        made = packed_linear(x, t["weight1"], t["bias1"], count, add_KC=t["add"], backend=backend)
        x = packed_linear_norm(made, t["weight2"], t["bias2"], x, *norm, backend=backend)
        layers = (t["weight1"], t["bias1"], t["weight2"], t["bias2"])
        x = packed_feedforward(x, *layers, *norm, backend=backend)
        packed_linear(x, t["weight1"], t["bias1"], count, memory_BSF=memory, plan=plan, backend=backend)
        return x[:23], memory

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with torch.no_grad():
            results.append(function(t["x"], plan.num_rows, t["memory"].clone()))
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < 1e-6


def test_flops_of_the_capacity() -> None:
    case = Case(capacity=20, count=None, width=32, hidden=48)
    t = case.tensors()
    norm = (t["norm_weight"], t["norm_bias"], 1e-5, None, "reference")
    layers = (t["x"], t["weight1"], t["bias1"], t["weight2"], t["bias2"])
    with FlopCounterMode(display=False) as counter:
        torch.ops.ats_detr.packed_linear(*layers[:3], None, None, SINGLE, False, "reference")
        torch.ops.ats_detr.packed_linear_norm(t["wide"], t["weight2"], t["bias2"], t["x"], *norm)
        torch.ops.ats_detr.packed_feedforward(*layers, *norm)
    assert counter.get_total_flops() == 4 * 2 * 20 * 32 * 48


def test_gradients_are_refused() -> None:
    case = Case(count=None)
    t = case.tensors()
    layer = (t["x"], t["weight1"].requires_grad_(), t["bias1"])
    with pytest.raises(RuntimeError, match="no_grad"):
        packed_linear(*layer)
    with torch.no_grad():
        assert not packed_linear(*layer).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight_FC=torch.zeros(80, 63)), r"weight \[80, 63\].*\[F, 64\]"),
        (dict(bias_F=torch.zeros(79)), r"bias \[79\].*\[80\]"),
        (dict(x_KC=torch.zeros(37, 64).int()), "floating point"),
        (dict(add_KC=torch.zeros(1, 64)), r"add \[1, 64\].*\[37, 64\]"),
        (dict(dtype=torch.int32), "floating point"),
        (dict(num_rows=torch.zeros(2, dtype=torch.int32)), "one int32"),
        (dict(num_rows=torch.zeros(1)), "one int32"),
        (dict(memory_BSF=torch.zeros(2, 37, 80)), "both or neither"),
        (dict(plan=Case().plan()), "both or neither"),
        (dict(memory_BSF=torch.zeros(2, 36, 80), plan=Case().plan()), r"\[2, 37, 80\]"),
        (dict(memory_BSF=torch.zeros(2, 37, 1).expand(2, 37, 80), plan=Case().plan()), "expanded"),
        (dict(memory_BSF=torch.zeros(2, 37, 80), plan=Case(capacity=38).plan()), "must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict(x_KC=torch.zeros(37, 64), weight_FC=torch.zeros(80, 64), bias_F=torch.zeros(80))
    with pytest.raises(ValueError, match=message):
        packed_linear(**{**arguments, **change})


def test_wide_rows_are_left_to_the_library() -> None:
    case = Case(width=300, count=None)
    assert relative_error(case.run("feedforward", backend=None), case.run("feedforward", exact=True)) < 1e-5
    with pytest.raises(ValueError, match="300 channels"):
        case.run("feedforward", backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_capacities_on_the_gpu(operator: str, dtype: torch.dtype) -> None:
    for count in (0, 1, 1900, 7128, 21385):
        case = Case(capacity=21385, count=count, width=256, hidden=1024, dtype=dtype, images=1)
        assert relative_error(case.run(operator)[:count], case.run(operator, exact=True)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_one_cuda_graph_serves_every_count_and_waits_for_nothing() -> None:
    case = Case(capacity=3000, count=3000, width=256, hidden=1024, dtype=BRAIN)
    t, plan = case.tensors(), case.plan()
    count, memory = plan.num_rows.clone(), t["memory"]
    layers = (t["weight1"], t["bias1"], t["weight2"], t["bias2"], t["norm_weight"], t["norm_bias"])

    def layer() -> Tensor:
        hidden = packed_linear(t["x"], t["weight1"], t["bias1"], count, add_KC=t["add"])
        x = packed_linear_norm(hidden, t["weight2"], t["bias2"], t["x"], *layers[4:], 1e-5, count)
        packed_linear(x, t["weight1"], t["bias1"], count, memory_BSF=memory, plan=plan)
        return packed_feedforward(x, *layers, 1e-5, count)

    expected = layer().clone()  # compiles and chooses
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = layer()
    for used in (0, 1, 100, 3000):
        count.fill_(used)
        captured.fill_(-77.0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[:used], expected[:used])
        assert (captured[used:] == -77.0).all()
