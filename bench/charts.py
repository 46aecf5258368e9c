"""Charts of a sweep, drawn with matplotlib: as PNG files, and as SVG in the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#3366aa", "#dd7722", "#449955", "#aa4477", "#777777", "#66bbcc", "#ccaa33", "#884422")
"""Distinguishable with most kinds of colour blindness, in this order."""
_GRID = "#e3e6ea"
_INK = "#22262b"
_STYLE = {"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK, "axes.labelcolor": _INK,
          "svg.hashsalt": "ats_detr"}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line, set of points, or set of bars of a chart."""

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    style: Literal["line", "points", "level"] = "line"
    """In a line chart: points joined or not, or a dashed line across the chart (one y, no x)."""
    labels: Sequence[str] = ()
    """Text at the points."""


@dataclass(frozen=True)
class Chart:
    """A chart with a caption of one or two sentences."""

    key: str
    """Name of its file, and its id in the page."""
    title: str
    caption: str
    x_title: str
    y_title: str
    series: list[Series] = field(default_factory=list)
    kind: Literal["lines", "stacked bars", "grouped bars"] = "lines"
    """Bars are horizontal: x are their names, from the top down, and x_title is the title of the values."""
    from_zero: bool = True
    """Whether the axes of a line chart begin at 0."""


def save_picture(chart: Chart, path: Path) -> None:
    """A PNG 1800 pixels wide."""
    _figure(chart).savefig(path, dpi=200, metadata={"Software": None})


def svg(chart: Chart) -> str:
    """The chart as the text of an SVG file."""
    text = io.StringIO()
    with rc_context(_STYLE):
        _figure(chart).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _figure(chart: Chart) -> Figure:
    bars = chart.kind != "lines"
    num_bars = len(dict.fromkeys(name for series in chart.series for name in series.x))
    thickness = 0.34 if chart.kind == "stacked bars" or len(chart.series) == 1 else 0.26 * len(chart.series)
    with rc_context(_STYLE):
        figure = Figure(figsize=(9, 1.7 + num_bars * thickness if bars else 4.6), layout="constrained")
        axes = figure.subplots()
        (_draw_bars if bars else _draw_lines)(axes, chart)
        axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x" if bars else "both", color=_GRID)
        axes.set(xlabel=chart.x_title, ylabel=chart.y_title)
        if len(chart.series) > 1:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for series, colour in zip(chart.series, COLOURS, strict=False):
        if series.style == "level":
            axes.axhline(series.y[0], color=colour, linestyle="--", linewidth=1.4, label=series.name)
            continue
        line, size = ("-", 5) if series.style == "line" else ("", 9)
        axes.plot(series.x, series.y, line, marker="o", markersize=size, color=colour, label=series.name)
        for x, y, label in zip(series.x, series.y, series.labels, strict=False):
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=9)
    if chart.from_zero:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    else:
        axes.margins(0.15)


def _draw_bars(axes: Axes, chart: Chart) -> None:
    frame = pandas.DataFrame({s.name: pandas.Series(s.y, index=s.x, dtype=float) for s in chart.series})
    frame = frame.reindex(dict.fromkeys(name for series in chart.series for name in series.x)).fillna(0.0)
    stacked = chart.kind == "stacked bars"
    frame.plot.barh(ax=axes, stacked=stacked, width=0.7 if stacked else 0.8, color=COLOURS, legend=False)
    ends = frame.sum(axis=1) if stacked else frame.max(axis=1)
    for bars in axes.containers[-1:] if stacked else axes.containers:
        values = ends if stacked else bars.datavalues
        axes.bar_label(bars, [_three_digits(value) for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()  # the first at the top
    axes.set_xlim(0, 1.12 * ends.max())


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"
