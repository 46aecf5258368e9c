"""Deformable attention and its map give the reference's result or one clear error for every input: dtypes, strides,
storage offsets, sizes, number ranges, non-finite numbers, transforms of torch.func, forms of `level_shapes`."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ats_detr.kernels import deformable_attention, deformable_attention_map, multi_scale_deformable_attention
from ats_detr.kernels import reference as definitions
from ats_detr.kernels.dispatch import _KNOWS_EXPORT
from ats_detr.kernels.levels import as_level_shapes

from .cases import DEVICE, relative_error
from .cases import TOLERANCE as OF_MANY_NUMBERS
from .test_attention import METHODS, by_kernel, choose

gpu = pytest.importorskip("ats_detr.kernels.gpu.attention", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning:triton")

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
BACKENDS = ("triton", "reference")
TOLERANCE = {**OF_MANY_NUMBERS, BRAIN: 2**-7}  # of a single number that the interpreter truncates to bfloat16
LEVELS = ((6, 7), (3, 4))
NUM_TOKENS = 54


# ------------------------------------------------------------------------------------------------- random problems
def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _offset(tensor: Tensor) -> Tensor:
    """The same numbers one element past the start of their storage: not aligned to more than one element."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


def _columns(tensor: Tensor) -> Tensor:
    """A slice of rows that have an odd number of further elements."""
    rows = tensor.flatten(1)
    unread = torch.nan if rows.is_floating_point() else 1
    wide = torch.cat([rows, rows.new_full((len(rows), 3), unread)], 1)
    return wide[:, : rows.shape[1]].view(tensor.shape)


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "storage offset": _offset,
    "slice of wider rows": _columns,
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "last axes transposed": _transposed,
    "first axes transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded rows": lambda tensor: tensor[:1].expand_as(tensor),
    # The dispatcher negates it; masks have no negation.
    "negated view": lambda tensor: tensor if tensor.dtype == torch.bool else torch._neg_view(-tensor),
    "expanded last axis": lambda tensor: tensor[..., :1].expand_as(tensor),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    levels: tuple[tuple[int, int], ...]
    batch: int
    queries: int
    heads: int
    head_dim: int
    points: int
    boxes: bool
    dtype: torch.dtype
    offset_dtype: torch.dtype
    logit_dtype: torch.dtype
    reference_dtype: torch.dtype
    layouts: tuple[str, ...]
    """Of value, offsets, logits, references and the output's gradient."""
    index: str
    spread: float
    shift: float
    method: str
    seed: int

    def tensors(self) -> list[Tensor]:
        """Value, offsets, logits, references, gradient."""
        g = torch.Generator().manual_seed(self.seed)
        num_queries, num_levels = self.batch * self.queries, len(self.levels)
        samples = (num_queries, self.heads, num_levels, self.points)
        num_tokens = sum(height * width for height, width in self.levels)
        tensors = (
            torch.randn(self.batch, num_tokens, self.heads, self.head_dim, generator=g).to(self.dtype),
            (torch.randn(*samples, 2, generator=g) * self.spread).to(self.offset_dtype),
            (torch.randn(samples, generator=g) + self.shift).to(self.logit_dtype),
            torch.rand(num_queries, num_levels, 4 if self.boxes else 2, generator=g).to(self.reference_dtype),
            torch.randn(num_queries, self.heads * self.head_dim, generator=g).to(self.dtype),
        )
        return [LAYOUTS[name](t).to(DEVICE) for t, name in zip(tensors, self.layouts, strict=True)]

    def image_index(self) -> Tensor | None:
        if self.index == "none":
            return None
        g = torch.Generator().manual_seed(self.seed)
        index = torch.randint(self.batch, (self.batch * self.queries,), generator=g)
        if self.index == "ascending int32":
            return index.sort().values.int().to(DEVICE)
        if self.index == "strided int64":
            return index.repeat_interleave(2)[::2].to(DEVICE)
        if self.index == "expanded uint8":
            return torch.full((1,), self.batch - 1, dtype=torch.uint8, device=DEVICE).expand(len(index))
        return index.to(torch.int16).to(DEVICE)

    def attend(self, backend: str, exact: bool = False, deterministic: bool = False) -> dict[str, Tensor]:
        """Output and gradients."""
        value, offsets, logits, references, grad = self.tensors()
        if exact:
            value, offsets, logits, references, grad = (
                t.double() for t in (value, offsets, logits, references, grad)
            )
        inputs = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
        arguments = (value, self.levels, references, offsets, logits, self.image_index())
        out = deformable_attention(*arguments, backend=backend, deterministic=deterministic)
        gradients = torch.autograd.grad(out, inputs, grad)
        return dict(zip(("out", "value", "offsets", "logits"), (out.detach(), *gradients), strict=True))


