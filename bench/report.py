"""Writes docs/performance.md and its pictures from the measured rows; nothing in it is typed by hand.

    python -m bench.report               all of bench/results/*.jsonl
    python -m bench.report --check       says whether docs/performance.md is what the rows say

Each file of rows becomes a section. What a row is, it says itself: `kind`, or for the operators of bench.kernels
`operator`. A row of kind `note` is printed where its section begins.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from ats_detr.errors import UserError, run_cli
from bench.charts import draw_picture
from bench.latency import STAGES, targets_of
from bench.measure import RESULTS, Row, read_rows
from bench.page import CPU_TIME, Sweep, label, num_threads

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
PICTURES = DOCUMENT.with_suffix("")
HEAD = """# Performance

Written by `python -m bench.report` from the rows in `bench/results/`; change those, not this.
Times are medians in milliseconds unless a column says otherwise; multiply-adds are giga multiply-adds per image.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 2 where the document differs"
    )
    arguments = parser.parse_args()
    text = document(RESULTS)
    if arguments.check:
        if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
            raise UserError(f"{DOCUMENT} is not what the rows say: run python -m bench.report")
        return
    DOCUMENT.write_text(text)
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for path in result_files(RESULTS):
        rows = read_rows(path)
        if is_sweep(rows):
            for chart in Sweep(rows).charts():
                draw_picture(chart, PICTURES / f"{path.stem}-{chart.key}.png")
    print(f"{DOCUMENT} and {len(list(PICTURES.glob('*.png')))} pictures")


def document(results: Path) -> str:
    """The whole of docs/performance.md."""
    sections = [section(path.stem, read_rows(path)) for path in result_files(results)]
    return "\n".join([HEAD, *sections])


def result_files(results: Path) -> list[Path]:
    """The latest date first, then by name."""
    paths = sorted(results.glob("*.jsonl"))
    return sorted(paths, key=lambda path: max(row.get("date", "") for row in read_rows(path)), reverse=True)


def section(name: str, rows: Sequence[Row]) -> str:
    """One file of rows."""
    notes = [row["text"] for row in rows if row.get("kind") == "note"]
    measured = [row for row in rows if row.get("kind") != "note"]
    lines = [f"## {title(measured)}", "", f"Rows: `bench/results/{name}.jsonl`.", *notes, ""]
    if is_sweep(measured):
        lines += sweep_part(name, measured)
    for part in (
        latency_part,
        profile_part,
        targets_part,
        precision_part,
        lazy_part,
        trial_part,
        parity_part,
        contests_part,
        operators_part,
    ):
        lines += part(measured)
    return "\n".join(lines).rstrip() + "\n"


def title(rows: Sequence[Row]) -> str:
    """What was measured, and where."""
    kinds = {row.get("kind", "operators") for row in rows}
    subjects = (
        ("flops", "Keep ratios"),
        ("lazy values", "Value projection before or after sampling"),
        ("latency", "Latency"),
        ("model latency", "Whole models"),
        ("operators", "Operators"),
    )
    subject = next((words for kind, words in subjects if kind in kinds), ", ".join(sorted(kinds)))
    if subject in ("Keep ratios", "Latency"):
        subject += " of " + next(row["config"] for row in rows if row.get("mode") == "packed")
    return f"{subject}: {', '.join(distinct(rows, 'machine', 'gpu'))}, {' and '.join(distinct(rows, 'date'))}"


def distinct(rows: Iterable[Row], *keys: str) -> list[str]:
    """The values under any of these keys, in the order they come in."""
    return list(dict.fromkeys(str(row[key]) for row in rows for key in keys if key in row))


def source(rows: Sequence[Row]) -> str:
    """The machine, versions, date and commit of a table, as its caption."""
    parts = distinct(rows, "machine", "gpu")
    parts += [num_threads(int(count)) for count in distinct(rows, "threads")]
    packages = [name for name in ("torch", "triton", "transformers", "torchvision") if distinct(rows, name)]
    parts += [f"{name} {' and '.join(distinct(rows, name))}" for name in packages]
    parts += distinct(rows, "timer")
    said = CPU_TIME if any(row.get("clock") == "cpu" for row in rows) else ""
    parts += [f"median of {rounds} rounds{said}" for rounds in distinct(rows, "rounds")]
    parts += [" and ".join(distinct(rows, "date")), f"commit {', '.join(distinct(rows, 'commit'))}"]
    return f"*{'; '.join(parts)}*"


