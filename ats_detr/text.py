"""Text in one line."""

from __future__ import annotations

import unicodedata

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
