"""`bench.launches`: the launches and bytes that a pass and a training step may need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.measure import read_rows

BUDGETS = {
    ("captured", "bfloat16", 1): {"launches": 300, "megabytes": 2300, "floor_us": 1150},
    ("captured", "bfloat16", 4): {"floor_us": 3300},
    ("eager", "float32", 1): {"launches": 480},
    ("eager", "bfloat16", 1): {"launches": 560},
    ("training", "float32", 2): {"launches": 3195},
    ("training", "bfloat16", 2): {"launches": 3195},
}
"""Lower these with the launches; raising one needs a reason."""


@pytest.mark.parametrize(
    "modes", [("captured", "eager"), pytest.param(("training",), marks=pytest.mark.slow)], ids=str
)
def test_passes_need_no_more_launches_and_bytes_than_budgeted(modes, tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "rows.jsonl"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    command = [sys.executable, "-m", "bench.launches", "--json", str(file), "--modes", *modes]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    totals = {
        (row["mode"], row["dtype"], row["images"]): row for row in read_rows(file) if row["stage"] == "total"
    }
    budgets = {case: budget for case, budget in BUDGETS.items() if case[0] in modes}
    assert totals.keys() == budgets.keys()
    over = {
        (case, figure): totals[case][figure]
        for case, budget in budgets.items()
        for figure, most in budget.items()
        if not 0 < totals[case][figure] <= most
    }
    assert not over
