"""The operators and their baselines on a GPU, or what the compiler makes of the kernels.

    python -m bench.kernels                       on a GPU: all parts, appends to bench/results/kernels.jsonl
    python -m bench.kernels --part attention      one part (or detectors, tokens, linear), a few minutes each
    python -m bench.kernels --peer package.module:function      one more baseline for the classical operator
    python -m bench.kernels --baselines deformops               only the baselines whose names begin with this
    python -m bench.kernels --offline --json out.jsonl          no GPU: registers, spills, instructions
    python -m bench.kernels --small               tiny shapes on any device, to check the command

Baselines of the classical operator take (value [B,S,H,D], shapes int64 [L,2], level starts [L], locations
[B,Q,H,L,P,2], weights [B,Q,H,L,P]). `+ torch` adds the PyTorch operators that a module needs around a baseline without
fused softmax and locations, with float32 locations. The classical operator gets locations in the value's dtype, which
every baseline supports. `error` and `error_of_value_gradient` are relative to our kernels in float32, which sum sample
by sample, on the same inputs. Each row is written immediately; `bench.measure.operator_times` defines the times.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from ats_detr import kernels
from ats_detr.console import run_cli
from ats_detr.errors import UserError
from ats_detr.kernels import reference
from ats_detr.kernels.gpu import tuning
from bench.measure import RESULTS, Row, append_rows, environment, new_parser, operator_times, row_file
from bench.tables import operator_tables

LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))
SMALL_LEVELS = ((10, 13), (5, 7), (3, 4), (2, 2))
HEADS, HEAD_DIM, POINTS = 8, 32, 4
# name, images, share of the tokens that are queries (None: 300 queries of a decoder, boxes as references)
CASES = (("dense", 4, 1.0), ("30%", 4, 0.3), ("10%", 4, 0.1), ("decoder", 4, None), ("dense B=1", 1, 1.0))
# decoders of other detectors, 300 queries: heads, channels of a head, levels, points of each level
DETECTORS = {
    "RF-DETR": (16, 16, ((40, 40),), (2,)),
    "D-FINE": (8, 32, ((80, 80), (40, 40), (20, 20)), (3, 6, 3)),
}
Baseline = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Bench:
    def __init__(self, small: bool, path: Path | None = None) -> None:
        """path: a file to which each row is appended immediately."""
        self.path = path
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.levels = SMALL_LEVELS if small else LEVELS
        self.num_tokens = sum(height * width for height, width in self.levels)
        self.rows: list[Row] = []
        self.environment = environment(torch.device(self.device))
        centres = []
        for height, width in self.levels:
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centres.append(torch.stack([x / width, y / height], -1).reshape(-1, 2))
        self.centres_S2 = torch.cat(centres)

    def add(self, operator: str, case: str, who: str, function: Callable[[], object], **facts) -> None:
        """Times one call and appends its row."""
        row: Row = {"kind": "operator", "operator": operator, "case": case, "who": who, **facts}
        try:
            times = operator_times(function, torch.device(self.device))
            row |= {name: round(value, 5) for name, value in times.items()}
        except Exception as error:  # a baseline may not support a case
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        self.rows.append({**row, **self.environment})
        append_rows(self.rows[-1:], self.path)
        figures = row.get("failed") or f"device {row['device_ms']:9.4f} ms   wall {row['wall_ms']:9.4f} ms"
        notes = "  ".join(f"{name}={value}" for name, value in facts.items())
        print(f"{operator:22} {case:10} {who:26} {figures}  {notes}", flush=True)

    def add_passes(
        self, case: str, who: str, function: Callable[..., Tensor], inputs: Sequence[Tensor],
        gradient: Tensor | None = None, forward_facts: Row | None = None, both_facts: Row | None = None,
    ) -> None:  # fmt: skip
        """Times attention: the forward pass, and both passes."""
        dtype = str(inputs[0].dtype).removeprefix("torch.")
        with torch.no_grad():
            self.add("msda forward", case, who, lambda: function(*inputs), dtype=dtype, **forward_facts or {})
        run = functools.partial(_both, function, inputs, gradient)
        self.add("msda both", case, who, run, dtype=dtype, **both_facts or {})

    # ---------------------------------------------------------------------------------------------------- attention
    def problem(self, images: int, share: float | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Inputs like those of a trained detector: clustered tokens, offsets along each head's direction plus noise."""
        generator = torch.Generator().manual_seed(0)
        tokens = []
        for _ in range(images):
            if share is None:
                tokens.append(torch.randint(0, self.num_tokens, (300,), generator=generator))
                continue
            blobs = torch.rand(12, 2, generator=generator)
            score = (-((self.centres_S2[:, None] - blobs) ** 2).sum(-1) / 0.004).exp().amax(1)
            score += torch.randn(self.num_tokens, generator=generator) * 0.05
            tokens.append(score.topk(int(self.num_tokens * share)).indices.sort().values)
        count = len(tokens[0])
        shape = (images * count, HEADS, len(self.levels), POINTS)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        way = torch.stack([angle.cos(), angle.sin()], -1)
        way = way / way.abs().amax(-1, keepdim=True)
        offsets = (way[:, None, None] * torch.arange(1, POINTS + 1)[:, None]).expand(*shape, 2)
        offsets = offsets + torch.randn(*shape, 2, generator=generator) * 1.5
        points = self.centres_S2[torch.cat(tokens)][:, None].expand(-1, len(self.levels), 2)
        if share is None:
            points = torch.cat([points, torch.full_like(points, 0.2)], -1)
        tensors = {
            "value": torch.randn(images, self.num_tokens, HEADS, HEAD_DIM, generator=generator).to(dtype),
            "offsets": offsets.to(dtype).contiguous(),
            "logits": (torch.randn(shape, generator=generator) * 1.5).to(dtype),
            "reference": points.contiguous(),
            "gradient": torch.randn(images * count, HEADS * HEAD_DIM, generator=generator).to(dtype),
        }
        if share is not None and share < 1:
            tensors["image"] = torch.arange(images).repeat_interleave(count).int()
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        tensors["image"] = tensors.get("image")
        return tensors

    def attention(self, baselines: dict[str, Baseline]) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            for case, images, share in CASES:
                self.attention_case(baselines, case, images, share, dtype)

    def attention_case(
        self, baselines: dict[str, Baseline], case: str, images: int, share: float | None, dtype: torch.dtype
    ) -> None:
        shapes = torch.tensor(self.levels, device=self.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        tensors = self.problem(images, share, dtype)
        image, reference_points = tensors["image"], tensors["reference"]
        value, offsets, logits = (tensors[name].requires_grad_() for name in ("value", "offsets", "logits"))
        batched = (images, -1)
        torch.compiler.reset()  # after a few shapes torch.compile silently falls back to eager

        def fused(value, offsets, logits, deterministic=None) -> Tensor:
            return kernels.deformable_attention(
                value, self.levels, reference_points, offsets, logits, image, deterministic=deterministic
            )

        def classical(value, locations, weights) -> Tensor:
            return kernels.multi_scale_deformable_attention(value, self.levels, locations, weights)

        with torch.no_grad():
            locations = reference.sampling_locations(reference_points, offsets, self.levels).to(dtype)
            weights = reference.attention_weights(logits).to(dtype)
        locations, weights = locations.unflatten(0, batched), weights.unflatten(0, batched)
        locations, weights = locations.contiguous().requires_grad_(), weights.contiguous().requires_grad_()

        def classical_baseline(baseline: Baseline) -> Callable:
            return lambda value, locations, weights: baseline(value, shapes, starts, locations, weights)

        def with_torch(baseline: Baseline) -> Callable:
            def run(value, offsets, logits) -> Tensor:
                where = reference.sampling_locations(reference_points, offsets, self.levels)
                weights = reference.attention_weights(logits).to(dtype)
                return baseline(
                    value, shapes, starts, where.unflatten(0, batched), weights.unflatten(0, batched)
                )

            return run

        raw, placed = (value, offsets, logits), (value, locations, weights)
        gradient = tensors["gradient"]
        with patch.object(tuning, "TILES_FROM", 10**9):
            expected = {
                inputs: _both(function, [x.detach().float().requires_grad_() for x in inputs], gradient)
                for function, inputs in ((fused, raw), (classical, placed))
            }
        candidates = [
            ("ours, fused", fused, raw),
            ("ours, classical", classical, placed),
            ("ours, deterministic", functools.partial(fused, deterministic=True), raw),
        ]
        for name, baseline in baselines.items():
            if name.startswith("grid_sample") and images * self.num_tokens * (share or 0) > 30000:
                continue  # the samples would take gigabytes
            candidates += [
                (name, classical_baseline(baseline), placed),
                (f"{name} + torch", with_torch(baseline), raw),
            ]
        for name, function, inputs in candidates:
            errors: list[float | None] = [None, None]
            with contextlib.suppress(Exception):  # `add` reports it
                errors = [
                    float(f"{_relative_error(result.reshape(want.shape), want):.1e}")
                    for result, want in zip(_both(function, inputs, gradient), expected[inputs], strict=True)
                ]
            facts = {"error": errors[0]}, {"error_of_value_gradient": errors[1]}
            self.add_passes(case, name, function, inputs, gradient, *facts)

    def detectors(self, small: bool) -> None:
        """The classical operator at the shapes of DETECTORS, four images, against the grid_sample of its definition."""
        for case, (heads, head_dim, levels, points) in DETECTORS.items():
            if small:
                levels = [(height // 8, width // 8) for height, width in levels]
            generator = torch.Generator().manual_seed(0)
            shape = (4, 10 if small else 300, heads, sum(points))
            num_tokens = sum(height * width for height, width in levels)
            for dtype in (torch.bfloat16, torch.float32):
                value = torch.randn(4, num_tokens, heads, head_dim, generator=generator)
                locations = torch.rand(*shape, 2, generator=generator)
                weights = torch.rand(shape, generator=generator).softmax(-1)
                inputs = [x.to(self.device, dtype).requires_grad_() for x in (value, locations, weights)]
                for who, backend in (("ours, classical", None), ("grid_sample", "reference")):

                    def attend(value, locations, weights, points=points, levels=levels, backend=backend):
                        return kernels.multi_scale_deformable_attention(
                            value, levels, locations, weights, num_points=points, backend=backend
                        )

                    self.add_passes(case, who, attend, inputs)

    # ------------------------------------------------------------------------------------------------------- tokens
    def tokens(self) -> None:
        sizes = (17821, 22223) if self.levels is LEVELS else (300,)
        for num_tokens in sizes:
            for share in (0.1, 0.3):
                scores = torch.randn(4, num_tokens, device=self.device)
                count = int(num_tokens * share)
                keep = torch.tensor([count, count // 2, count, count // 3], device=self.device)
                case = f"{num_tokens}/{count}"
                self.add(
                    "select",
                    case,
                    "ours",
                    lambda s=scores, k=keep, c=count: kernels.select_tokens(s, k, capacity=4 * c),
                )
                self.add("select", case, "topk", lambda s=scores, c=count: s.topk(c))
                self.add("select", case, "topk unsorted", lambda s=scores, c=count: s.topk(c, sorted=False))
                self.add("select", case, "sort", lambda s=scores: s.sort(descending=True))
        memory = torch.randn(4, self.num_tokens, 256, device=self.device).bfloat16()
        keep = torch.full((4,), self.num_tokens // 10, device=self.device)
        plan = kernels.select_tokens(torch.randn(4, self.num_tokens, device=self.device), keep)
        (rows,) = kernels.pack_tokens(plan, memory)
        index = plan.flat_index_K
        flat = memory.flatten(0, 1)
        self.add("pack two", "10%", "ours", lambda: kernels.pack_tokens(plan, memory, memory))
        self.add("pack two", "10%", "index_select", lambda: [flat.index_select(0, index) for _ in range(2)])
        self.add("scatter", "10%", "ours", lambda: kernels.scatter_tokens(plan, memory, rows))
        in_place = lambda: kernels.scatter_tokens(plan, memory, rows, in_place=True)  # noqa: E731
        self.add("scatter", "10%", "ours, in place", in_place)
        self.add("scatter", "10%", "index_copy", lambda: flat.index_copy(0, index, rows))
        tensors = self.problem(4, None, torch.float32)
        raw = (tensors["reference"], tensors["offsets"], tensors["logits"])
        for backend in ("ours", "reference"):
            chosen = None if backend == "ours" else backend
            self.add(
                "attention map", "decoder", backend,
                lambda b=chosen: kernels.deformable_attention_map(*raw, self.levels, 4, backend=b),
            )  # fmt: skip

    # ------------------------------------------------------------------------------- linear layers of packed rows
    def linear(self) -> None:
        """The linear layers of an encoder layer, for a capacity of 30 % of the tokens of four images, of which the
        share in the case's name is in use. Baselines: PyTorch on all rows of the capacity, and on the rows in use as if
        their number were known on the host."""
        for dtype in (torch.bfloat16, torch.float32):
            for share in (1.0, 0.5, 0.33, 0.1):
                self.linear_case(share, dtype)

    def linear_case(self, share: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.device, dtype)

        per_image = int(self.num_tokens * 0.3)
        capacity, width, hidden = 4 * per_image, HEADS * HEAD_DIM, 1024
        projected = HEADS * len(self.levels) * POINTS * 3
        keep = torch.full((4,), int(per_image * share), device=self.device)
        scores = torch.randn(4, self.num_tokens, generator=generator).to(self.device)
        plan = kernels.select_tokens(scores, keep, capacity=capacity)
        count, used = plan.num_rows, 4 * int(per_image * share)
        x, add, gathered = (normal(capacity, width) for _ in range(3))
        projection, square = normal(projected, width, scale=0.06), normal(width, width, scale=0.06)
        weight1, weight2 = normal(hidden, width, scale=0.06), normal(width, hidden, scale=0.03)
        biases = {size: normal(size) for size in (projected, width, hidden)}
        norm = (normal(width), normal(width))

        def query(rows: int) -> Tensor:
            return functional.linear(x[:rows] + add[:rows], projection, biases[projected])

        def attended(rows: int) -> Tensor:
            total = x[:rows] + functional.linear(gathered[:rows], square, biases[width])
            return functional.layer_norm(total, (width,), *norm)

        def fed(rows: int) -> Tensor:
            inner = functional.linear(x[:rows], weight1, biases[hidden]).relu_()
            total = x[:rows] + functional.linear(inner, weight2, biases[width])
            return functional.layer_norm(total, (width,), *norm)

        forced = dict(num_rows=count, backend="triton" if self.device == "cuda" else None)
        layers = (weight1, biases[hidden], weight2, biases[width], *norm, 1e-5)
        cases = {
            "offsets and logits": (
                query,
                lambda: kernels.packed_linear(x, projection, biases[projected], add_KC=add, **forced),
            ),
            "output and norm": (
                attended,
                lambda: kernels.packed_linear_norm(gathered, square, biases[width], x, *norm, 1e-5, **forced),
            ),
            "feed-forward": (fed, lambda: kernels.packed_feedforward(x, *layers, **forced)),
        }
        for operator, (library, ours) in cases.items():
            with torch.no_grad():
                error = _relative_error(ours()[:used], library(used))
                facts = {"dtype": str(dtype).removeprefix("torch."), "capacity": capacity, "rows": used}
                self.add(operator, f"{share:.0%}", "ours", ours, error=float(f"{error:.1e}"), **facts)
                for who, rows in (("torch, the capacity", capacity), ("torch, the rows in use", used)):
                    self.add(operator, f"{share:.0%}", who, lambda f=library, n=rows: f(n), **facts)


def _both(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output, and the gradient by the first input. `gradient` is that by the output; None: the output itself."""
    out = function(*inputs)
    by_out = out.detach() if gradient is None else gradient.to(out.dtype).reshape(out.shape)
    return out, torch.autograd.grad(out, inputs, by_out)[0]


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _baselines(levels: tuple, extra: list[str], compiled: bool) -> Iterator[tuple[str, Baseline]]:
    def grid_sample(value, shapes, starts, locations, weights) -> Tensor:
        return reference.multi_scale_deformable_attention(value, levels, locations, weights)

    def with_flat_weights(function: Callable[..., Tensor]) -> Baseline:
        return lambda *arguments: function(*arguments[:-1], arguments[-1].flatten(3))

    with contextlib.suppress(ImportError):
        from deformops.registry import msda

        yield "deformops", with_flat_weights(msda)
        from deformops.backends.triton import msda_query_tiled_fp32acc

        # Sums the value's gradient in float32, as ours does.
        yield "deformops, float32 sums", with_flat_weights(msda_query_tiled_fp32acc.forward)
    yield "grid_sample", grid_sample
    if compiled:
        yield "grid_sample compiled", torch.compile(grid_sample)
    for name in extra:
        module, _, function = name.partition(":")
        yield name, getattr(importlib.import_module(module), function)


def main() -> None:
    parser = new_parser("kernels", __doc__)
    parser.add_argument("--offline", action="store_true", help="compile instead of running; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="offline: default configurations only")
    parser.add_argument("--json", type=row_file, help="append rows to this file, one JSON object a line")
    parser.add_argument("--part", choices=["attention", "detectors", "tokens", "linear"])
    parser.add_argument("--peer", action="append", default=[], help="module:function of one more baseline")
    parser.add_argument("--baselines", default="", metavar="PREFIX", help="only baselines with this prefix")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to check the command")
    arguments = parser.parse_args()
    if arguments.offline:
        from bench import offline

        append_rows(offline.main(arguments), arguments.json)
        return
    if not torch.cuda.is_available() and not arguments.small:
        raise UserError("no CUDA device: give --offline, or --small to check the command")
    bench = Bench(arguments.small, arguments.json or (None if arguments.small else RESULTS / "kernels.jsonl"))
    if arguments.part in (None, "attention"):
        baselines = dict(_baselines(bench.levels, arguments.peer, compiled=bench.device == "cuda"))
        chosen = {name: one for name, one in baselines.items() if name.startswith(arguments.baselines)}
        bench.attention(chosen)
    if arguments.part in (None, "detectors"):
        bench.detectors(arguments.small)
    if arguments.part in (None, "tokens"):
        bench.tokens()
    if arguments.part in (None, "linear"):
        bench.linear()
    for table in operator_tables(bench.rows, relative=True):
        print(f"\n{table}")


if __name__ == "__main__":
    run_cli(main)
