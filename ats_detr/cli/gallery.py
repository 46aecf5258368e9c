"""An HTML page of detections: each image with its boxes, its kept tokens at each level, and its budget.

The page is one file with all images in it and needs no server.
"""

from __future__ import annotations

import base64
import html
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ats_detr.data.coco import ClassMap
from ats_detr.detector import Result
from ats_detr.files import replaced_file
from ats_detr.visualize import class_colour

MOST_IMAGES = 1000
"""A page of this many images has about 60 MB. Further images are omitted, and the page states how many."""
_LONG_SIDE = 720
"""Of a thumbnail, in pixels."""


class Gallery:
    """Collects results, about 60 kB of memory each, and writes the page."""

    def __init__(self, title: str, classes: ClassMap) -> None:
        self.title, self.classes = title, classes
        self._entries: list[str] = []
        self._rows: set[int] = set()
        self.num_left_out = 0

    def add(self, result: Result) -> None:
        """Add an image, with its kept tokens if the result has them."""
        if len(self._entries) == MOST_IMAGES:
            self.num_left_out += 1
            return
        height, width = result.size
        scale = np.array([width, height, width, height], np.float64)
        boxes = (result.boxes_xyxy / scale).clip(0, 1).round(4)
        budget, kept = result.budget, result.kept_tokens
        entry: dict[str, Any] = {
            "name": Path(result.name).name,
            "size": [width, height],
            "image": _thumbnail(result.image()),
            "objects": [
                [*box, round(score, 3), row]
                for box, score, row in zip(
                    boxes.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True
                )
            ],
            "kept": budget.num_kept_tokens,
            "valid": budget.num_valid_tokens,
            "choice": budget.budget_class,
            "levels": [],
        }
        for level in range(0 if kept is None else len(kept.levels)):
            assert kept is not None
            cells, (cell_height, cell_width) = kept.in_image(level), kept.cell_size(level)
            # Share of the image that a cell covers; the last row and column may extend beyond the image.
            share = [cell_width / kept.resized_size[1], cell_height / kept.resized_size[0]]
            entry["levels"].append(
                {
                    "stride": kept.stride(level),
                    "rows": cells.shape[0],
                    "columns": cells.shape[1],
                    "cell": [round(value, 6) for value in share],
                    "kept": int(cells.sum()),
                    "bits": base64.b64encode(np.packbits(cells).tobytes()).decode(),
                }
            )
        self._rows |= set(result.labels.tolist())
        self._entries.append(_for_script(entry))

    def save(self, path: str | Path) -> Path:
        """Write the page atomically: a failure leaves no partial file."""
        path = Path(path)
        shared = {
            "left_out": self.num_left_out,
            "classes": {
                row: {
                    "name": self.classes.name_of_row(row),
                    "colour": "#{:02x}{:02x}{:02x}".format(*class_colour(row)),
                }
                for row in sorted(self._rows)
            },
        }
        page = (files("ats_detr.cli") / "gallery.html").read_text(encoding="utf-8")
        before, marker, after = page.partition("/*DATA*/")
        assert marker
        pieces = (
            before.replace("{{title}}", html.escape(self.title)),
            f"const shared = {_for_script(shared)};\nconst images = [\n",
            *(f"{entry},\n" for entry in self._entries),
            f"];\n{after}",
        )
        with replaced_file(path) as file:
            file.writelines(piece.encode("utf-8") for piece in pieces)
        return path


def _for_script(value: Any) -> str:
    """JSON in which no file name or class name can close the surrounding script element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _thumbnail(image: Image.Image) -> str:
    """A JPEG of at most 720 pixels on the longer side, as a data URI."""
    factor = _LONG_SIDE / max(image.size)
    if factor < 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
