"""python -m bench.report: docs/performance.md is what the committed rows say, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.latency import Target, targets_of
from bench.measure import RESULTS, Row, append_rows, read_rows


def test_the_document_is_what_the_rows_say() -> None:
    assert report.DOCUMENT.read_text() == report.document(RESULTS), "run python -m bench.report"


def test_every_picture_of_the_document_is_there() -> None:
    shown = [
        line.split("](")[1].removesuffix(")")
        for line in report.DOCUMENT.read_text().splitlines()
        if line[:2] == "!["
    ]
    assert {f"performance/{path.name}" for path in report.PICTURES.glob("*.png")} == set(shown)


def test_every_committed_row_is_in_some_part() -> None:
    known = {
        "note",
        "latency",
        "flops",
        "budgets",
        "precision",
        "lazy values",
        "profile",
        "model latency",
        "model parity on the GPU",
    }
    for path in report.result_files(RESULTS):
        for row in read_rows(path):
            assert row.get("kind") in known or "operator" in row, f"{path.name}: {row}"


def test_a_changed_row_changes_the_document(tmp_path: Path) -> None:
    row = {"kind": "lazy values", "layer": "decoder layer", "queries": 300, "first_gmac": 1.2, "afterwards_gmac": 0.1,
           "first_ms": 10.0, "afterwards_ms": 5.0, "rounds": 3, "machine": "an abacus", "torch": "2.11",
           "date": "2026-01-02", "commit": "abc1234"}  # fmt: skip
    append_rows([row], tmp_path / "one.jsonl")
    text = report.document(tmp_path)
    assert "| decoder layer | 300 | 1.200 | 0.100 | 10.0 | 5.0 | 0.50 |" in text
    assert "*an abacus; torch 2.11; median of 3 rounds; 2026-01-02; commit abc1234*" in text
    assert "Faster afterwards: decoder layer." in text
    (tmp_path / "one.jsonl").write_text(json.dumps({**row, "afterwards_ms": 20.0}) + "\n")
    assert "Faster afterwards: nowhere." in report.document(tmp_path)


def test_of_several_configurations_of_a_kernel_the_fastest_is_shown(tmp_path: Path) -> None:
    rows = [{"operator": "scatter", "case": "10%", "who": "ours", "device_ms": ms, "config": config, "gpu": "a GPU",
             "date": "2026-01-02", "commit": "abc1234"}
            for config, ms in (("a", 0.3), ("b", 0.2), ("c", 0.4))]  # fmt: skip
    append_rows(rows, tmp_path / "kernels.jsonl")
    text = report.document(tmp_path)
    assert "0.2000" in text and "0.3000" not in text and "0.4000" not in text


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
    assert Target("x", 1.25, 1.25, at_most=False).met


def test_contests_have_a_column_for_each_contender() -> None:
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

    lines = report.contests_part([row("ours", 0.5), row("theirs", 2)])
    assert lines[0] == "| scatter | dtype | ours | theirs |"
    assert lines[2] == "| 10% | float32 | 0.5000 | 2.0000 |"
    assert not report.operators_part([row("ours", 0.5)])
