"""Charts, described once and drawn twice: for a page (plotly, to hover over) and as a picture (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COLOURS = ("#3366aa", "#dd7722", "#449955", "#aa4477", "#777777", "#66bbcc", "#ccaa33", "#884422")
"""Told apart by most colour-blind eyes, in this order."""
_GRID = "#e3e6ea"
_INK = "#22262b"


@dataclass(frozen=True)
class Series:
    """One line, set of points, or set of bars of a chart."""

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    style: Literal["line", "points", "level"] = "line"
    """Of a line chart: points joined or not, or a dashed level across the chart (one y, no x)."""
    labels: Sequence[str] = ()
    """Words at the points."""


@dataclass(frozen=True)
class Chart:
    """A chart with one sentence on what is to be seen in it."""

    key: str
    """Names its file and its place on the page."""
    title: str
    caption: str
    x_title: str
    y_title: str
    series: list[Series] = field(default_factory=list)
    kind: Literal["lines", "stacked bars", "grouped bars"] = "lines"
    """Bars lie on their side: x are their names, from the top down, and x_title is the title of the values."""
    from_zero: bool = True
    """Whether the axes of a line chart begin at 0."""


# ------------------------------------------------------------------------------------------------------------- picture
def draw_picture(chart: Chart, path: Path) -> None:
    """A PNG of 1800 pixels in width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = chart.kind != "lines"
    num_bars = len(dict.fromkeys(name for series in chart.series for name in series.x))
    thickness = 0.34 if chart.kind == "stacked bars" or len(chart.series) == 1 else 0.26 * len(chart.series)
    height = 1.7 + num_bars * thickness if bars else 4.6
    style = {"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK, "axes.labelcolor": _INK}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
        (_draw_bars if bars else _draw_lines)(axes, chart)
        axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x" if bars else "both", color=_GRID)
        axes.set_xlabel(chart.x_title)
        axes.set_ylabel(chart.y_title)
        if len(chart.series) > 1:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        figure.savefig(path, dpi=200, metadata={"Software": None})
        pyplot.close(figure)


def _draw_lines(axes: Any, chart: Chart) -> None:
    for series, colour in zip(chart.series, COLOURS, strict=False):
        if series.style == "level":
            axes.axhline(series.y[0], color=colour, linestyle="--", linewidth=1.4, label=series.name)
            continue
        line = "-" if series.style == "line" else ""
        size = 5 if line else 9
        axes.plot(
            series.x, series.y, linestyle=line, marker="o", markersize=size, color=colour, label=series.name
        )
        for x, y, label in zip(series.x, series.y, series.labels, strict=False):
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=9)
    if chart.from_zero:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    else:
        axes.margins(0.15)


def _draw_bars(axes: Any, chart: Chart) -> None:
    names = list(dict.fromkeys(name for series in chart.series for name in series.x))
    stacked = chart.kind == "stacked bars"
    width = 0.7 if stacked else 0.8 / len(chart.series)
    ends = dict.fromkeys(names, 0.0)
    for index, (series, colour) in enumerate(zip(chart.series, COLOURS, strict=False)):
        offset = 0.0 if stacked else (index - (len(chart.series) - 1) / 2) * width
        places = [names.index(name) + offset for name in series.x]
        left = [ends[name] for name in series.x] if stacked else None
        bars = axes.barh(places, series.y, width * 0.94, left=left, color=colour, label=series.name)
        for name, value in zip(series.x, series.y, strict=True):
            ends[name] += value
        if not stacked:
            axes.bar_label(bars, [_short(value) for value in series.y], padding=3, fontsize=9)
    if stacked:
        for place, name in enumerate(names):
            axes.annotate(_short(ends[name]), (ends[name], place), textcoords="offset points", xytext=(4, 0),
                          va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first at the top
    axes.set_xlim(
        0, 1.12 * max(ends.values() if stacked else (y for series in chart.series for y in series.y))
    )


def _short(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------------- page
def draw_interactive(chart: Chart) -> str:
    """The chart as an HTML element; plotly.js has to be on the page already."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    bars = chart.kind != "lines"
    totals: dict[Any, float] = {}
    for series, colour in zip(chart.series, COLOURS, strict=False):
        if bars:
            figure.add_bar(x=list(series.y), y=list(series.x), orientation="h", name=series.name, marker_color=colour,
                           hovertemplate="%{y}<br>%{x:.4g}")  # fmt: skip
            for name, value in zip(series.x, series.y, strict=True):
                totals[name] = totals.get(name, 0.0) + value
        elif series.style == "level":
            ends = [0, max(x for other in chart.series for x in other.x)]
            figure.add_scatter(
                x=ends,
                y=[series.y[0]] * 2,
                mode="lines",
                name=series.name,
                line={"dash": "dash", "color": colour},
                hovertemplate="%{y:.4g}",
            )
        else:
            mode = {"line": "lines+markers", "points": "markers"}[series.style] + (
                "+text" if series.labels else ""
            )
            figure.add_scatter(
                x=list(series.x),
                y=list(series.y),
                mode=mode,
                name=series.name,
                text=list(series.labels),
                textposition="top center",
                line_color=colour,
                marker={"size": 8, "color": colour},
                hovertemplate="%{x:.4g}, %{y:.4g}",
            )
    if chart.kind == "stacked bars":
        for name, total in totals.items():
            figure.add_annotation(
                x=total, y=name, text=_short(total), xanchor="left", showarrow=False, xshift=3
            )
    # The legend's place below the axis does not grow with it: three entries a row.
    foot = 64 + (24 * math.ceil(len(chart.series) / 3) if len(chart.series) > 1 else 0)
    bar = 30 if chart.kind == "stacked bars" else 26 * len(chart.series)
    figure.update_layout(
        template="simple_white",
        height=34 + (bar * len(totals) if bars else 320) + foot,
        margin={"l": 10, "r": 24, "t": 34, "b": foot},
        barmode="stack" if chart.kind == "stacked bars" else "group",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "traceorder": "normal"},
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        showlegend=len(chart.series) > 1,
        hoverlabel={"namelength": -1},
    )
    grid = {"showgrid": True, "gridcolor": _GRID, "automargin": True}
    rangemode = "tozero" if chart.from_zero else "normal"
    figure.update_xaxes(title=chart.x_title, rangemode=rangemode, **grid)
    figure.update_yaxes(title=chart.y_title, **grid)
    if bars:
        figure.update_yaxes(autorange="reversed", showgrid=False)
    else:
        figure.update_yaxes(rangemode=rangemode)
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=chart.key,
        config={"displaylogo": False, "responsive": True},
    )