def table(headings: Sequence[str], lines: Iterable[Sequence[object]], numbers_from: int = 1) -> list[str]:
    """A Markdown table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if index < numbers_from else "---:" for index in range(len(headings))]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (headings, rule, *lines)]


# --------------------------------------------------------------------------------------------------------------- parts
def is_sweep(rows: Iterable[Row]) -> bool:
    return any(row.get("kind") == "flops" for row in rows)


def sweep_part(name: str, rows: Sequence[Row]) -> list[str]:
    """Findings, pictures, and multiply-adds of a run of bench.sweep."""
    sweep = Sweep(rows)
    lines = [f"- {finding}" for finding in sweep.findings()] + [""]
    for chart in sweep.charts():
        lines += [
            f"![{chart.title}](performance/{name}-{chart.key}.png)",
            "",
            f"{chart.caption}",
            "",
            source(rows),
            "",
        ]
    parts = list(dict.fromkeys(part for row in sweep.flops for part in row["parts"]))
    lines += table(
        ["multiply-adds", "kept", "total", "encoder", *parts],
        [
            [label(row), f"{row['keep_ratio']:.1%}", f"{row['gflops']:.2f}", f"{row['encoder_gflops']:.2f}"]
            + [f"{row['parts'][part]:.2f}" if part in row["parts"] else "" for part in parts]
            for row in sweep.flops
        ],
    )
    return [*lines, "", source(sweep.flops), ""]


def latency_part(rows: Sequence[Row]) -> list[str]:
    """Stages of every contender."""
    mine = [row for row in rows if row.get("kind") == "latency"]
    if not mine:
        return []
    lines = []
    keys = ("mode", "budgets", "keep_ratio", "batch", "images", "image_size", "dtype")
    for key, group in itertools.groupby(mine, lambda row: [row[name] for name in keys]):
        stages = {row["stage"]: row for row in group}
        total = stages["total"]
        _, _, keep_ratio, batch, images, (height, width), dtype = key
        lines.append(
            [
                label(total),
                "" if total["mode"].startswith("peer:") else f"{keep_ratio:.1%}",
                f"{batch} {images}",
                f"{height}x{width}",
                dtype,
                *(f"{stages[stage]['p50_ms']:.1f}" if stage in stages else "" for stage in STAGES),
                f"{total['p95_ms']:.1f}",
                f"{total['images_per_s']:.2f}",
                "" if total["peak_mb"] is None else f"{total['peak_mb']:.0f}",
            ]
        )
    headings = ["detector", "kept", "images", "size", "dtype", *STAGES, "total p95", "images/s", "peak MB"]
    return [*table(headings, lines), "", source(mine), ""]


def profile_part(rows: Sequence[Row]) -> list[str]:
    """The kernels that take the most time of a captured pass."""
    mine = [row for row in rows if row.get("kind") == "profile"]
    lines = [[f"`{row['kernel']}`", row["batch"], row["launches"] or "", f"{row['us']:.0f}"] for row in mine]
    return [*table(["kernel", "images", "launches", "us"], lines), "", source(mine), ""] if mine else []


def targets_part(rows: Sequence[Row]) -> list[str]:
    targets = targets_of([row for row in rows if row.get("kind") == "latency"])
    if not targets:
        return []
    return [*(f"- {target.sentence}" for target in targets), ""]


def precision_part(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row.get("kind") == "precision"]
    if not mine:
        return []
    lines = [
        [
            "adaptive" if row["budgets"] is None else f"{row['budgets'][0]:.0%} kept",
            f"{row['mean_keep_ratio']:.1%}",
            *("" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("AP", "AP50", "AP75")),
            row["num_images"],
        ]
        for row in mine
    ]
    return [*table(["AP (%)", "kept", "AP", "AP50", "AP75", "images"], lines), "", source(mine), ""]


def lazy_part(rows: Sequence[Row]) -> list[str]:
    """The experiment of bench.lazy_values, and what follows from its numbers."""
    mine = [row for row in rows if row.get("kind") == "lazy values"]
    if not mine:
        return []
    lines = [
        [
            row["layer"],
            row["queries"],
            f"{row['first_gmac']:.3f}",
            f"{row['afterwards_gmac']:.3f}",
            f"{row['first_ms']:.1f}",
            f"{row['afterwards_ms']:.1f}",
            f"{row['afterwards_ms'] / row['first_ms']:.2f}",
        ]
        for row in mine
    ]
    headings = [
        "layer",
        "queries",
        "GMAC, first",
        "GMAC, after",
        "ms, first",
        "ms, after",
        "time after / first",
    ]
    fewer = [row["layer"] for row in mine if row["afterwards_gmac"] < row["first_gmac"]]
    faster = [row["layer"] for row in mine if row["afterwards_ms"] < row["first_ms"]]
    return [
        "Sampling is linear, so values can be projected after sampling instead of before: only what was gathered is "
        "projected, but every head gathers all channels.",
        f"Fewer multiply-adds afterwards: {'; '.join(fewer) or 'nowhere'}. "
        f"Faster afterwards: {'; '.join(faster) or 'nowhere'}."
        + (" No GPU was measured here." if all("threads" in row for row in mine) else ""),
        "",
        *table(headings, lines),
        "",
        source(mine),
        "",
    ]


def trial_part(rows: Sequence[Row]) -> list[str]:
    """Rows of kind `model latency`: whole models, before bench.latency existed."""
    mine = [row for row in rows if row.get("kind") == "model latency"]
    lines = [
        [
            row["config"],
            row["batch"],
            row["dtype"],
            row["backend"],
            "all" if row["kept"] is None else " ".join(map(str, row["kept"])),
            *(f"{row[key]:.2f}" for key in ("backbone_ms", "encoder_ms", "total_ms")),
        ]
        for row in mine
    ]
    headings = ["config", "batch", "dtype", "operators", "tokens kept", "backbone", "encoder", "total"]
    images = "; ".join(distinct(mine, "image"))
    return [*table(headings, lines), "", f"Images: {images}.", "", source(mine), ""] if mine else []


def parity_part(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row.get("kind") == "model parity on the GPU"]
    lines = [
        [
            row["case"],
            row["backend"],
            "yes" if row["same_queries"] else "no",
            f"{row['max_error_logits']:.1e}",
            f"{row['max_error_boxes']:.1e}",
        ]
        for row in mine
    ]
    headings = ["equal outputs", "operators", "same queries", "largest error, logits", "largest error, boxes"]
    return [*table(headings, lines), "", source(mine), ""] if mine else []


def contests_part(rows: Sequence[Row]) -> list[str]:
    """Rows of bench.kernels: for every operator a table of the device's milliseconds, a column for each contender."""
    mine = [row for row in rows if is_contest(row)]
    lines = []
    for operator in distinct(mine, "operator"):
        contest = [row for row in mine if row["operator"] == operator]
        contenders = distinct(contest, "who")
        times: dict[tuple[str, str], Row] = {}
        for row in contest:
            times.setdefault((row["case"], row.get("dtype", "")), {})[row["who"]] = f"{row['device_ms']:.4f}"
        lines += table(
            [operator, "dtype", *contenders],
            [[*case, *(row.get(who, "") for who in contenders)] for case, row in times.items()],
            numbers_from=2,
        )
        lines.append("")
    return [*lines, source(mine), ""] if mine else []


