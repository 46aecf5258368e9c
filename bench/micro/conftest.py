"""A calibrated clock, which makes times comparable between machines, and between a busy and an idle machine.

It measures the CPU time of one thread. A fixed loop is timed before each benchmark: a "second" is the time of
LOOPS_PER_SECOND such loops.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.measure import commit, environment

LOOPS_PER_SECOND = 50
"""Makes a benchmark's second a real second where the loop takes 20 ms."""
_REPEATS = 5

_seconds_per_loop = 1.0


def clock() -> float:
    """The time in seconds of the benchmarks."""
    return time.process_time() / (_seconds_per_loop * LOOPS_PER_SECOND)


def loop() -> None:
    """The operations of the hot paths, in equal parts: matrix products, gathers, small operators, plain Python."""
    matrix = torch.ones(256, 256)
    table, rows = torch.ones(20000, 64), torch.arange(0, 20000, 7)
    for _ in range(8):
        matrix = (matrix @ matrix).clamp_(max=1.0)
    for _ in range(12):
        table.index_select(0, rows).sum()
    small = torch.ones(16)
    for _ in range(600):
        small = small + 1.0
    total = 0
    for number in range(60000):
        total += number


@pytest.fixture(autouse=True)
def calibrated() -> None:
    """Takes the fastest of a few loops: interruptions only make a loop slower."""
    global _seconds_per_loop
    torch.set_num_threads(1)
    times = []
    for _ in range(_REPEATS):
        start = time.process_time()
        loop()
        times.append(time.process_time() - start)
    _seconds_per_loop = min(times)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock, min_rounds=7))


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {"project": "ats_detr", "id": commit()}


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return environment(torch.device("cpu"))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drops the single timings, so that a baseline is small enough to commit."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