FLOATS = st.sampled_from([SINGLE, SINGLE, BRAIN, HALF, DOUBLE])
PROBLEMS = st.builds(
    Problem,
    levels=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3).map(tuple),
    batch=st.integers(1, 3),
    queries=st.integers(1, 5),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 3, 4, 8, 12, 16, 33]),
    points=st.integers(1, 5),
    boxes=st.booleans(),
    dtype=st.sampled_from([SINGLE, BRAIN, HALF]),
    offset_dtype=FLOATS,
    logit_dtype=FLOATS,
    reference_dtype=st.sampled_from([SINGLE, DOUBLE, HALF]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 5),
    index=st.sampled_from(["none", "ascending int32", "strided int64", "expanded uint8", "shuffled int16"]),
    spread=st.sampled_from([1e-3, 1.0, 3.0, 50.0, 1e4]),
    shift=st.sampled_from([0.0, 0.0, -100.0, 1e4, -3e4]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 1000),
)


def compare(problem: Problem) -> None:
    """Output and every gradient of the kernels, and the reference's output without gradients, against float64."""
    with pytest.MonkeyPatch.context() as patch:
        result = problem.attend("triton", deterministic=choose(problem.method, patch))
    expected = problem.attend("reference", exact=True)
    value, offsets, logits, references, _ = problem.tensors()
    arguments = (value, problem.levels, references, offsets, logits, problem.image_index())
    with torch.no_grad():
        result["without gradients"] = deformable_attention(*arguments, backend="reference")
    expected["without gradients"] = expected["out"]
    for name, tensor in result.items():
        dtype = {"offsets": problem.offset_dtype, "logits": problem.logit_dtype}.get(name, problem.dtype)
        assert tensor.dtype == dtype, name
        # gradients by offsets and logits pass through the value's dtype, too
        allowed = max(TOLERANCE[problem.dtype], TOLERANCE.get(dtype, 0.0))
        if (
            name == "logits" and problem.dtype != SINGLE
        ):  # <gradient, rounded output> subtracted, from nearly the same
            allowed *= 3
        error = relative_error(tensor, expected[name])
        assert error < allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@by_kernel
@settings(PROPERTY, max_examples=8)
@given(problem=PROBLEMS)
def test_any_dtype_stride_size_and_range(problem: Problem) -> None:
    compare(problem)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@by_kernel
@settings(PROPERTY, max_examples=600)
@given(problem=PROBLEMS)
def test_any_dtype_stride_size_and_range_in_many_examples(problem: Problem) -> None:
    compare(problem)


@by_kernel
@settings(PROPERTY, max_examples=8)
@given(problem=PROBLEMS, weight_dtype=FLOATS)
def test_classical_operator_of_any_dtype_stride_size_and_range(problem: Problem, weight_dtype) -> None:
    """Locations and weights have layouts of their own, here over [B, Q, ...]."""
    problem = dataclasses.replace(problem, shift=0.0)
    value, offsets, logits, references, grad = problem.tensors()
    shape = (problem.batch, problem.queries)
    locations = definitions.sampling_locations(references, offsets, problem.levels).unflatten(0, shape)
    locations = LAYOUTS[problem.layouts[1]](locations.to(problem.offset_dtype))
    weights = definitions.attention_weights(logits).unflatten(0, shape).to(weight_dtype)
    weights = LAYOUTS[problem.layouts[2]](weights)
    results = []
    for backend, exact in (("triton", False), ("reference", True)):
        with pytest.MonkeyPatch.context() as patch:
            deterministic = choose(problem.method, patch)
            inputs = [t.double() if exact else t.detach() for t in (value, locations, weights)]
            v, x, w = (tensor.requires_grad_() for tensor in inputs)
            out = multi_scale_deformable_attention(
                v, problem.levels, x, w, backend=backend, deterministic=deterministic
            )
            gradients = torch.autograd.grad(out, (v, x, w), grad.view_as(out).to(out.dtype))
        results.append((out.detach(), *gradients))
    for name, result, expected in zip(("out", "value", "locations", "weights"), *results, strict=True):
        allowed = max(TOLERANCE[problem.dtype], TOLERANCE.get(result.dtype, 0.0))
        error = relative_error(result, expected)
        assert error < allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


