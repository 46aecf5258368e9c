"""Pictures of detections, kept tokens, and budgets against the number of objects."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from ats_detr.evaluation import Metrics
from ats_detr.fonts import font_for

PICTURE_SIDE = 640
"""Shorter side in pixels to which small images are enlarged, by an integer factor, before drawing."""
LONGEST_SIDE = 4096
"""Maximum longer side of an enlarged image in pixels."""
DIMMED = 0.28
"""Brightness factor of tokens that are not kept."""
_SHEET_WIDTH, _GAP = 1680, 12
"""Width of a picture of kept tokens, and gap between its panels, in pixels."""
ACCENT = "#ff9f1c"
INK = "#22303c"


def class_colour(label: int) -> tuple[int, int, int]:
    """RGB colour of a class index. Consecutive indices have distant hues (golden-ratio steps on the colour circle)."""
    red, green, blue = colorsys.hsv_to_rgb((0.08 + label * 0.618034) % 1, 0.78, 0.98)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image, boxes_xyxy: np.ndarray, labels: Sequence[int], captions: Sequence[str]
) -> Image.Image:
    """A copy of `image` with captioned boxes in the colours of their classes; the first is drawn last.

    Small images are enlarged by an integer factor to keep captions legible.

    Args:
        image: the image.
        boxes_xyxy: [N, 4] corners in pixels of the image.
        labels: N class indices, which select the colours.
        captions: N texts.
    """
    factor = max(1, min(round(PICTURE_SIDE / min(image.size)), LONGEST_SIDE // max(image.size)))
    picture = image.convert("RGB").resize(
        (image.width * factor, image.height * factor), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(picture)
    text_size = max(12, round(min(picture.size) / 42))
    line_width = max(2, round(min(picture.size) / 240))
    corners_N22 = np.asarray(boxes_xyxy, np.float64).reshape(-1, 2, 2) * factor
    inside_N22 = np.sort(corners_N22.clip(0, np.array(picture.size) - 1), axis=1)  # ordered, as PIL requires
    boxes = inside_N22.reshape(-1, 4).tolist()
    for (left, top, right, bottom), label, caption in reversed(
        list(zip(boxes, labels, captions, strict=True))
    ):
        colour = class_colour(label)
        draw.rectangle((left, top, right, bottom), outline=colour, width=line_width)
        font, caption = font_for(caption, text_size)
        _, _, text_width, text_height = draw.textbbox((0, 0), caption, font=font)
        # Above the box, or inside it at the top edge of the picture.
        text_top = top - text_height - 4 if top - text_height - 4 >= 0 else top
        text_left = max(0, min(left, picture.width - text_width - 6))
        draw.rectangle(
            (text_left, text_top, text_left + text_width + 6, text_top + text_height + 4), fill=colour
        )
        draw.text((text_left + 3, text_top + 1), caption, fill=_readable_on(colour), font=font)
    return picture


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Masks of the kept tokens of one image."""

    levels: tuple[np.ndarray, ...]
    """bool [rows, columns] of each level of the pyramid, finest first. A level covers `padded_size`."""
    resized_size: tuple[int, int]
    """(height, width) in pixels of the model's input without padding."""
    padded_size: tuple[int, int]
    """(height, width) in pixels of the model's input."""

    @staticmethod
    def from_flat(
        kept_S: Tensor,
        level_shapes: Sequence[tuple[int, int]],
        *,
        resized_size: tuple[int, int],
        padded_size: tuple[int, int],
    ) -> KeptTokens:
        """Masks from the tokens of one image, bool [S], levels concatenated, row-major (`plan.slot_BS[i] >= 0`)."""
        levels = kept_S.cpu().split([math.prod(shape) for shape in level_shapes])
        maps = [level.view(shape).numpy() for level, shape in zip(levels, level_shapes, strict=True)]
        return KeptTokens(tuple(maps), resized_size, padded_size)

    def in_image(self, level: int) -> np.ndarray:
        """Mask of a level without padding, bool [rows, columns]."""
        kept = self.levels[level]
        rows = math.ceil(self.resized_size[0] * kept.shape[0] / self.padded_size[0])
        columns = math.ceil(self.resized_size[1] * kept.shape[1] / self.padded_size[1])
        return kept[:rows, :columns]

    def cell_size(self, level: int) -> tuple[float, float]:
        """(height, width) of a token of this level in pixels of the model's input."""
        rows, columns = self.levels[level].shape
        return self.padded_size[0] / rows, self.padded_size[1] / columns

    def stride(self, level: int) -> int:
        """Nominal stride of a level in pixels; cells are slightly smaller if it does not divide the input size."""
        return 2 ** round(math.log2(max(self.cell_size(level))))


