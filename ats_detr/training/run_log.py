"""What a run tells while it trains: a progress bar, a JSONL file, TensorBoard. Only the first process tells."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ats_detr import distributed

console = Console(quiet=not distributed.is_main())
_SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal there is no bar that moves: a line is printed this often."""


def configure() -> None:
    """Show the package's messages on the console of the first process. Call it once the processes are connected."""
    console.quiet = not distributed.is_main()
    logging.basicConfig(level=logging.WARNING, handlers=[_ConsoleHandler()], force=True)
    logging.getLogger("ats_detr").setLevel(logging.INFO if distributed.is_main() else logging.ERROR)


def say(text: str) -> None:
    """A line on the console of the first process."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    """Log records as lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(prefix + record.getMessage())


class RunLog:
    """The log of one stage: `log.jsonl` and `tensorboard/` in its folder, and the console; by the first process.

    Args:
        folder: of the stage.
        name: of the stage, shown in front of the bar.
        step: completed steps of the run that goes on; later entries of an interrupted run are dropped.
        evaluated: whether the evaluation after that step is behind it.
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
        """The batches of an epoch from number `start` on, with a bar that shows what `write` was given last."""
        title = f"{self.name} {epoch + 1}/{num_epochs}"
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
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
        """One line of the log: `kind` is `train`, `evaluation` or `skipped`."""
        if self._writer is None:
            return
        with self._file.open("a") as file:
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
        """Flush TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def _drop_entries_after(file: Path, step: int, evaluated: bool) -> None:
    """Entries beyond the checkpoint that a run goes on from will be written again. A torn last line goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        is_pending = entry["step"] == step and entry["kind"] == "evaluation" and not evaluated
        if line.endswith("\n") and entry["step"] <= step and not is_pending:
            kept.append(line)
    file.write_text("".join(kept))
