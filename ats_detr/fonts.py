"""Fonts for text in pictures: class names may be in any script."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

import matplotlib
from anyascii import anyascii
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from ats_detr.text import is_visible

DEFAULT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
"""Shipped with Matplotlib. Covers Latin, Greek, Cyrillic, Hebrew, Arabic, Armenian, Georgian, and symbols."""


def font_for(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font of `size` pixels, and `text` in one line as this font can draw it.

    The font is DejaVu Sans, or the first font of the system that covers `text`. Characters that no font covers are
    transliterated to ASCII (猫 becomes Mao).
    """
    text = one_line(text)
    needed = frozenset(map(ord, text)) - _covered(DEFAULT)
    font = _system_font(needed) if needed else DEFAULT
    if font is None:
        return ImageFont.truetype(str(DEFAULT), size), legible(text)
    return ImageFont.truetype(str(font), size), text


def legible(text: str) -> str:
    """`text` in one line, with characters that DejaVu Sans lacks transliterated to ASCII."""
    covered = _covered(DEFAULT)
    return "".join(c if ord(c) in covered else _ascii(c) for c in one_line(text))


def _ascii(character: str) -> str:
    """A transliteration; of marks without one, such as the virama of Indic scripts, nothing."""
    is_mark = unicodedata.category(character).startswith("M")
    return anyascii(character) or ("" if is_mark else f"U+{ord(character):04X}")


def one_line(text: str) -> str:
    """`text` without line breaks, control characters and lone surrogates."""
    return " ".join("".join(c if is_visible(c) else " " for c in text).split())


@functools.lru_cache(maxsize=256)
def _covered(path: Path) -> frozenset[int]:
    """Code points of a font; none if it cannot be drawn with, such as a font of colour bitmaps."""
    try:
        ImageFont.truetype(str(path), 20)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.lru_cache(maxsize=1024)
def _system_font(needed: frozenset[int]) -> Path | None:
    """The first font of the system that covers these code points and ASCII."""
    wanted = needed | set(range(0x20, 0x7F))
    return next((path for path in _system_fonts() if wanted <= _covered(path)), None)


@functools.lru_cache(maxsize=1)
def _system_fonts() -> tuple[Path, ...]:
    """Regular sans-serif styles first; without fonts that draw a box for every character."""
    paths = [Path(path) for path in font_manager.findSystemFonts()]
    paths = [path for path in paths if "lastresort" not in path.name.lower()]

    def rank(path: Path) -> tuple[bool, bool, bool, str]:
        name = path.name.lower()
        is_styled = any(
            style in name for style in ("bold", "italic", "oblique", "light", "black", "thin", "cond")
        )
        return "sans" not in name, is_styled, "mono" in name, name

    return tuple(sorted(paths, key=rank))
