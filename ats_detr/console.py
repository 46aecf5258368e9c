"""Output to the terminal, and the end of a command.

Markup, escape sequences and line breaks in the names of classes and files have no effect.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ats_detr.errors import Stopped, UserError
from ats_detr.text import printable

T = TypeVar("T")


class _PlainConsole(Console):
    """A console on which every string, also in tables, is `printable` text without markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


console = _PlainConsole(highlight=False)


def say(text: str) -> None:
    """Print one line."""
    console.print(text, soft_wrap=True)


def complain(text: str) -> None:
    """Print one line on stderr."""
    print(f"error: {printable(text)}", file=sys.stderr)


def track(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """Yield the items, with a progress bar where the output is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield from progress.track(items, total=total, description=printable(what))


def use_utf8() -> None:
    """Make this process read file names and arguments as UTF-8, and never fail to print a character.

    Python decodes them by the locale, and has no characters beyond ASCII in the locale C; it is started again in UTF-8
    mode there.
    """
    if sys.getfilesystemencoding().lower() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` in UTF-8 and convert exceptions to exit codes.

    - UserError, or a file that cannot be read or written: one line on stderr, exit code 2. Under torchrun, ranks above
      0 wait ten seconds before printing; if rank 0 has the same error, torchrun ends them within that time.
    - Stopped: one line on stdout, exit code 0, so that a launcher does not restart the run; after Ctrl-C 130.
    - KeyboardInterrupt: exit code 130.
    - All others are bugs and keep their traceback for a report.
    """
    use_utf8()
    try:
        main()
    except UserError as error:
        _end(str(error))
    except Stopped as end:
        if os.environ.get("RANK", "0") == "0":
            say(str(end))
        sys.exit(end.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(f"no space left for {error.filename or 'a file'}")
        if error.filename is None:
            raise
        _end(f"{os.fsdecode(error.filename)}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    complain(message)
    sys.exit(2)