@by_kernel
@settings(PROPERTY, max_examples=8)
@given(problem=PROBLEMS, into=st.sampled_from(["none", *LAYOUTS]), deterministic=st.booleans())
def test_attention_map_of_any_dtype_stride_size_and_range(
    problem: Problem, into: str, deterministic: bool
) -> None:
    if into.startswith(("expanded", "negated")):
        into = "none"  # cannot be written to
    _, offsets, logits, references, _ = problem.tensors()
    num_tokens = sum(height * width for height, width in problem.levels)
    before = torch.rand(problem.batch, num_tokens, device=DEVICE)
    arguments = (offsets, logits, problem.levels, problem.batch)
    torch.use_deterministic_algorithms(deterministic)
    try:
        target = None if into == "none" else LAYOUTS[into](before.clone())
        result = deformable_attention_map(references, *arguments, into=target, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    expected = definitions.deformable_attention_map(references.double(), offsets.double(), *arguments[1:])
    if target is not None:
        assert result is target
        expected = expected + before
    assert result.dtype == SINGLE
    assert relative_error(result, expected) < 2e-5  # the reference's map is float32 as well


# -------------------------------------------------------------------------------------------- arguments that do not fit
def problem(num_queries: int = 8, batch: int = 1, heads: int = 2, head_dim: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (num_queries, heads, 2, 4)
    tensors = dict(
        value_BSHD=torch.randn(batch, NUM_TOKENS, heads, head_dim, generator=g),
        reference_points=torch.rand(num_queries, 2, 2, generator=g),
        offsets_NHLP2=torch.randn(*shape, 2, generator=g),
        logits_NHLP=torch.randn(shape, generator=g),
    )
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def index(*images: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(images, dtype=dtype, device=DEVICE)


WRONG = {
    "value of three axes": (dict(value_BSHD=torch.zeros(1, NUM_TOKENS, 16)), r"\[B, S, H, D\]"),
    "value of other heads": (dict(value_BSHD=torch.zeros(1, NUM_TOKENS, 3, 8)), "H = 2 heads"),
    "value of integers": (dict(value_BSHD=torch.zeros(1, NUM_TOKENS, 2, 8).int()), "floating point"),
    "complex value": (dict(value_BSHD=torch.zeros(1, NUM_TOKENS, 2, 8).cfloat()), "floating point"),
    "value elsewhere": (dict(value_BSHD=torch.zeros(1, NUM_TOKENS, 2, 8, device="meta")), "one device"),
    "offsets of integers": (dict(offsets_NHLP2=torch.zeros(8, 2, 2, 4, 2).int()), "floating point"),
    "offsets of three coordinates": (dict(offsets_NHLP2=torch.zeros(8, 2, 2, 4, 3)), r"\[8, 2, 2, 4, 2\]"),
    "offsets of fewer queries": (dict(offsets_NHLP2=torch.zeros(7, 2, 2, 4, 2)), r"\[8, 2, 2, 4, 2\]"),
    "logits of two axes": (dict(logits_NHLP=torch.zeros(8, 16)), r"H, 2, P\]"),
    "boolean logits": (dict(logits_NHLP=torch.zeros(8, 2, 2, 4).bool()), "floating point"),
    "references of one level": (dict(reference_points=torch.zeros(8, 1, 2)), r"\[8, 2, 2 or 4\]"),
    "references of three numbers": (dict(reference_points=torch.zeros(8, 2, 3)), r"\[8, 2, 2 or 4\]"),
    "references without levels": (dict(reference_points=torch.zeros(8, 2)), r"\[8, 2, 2 or 4\]"),
    "integer references": (dict(reference_points=torch.zeros(8, 2, 2).long()), "floating point"),
    "index too short": (dict(image_index_N=torch.zeros(3).int()), r"image_index_N \[3\]"),
    "index of two axes": (dict(image_index_N=torch.zeros(8, 1).int()), r"image_index_N \[8, 1\]"),
    "index of floats": (dict(image_index_N=torch.zeros(8)), "integers"),
    "index of booleans": (dict(image_index_N=torch.zeros(8).bool()), "integers"),
    "index elsewhere": (dict(image_index_N=torch.zeros(8, device="meta").int()), "one device"),
    "count of floats": (dict(num_rows=torch.zeros(1)), "integers"),
    "two counts": (dict(num_rows=torch.zeros(2).int()), r"num_rows \[2\]"),
    "queries that do not split": (dict(value_BSHD=torch.zeros(3, NUM_TOKENS, 2, 8)), "image_index_N"),
    "no images": (dict(value_BSHD=torch.zeros(0, NUM_TOKENS, 2, 8)), "0 images"),
    "levels of other tokens": (dict(level_shapes=((6, 7), (3, 5))), "57 tokens: must have 54"),
    "levels of fractions": (dict(level_shapes=((6.0, 7.0), (3, 4))), "integers"),
    "levels of three numbers": (dict(level_shapes=((6, 7, 1), (3, 4, 1))), "height, width"),
    "levels in one row": (dict(level_shapes=[6, 7, 3, 4]), "height, width"),
    "no level shapes": (dict(level_shapes=None), "height, width"),
    "a negative level": (dict(level_shapes=((-6, -7), (3, 4))), "at least 1"),
    "levels as a row": (dict(level_shapes=torch.tensor([6, 7, 3, 4])), r"\[L, 2\]|height, width"),
    "levels as floats": (dict(level_shapes=torch.tensor(LEVELS).float()), "integers"),
    "levels of another number": (dict(level_shapes=((6, 9),)), r"\[N, H, 1, P\]"),
    "unknown backend": (dict(backend="cuda"), "backend 'cuda'"),
    "levels on a device": (
        dict(level_shapes=torch.zeros(2, 2, dtype=torch.int64, device="meta")),
        "synchronise",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    change, message = WRONG[name]
    change = {
        key: value.to(DEVICE)
        if isinstance(value, Tensor) and value.device.type != "meta" and key != "level_shapes"
        else value
        for key, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        deformable_attention(**{**problem(), "level_shapes": LEVELS, "backend": backend, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_images=3), "must be a multiple"),
        (dict(num_images=0), "must be a multiple"),
        (dict(num_images=-2), "must be a multiple"),
        (dict(into=torch.zeros(2, NUM_TOKENS - 5)), r"float32 \[2, 54\]"),
        (dict(into=torch.zeros(4, NUM_TOKENS)), r"float32 \[2, 54\]"),
        (dict(into=torch.zeros(2 * NUM_TOKENS)), r"float32 \[2, 54\]"),
        (dict(into=torch.zeros(2, NUM_TOKENS).half()), "float32"),
        (dict(into=torch.zeros(2, NUM_TOKENS).double()), "float32"),
        (dict(into=torch.zeros(2, NUM_TOKENS, device="meta")), "one device"),
        (dict(into=torch.zeros(2, NUM_TOKENS, requires_grad=True)), "gradient"),
        (dict(reference_points=torch.zeros(8, 2, 3)), r"\[8, 2, 2 or 4\]"),
        (dict(logits_NHLP=torch.zeros(8, 2, 2, 4).long()), "floating point"),
        (dict(level_shapes=torch.zeros(2, 2, dtype=torch.int64, device="meta")), "synchronise"),
    ],
)
def test_arguments_of_the_map_that_do_not_fit_are_refused(change: dict, message: str, backend: str) -> None:
    change = {
        key: value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.device.type != "meta"
        else value
        for key, value in change.items()
    }
    arguments = dict(problem(), level_shapes=LEVELS, num_images=2)
    del arguments["value_BSHD"]
    with pytest.raises(ValueError, match=message):
        deformable_attention_map(**{**arguments, **change}, backend=backend)


POINTS = (3, 6, 3)
OF_POINTS = ((4, 5), (3, 2), (1, 2))


def placed(*, num_samples: int = 12) -> dict:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, num_samples)
    tensors = dict(
        value_BSHD=torch.randn(2, 28, 2, 4, generator=generator),
        locations_BQHLP2=torch.rand(*shape, 2, generator=generator) * 1.4 - 0.2,
        weights_BQHLP=torch.rand(shape, generator=generator),
    )
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_points=(3, 6)), r"num_points \(3, 6\): must be 3 numbers, one for each level"),
        (dict(num_points=(3, 6, 4)), r"\[B, Q, H, 13\]"),
        (dict(num_points=(3, 9, 0)), "integers >= 1"),
        (dict(num_points=(3, 3, 3, 3)), "must be 3 numbers, one for each level"),
        (dict(num_points=(3.0, 6.0, 3.0)), "integers >= 1"),
        (dict(num_points=12), "integers >= 1"),
        (dict(num_points=POINTS, weights_BQHLP=torch.zeros(2, 3, 2, 3, 4)), r"weights \[2, 3, 2, 3, 4\]"),
        (
            dict(num_points=POINTS, locations_BQHLP2=torch.zeros(2, 3, 2, 11, 2)),
            r"locations \[2, 3, 2, 11, 2\]",
        ),
        (dict(), r"\[B, Q, H, 3, P\]; for the points of all levels in one dimension pass num_points"),
        (dict(num_points=POINTS, method="discrete"), "nearest pixel"),
        (dict(num_points=POINTS, padding_mode="border"), "must be 'zeros'"),
        (dict(num_points=POINTS, align_corners=True), "grid_sample"),
    ],
)
def test_points_of_levels_that_do_not_fit_are_refused(change: dict, message: str, backend: str) -> None:
    change = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in change.items()}
    with pytest.raises(ValueError, match=message):
        multi_scale_deformable_attention(**{**placed(), **change}, level_shapes=OF_POINTS, backend=backend)