def draw_kept_tokens(image: Image.Image, kept: KeptTokens, *, title: str = "") -> Image.Image:
    """A picture with one panel per level, in which tokens that are not kept are dimmed."""
    height, width = kept.resized_size
    # Large images have small cells: two panels per row instead of one row.
    columns = len(kept.levels) if max(kept.resized_size) <= 256 else min(2, len(kept.levels))
    rows = math.ceil(len(kept.levels) / columns)
    panel_width = (_SHEET_WIDTH - _GAP * (columns + 1)) // columns
    panel_height = max(8, min(round(panel_width * height / width), 2 * panel_width))
    line, title_line = 24, 40 if title else 8
    sheet = Image.new(
        "RGB", (_SHEET_WIDTH, title_line + rows * (panel_height + line + _GAP)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    font, title = font_for(title, 20)
    draw.text((_SHEET_WIDTH / 2, 20), title, fill=INK, font=font, anchor="mm")
    panel = image.convert("RGB").resize((panel_width, panel_height), Image.Resampling.BICUBIC)
    for level in range(len(kept.levels)):
        left = _GAP + (level % columns) * (panel_width + _GAP)
        top = title_line + (level // columns) * (panel_height + line + _GAP)
        cells = kept.in_image(level)
        font, text = font_for(f"stride {kept.stride(level)}: {int(cells.sum())} of {cells.size}", 15)
        place = (left + panel_width / 2, top + line / 2)
        draw.text(place, text, fill=INK, font=font, anchor="mm")
        sheet.paste(_dim_discarded(panel, kept, level), (left, top + line))
    return sheet


def _dim_discarded(panel: Image.Image, kept: KeptTokens, level: int) -> Image.Image:
    """The image with the discarded tokens of a level dimmed, and a border around each kept token."""
    cells, (cell_height, cell_width) = kept.in_image(level), kept.cell_size(level)
    y = (np.arange(panel.height) + 0.5) * kept.resized_size[0] / panel.height
    x = (np.arange(panel.width) + 0.5) * kept.resized_size[1] / panel.width
    row, column = (y / cell_height).astype(int), (x / cell_width).astype(int)
    is_kept = cells[row[:, None], column]
    # Borders would hide cells smaller than 5 pixels: these have a border around each group of cells instead.
    by_cell = min(
        cell_height / kept.resized_size[0] * panel.height, cell_width / kept.resized_size[1] * panel.width
    )
    number = row[:, None] * cells.shape[1] + column if by_cell >= 5 else is_kept
    border = np.zeros(is_kept.shape, bool)
    border[1:] |= (number[1:] != number[:-1]) & (is_kept[1:] | is_kept[:-1])
    border[:, 1:] |= (number[:, 1:] != number[:, :-1]) & (is_kept[:, 1:] | is_kept[:, :-1])
    pixels = np.asarray(panel, np.float32) * np.where(is_kept, 1, DIMMED)[..., None]
    pixels[border] = ImageColor.getrgb(ACCENT)
    return Image.fromarray(pixels.round().astype(np.uint8))


def add_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a caption below it, wrapped to its width."""
    size = max(12, round(min(picture.width / 34, picture.height / 28)))
    font, text = font_for(text, size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= picture.width - 8:
            lines[-1] = longer
        else:
            lines.append(word)
    line_height = round(size * 1.3)
    bar = line_height * len(lines) + round(size * 0.6)
    captioned = Image.new("RGB", (picture.width, picture.height + bar), ImageColor.getrgb(INK))
    captioned.paste(picture, (0, 0))
    draw = ImageDraw.Draw(captioned)
    for number, line in enumerate(lines):
        place = (picture.width / 2, picture.height + size * 0.3 + (number + 0.5) * line_height)
        draw.text(place, line, fill="white", font=font, anchor="mm")
    return captioned


def plot_budgets(metrics: Metrics) -> Figure:
    """A scatter plot of kept tokens against the number of objects, with the mean for each number of objects."""
    objects = np.array([record.num_objects for record in metrics.images])
    ratios = np.array([record.keep_ratio for record in metrics.images]) * 100
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    jitter = np.random.default_rng(0)
    spread = max(float(np.ptp(ratios)), 1.0)
    axis.scatter(
        objects + jitter.uniform(-0.3, 0.3, len(objects)),
        ratios + jitter.uniform(-0.02, 0.02, len(objects)) * spread,
        s=14,
        color="#3a86c8",
        alpha=0.45,
        linewidths=0,
        label="one image",
    )
    counts = np.unique(objects)
    means = [ratios[objects == count].mean() for count in counts]
    axis.plot(counts, means, color=ACCENT, linewidth=2.2, marker="o", markersize=4, label="mean")
    axis.axhline(
        ratios.mean(), color=INK, linewidth=1, linestyle=":", label=f"mean of all, {ratios.mean():.1f} %"
    )
    axis.set_xlabel("objects in the image", color=INK)
    axis.set_ylabel("tokens kept (%)", color=INK)
    axis.set_ylim(0, 1.1 * float(ratios.max()))  # keeps the points of a constant budget away from the edge
    correlation = metrics.budget_object_spearman
    found = "the budget is constant" if math.isnan(correlation) else f"Spearman r = {correlation:.2f}"
    axis.set_title(f"Budget against difficulty: {found}, {len(objects)} images", fontsize=11, color=INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure
