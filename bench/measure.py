"""How things are timed here, and what every row says about where that was.

Contenders of one comparison run in one process and take turns: a slow second of the machine then hits all of them, and
medians stay comparable.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ats_detr.errors import UserError

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Samples = dict[str, list[float]]
"""Milliseconds of each stage, one per round."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On the CPU: the time that passes, or the time that the process computes (all threads together). With one thread both
are the same on an idle machine; on a busy one only the second is what it would be without the others.
"""
CLOCK_HELP = "on a CPU: cpu counts the time that the process computes, for one thread on a busy machine"


class Stopwatch:
    """Times consecutive stages of one pass: by one of CLOCKS on the CPU, by events on the stream of a GPU."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.on_gpu, self.clock = device.type == "cuda", CLOCKS[clock]
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """The stage that ran since the last mark ends here. On a GPU this does not wait."""
        self._marks.append((stage, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each stage, and of all together as `total`. Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        names, times = zip(*self._marks, strict=True)
        stages: dict[str, float] = defaultdict(float)
        for name, before, after in zip(names[1:], times, times[1:], strict=False):
            stages[name] += self._between(before, after)
        return {**stages, "total": self._between(times[0], times[-1])}

    def _now(self) -> Any:
        if not self.on_gpu:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.on_gpu else (after - before) * 1e3


Contender = Callable[[Stopwatch], object]
"""One pass; marks its stages. What it does after its last mark is not timed."""


def take_turns(
    contenders: Mapping[str, Contender],
    device: torch.device,
    rounds: int,
    clock: str = "wall",
    after_pass: Callable[[str], object] = lambda name: None,
) -> dict[str, Samples]:
    """The stage times of each contender: in every round each runs once, and another one begins.

    `after_pass` is told who has just run.
    """
    samples: dict[str, Samples] = {name: defaultdict(list) for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            watch = Stopwatch(device, clock)
            watch.start()
            contenders[name](watch)
            for stage, milliseconds in watch.read().items():
                samples[name][stage].append(milliseconds)
            after_pass(name)
    return samples


def peak_memory(contender: Contender, device: torch.device) -> float | None:
    """Megabytes (10^6 bytes) that one pass needs beyond what was there before it; None where no one can tell.

    On a GPU what torch allocated at most; on the CPU the growth of the process's resident memory, which Linux tracks.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender(Stopwatch(device))
        return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes freed goes back to the system, and counts anew
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
        before = _status_bytes("VmRSS")
        contender(Stopwatch(device))
        return round((_status_bytes("VmHWM") - before) / 1e6, 1)
    except (OSError, AttributeError):
        return None


def _status_bytes(key: str) -> int:
    """An entry of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def percentile(milliseconds: list[float], share: float) -> float:
    """Rounded to a microsecond."""
    return round(float(np.percentile(milliseconds, share)), 3)


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that moves the bar one pass ahead and says what ran last."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("passes"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


# ---------------------------------------------------------------------------------------------------------------- rows
def environment(device: torch.device) -> Row:
    """Machine, versions, date and commit: part of every row."""
    facts: Row = {"machine": machine(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        del facts["threads"]
    for package in ("torch", "triton", "transformers", "torchvision"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["torch"] = torch.__version__
    return {**facts, "date": datetime.date.today().isoformat(), "commit": commit()}


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        name = facts.get("model name", name)
        if name == "Intel(R) Xeon(R) Processor":  # virtual machines hide which; family and model tell it
            name += f" (family {facts.get('cpu family')}, model {facts.get('model')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


@functools.cache
def commit() -> str:
    """Short hash of the checked-out commit, with a + where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        run = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def row_file(text: str) -> Path:
    """An argument: a file for rows, tried before anything is measured for it."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot write it ({error.strerror})") from None
    return path


def row_folder(path: Path) -> Path:
    """The folder, made before anything is measured for it. Raises UserError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder ({error.strerror})") from None
    return path


def positive(text: str) -> int:
    """An argument: a number of passes."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def append_rows(rows: Iterable[Row], path: Path) -> None:
    """One JSON object a line, after what is there already."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]
