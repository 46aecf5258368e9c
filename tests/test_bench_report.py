"""python -m bench.report: docs/performance.md equals what the committed rows give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.latency import Target, targets_of
from bench.measure import RESULTS, Row, append_rows, read_rows
from bench.tables import operator_tables


def test_the_document_is_up_to_date() -> None:
    assert report.DOCUMENT.read_text() == report.document(RESULTS), "run python -m bench.report"


def test_every_picture_of_the_document_exists() -> None:
    shown = [
        line.split("](")[1].removesuffix(")")
        for line in report.DOCUMENT.read_text().splitlines()
        if line[:2] == "!["
    ]
    assert {f"performance/{path.name}" for path in report.PICTURES.glob("*.png")} == set(shown)


def test_every_committed_row_is_in_the_document() -> None:
    known = {"note", "latency", "flops", "budgets", "precision", "training", "launches"}
    for path in report.result_files(RESULTS):
        for row in read_rows(path):
            generated = row.get("kind") in known or "operator" in row
            assert generated or path.with_suffix(".md").exists(), f"{path.name}: {row}"


def test_a_changed_row_changes_the_document(tmp_path: Path) -> None:
    row = {"kind": "training", "part": "labels", "p50_ms": 1.25, "baseline": "definition", "baseline_ms": 10.0,
           "rounds": 3, "machine": "an abacus", "threads": 1, "torch": "2.11", "date": "2026-01-02",
           "commit": "abc1234"}  # fmt: skip
    append_rows([row], tmp_path / "one.jsonl")
    text = report.document(tmp_path)
    assert "## Training: an abacus, 2026-01-02" in text
    assert "| labels | 1.25 | definition | 10.0 |" in text
    assert "*an abacus; 1 thread; torch 2.11; median of 3 rounds; 2026-01-02; commit abc1234*" in text
    (tmp_path / "one.jsonl").write_text(json.dumps({**row, "p50_ms": 2.5}) + "\n")
    assert "| labels | 2.5 | definition | 10.0 |" in report.document(tmp_path)


def test_text_beside_rows_is_part_of_the_document(tmp_path: Path) -> None:
    append_rows([{"kind": "old", "date": "2026-01-02"}], tmp_path / "old.jsonl")
    (tmp_path / "old.md").write_text("## An experiment\n\nIts result.\n")
    assert report.document(tmp_path).endswith("## An experiment\n\nIts result.\n")


def test_targets_are_ratios_of_medians() -> None:
    def row(mode: str, stage: str, milliseconds: float, budgets: list[float] | None = None) -> Row:
        return {"device": "cpu", "mode": mode, "stage": stage, "budgets": budgets, "p50_ms": milliseconds}

    rows = [
        row("packed", "encoder", 20, [0.1]),
        row("dense", "encoder", 100),
        row("packed", "total", 100, [0.1]),
    ]
    encoder, *others = targets_of(rows)
    assert encoder.measured == pytest.approx(0.2) and encoder.met and not others
    assert not targets_of([row | {"device": "cuda"} for row in rows])
    slower = targets_of([*rows, row("peer:deformable-detr", "total", 120)])[1]
    assert slower.measured == pytest.approx(1.2) and not slower.met
    assert "1.20 (at least 1.25: NOT MET)" in slower.sentence
    assert Target("x", 1.25, 1.25, "at least").met


def test_operators_have_a_column_for_each_baseline() -> None:
    def row(who: str, milliseconds: float) -> Row:
        times = {
            "device_ms": milliseconds,
            "wall_ms": 9.0,
            "dtype": "float32",
            "gpu": "X",
            "commit": "a",
            "date": "b",
        }
        return {"operator": "scatter", "case": "10%", "who": who, **times}

    rows = [row("ours", 0.5), row("theirs", 1), row("theirs", 2)]
    (table,) = operator_tables(rows)
    lines = table.splitlines()
    assert lines[0] == "| scatter | dtype | ours | theirs |"
    assert lines[2] == "| 10% | float32 | 0.5000 | 2.0000 |"
    assert operator_tables(rows, relative=True)[0].splitlines()[2] == "| 10% | float32 | 1.00 | 4.00 |"
