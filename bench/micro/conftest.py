"""A clock that runs with the machine: times become comparable between machines, and between busy and idle hours.

It counts what the process computes, in one thread. Before each benchmark a fixed loop is timed: a "second" of the
benchmarks is as long as LOOPS_PER_SECOND such loops take on this machine now.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.measure import commit, environment

LOOPS_PER_SECOND = 50
"""So that a benchmark's second is a real one where the loop takes 20 ms."""
_REPEATS = 5

_seconds_per_loop = 1.0


def clock() -> float:
    """The time in seconds of the benchmarks."""
    return time.process_time() / (_seconds_per_loop * LOOPS_PER_SECOND)


def loop() -> None:
    """What the hot paths are made of, in equal parts: matrix products, gathers, many small operators, plain Python."""
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
    """The fastest of a few loops: whatever disturbs makes it slower."""
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
    """Without the single timings: a baseline is small enough to be committed."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