def test_gradients_of_levels_with_different_points() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in placed().values()]
    assert torch.autograd.gradcheck(
        lambda value, *samples: multi_scale_deformable_attention(
            value, OF_POINTS, *samples, num_points=POINTS
        ),
        tensors,
    )


def test_equal_numbers_of_points_are_those_of_an_axis() -> None:
    tensors = placed()
    flat = multi_scale_deformable_attention(**tensors, level_shapes=OF_POINTS, num_points=(4, 4, 4))
    for name in ("locations_BQHLP2", "weights_BQHLP"):
        tensors[name] = tensors[name].unflatten(3, (3, 4))
    assert torch.equal(flat, multi_scale_deformable_attention(**tensors, level_shapes=OF_POINTS))


@by_kernel
def test_levels_with_different_points_compile_into_one_graph() -> None:
    results = []
    for compiled in (False, True):
        tensors = {name: tensor.requires_grad_() for name, tensor in placed().items()}
        function = multi_scale_deformable_attention
        function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        out = function(**tensors, level_shapes=OF_POINTS, num_points=POINTS, backend="triton")
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(tensors.values()))])
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < TOLERANCE[SINGLE]


def test_limits_of_the_kernels_are_an_error_on_request_and_else_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    torch.manual_seed(0)
    for levels, points in ((((2, 2),) * 9, 1), (((2, 2),), 17), (((1, 40000),), 1)):
        num_tokens = sum(height * width for height, width in levels)
        value = torch.randn(1, num_tokens, 1, 1, device=DEVICE)
        shape = (3, 1, len(levels), points)
        raw = (torch.rand(3, len(levels), 2), torch.randn(*shape, 2), torch.randn(shape))
        arguments = (value, levels, *(tensor.to(DEVICE) for tensor in raw))
        with pytest.raises(ValueError, match="maximum"):
            deformable_attention(*arguments, backend="triton")
        expected = deformable_attention(*arguments, backend="reference")
        assert torch.equal(deformable_attention(*arguments), expected)
        with pytest.raises(ValueError, match="maximum"):
            deformable_attention_map(*arguments[2:], levels, 1, backend="triton")
        assert deformable_attention_map(*arguments[2:], levels, 1).sum() > 0


