"""python -m bench.sweep: its rows agree with the other commands, and its report shows every chart."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ats_detr.checkpoint import build_without_fetching, save_checkpoint
from ats_detr.config import config_to_dict, load_config
from ats_detr.data.coco import ClassMap
from ats_detr.data.synthetic import CLASSES
from bench.charts import Sweep
from bench.flops import given_subject, row_of
from bench.latency import QUICK_SIZE, generated_images
from bench.measure import Row, read_rows
from tests.training.small import SMALL_DATA, write_small_chain

ROOT = Path(__file__).parents[1]
CHARTS = {
    "gflops",
    "latency",
    "savings",
    "parts",
    "stages",
    "packing",
    "budgets",
    "ap_mean_keep_ratio",
    "ap_gflops",
    "ap_latency_ms",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep of a tiny untrained student, with its configs: weak.yaml, strong.yaml, student.yaml."""
    folder = tmp_path_factory.mktemp("sweep")
    config_file = write_small_chain(folder)
    config = load_config(config_file)
    classes = ClassMap.from_categories({index + 1: name for index, (name, *_) in enumerate(CLASSES[:3])})
    model = build_without_fetching(config, classes.num_rows)
    facts = {"config": config_to_dict(config), "num_classes": classes.num_rows, "classes": classes.to_dict()}
    facts |= {"epoch": 1, "finished": True}
    save_checkpoint({**facts, "model": model.state_dict()}, folder / "run" / "student" / "final.pt")
    command = [sys.executable, "-m", "bench.sweep", "--config", str(config_file), "--quick", "--device", "cpu",
               "--ratios", "0.1,0.5", "--peers", "", "--checkpoint", str(folder / "run"), "--ap",
               "--out", str(folder)]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "of the saving became time" in " ".join(result.stdout.split())
    return folder


def rows_of(folder: Path, kind: str) -> list[Row]:
    return [row for row in read_rows(folder / "rows.jsonl") if row["kind"] == kind]


def test_multiply_adds_are_those_of_bench_flops(folder: Path) -> None:
    images = [generated_images(1, "same", QUICK_SIZE)]
    swept = {str(row["budgets"]): row for row in rows_of(folder, "flops") if row["mode"] == "packed"}
    for ratio in (0.1, 0.5):
        overrides = [f"model.selector.keep_ratio={ratio}", "model.num_classes=3"]
        subject = given_subject(load_config(folder / "weak.yaml", overrides), None)
        counted = row_of(subject, images)
        row = swept[str([ratio])]
        assert row["keep_ratio"] == pytest.approx(counted["keep_ratio"], abs=1e-4)
        assert row["encoder_gflops"] == pytest.approx(counted["needed_encoder_gflops"], abs=1e-4)
        # The adaptive model has a budget head that the fixed one has not.
        assert row["gflops"] == pytest.approx(counted["needed_gflops"], rel=1e-3)
    (dense,) = [row for row in rows_of(folder, "flops") if row["mode"] == "dense"]
    overrides = ["model.selector=null", "model.encoder_auxiliary=false", "model.num_classes=3"]
    subject = given_subject(load_config(folder / "weak.yaml", overrides), None)
    counted = row_of(subject, images)
    assert dense["gflops"] == pytest.approx(counted["needed_gflops"], rel=1e-3)


def test_every_choice_is_evaluated_on_every_validation_image(folder: Path) -> None:
    rows = rows_of(folder, "precision")
    assert [row["budgets"] for row in rows] == [None, [0.1], [0.5]]
    assert {row["num_images"] for row in rows} == {SMALL_DATA["synthetic"]["num_val"]}
    for row, ratio in zip(rows[1:], (0.1, 0.5), strict=True):
        assert ratio < row["mean_keep_ratio"] < ratio + 0.05  # int(n * ratio) + 1 of some 85 tokens
    assert all(0 <= row["AP"] <= 1 for row in rows)


def test_parts_add_up_to_the_whole(folder: Path) -> None:
    for row in rows_of(folder, "flops"):
        assert sum(row["parts"].values()) == pytest.approx(row["gflops"], abs=1e-3)
        assert all(part >= 0 for part in row["parts"].values())


def test_savings_compare_with_the_dense_model() -> None:
    def flops(mode: str, budgets: list[float] | None, ratio: float, total: float, encoder: float) -> Row:
        return {"kind": "flops", "config": "x", "mode": mode, "budgets": budgets, "keep_ratio": ratio,
                "gflops": total, "encoder_gflops": encoder}  # fmt: skip

    def time(mode: str, budgets: list[float] | None, stage: str, milliseconds: float) -> Row:
        return {
            "kind": "latency",
            "mode": mode,
            "budgets": budgets,
            "batch": 1,
            "stage": stage,
            "p50_ms": milliseconds,
        }

    sweep = Sweep([
        flops("packed", [0.1], 0.1, 60, 20), flops("dense", None, 1.0, 100, 50),
        time("packed", [0.1], "encoder", 30), time("packed", [0.1], "total", 80),
        time("dense", None, "encoder", 60), time("dense", None, "total", 100),
    ])  # fmt: skip
    ((ratio, saved),) = sweep.savings()
    assert ratio == 0.1
    assert saved["encoder"] == pytest.approx((0.6, 0.5))
    assert saved["total"] == pytest.approx((0.4, 0.2))
    assert "83% of the saving became time" in sweep.findings()[0]


def test_every_chart_is_a_picture_of_some_size(folder: Path) -> None:
    assert {path.stem for path in folder.glob("*.png")} == CHARTS
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width == 1800
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 3


def test_the_report_shows_every_chart_and_the_source_of_its_rows(folder: Path) -> None:
    report = (folder / "report.md").read_text()
    assert set(re.findall(r"!\[.*\]\((\w+)\.png\)", report)) == CHARTS
    assert "commit" in report and "torch" in report
    assert "| adaptive |" in report  # a row of the table of passes