def is_contest(row: Row) -> bool:
    """Whether bench.kernels wrote it."""
    return row.get("device_ms") is not None and row.get("wall_ms") is not None and "operator" in row


def operators_part(rows: Sequence[Row]) -> list[str]:
    """Other rows of single operators: of several configurations of a kernel the fastest."""
    rows = [row for row in rows if not is_contest(row)]
    keys = ("device_ms", "wall_ms", "fwd_ms", "bwd_ms")
    fastest: dict[tuple[str, ...], Row] = {}
    mine = [row for row in rows if "operator" in row and any(row.get(key) is not None for key in keys)]
    for row in mine:
        name = tuple(str(row.get(key, "")) for key in ("operator", "case", "who", "dtype", "timer", "commit"))
        if name not in fastest or _time(row) < _time(fastest[name]):
            fastest[name] = row
    lines = [
        [*name, *(f"{row[key]:.4f}" if row.get(key) is not None else "" for key in keys)]
        for name, row in fastest.items()
    ]
    used = [
        index for index, key in enumerate(keys) if any(row.get(key) is not None for row in fastest.values())
    ]
    headings = ["operator", "case", "who", "dtype", "timer", "commit"]
    words = {"device_ms": "device", "wall_ms": "wall", "fwd_ms": "forward", "bwd_ms": "backward"}
    lines = [[*line[: len(headings)], *(line[len(headings) + index] for index in used)] for line in lines]
    time_headings = [words[keys[index]] for index in used]
    others = [row for row in rows if "operator" in row and row not in mine]
    named = {*headings, "gpu", "machine", "torch", "triton", "date", "config"}
    figures = [
        [
            *(row.get(key, "") for key in headings[:2]),
            ", ".join(_figure(k, v) for k, v in row.items() if k not in named),
        ]
        for row in others
    ]
    return [
        *([*table([*headings, *time_headings], lines, numbers_from=6), "", source(mine), ""] if mine else []),
        *([*table(["operator", "case", "figures"], figures, 3), "", source(others), ""] if others else []),
    ]


def _figure(name: str, value: object) -> str:
    """A name and its number; of several numbers (a profile) their sum and the largest."""
    if isinstance(value, dict):
        largest = max(value, key=lambda key: value[key])
        return f"{name}: {sum(value.values()):.4g} in all, {largest} {value[largest]:.4g}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _time(row: Row) -> float:
    """By which configurations of one kernel are compared."""
    return next(row[key] for key in ("device_ms", "fwd_ms", "bwd_ms", "wall_ms") if row.get(key) is not None)


if __name__ == "__main__":
    run_cli(main)