# --------------------------------------------------------------------------------------------------- images of queries
@by_kernel
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_no_image_and_of_bad_coordinates_agree_with_the_reference(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN where the reference is NaN, in the output and every gradient; other rows are as if alone."""
    deterministic = choose(method, monkeypatch)
    results = []
    for backend in BACKENDS:
        tensors = problem(9, batch=2)
        with torch.no_grad():
            tensors["offsets_NHLP2"][5, 0, 1, 2, 0] = torch.nan
            tensors["offsets_NHLP2"][6, 1, 0, 3, 1] = torch.inf
            tensors["reference_points"][7, 0, 0] = -torch.inf
        inputs = [tensors[name].requires_grad_() for name in ("value_BSHD", "offsets_NHLP2", "logits_NHLP")]
        images = index(1, -1, 0, 2, 2**31 - 1, 0, 1, 0, 1)
        out = deformable_attention(
            **tensors, level_shapes=LEVELS, image_index_N=images, backend=backend, deterministic=deterministic
        )
        results.append(
            [out.detach(), *torch.autograd.grad(out.nan_to_num().square().sum() + out.sum(), inputs)]
        )
    for name, result, expected in zip(("out", "value", "offsets", "logits"), *results, strict=True):
        assert torch.equal(result.isnan(), expected.isnan()), name
        assert relative_error(result.nan_to_num(), expected.nan_to_num()) < TOLERANCE[SINGLE], name
    out, value, offsets, logits = results[0]
    assert out[[1, 3, 4]].isnan().all() and out[[0, 2, 8]].isfinite().all()
    assert value.isfinite().all() and offsets.isfinite().all()
    assert logits[[1, 3, 4]].isnan().all() and logits[[0, 2, 8]].isfinite().all()


@by_kernel
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_images_beyond_32_bits_are_no_images(backend: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        out = deformable_attention(
            **problem(3, batch=2), level_shapes=LEVELS, backend=backend,
            image_index_N=index(1, 2**32, -(2**32) + 1, dtype=torch.int64),
        )  # fmt: skip
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_queries_in_any_order_of_images(backend: str, grad: bool) -> None:
    tensors, images = problem(8, batch=3), index(2, 0, 2, 1, 0, 0, 2, 1)
    order = images.argsort(stable=True)
    ordered = {name: t if name == "value_BSHD" else t[order] for name, t in tensors.items()}
    with torch.set_grad_enabled(grad):
        mixed, ascending = (
            deformable_attention(**t, level_shapes=LEVELS, image_index_N=i, backend=backend)
            for t, i in ((tensors, images), (ordered, images[order]))
        )
    assert torch.equal(mixed[order], ascending)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [-5, 0, 3, 100, 2**31 - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_any_count_of_rows(backend: str, count: int, packed: bool) -> None:
    tensors = problem(8, batch=2)
    images = index(0, 0, 1, 1, 1, 1, 1, 1) if packed else None
    arguments = dict(tensors, level_shapes=LEVELS, image_index_N=images, backend=backend)
    for num_rows in (index(count), index(count, dtype=torch.int64), index(count)[0]):
        with torch.no_grad():
            out = deformable_attention(**arguments, num_rows=num_rows)
            used = min(max(count, 0), 8)
            assert out.shape == (8, 16)
            assert torch.equal(out[:used], deformable_attention(**arguments)[:used])


# ------------------------------------------------------------------------------------------------------- number ranges
@by_kernel
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5, -1e5, torch.finfo(SINGLE).min])
def test_a_common_offset_of_the_logits_cancels(
    shift: float, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deterministic = choose(method, monkeypatch)
    tensors = problem()
    tensors["logits_NHLP"] = tensors["logits_NHLP"] + shift
    results = []
    for backend, dtype in (("triton", SINGLE), ("reference", DOUBLE)):
        cast = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        cast["reference_points"] = cast["reference_points"].detach()
        out = deformable_attention(**cast, level_shapes=LEVELS, backend=backend, deterministic=deterministic)
        inputs = [tensor for tensor in cast.values() if tensor.requires_grad]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < 1e-6
    del tensors["value_BSHD"]
    maps = [
        deformable_attention_map(**tensors, level_shapes=LEVELS, num_images=1, backend=b) for b in BACKENDS
    ]
    assert relative_error(*maps) < 1e-6


@by_kernel
def test_infinite_logits_are_those_of_the_softmax() -> None:
    outs = []
    for backend in BACKENDS:
        tensors = problem()
        tensors["logits_NHLP"][0, 0, 0, :2] = -torch.inf
        tensors["logits_NHLP"][1, 0] = -torch.inf
        tensors["logits_NHLP"][2, 0, 0, 0] = torch.inf
        tensors["logits_NHLP"][3, 1, 0, 0] = torch.nan
        outs.append(deformable_attention(**tensors, level_shapes=LEVELS, backend=backend))
    assert torch.equal(outs[0].isnan(), outs[1].isnan()) and outs[0].isnan().sum() == 24
    assert relative_error(outs[0].nan_to_num(), outs[1].nan_to_num()) < TOLERANCE[SINGLE]


@by_kernel
def test_values_that_are_not_finite_reach_the_samples_around_them() -> None:
    """Wherever the reference is not finite the kernel is not; where the kernel is finite both are equal."""
    tensors = problem(64)
    tensors["value_BSHD"][0, 10] = torch.inf
    tensors["value_BSHD"][0, 45] = torch.nan
    result, expected = (deformable_attention(**tensors, level_shapes=LEVELS, backend=b) for b in BACKENDS)
    finite = result.isfinite()
    assert 0 < finite.sum() < finite.numel()
    assert expected[finite].isfinite().all()
    assert relative_error(result[finite], expected[finite]) < TOLERANCE[SINGLE]


@by_kernel
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, 1e20])
def test_huge_coordinates_are_outside_of_the_map(value: float) -> None:
    tensors = problem()
    tensors["offsets_NHLP2"][:, 0] = value
    for backend, grad in itertools.product(BACKENDS, (False, True)):
        with torch.set_grad_enabled(grad):
            out = deformable_attention(**tensors, level_shapes=LEVELS, backend=backend)
        assert not out[:, :8].any() and out[:, 8:].any()


@by_kernel
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_levels_of_more_than_2_to_24_pixels(backend: str, grad: bool) -> None:
    side = 4100
    column = (torch.arange(side * side, device=DEVICE) % 128).to(BRAIN)
    value = column.view(1, -1, 1, 1).requires_grad_(grad)
    references = torch.tensor([[4009.5, 4099.5]], device=DEVICE).div(side).expand(4, 1, 2)
    offsets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], device=DEVICE).view(
        4, 1, 1, 1, 2
    )
    logits = torch.zeros(4, 1, 1, 1, device=DEVICE)
    with torch.set_grad_enabled(grad):
        out = deformable_attention(value, ((side, side),), references, offsets, logits, backend=backend)
    pixel = torch.tensor([4009, 4010, 4011, 4012], device=DEVICE)
    assert (out[:, 0] - (side * 4099 + pixel) % 128).abs().max() < 0.3  # float32 coordinates
    received = deformable_attention_map(
        references - 0.5 / side, offsets, logits, ((side, side),), 1, backend=backend
    )[0]
    assert received[side * 4099 + 4009 : side * 4099 + 4013].sum() > 3.5
    if grad and backend == "triton":  # the sums of four samples, at the same pixels
        (gradient,) = torch.autograd.grad(out.sum(), value)
        assert gradient.view(-1)[side * 4099 + 4008 : side * 4099 + 4014].sum() > 3.9


@by_kernel
@pytest.mark.parametrize("which", ["offsets_NHLP2", "logits_NHLP"])
def test_rows_beyond_the_reach_of_32_bit_offsets(which: str) -> None:
    """Memory between the rows is never touched, so that only pages of the rows themselves are committed."""
    pitch = 2**30
    tensors = problem(3, heads=1)
    tensors = {name: t.half() if name == which else t for name, t in tensors.items()}
    expected = deformable_attention(**tensors, level_shapes=LEVELS, backend="reference")
    far = torch.empty(2 * pitch + 64, dtype=HALF, device=DEVICE)
    far = far.as_strided(tensors[which].shape, (pitch, *tensors[which].stride()[1:])).copy_(tensors[which])
    result = deformable_attention(**{**tensors, which: far}, level_shapes=LEVELS, backend="triton")
    assert relative_error(result, expected) < TOLERANCE[SINGLE]


def test_16_bit_gradients_are_read_from_aligned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient may start at an odd element, for instance where the output was concatenated with something."""
    read, load = [], gpu.row_kind
    original = gpu.aligned

    def spy(tensor: Tensor) -> Tensor:
        read.append(original(tensor))
        return read[-1]

    monkeypatch.setattr(gpu, "aligned", spy)
    value = problem()["value_BSHD"].bfloat16().requires_grad_()
    arguments = {**problem(), "value_BSHD": value, "level_shapes": LEVELS}
    out = deformable_attention(**arguments, backend="triton")
    one = torch.ones(1, dtype=BRAIN, device=DEVICE)
    (gradient,) = torch.autograd.grad(torch.cat([one, out.flatten()]).sum(), value)
    assert load(value) == "bf16" and len(read) == 2
    assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in read)
    (expected,) = torch.autograd.grad(deformable_attention(**arguments, backend="reference").sum(), value)
    assert relative_error(gradient, expected) < TOLERANCE[BRAIN]


