"""The operators against their rivals, or against the compiler.

    python -m bench.kernels                       on a GPU: times everything, appends to bench/results/kernels.jsonl
    python -m bench.kernels --part attention      one part (or tokens, linear), each a few minutes; the first compiles
    python -m bench.kernels --peer package.module:function      one more rival for the classical operator
    python -m bench.kernels --rivals deformops                  those rivals only whose names begin so
    python -m bench.kernels --offline --json out.json           no GPU: registers, spills, instructions
    python -m bench.kernels --small               tiny shapes on any device, to check this script

`device_ms` sums the durations of the kernels, `wall_ms` is what an eager caller waits for. Rivals of the classical
operator take (value [B,S,H,D], shapes int64 [L,2], level starts [L], locations [B,Q,H,L,P,2], weights [B,Q,H,L,P]).
Where a rival has no fused softmax and locations, `+ torch` adds the PyTorch operators a module needs around it, with
float32 locations. The classical operator is timed with locations in the value's dtype, which every rival takes.
`error` and `error_of_value_gradient` are relative to our kernels in float32, summing sample by sample, on the same
inputs.
Rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional

from ats_detr import kernels
from ats_detr.kernels import reference
from ats_detr.kernels.gpu import tuning

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))
SMALL_LEVELS = ((10, 13), (5, 7), (3, 4), (2, 2))
HEADS, HEAD_DIM, POINTS = 8, 32, 4
# name, images, share of the tokens that are queries (None: 300 queries of a decoder, boxes as references)
CASES = (("dense", 4, 1.0), ("30%", 4, 0.3), ("10%", 4, 0.1), ("decoder", 4, None), ("dense B=1", 1, 1.0))
Rival = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Bench:
    def __init__(self, small: bool, path: Path | None = None) -> None:
        """path: rows are appended there as they are measured."""
        self.path = path
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.levels = SMALL_LEVELS if small else LEVELS
        self.num_tokens = sum(height * width for height, width in self.levels)
        self.rows: list[dict] = []
        self.environment = {
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else "none",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
            "commit": _commit(),
        }
        centres = []
        for height, width in self.levels:
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centres.append(torch.stack([x / width, y / height], -1).reshape(-1, 2))
        self.centres_S2 = torch.cat(centres)

    def time(self, function: Callable[[], object]) -> dict[str, float]:
        function()
        if self.device == "cpu":
            start = time.perf_counter()
            function()
            elapsed = (time.perf_counter() - start) * 1e3
            return {"device_ms": elapsed, "wall_ms": elapsed}
        wall = triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(5):
                function()
            torch.cuda.synchronize()
        device = sum(event.self_device_time_total for event in profile.key_averages()) / 5e3
        return {"device_ms": device, "wall_ms": wall}

    def add(self, operator: str, case: str, who: str, function: Callable[[], object], **facts) -> None:
        row = {"operator": operator, "case": case, "who": who, **facts}
        try:
            row.update({name: round(value, 5) for name, value in self.time(function).items()})
        except Exception as error:  # a rival may not support a case, and says so in its own way
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        self.rows.append({**row, **self.environment})
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        figures = row.get("failed") or f"device {row['device_ms']:9.4f} ms   wall {row['wall_ms']:9.4f} ms"
        notes = "  ".join(f"{name}={value}" for name, value in facts.items())
        print(f"{operator:22} {case:10} {who:26} {figures}  {notes}", flush=True)

    # ---------------------------------------------------------------------------------------------------- attention
    def problem(self, images: int, share: float | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Inputs as a trained detector has them: clustered tokens, offsets along each head's direction plus noise."""
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

    def attention(self, peers: dict[str, Rival]) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            for case, images, share in CASES:
                self.attention_case(peers, case, images, share, dtype)

    def attention_case(
        self, peers: dict[str, Rival], case: str, images: int, share: float | None, dtype: torch.dtype
    ) -> None:
        shapes = torch.tensor(self.levels, device=self.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        tensors = self.problem(images, share, dtype)
        image, reference_points = tensors["image"], tensors["reference"]
        value, offsets, logits = (tensors[name].requires_grad_() for name in ("value", "offsets", "logits"))
        batched = (images, -1)
        torch.compiler.reset()  # a compiled rival gives up after a few shapes and would silently run as it is

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

        def rival(peer: Rival) -> Callable:
            return lambda value, locations, weights: peer(value, shapes, starts, locations, weights)

        def with_torch(peer: Rival) -> Callable:
            def run(value, offsets, logits) -> Tensor:
                where = reference.sampling_locations(reference_points, offsets, self.levels)
                weights = reference.attention_weights(logits).to(dtype)
                return peer(value, shapes, starts, where.unflatten(0, batched), weights.unflatten(0, batched))

            return run

        def both(function, inputs) -> tuple[Tensor, Tensor]:
            """Output and the value's gradient."""
            out = function(*inputs)
            gradient = tensors["gradient"].to(out.dtype).reshape(out.shape)
            return out, torch.autograd.grad(out, inputs, gradient)[0]

        raw, placed = (value, offsets, logits), (value, locations, weights)
        tiles_from, tuning.TILES_FROM = tuning.TILES_FROM, 10**9
        try:
            expected = {
                inputs: both(function, [tensor.detach().float().requires_grad_() for tensor in inputs])
                for function, inputs in ((fused, raw), (classical, placed))
            }
        finally:
            tuning.TILES_FROM = tiles_from
        contenders = [
            ("ours, fused", fused, raw),
            ("ours, classical", classical, placed),
            ("ours, deterministic", functools.partial(fused, deterministic=True), raw),
        ]
        for name, peer in peers.items():
            if name.startswith("grid_sample") and images * self.num_tokens * (share or 0) > 30000:
                continue  # gigabytes of samples
            contenders += [(name, rival(peer), placed), (f"{name} + torch", with_torch(peer), raw)]
        for name, function, inputs in contenders:
            facts = {"dtype": str(dtype).removeprefix("torch.")}
            errors = []
            with contextlib.suppress(Exception):  # `add` says what is wrong
                errors = [
                    float(f"{_relative_error(result.reshape(want.shape), want):.1e}")
                    for result, want in zip(both(function, inputs), expected[inputs], strict=True)
                ]
            error, gradient_error = errors or (None, None)
            with torch.no_grad():
                self.add("msda forward", case, name, lambda f=function, i=inputs: f(*i), **facts, error=error)
            facts["error_of_value_gradient"] = gradient_error
            self.add("msda both", case, name, lambda f=function, i=inputs: both(f, i), **facts)

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
        """An encoder layer's three groups of layers for a capacity of 30 % of the tokens of four images, of which
        the share in the case's name is in use; against the same in PyTorch on the capacity, and on the rows in use as
        if their number were known."""
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
        count, used, index = plan.num_rows, 4 * int(per_image * share), plan.flat_index_K
        x, add, gathered = (normal(capacity, width) for _ in range(3))
        projection, square = normal(projected, width, scale=0.06), normal(width, width, scale=0.06)
        weight1, weight2 = normal(hidden, width, scale=0.06), normal(width, hidden, scale=0.03)
        biases = {size: normal(size) for size in (projected, width, hidden)}
        norm, memory = (normal(width), normal(width)), normal(4, self.num_tokens, width)
        target = dict(memory_BSC=memory, plan=plan)

        def query(rows: int) -> Tensor:
            return functional.linear(x[:rows] + add[:rows], projection, biases[projected])

        def attended(rows: int) -> Tensor:
            total = x[:rows] + functional.linear(gathered[:rows], square, biases[width])
            return functional.layer_norm(total, (width,), *norm)

        def fed(rows: int) -> Tensor:
            inner = functional.linear(x[:rows], weight1, biases[hidden]).relu_()
            total = x[:rows] + functional.linear(inner, weight2, biases[width])
            return functional.layer_norm(total, (width,), *norm)

        def fed_to_memory(rows: int) -> Tensor:
            refined = fed(rows)
            memory.flatten(0, 1).index_copy_(0, index[:rows], refined)
            return refined

        forced = dict(num_rows=count, backend="triton" if self.device == "cuda" else None)
        layers = (weight1, biases[hidden], weight2, biases[width], *norm, 1e-5)
        contests = {
            "offsets and logits": (
                query,
                lambda: kernels.packed_linear(x, projection, biases[projected], add_KC=add, **forced),
            ),
            "output and norm": (
                attended,
                lambda: kernels.packed_linear_norm(gathered, square, biases[width], x, *norm, 1e-5, **forced),
            ),
            "feed-forward": (fed, lambda: kernels.packed_feedforward(x, *layers, **forced)),
            "feed-forward to memory": (
                fed_to_memory,
                lambda: kernels.packed_feedforward(x, *layers, **forced, **target),
            ),
        }
        for operator, (library, ours) in contests.items():
            with torch.no_grad():
                error = _relative_error(ours()[:used], library(used))
                facts = {"dtype": str(dtype).removeprefix("torch."), "capacity": capacity, "rows": used}
                self.add(operator, f"{share:.0%}", "ours", ours, error=float(f"{error:.1e}"), **facts)
                for who, rows in (("torch, the capacity", capacity), ("torch, the rows in use", used)):
                    self.add(operator, f"{share:.0%}", who, lambda f=library, n=rows: f(n), **facts)


def summary(rows: list[dict]) -> list[str]:
    """How many times as long as ours every other way takes on the device, case by case; and what share of the tokens
    costs of all."""
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "device_ms" in row:
            key = (row["operator"], row["case"], row.get("dtype", ""))
            times.setdefault(key, {})[row["who"]] = row["device_ms"]
    lines = []
    for (operator, case, dtype), contest in times.items():
        ours = min((ms for who, ms in contest.items() if who.startswith("ours")), default=0.0)
        if not ours:
            continue
        others = [f"{who} {ms / ours:.2f}x" for who, ms in contest.items() if not who.startswith("ours")]
        dense = times.get((operator, "dense", dtype), {})
        if case.endswith("%") and (
            all_tokens := min((t for w, t in dense.items() if w.startswith("ours")), default=0.0)
        ):
            others.append(f"{ours / all_tokens:.1%} of dense")
        lines.append(f"{operator:22} {case:10} {dtype:9} ours {ours:8.4f} ms   " + "   ".join(others))
    return lines


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _rivals(levels: tuple, extra: list[str], compiled: bool) -> Iterator[tuple[str, Rival]]:
    def grid_sample(value, shapes, starts, locations, weights) -> Tensor:
        return reference.multi_scale_deformable_attention(value, levels, locations, weights)

    with contextlib.suppress(ImportError):
        from deformops.registry import msda

        yield (
            "deformops",
            lambda value, shapes, starts, where, weights: msda(
                value, shapes, starts, where, weights.flatten(3)
            ),
        )
        from deformops.backends.triton import msda_query_tiled_fp32acc

        yield (  # sums the value's gradient in float32, as ours does
            "deformops, float32 sums",
            lambda value, shapes, starts, where, weights: msda_query_tiled_fp32acc.forward(
                value, shapes, starts, where, weights.flatten(3)
            ),
        )
    yield "grid_sample", grid_sample
    if compiled:
        yield "grid_sample compiled", torch.compile(grid_sample)
    for name in extra:
        module, _, function = name.partition(":")
        yield name, getattr(importlib.import_module(module), function)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offline", action="store_true", help="compile instead of running; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="offline: default configurations only")
    parser.add_argument("--json", type=Path, help="where rows go (GPU runs append)")
    parser.add_argument("--part", choices=["attention", "tokens", "linear"])
    parser.add_argument("--peer", action="append", default=[], help="module:function of one more rival")
    parser.add_argument("--rivals", default="", metavar="NAME", help="only those whose names begin so")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.offline:
        from bench import offline

        rows = offline.main(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    if not torch.cuda.is_available() and not arguments.small:
        raise SystemExit("no GPU here: use --offline, or --small to check the script")
    path = arguments.json or (None if arguments.small else RESULTS)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.small, path)
    if arguments.part in (None, "attention"):
        rivals = dict(_rivals(bench.levels, arguments.peer, compiled=bench.device == "cuda"))
        chosen = {name: rival for name, rival in rivals.items() if name.startswith(arguments.rivals)}
        bench.attention(chosen)
    if arguments.part in (None, "tokens"):
        bench.tokens()
    if arguments.part in (None, "linear"):
        bench.linear()
    print("\nDevice time, others against ours")
    print("\n".join(summary(bench.rows)))


if __name__ == "__main__":
    main()
