"""An experiment: is it better to project values after sampling?

    python -m bench.lazy_values                  sparse encoder layers and a decoder layer, both ways
    python -m bench.lazy_values --json PATH      appends the rows, which docs/performance.md shows

Sampling is linear: W (sum of weighted samples of x) = sum of weighted samples of (W x). First (as Deformable DETR and
this package do): every token is projected, S C^2 multiply-adds, and each head samples its D of the C channels. After:
only what was gathered is projected, K C^2; but each head gathers all C channels, H times the reads. The bias is added
in proportion to the weight that fell inside the map and on unpadded tokens, which sampling a map of ones tells.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ats_detr.distributed import choose_device
from ats_detr.errors import run_cli
from ats_detr.kernels import deformable_attention, multi_scale_deformable_attention, reference
from bench.kernels import HEAD_DIM, HEADS, LEVELS, POINTS, SMALL_LEVELS
from bench.measure import (
    CLOCK_HELP,
    CLOCKS,
    Contender,
    Row,
    Stopwatch,
    append_rows,
    environment,
    percentile,
    positive,
    progress_bar,
    row_file,
    take_turns,
)

CASES = (("encoder layer", 0.05), ("encoder layer", 0.1), ("encoder layer", 0.3), ("decoder layer", None))
"""And the share of the tokens that is kept; the queries of a decoder layer are NUM_QUERIES."""
NUM_QUERIES = 300
WIDTH = HEADS * HEAD_DIM
Levels = tuple[tuple[int, int], ...]


class Problem:
    """One image, and queries around it that sample some pixels around them."""

    def __init__(self, levels: Levels, share: float | None, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.levels = levels
        num_tokens = sum(height * width for height, width in levels)
        self.num_queries = NUM_QUERIES if share is None else round(share * num_tokens)
        shape = (self.num_queries, HEADS, len(levels), POINTS)
        kept = torch.randperm(num_tokens, generator=generator)[: self.num_queries].sort().values
        centres = torch.cat([_centres(height, width) for height, width in levels])
        references = (
            centres[kept] if share is not None else torch.rand(self.num_queries, 2, generator=generator)
        )[:, None]
        self.references = references.expand(-1, len(levels), -1).contiguous().to(device)
        self.offsets = (torch.randn(*shape, 2, generator=generator) * 3).to(device)
        self.logits = torch.randn(shape, generator=generator).to(device)
        self.memory = torch.randn(1, num_tokens, WIDTH, generator=generator).to(device)
        self.padding = torch.zeros(1, num_tokens, dtype=torch.bool)
        self.padding[:, -num_tokens // 50 :] = True
        self.padding = self.padding.to(device)
        torch.manual_seed(0)
        self.projection = nn.Linear(WIDTH, WIDTH).to(device)

    def project_first(self) -> Tensor:
        """[N, C], by the operator that the model uses."""
        value = self.projection(self.memory).masked_fill(self.padding[..., None], 0.0)
        value = value.unflatten(-1, (HEADS, HEAD_DIM))
        return deformable_attention(value, self.levels, self.references, self.offsets, self.logits)

    def masked(self) -> tuple[Tensor, Tensor]:
        """What is sampled before the projection: the memory and ones, [B, S, 1, C] and [B, S, 1, 8], zero at padding.

        A model that worked so would keep them in this form.
        """
        ones = (~self.padding[..., None, None]).to(self.memory.dtype)
        return self.memory[:, :, None] * ones, ones.expand(-1, -1, -1, 8).contiguous()

    def project_afterwards(self, memory: Tensor, ones: Tensor) -> Tensor:
        """The same from `masked()`. Each head of a query is a query of its own that reads all channels."""
        locations = reference.sampling_locations(self.references, self.offsets, self.levels)
        weights = reference.attention_weights(self.logits)
        locations, weights = (tensor.flatten(0, 1)[None, :, None] for tensor in (locations, weights))
        gathered, inside = (
            multi_scale_deformable_attention(value, self.levels, locations, weights)
            .view(self.num_queries, HEADS, -1)
            .transpose(0, 1)
            for value in (memory, ones)
        )
        weight_HDC = self.projection.weight.view(HEADS, HEAD_DIM, WIDTH)
        bias_H1D = self.projection.bias.view(HEADS, 1, HEAD_DIM)
        projected_HND = torch.bmm(gathered, weight_HDC.transpose(1, 2)) + inside[..., :1] * bias_H1D
        return projected_HND.transpose(0, 1).flatten(1)

    def multiply_adds(self) -> tuple[float, float]:
        """Giga multiply-adds of the two ways: projection, and four per sample and channel."""
        num_tokens = self.memory.shape[1]
        samples = 4 * self.num_queries * HEADS * len(self.levels) * POINTS
        first = num_tokens * WIDTH**2 + samples * HEAD_DIM
        afterwards = self.num_queries * WIDTH**2 + samples * (WIDTH + 8)
        return first / 1e9, afterwards / 1e9


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / width, y / height], -1).reshape(-1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lazy_values",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=CLOCK_HELP)
    parser.add_argument("--small", action="store_true", help="a tiny pyramid, to check this script")
    parser.add_argument("--json", type=row_file, help="append the rows here, one JSON object a line")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    console = Console(highlight=False)
    rows = measure(
        SMALL_LEVELS if arguments.small else LEVELS, device, arguments.rounds, arguments.clock, console
    )
    table = Table(title=f"value projection before or after sampling, {rows[0]['machine']}, float32")
    for heading in ("layer", "queries", "first: GMAC", "afterwards", "first: ms", "afterwards", "time ratio"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        table.add_row(
            row["layer"], str(row["queries"]), f"{row['first_gmac']:.3f}", f"{row['afterwards_gmac']:.3f}",
            f"{row['first_ms']:.1f}", f"{row['afterwards_ms']:.1f}", f"{row['afterwards_ms'] / row['first_ms']:.2f}",
        )  # fmt: skip
    Console(width=max(console.width, 110), highlight=False).print(table, crop=False)
    if arguments.json:
        append_rows(rows, arguments.json)


@torch.inference_mode()
def measure(levels: Levels, device: torch.device, rounds: int, clock: str, console: Console) -> list[Row]:
    rows = []
    with progress_bar(console, len(CASES) * 2 * (rounds + 1)) as advance:
        for layer, share in CASES:
            problem = Problem(levels, share, device)
            masked = problem.masked()

            def first(watch: Stopwatch, problem: Problem = problem) -> None:
                problem.project_first()
                watch.mark("total")

            def afterwards(
                watch: Stopwatch, problem: Problem = problem, masked: tuple[Tensor, Tensor] = masked
            ) -> None:
                problem.project_afterwards(*masked)
                watch.mark("total")

            contenders: dict[str, Contender] = {"first": first, "afterwards": afterwards}
            take_turns(contenders, device, 1, clock, advance)  # warms up
            samples = take_turns(contenders, device, rounds, clock, advance)
            counts = problem.multiply_adds()
            rows.append(
                {
                    "kind": "lazy values",
                    "layer": layer if share is None else f"{layer}, {share:.0%} kept",
                    "tokens": problem.memory.shape[1],
                    "queries": problem.num_queries,
                    "first_gmac": round(counts[0], 4),
                    "afterwards_gmac": round(counts[1], 4),
                    "first_ms": percentile(samples["first"]["total"], 50),
                    "afterwards_ms": percentile(samples["afterwards"]["total"], 50),
                    "rounds": rounds,
                    "clock": clock,
                    **environment(device),
                }
            )
    return rows


if __name__ == "__main__":
    run_cli(main)
