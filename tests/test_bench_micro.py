"""bench/micro: every benchmark runs, is in the committed baseline, and reports a slowdown."""

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
    # Without the settings of the surrounding pytest run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_benchmark_runs_and_is_in_the_baseline() -> None:
    result = run_micro("--benchmark-disable", "-v")
    assert result.returncode == 0, result.stdout
    known = {benchmark["fullname"] for benchmark in json.loads(BASELINE.read_text())["benchmarks"]}
    ran = {
        line.split()[0].removeprefix("bench/micro/")
        for line in result.stdout.splitlines()
        if " PASSED" in line
    }
    assert ran == known


def test_a_slowdown_fails(tmp_path: Path) -> None:
    baseline = json.loads(BASELINE.read_text())
    for benchmark in baseline["benchmarks"]:
        for statistic in ("min", "max", "mean", "median"):
            benchmark["stats"][statistic] /= 1000  # as if it had been a thousand times faster
    path = tmp_path / "faster.json"
    path.write_text(json.dumps(baseline))
    options = ("-k", "decode", "--benchmark-only", "--benchmark-compare-fail=min:1000%")
    assert "Performance has regressed" in run_micro(*options, f"--benchmark-compare={path}").stderr
