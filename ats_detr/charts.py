"""Charts with captions, as PNG files of one style."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#3366aa", "#dd7722", "#449955", "#aa4477", "#777777", "#66bbcc", "#ccaa33", "#884422")
"""Distinguishable with most kinds of colour blindness, in this order."""
_STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#22262b",
    "axes.labelcolor": "#22262b",
    "text.color": "#22262b",
    "grid.color": "#e3e6ea",
    "axes.prop_cycle": cycler(color=COLOURS),
}


@dataclass(frozen=True)
class Chart:
    """A chart with a caption of one or two sentences."""

    key: str
    """Name of its file."""
    title: str
    caption: str
    x_title: str
    y_title: str
    draw: Callable[[Axes], object]
    height: float = 4.6
    """Inches; the width is 9."""

    def save(self, file: Path) -> None:
        """As a PNG 1800 pixels wide."""
        with rc_context(_STYLE):
            figure = Figure(figsize=(9, self.height), layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            self.draw(axes)
            axes.grid(axis="both" if self.y_title else "x")
            axes.set_title(self.title, loc="left", fontsize=12, fontweight="bold")
            axes.set(xlabel=self.x_title, ylabel=self.y_title)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
            figure.savefig(file, dpi=200, metadata={"Software": None})
