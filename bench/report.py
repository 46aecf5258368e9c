"""Writes docs/performance.md and its pictures from the measured rows.

    python -m bench.report               all of bench/results/*.jsonl
    python -m bench.report --check       fails if docs/performance.md differs from what the rows give

Each file of rows becomes a section. The text of finished experiments, whose rows no command writes any more, is the
Markdown file beside the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas

from ats_detr.console import run_cli
from ats_detr.curve import Point, curve_table
from ats_detr.errors import UserError
from bench.charts import Sweep
from bench.latency import targets_of
from bench.measure import RESULTS, ROOT, Row, new_parser, read_rows
from bench.tables import (
    distinct,
    label,
    latency_table,
    numbers,
    operator_tables,
    plain_table,
    source,
    to_markdown,
)

DOCUMENT = ROOT / "docs" / "performance.md"
PICTURES = DOCUMENT.with_suffix("")
HEAD = """# Performance

Written by `python -m bench.report` from the rows and texts in `bench/results/`; edit those, not this file.
Times are medians in milliseconds unless a column names another unit; multiply-adds are giga multiply-adds per image.
Rows of a GPU are older than the fused convolutions and the captured postprocessing: no present pass and no training
step has been timed on a GPU. `bench/gpu.sh` runs these measurements.
"""


def main() -> None:
    parser = new_parser("report", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 2 if the document differs"
    )
    arguments = parser.parse_args()
    text = document(RESULTS)
    if arguments.check:
        if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
            raise UserError(f"{DOCUMENT} differs from the rows: run python -m bench.report")
        return
    DOCUMENT.write_text(text)
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for path in result_files(RESULTS):
        for chart in Sweep(rows).charts() if is_sweep(rows := read_rows(path)) else ():
            chart.save(PICTURES / f"{path.stem}-{chart.key}.png")
    print(f"{DOCUMENT} and {len(list(PICTURES.glob('*.png')))} pictures")


def document(results: Path) -> str:
    """The text of docs/performance.md."""
    return "\n".join([HEAD, *map(section, result_files(results))])


def result_files(results: Path) -> list[Path]:
    """The latest date first, then by name."""
    paths = sorted(results.glob("*.jsonl"))
    return sorted(paths, key=lambda path: max(row.get("date", "") for row in read_rows(path)), reverse=True)


def section(path: Path, *, pictures: str | None = None) -> str:
    """The section of one file of rows.

    pictures: beginning of the paths of its charts; None: where `main` writes them.
    """
    rows = read_rows(path)
    notes = [row["text"] for row in rows if row.get("kind") == "note"]
    text = path.with_suffix(".md").read_text() if path.with_suffix(".md").exists() else ""
    if text.startswith("## "):
        return text.rstrip() + "\n"
    measured = [row for row in rows if row.get("kind") != "note"]
    parts = [f"## {title(measured)}", "\n".join([f"Rows: `bench/results/{path.name}`.", *notes])]
    if is_sweep(measured):
        parts += sweep_part(f"performance/{path.stem}-" if pictures is None else pictures, measured)
    for kind in distinct(measured, "kind"):
        mine = [row for row in measured if row.get("kind") == kind]
        if kind == "latency":
            parts += [to_markdown(latency_table(mine)), f"*{source(mine)}*"]
            parts.append("\n".join(f"- {target.sentence}" for target in targets_of(mine)))
        elif kind == "precision":
            points = [Point.from_dict(row["point"]) for row in mine]
            header, *lines = curve_table(points)
            parts += [to_markdown(pandas.DataFrame(lines, columns=header)), f"*{source(mine)}*"]
        elif kind in ("training", "stages", "launches"):
            parts += [to_markdown(plain_table(mine)), f"*{source(mine)}*"]
    if mine := [row for row in measured if "operator" in row]:
        parts += [*operator_tables(mine), f"*{source(mine)}*"]
    return "\n\n".join(part for part in [*parts, text.strip()] if part) + "\n"


def title(rows: Sequence[Row]) -> str:
    """What was measured, where and when."""
    kinds = {row.get("kind", "operator") for row in rows}
    subjects = (("flops", "Keep ratios"), ("latency", "Latency"), ("operator", "Operators"))
    subject = next(
        (words for kind, words in subjects if kind in kinds), ", ".join(sorted(kinds)).capitalize()
    )
    if kinds & {"flops", "latency"}:
        subject += f" of {next(row['config'] for row in rows if row.get('mode') == 'packed')}"
    return f"{subject}: {', '.join(distinct(rows, 'machine', 'gpu'))}, {' and '.join(distinct(rows, 'date'))}"


def is_sweep(rows: Sequence[Row]) -> bool:
    return any(row.get("kind") == "flops" for row in rows)


def sweep_part(pictures: str, rows: Sequence[Row]) -> list[str]:
    """Findings, pictures, and multiply-adds of a run of bench.sweep."""
    sweep = Sweep(rows)
    parts = ["\n".join(f"- {finding}" for finding in sweep.findings())]
    for chart in sweep.charts():
        parts += [f"![{chart.title}]({pictures}{chart.key}.png)", chart.caption]
    parts.append(f"*{source(rows)}*")
    flops = pandas.DataFrame(sweep.flops)
    table = pandas.DataFrame(
        {
            "multiply-adds": list(map(label, sweep.flops)),
            "kept": numbers(flops["keep_ratio"], ".1%"),
            "total": numbers(flops["gflops"], ".2f"),
            "encoder": numbers(flops["encoder_gflops"], ".2f"),
        }
    )
    counts = pandas.DataFrame([row["parts"] for row in sweep.flops])
    return [*parts, to_markdown(table.join(counts.apply(numbers, spec=".2f"))), f"*{source(sweep.flops)}*"]


if __name__ == "__main__":
    run_cli(main)
