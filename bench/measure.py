"""The timing harness of every benchmark, the options they share, and the format of their rows.

Everything in one comparison runs in one process and in turns, so that other load on the machine affects all of it alike
and the medians stay comparable.

A row is a flat JSON object: `kind` (`latency`, `flops`, `operator`, `training`, ...), the figures, and `environment`.
Row files hold one object a line and are appended to. Older rows of operators have no `kind`, and `gpu` for `machine`.
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
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from ats_detr.cli.options import image_size

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Samples = dict[str, list[float]]
"""Milliseconds of each stage, one per round."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks on the CPU: elapsed time, or CPU time of the process (the sum over its threads). With one thread both agree on
an idle machine; on a busy machine only CPU time is unaffected by other programs.
"""


class Stopwatch:
    """Times consecutive stages of one pass: with one of CLOCKS on the CPU, with CUDA events on a GPU."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.on_gpu, self.clock = device.type == "cuda", CLOCKS[clock]
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self._marks = [("", self._now())]

    def mark(self, stage: str) -> None:
        """Ends the stage that began at the last mark. Does not synchronise."""
        self._marks.append((stage, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each stage, and their sum as `total`. Synchronises."""
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


Pass = Callable[[Stopwatch], Any]
"""One pass of something; marks its stages. Work after its last mark is not timed."""
Key = TypeVar("Key")


def take_turns(
    passes: Mapping[Key, Pass],
    device: torch.device,
    rounds: int,
    clock: str = "wall",
    after_pass: Callable[[Key], object] = lambda key: None,
    least_ms: float = 0.0,
) -> dict[Key, Samples]:
    """The stage times of each pass, one sample per round. Every round runs each pass once and starts with another one.

    after_pass: called with the key of the pass that has just run.
    least_ms: repeats a pass within its turn until this time is used up, and samples the mean: a short pass that ran
        once between long ones would be timed with cold caches.
    """
    samples: dict[Key, Samples] = {name: defaultdict(list) for name in passes}
    names = list(passes)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            stages: dict[str, float] = defaultdict(float)
            count = 0
            while count == 0 or stages["total"] < least_ms:
                watch = Stopwatch(device, clock)
                watch.start()
                passes[name](watch)
                count += 1
                for stage, milliseconds in watch.read().items():
                    stages[stage] += milliseconds
            for stage, milliseconds in stages.items():
                samples[name][stage].append(milliseconds / count)
            after_pass(name)
    return samples


def timed(function: Callable[[], object]) -> Pass:
    """A pass of one stage."""

    def run(watch: Stopwatch) -> None:
        function()
        watch.mark("total")

    return run


def operator_times(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Median milliseconds of one call of an operator, after one call that compiles and tunes.

    `device_ms` is the sum of the durations of its kernels, `wall_ms` the latency that an eager caller sees; on the CPU
    they are equal.
    """
    import triton.testing

    function()
    if device.type == "cpu":
        (total,) = take_turns({"": timed(function)}, device, 1)[""].values()
        return {"device_ms": total[0], "wall_ms": total[0]}
    wall = triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in profile.key_averages()) / 5e3
    return {"device_ms": kernels, "wall_ms": wall}


def peak_memory(run: Pass, device: torch.device) -> tuple[Any, float | None]:
    """The result of one pass, and its peak memory in megabytes (10^6 bytes), beyond what was allocated before it.

    On a GPU the memory that torch allocates; on the CPU the growth of the process's resident memory
    (Linux only, elsewhere None).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run(Stopwatch(device))
        return result, round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return run(Stopwatch(device)), None
    result = run(Stopwatch(device))
    return result, round((_status_bytes("VmHWM") - before) / 1e6, 1)


def _status_bytes(key: str) -> int:
    """An entry of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def percentile(milliseconds: list[float], share: float) -> float:
    """Rounded to a microsecond."""
    return round(float(np.percentile(milliseconds, share)), 3)


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that advances the bar by one pass and shows the pass's name."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


# ---------------------------------------------------------------------------------------------------------------- rows
def environment(device: torch.device) -> Row:
    """Machine, versions, date and commit, for every row."""
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
    """Name of the GPU, or name and number of cores of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        name = facts.get("model name", name)
        if name == "Intel(R) Xeon(R) Processor":  # a virtual machine hides the name, but not the model number
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


def append_rows(rows: Iterable[Row], path: Path | None) -> None:
    """Appends one JSON object a line to a file, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


# ------------------------------------------------------------------------------------------------------------- options
def new_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Parser of `python -m bench.<module>`, whose description is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser, size: tuple[int, int], rounds: str) -> None:
    """Model, batches, device, dtype, rounds and clock of a benchmark of whole models.

    size: default (height, width) of generated images.
    rounds: default number, in words.
    """
    parser.add_argument("--config", default=str(CONFIGS / "ats_r50_0.1_0.2.yaml"), help="one YAML file")
    parser.add_argument("--checkpoint", help="trained weights, as for predict")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.num_queries=100")
    parser.add_argument("--batch", type=batch_sizes, default=[1], metavar="1,4,8")
    parser.add_argument(
        "--image-size", type=image_size, default=size, metavar="HxW", help="of generated images"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=positive, help=f"timed passes of each mode; default {rounds}")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall",
                        help="on a CPU: elapsed time, or CPU time (with one thread on a busy machine)")  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="tiny images and two rounds, to check the command"
    )


def row_file(text: str) -> Path:
    """An argument: a file for rows. Fails before anything is measured if it cannot be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot write this file ({error.strerror})") from None
    return path


def positive(text: str) -> int:
    """An argument: an integer > 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer > 0")
    return int(text)


def words(text: str) -> list[str]:
    """An argument such as a,b."""
    return [word.strip() for word in text.split(",") if word.strip()]


def shares(text: str) -> tuple[float, ...]:
    """An argument such as 0.1,0.3."""
    try:
        numbers = tuple(float(word) for word in words(text))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers in (0, 1], such as 0.1,0.3")
    return numbers


def batch_sizes(text: str) -> list[int]:
    """An argument such as 1,4,8."""
    return [positive(word) for word in words(text)] or [positive(text)]