# ---------------------------------------------------------------------------------------------------- sizes and shapes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("empty", ["queries", "levels", "points", "heads", "channels"])
def test_empty_problems_are_sums_of_nothing(backend: str, batch: int, empty: str) -> None:
    levels = () if empty == "levels" else LEVELS
    sizes = dict(queries=3 if batch else 0, points=4, heads=2, channels=8)
    sizes[empty] = 0
    num_queries, heads = batch * sizes["queries"], sizes["heads"]
    num_tokens = sum(height * width for height, width in levels)
    samples = (num_queries, heads, len(levels), sizes["points"])
    value = torch.ones(batch, num_tokens, heads, sizes["channels"], device=DEVICE).requires_grad_()
    offsets = torch.zeros(*samples, 2, device=DEVICE).requires_grad_()
    logits = torch.zeros(samples, device=DEVICE).requires_grad_()
    references = torch.rand(num_queries, len(levels), 2, device=DEVICE)
    split = (batch, sizes["queries"])
    for images in (None, torch.zeros(num_queries, dtype=torch.int32, device=DEVICE)):
        out = deformable_attention(value, levels, references, offsets, logits, images, backend=backend)
        assert out.shape == (num_queries, heads * sizes["channels"]) and not out.any()
        gradients = torch.autograd.grad(out.sum(), (value, offsets, logits))
        for gradient, tensor in zip(gradients, (value, offsets, logits), strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()
    classical = multi_scale_deformable_attention(
        value, levels, offsets.unflatten(0, split), logits.unflatten(0, split), backend=backend
    )
    assert classical.shape == (*split, heads * sizes["channels"]) and not classical.any()
    received = deformable_attention_map(references, offsets, logits, levels, batch, backend=backend)
    assert received.shape == (batch, num_tokens)
    if empty != "channels":
        assert not received.any()


@by_kernel
@pytest.mark.parametrize(("head_dim", "dtype"), [(257, SINGLE), (512, BRAIN), (1025, SINGLE)])
def test_heads_of_any_width(head_dim: int, dtype: torch.dtype) -> None:
    results = []
    for backend, exact in (("triton", dtype), ("reference", DOUBLE)):
        tensors = problem(2, heads=2, head_dim=head_dim)
        tensors["value_BSHD"] = tensors["value_BSHD"].to(dtype)
        inputs = {
            name: tensor.to(tensor.dtype if backend == "triton" else exact)
            for name, tensor in tensors.items()
        }
        wanted = [inputs[n].requires_grad_() for n in ("value_BSHD", "offsets_NHLP2", "logits_NHLP")]
        out = deformable_attention(**inputs, level_shapes=LEVELS, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), wanted)])
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) < 2 * TOLERANCE[dtype]


