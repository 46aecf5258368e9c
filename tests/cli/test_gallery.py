"""The gallery shows the detections, tested in a browser if one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats_detr.cli.gallery import Gallery
from ats_detr.data.coco import ClassMap
from ats_detr.detector import Result
from ats_detr.model.output import TokenBudget
from ats_detr.visualize import KeptTokens, class_colour

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLASSES = ClassMap.from_categories({1: "cat", 2: "</script><b>dog"})
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def result(name: str, rows: list[int], *, kept: int, size: tuple[int, int] = (64, 96)) -> Result:
    """A white image with one box per row and the first `kept` of 3 x 4 tokens; the last column is padding."""
    number = len(rows)
    cells = np.zeros((3, 4), bool)
    order = [(row, column) for row in range(3) for column in range(3)]
    for place in order[:kept]:
        cells[place] = True
    height, width = size
    return Result(
        source=Image.new("RGB", (width, height), "white"),
        name=name,
        size=size,
        boxes_xyxy=np.array([[10 * i, 5, 10 * i + 30, 40] for i in range(number)], np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.5, number).astype(np.float32),
        labels=np.array(rows, np.int64),
        category_ids=np.array(rows, np.int64) + 1,
        names=tuple(CLASSES.name_of_row(row) for row in rows),
        budget=TokenBudget(num_valid_tokens=9, num_kept_tokens=kept, budget_class=int(kept > 4)),
        kept_tokens=KeptTokens((cells,), (96, 96), (96, 128)),
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    gallery = Gallery("cats & <dogs>", CLASSES)
    gallery.add(result("many.jpg", [0, 1, 0], kept=8))
    gallery.add(result("few.jpg", [0], kept=2))
    gallery.add(result("none.jpg", [], kept=5))
    gallery.add(result("folder/</script><img onerror=alert(1)>.jpg", [1], kept=3))
    return gallery.save(tmp_path / "gallery.html")


def browse(page: Path, folder: Path, fragment: str = "", *arguments: str) -> tuple[str, str]:
    """The page after its scripts have run, and the messages of the browser's console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--enable-logging=stderr",
        "--window-size=1300,1000", *arguments, f"{page.as_uri()}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def titles(dom: str) -> list[str]:
    """Names of the visible images, in order."""
    cards = re.findall(r"<article(.*?)>(.*?)</article>", dom, re.DOTALL)
    shown = [body for attributes, body in cards if "hidden" not in attributes]
    return [html.unescape(re.search(r"<h2.*?>(.*?)</h2>", body, re.DOTALL)[1]) for body in shown]


def test_the_page_is_self_contained_and_has_the_results(page: Path) -> None:
    text = page.read_text()
    assert "{{" not in text
    assert "<title>cats &amp; &lt;dogs&gt;</title>" in text
    assert not re.search(r"""(?:src|href)=(?!["']?data:)""", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "</script><" not in text.rsplit("</script>", 1)[0], "a name cannot end the script"
    images = json.loads(re.search(r"const images = (\[.*?\n\]);", text, re.DOTALL)[1].replace(",\n]", "]"))
    assert [image["name"] for image in images][:3] == ["many.jpg", "few.jpg", "none.jpg"]
    assert images[0]["objects"][1] == [round(10 / 96, 4), round(5 / 64, 4), round(40 / 96, 4), 0.625, 0.7, 1]
    assert images[1]["levels"][0]["kept"] == 2
    assert images[0]["levels"][0]["columns"] == 3, "padding is not shown"


def test_images_beyond_the_limit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ats_detr.cli.gallery.MOST_IMAGES", 2)
    gallery = Gallery("t", CLASSES)
    for name in "abcd":
        gallery.add(result(name, [0], kept=1))
    assert '"left_out":2' in gallery.save(tmp_path / "g.html").read_text()


@needs_browser
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("", ["many.jpg", "few.jpg", "none.jpg", "script><img onerror=alert(1)>.jpg"]),
        ("#order=budget", ["few.jpg", "script><img onerror=alert(1)>.jpg", "none.jpg", "many.jpg"]),
        ("#order=-budget&class=cat", ["many.jpg", "few.jpg"]),
    ],
)
def test_a_browser_shows_sorts_and_filters_without_an_error(
    page: Path, tmp_path: Path, fragment: str, expected: list[str]
) -> None:
    dom, console = browse(page, tmp_path, fragment, "--dump-dom")
    assert console == ""
    assert titles(dom) == expected
    assert "keeps 8 of 9 tokens: 89 %, budget 2" in dom
    assert "onerror=alert(1)>.jpg</h2>" not in dom, "a name is text"


@needs_browser
def test_a_screenshot_has_the_boxes_and_dimmed_tokens(page: Path, tmp_path: Path) -> None:
    shot, dimmed = tmp_path / "shot.png", (62, 63, 66)

    def share(colour: tuple[int, int, int]) -> float:
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        return (abs(pixels - colour) <= 10).all(-1).mean()

    for _ in range(3):  # the screenshot may be taken before the images are decoded
        _, console = browse(page, tmp_path, "#level=0", f"--screenshot={shot}")
        assert console == ""
        if share(dimmed) > 0.02:
            break
    assert share(class_colour(0)) > 0.0005
    assert share(class_colour(1)) > 0.0005
    assert share(dimmed) > 0.02, "white under the dimming: 255 - 0.78 * (255 - 8)"
