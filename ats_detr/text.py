"""Text in one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shortened(value: object, length: int = 80) -> str:
    """`repr` of a value, with at most `length` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or deeply nested
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def run_name(source: str) -> str:
    """A name of a run from that of a file."""
    return re.sub(r"[^\w.-]+", "_", Path(source).stem).strip(".")[:50] or "published"


def mismatches(expected: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Missing, unknown and reshaped tensors of a state dict in one phrase; empty if names and shapes agree."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [n for n in expected if n in state and state[n].shape != expected[n].shape],
    }
    return "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in problems.items() if names)
