"""Output to the terminal. Markup, escape sequences and line breaks in the names of classes and files have no effect."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, format characters, surrogates, and separators of lines and paragraphs."""
_JOINERS = "\u200c\u200d"
"""Zero-width characters that change the shape of their neighbours."""


def is_visible(character: str) -> bool:
    """Whether a character is part of visible text in one line."""
    return unicodedata.category(character) not in _INVISIBLE or character in _JOINERS


def printable(text: str) -> str:
    """`text` in one line, with invisible characters as escape sequences (`\\n`, `\\x1b`)."""
    return "".join(c if is_visible(c) else c.encode("unicode_escape").decode() for c in text)


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
