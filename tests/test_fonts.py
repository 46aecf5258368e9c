"""Class names in any script are drawn legibly: never as empty boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ats_detr import fonts
from ats_detr.visualize import add_caption, draw_boxes

SCRIPTS = {
    "accents": "éclair Ångström Łódź",
    "Greek": "γάτα",
    "Cyrillic": "кошка",
    "Hebrew": "חתול",
    "Arabic": "قطة",
    "Devanagari": "बिल्ली",
    "Thai": "แมว",
    "Han": "猫",
    "kana": "ねこ",
    "Hangul": "고양이",
    "emoji": "🚗",
    "private use": "\ue000",
}


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without fonts other than Matplotlib's."""
    fonts._system_font.cache_clear()
    monkeypatch.setattr(fonts, "_system_fonts", lambda: ())
    yield
    fonts._system_font.cache_clear()


def drawn(text: str) -> np.ndarray:
    font, text = fonts.font_for(text, 24)
    image = Image.new("L", (400, 60))
    ImageDraw.Draw(image).text((4, 4), text, fill=255, font=font)
    return np.asarray(image)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_character_has_a_glyph(script: str) -> None:
    font, text = fonts.font_for(SCRIPTS[script], 24)
    covered = fonts._covered(Path(font.path))
    assert text
    assert {character for character in text if ord(character) not in covered} == set()
    assert drawn(SCRIPTS[script]).any()


@pytest.mark.usefixtures("no_system_fonts")
def test_without_system_fonts_other_scripts_are_transliterated() -> None:
    assert fonts.font_for("猫 0.93", 20)[1] == "Mao 0.93"
    assert fonts.font_for("кошка é قطة", 20)[1] == "кошка é قطة"
    assert fonts.font_for("हिन्दी 🐈", 20)[1] == "hindi :cat2:"
    assert fonts.font_for("\ue000", 20)[1] == "U+E000"


def test_a_system_font_that_covers_the_text_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    serif = fonts.DEFAULT.with_name("DejaVuSerif.ttf")
    fonts._system_font.cache_clear()
    monkeypatch.setattr(fonts, "_system_fonts", lambda: (Path("missing.ttf"), serif))
    monkeypatch.setattr(
        fonts,
        "_covered",
        lambda path: (
            {fonts.DEFAULT: frozenset(range(0x20, 0x7F))}.get(path)
            or (frozenset(range(0x20, 0x500)) if path == serif else frozenset())
        ),
    )
    font, text = fonts.font_for("кошка", 20)
    fonts._system_font.cache_clear()
    assert (Path(font.path), text) == (serif, "кошка")


def test_names_that_differ_look_different_on_pictures() -> None:
    pictures = [
        np.asarray(draw_boxes(Image.new("RGB", (640, 640)), np.array([[100, 100, 300, 300]]), [0], [name]))
        for name in ("猫 0.9", "狗 0.9", "é 0.9", "è 0.9", "ê 0.9")
    ]
    for i, picture in enumerate(pictures):
        assert all(not np.array_equal(picture, other) for other in pictures[:i])


@pytest.mark.parametrize("name", ["two\nlines", "tab\tbell\x07", "lone \ud800 surrogate", "", "  "])
def test_names_with_control_characters_are_drawn(name: str) -> None:
    draw_boxes(Image.new("RGB", (64, 64)), np.array([[10, 10, 30, 30]]), [0], [name])
    assert add_caption(Image.new("RGB", (64, 64)), name).height > 64
    assert "\n" not in fonts.font_for(name, 20)[1]
