"""bench/micro: every hot path runs, the committed baseline knows each of them, and a slowdown shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "bench" / "micro" / "baseline.json"


def run_micro(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench/micro", *arguments]
    # Not the settings of the run that this test is part of.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_baseline_knows_every_hot_path_and_every_one_runs() -> None:
    result = run_micro("--benchmark-disable", "-v")
    assert result.returncode == 0, result.stdout
    known = {benchmark["fullname"] for benchmark in json.loads(BASELINE.read_text())["benchmarks"]}
    ran = {
        line.split()[0].removeprefix("bench/micro/")
        for line in result.stdout.splitlines()
        if " PASSED" in line
    }
    assert ran == known


def test_a_slowdown_shows(tmp_path: Path) -> None:
    baseline = json.loads(BASELINE.read_text())
    for benchmark in baseline["benchmarks"]:
        for statistic in ("min", "max", "mean", "median"):
            benchmark["stats"][statistic] /= 1000  # as if it had been a thousand times faster
    path = tmp_path / "faster.json"
    path.write_text(json.dumps(baseline))
    options = ("-k", "decode", "--benchmark-only", "--benchmark-compare-fail=min:1000%")
    assert "Performance has regressed" in run_micro(*options, f"--benchmark-compare={path}").stderr
    assert run_micro(*options, f"--benchmark-compare={BASELINE}").returncode == 0
