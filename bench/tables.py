"""Rows as pandas tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas
from rich.console import Console
from rich.table import Table

from bench.measure import Row

STAGES = ("backbone", "select", "encoder", "decoder", "total")
CPU_TIME = ", CPU time of the process: other programs were running"
VERSIONS = ("torch", "triton", "transformers", "torchvision")
_SOURCE = {"gpu", "machine", "threads", "rounds", "clock", "timer", "date", "commit", *VERSIONS}


def latency_table(rows: Sequence[Row]) -> pandas.DataFrame:
    """Of rows of kind `latency`: a line for each pass with the median milliseconds of its stages, as text."""
    frame = pandas.DataFrame(rows)
    frame["pass"] = (frame["stage"] == "total").shift(fill_value=False).cumsum()  # `total` is its last row
    stages = frame.pivot(index="pass", columns="stage", values="p50_ms").reindex(columns=STAGES)
    totals = frame[frame["stage"] == "total"].set_index("pass")
    passes = totals.to_dict("records")
    return pandas.DataFrame(
        {
            "detector": [label(row) for row in passes],
            "kept": ["" if row["mode"].startswith("peer:") else f"{row['keep_ratio']:.1%}" for row in passes],
            "images": totals["batch"].astype(str) + " " + totals["images"],
            "size": ["x".join(map(str, size)) for size in totals["image_size"]],
            "dtype": totals["dtype"],
            **{stage: numbers(stages[stage], ".1f") for stage in STAGES},
            "total p95": numbers(totals["p95_ms"], ".1f"),
            "images/s": numbers(totals["images_per_s"], ".2f"),
            "peak MB": numbers(totals["peak_mb"], ".0f"),
        },
        index=totals.index,
    )


def numbers(column: pandas.Series, spec: str) -> list[str]:
    """The column formatted; empty where there is no number."""
    return ["" if pandas.isna(value) else format(value, spec) for value in column]


def label(row: Row) -> str:
    """Name of a mode in charts and tables."""
    mode = row["mode"]
    if mode.startswith("peer:"):
        return mode.removeprefix("peer:")
    if mode in ("dense", "captured-dense"):
        return mode
    before = "" if mode == "packed" else f"{mode}, "
    if row["budgets"] is None:
        return f"{before}adaptive"
    spelled = " ".join(f"{share:.0%}" for share in row["budgets"])
    return f"{before}{spelled} kept" if len(row["budgets"]) == 1 else f"{mode} {spelled}"


def distinct(rows: Iterable[Row], *keys: str) -> list[str]:
    """The values under any of these keys, in order of appearance."""
    return list(dict.fromkeys(str(row[key]) for row in rows for key in keys if key in row))


def source(rows: Sequence[Row]) -> str:
    """Machine, versions, rounds, date and commit of a table."""
    parts = distinct(rows, "machine", "gpu")
    parts += ["1 thread" if count == "1" else f"{count} threads" for count in distinct(rows, "threads")]
    parts += [f"{name} {' and '.join(distinct(rows, name))}" for name in VERSIONS if distinct(rows, name)]
    clock = CPU_TIME if any(row.get("clock") == "cpu" for row in rows) else ""
    parts += [f"median of {rounds} rounds{clock}" for rounds in distinct(rows, "rounds")]
    parts += [" and ".join(distinct(rows, "date")), f"commit {', '.join(distinct(rows, 'commit'))}"]
    return "; ".join(parts)


def operator_tables(rows: Sequence[Row], relative: bool = False) -> list[str]:
    """Of rows of bench.kernels: for every operator a Markdown table of device times, a column for each implementation.

    relative: times divided by the fastest of our own, instead of milliseconds.
    """
    keys = ["operator", "case", "dtype", "who"]
    frame = pandas.DataFrame(rows, columns=[*keys, "device_ms"]).fillna({"dtype": ""})
    tables = []
    for operator, mine in frame.drop_duplicates(keys, keep="last").groupby("operator", sort=False):
        times = mine.set_index(keys[1:])["device_ms"].unstack("who", sort=False)
        if relative:
            times = times.div(times[[who for who in times if who.startswith("ours")]].min(axis=1), axis=0)
        wide = times.apply(numbers, spec=".2f" if relative else ".4f").reset_index()
        tables.append(to_markdown(wide.rename(columns={"case": operator}), num_names=2))
    return tables


def plain_table(rows: Sequence[Row]) -> pandas.DataFrame:
    """Every field of rows of one kind, except those that `source` reports."""
    frame = pandas.DataFrame(rows).drop(columns=["kind", *_SOURCE], errors="ignore")
    return frame.map(lambda value: "" if value is None or value is pandas.NA else value)


def to_markdown(frame: pandas.DataFrame, num_names: int = 1) -> str:
    """A Markdown table; the columns after the first `num_names` are aligned to the right."""
    rule = ["---" if index < num_names else "---:" for index in range(len(frame.columns))]
    lines = [frame.columns, rule, *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def print_table(frame: pandas.DataFrame, console: Console, title: str, caption: str, width: int) -> None:
    """Prints at least `width` columns: long lines are more legible than wrapped numbers."""
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(frame.columns):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in frame.itertuples(index=False):
        table.add_row(*map(str, line))
    Console(width=max(console.width, width), highlight=False).print(table, crop=False)