FORMS = {
    "tuples": lambda: LEVELS,
    "lists": lambda: [list(pair) for pair in LEVELS],
    "tensor": lambda: torch.tensor(LEVELS),
    "int32 tensor": lambda: torch.tensor(LEVELS, dtype=torch.int32),
    "rows of a tensor": lambda: list(torch.tensor(LEVELS)),
    "tensors of one number": lambda: [tuple(map(torch.tensor, pair)) for pair in LEVELS],
    "torch.Size": lambda: [torch.empty(pair).shape for pair in LEVELS],
}


@pytest.mark.parametrize("form", [*FORMS, "array"])
def test_forms_of_level_shapes(form: str) -> None:
    shapes = np.array(LEVELS) if form == "array" else FORMS[form]()
    assert as_level_shapes(shapes) == LEVELS


@pytest.mark.parametrize("grad", [False, True])
def test_every_operator_takes_a_tensor_of_level_shapes(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        _check_forms(torch.tensor(LEVELS), grad, compiled=False, backends=BACKENDS)


@pytest.mark.parametrize("form", ["tuples", "tensor", "rows of a tensor", "tensors of one number"])
def test_forms_of_level_shapes_in_one_graph(form: str) -> None:
    torch.compiler.reset()
    _check_forms(FORMS[form](), grad=True, compiled=True, backends=("reference",))


def _check_forms(shapes: object, grad: bool, compiled: bool, backends: tuple[str, ...]) -> None:
    tensors = problem()
    value, references, offsets, logits = tensors.values()
    received = torch.zeros(1, NUM_TOKENS, device=DEVICE)

    def run(value, references, offsets, logits, into, shapes, backend):
        fused = deformable_attention(value, shapes, references, offsets, logits, backend=backend)
        classical = multi_scale_deformable_attention(
            value, shapes, offsets[None], logits[None], backend=backend
        )
        learned = deformable_attention(
            value, shapes, offsets[:, 0, :, 0].sigmoid(), offsets, logits, backend=backend
        )
        deformable_attention_map(references, offsets, logits, shapes, 1, into=into, backend=backend)
        return fused, classical, learned

    for backend in backends:
        inputs = [tensor.detach().clone().requires_grad_(grad) for tensor in (value, offsets, logits)]
        outs = []
        for function, sizes in (
            (run, LEVELS),
            (torch.compile(run, fullgraph=True, backend="aot_eager"), shapes),
        ):
            if not compiled:
                function = run
            into = torch.zeros_like(received)
            out = function(inputs[0], references, *inputs[1:], into, sizes, backend)
            if grad:
                out += torch.autograd.grad(sum(tensor.sum() for tensor in out), inputs)
            outs.append((*out, into))
        for result, expected in zip(*reversed(outs), strict=True):
            assert relative_error(result, expected) < 1e-6


def test_a_tensor_of_level_shapes_is_checked_in_a_graph_too() -> None:
    torch.compiler.reset()
    function = torch.compile(multi_scale_deformable_attention, fullgraph=True, backend="aot_eager")
    value, _, offsets, logits = problem().values()
    with pytest.raises(ValueError, match="57 tokens"), torch.no_grad():
        function(value, torch.tensor(((6, 7), (3, 5))), offsets[None], logits[None], backend="reference")


# ------------------------------------------------------------------------------------------------------------ autograd
TRANSFORMS = {
    "grad": lambda loss, attend, value: torch.func.grad(loss)(value),
    "vjp": lambda loss, attend, value: torch.func.vjp(attend, value)[1](torch.ones(3, 16, device=DEVICE))[0],
    "vmap": lambda loss, attend, value: torch.func.vmap(attend)(torch.stack([value, 2 * value])),
    "vmap of grad": lambda loss, attend, value: torch.func.vmap(torch.func.grad(loss))(value[None]),
}


@pytest.mark.parametrize("which", ["value_BSHD", "offsets_NHLP2", "logits_NHLP", "reference_points"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_run_the_reference(
    transform: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transform == "vmap of grad" and which in ("offsets_NHLP2", "reference_points") and not _KNOWS_EXPORT:
        pytest.skip("PyTorch 2.11 has no batched gradient of grid_sample by the locations")
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    tensors = problem(3)

    def attend(tensor, backend=None):
        return deformable_attention(**{**tensors, which: tensor}, level_shapes=LEVELS, backend=backend)

    def apply(backend):
        def loss(tensor):
            return attend(tensor, backend).square().sum()

        return TRANSFORMS[transform](loss, lambda tensor: attend(tensor, backend), tensors[which])

    assert torch.equal(apply(None), apply("reference"))
    with pytest.raises(ValueError, match=r"torch\.func are not supported; use backend='reference'"):
        apply("triton")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("which", ["value_BSHD", "offsets_NHLP2", "logits_NHLP", "reference_points"])
def test_forward_mode_raises(which: str) -> None:
    tensors = problem()
    tangent = torch.ones_like(tensors[which])
    for backend in BACKENDS:
        if backend == "reference" and which == "logits_NHLP":  # PyTorch has this derivative
            continue

        def attend(tensor, backend=backend):
            return deformable_attention(**{**tensors, which: tensor}, level_shapes=LEVELS, backend=backend)

        error = pytest.raises((ValueError, NotImplementedError), match=r"forward-mode|forward AD")
        with error:
            torch.func.jvp(attend, (tensors[which],), (tangent,))
        with forward_ad.dual_level(), error:
            attend(forward_ad.make_dual(tensors[which], tangent))


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_raise(compiled: bool) -> None:
    tensors = problem()
    value = tensors["value_BSHD"].requires_grad_()
    arguments = {**tensors, "level_shapes": LEVELS, "backend": "triton"}
    if compiled:  # as compilers call it
        sizes = [side for pair in LEVELS for side in pair]
        raw = (tensors["reference_points"], tensors["offsets_NHLP2"], tensors["logits_NHLP"])
        out = torch.ops.ats_detr.msda(value, sizes, None, *raw, None, None, None, [], "triton")
    else:
        out = deformable_attention(**arguments)
    (gradient,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
