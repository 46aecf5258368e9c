"""The log of a run: progress bar, JSONL file and TensorBoard. Written by rank 0 only."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ats_detr import distributed
from ats_detr.console import console, say
from ats_detr.files import replaced_file

_SECONDS_BETWEEN_LINES = 30.0
"""Interval of progress lines where the output is not a terminal."""


def configure() -> None:
    """Show the package's log messages on the console of rank 0. Call it after the process group is initialised."""
    console.quiet = not distributed.is_main()
    logging.basicConfig(level=logging.WARNING, handlers=[_ConsoleHandler()], force=True)
    logging.getLogger("ats_detr").setLevel(logging.INFO if distributed.is_main() else logging.ERROR)


class _ConsoleHandler(logging.Handler):
    """Prints log records above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(prefix + record.getMessage())


class RunLog:
    """The log of one stage: `log.jsonl` and `tensorboard/` in its folder, and the console of rank 0.

    Args:
        folder: folder of the stage.
        name: name of the stage, shown in the progress bar.
        step: completed steps; later entries of an interrupted run are removed.
        evaluated: whether an evaluation after that step is complete; otherwise its entry is removed, too.
    """

    def __init__(self, folder: Path, name: str, step: int, evaluated: bool = True) -> None:
        self.name = name
        self._file = folder / "log.jsonl"
        self._writer: SummaryWriter | None = None
        if distributed.is_main():
            _drop_entries_after(self._file, step, evaluated)
            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def track(
        self, batches: Iterable[Any], num_steps: int, epoch: int, num_epochs: int, start: int = 0
    ) -> Iterator[Any]:
        """Yield the batches of an epoch, of which `start` are done, with a progress bar and the values last written."""
        title = f"{self.name} {epoch + 1}/{num_epochs}"
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._text, printed = "", time.monotonic()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=num_steps, completed=start, text="")
            for done, batch in enumerate(batches, start=start + 1):
                yield batch
                progress.update(task, completed=done, text=self._text)
                if not console.is_terminal and time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
                    say(f"{title} step {done}/{num_steps} {self._text}")
                    printed = time.monotonic()

    def write(self, step: int, epoch: int, values: Mapping[str, Any], *, kind: str = "train") -> None:
        """Write one entry; `kind` is `train`, `evaluation` or `skipped`."""
        if self._writer is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{key}", value, step)
        if kind == "train":
            shown = {
                "loss": "loss {:.3f}",
                "learning_rate": "lr {:.1e}",
                "images_per_second": "{:.1f} images/s",
            }
            self._text = "  ".join(text.format(values[key]) for key, text in shown.items() if key in values)
            if "keep_ratio" in values:
                self._text += f"  keep {values['keep_ratio']:.1%}"

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


def _drop_entries_after(file: Path, step: int, evaluated: bool) -> None:
    """Remove entries after a checkpoint, which will be written again, and incomplete lines."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
            is_pending = entry["step"] == step and entry["kind"] == "evaluation" and not evaluated
            is_kept = line.endswith("\n") and entry["step"] <= step and not is_pending
        except (ValueError, TypeError, LookupError, RecursionError):  # not a line of this log
            continue
        if is_kept:
            kept.append(line)
    with replaced_file(file) as replaced:
        replaced.write("".join(kept).encode())
