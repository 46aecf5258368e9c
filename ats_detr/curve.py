"""AP against cost over the budgets of one model: static keep ratios as a line, adaptive budgets beside it.

Errors are standard errors over images by the delete-group jackknife (Wolter, Introduction to Variance Estimation,
chapter 4): AP is computed without each of 50 groups of images. All budgets have the same groups, so the error of a
difference between budgets is paired.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from ats_detr.batch import ImageBatch
from ats_detr.budgets import Budget
from ats_detr.charts import Chart
from ats_detr.data.coco import CocoAnnotations
from ats_detr.evaluation import MAX_DETECTIONS, DetectionTable, Metrics, average_precision_without
from ats_detr.flops import count_flops
from ats_detr.model import Detr

_NUM_GROUPS = 50
_COUNTED_RATIOS = (0.25, 0.75)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget of a curve; NaN where a value is not known."""

    budget: str
    is_static: bool
    """Whether all images have the same keep ratio."""
    num_images: int
    mean_keep_ratio: float
    ap: float
    ap_error: float
    gain: float = math.nan
    """Of an adaptive budget: AP minus that of the static ratios, interpolated at the same mean keep ratio."""
    gain_error: float = math.nan
    gflops: float = math.nan
    """Giga multiply-adds of an image at the mean keep ratio."""
    encoder_gflops: float = math.nan
    latency_ms: float = math.nan
    """Of one image, a mean over images."""
    ap_without: tuple[float, ...] = ()
    """AP without each group of images. The groups depend on the number of images only, so that these values of two
    models on the same images give the paired error of the difference of their AP."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; None for unknown values."""
        values = dataclasses.asdict(self)
        return {
            **{key: _or_none(value) for key, value in values.items()},
            "ap_without": list(map(_or_none, self.ap_without)),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Point:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
        without = tuple(math.nan if ap is None else ap for ap in known.pop("ap_without", ()))
        return Point(**known, ap_without=without)


def budget_curve(
    evaluated: Sequence[tuple[Budget, Metrics, DetectionTable]],
    annotations: CocoAnnotations,
    *,
    max_detections: int = MAX_DETECTIONS,
) -> list[Point]:
    """The points of several budgets of one model, all evaluated on the same images.

    Args:
        evaluated: each budget with what `evaluate_budgets` returns for it.
        annotations: of the images.
    """
    image_ids = [record.image_id for record in evaluated[0][1].images]
    groups = _groups(len(image_ids))
    values = []  # of each budget: AP and mean keep ratio, of all images and without each group
    for _, metrics, detections in evaluated:
        assert [record.image_id for record in metrics.images] == image_ids
        aps = average_precision_without(
            groups, annotations, detections, annotations.indices_of(image_ids), max_detections
        )
        ratios = np.array([record.keep_ratio for record in metrics.images])
        left = [ratios[groups != group].mean() for group in range(groups.max() + 1)]
        values.append(np.array([[metrics.precision.ap, *aps], [ratios.mean(), *left]]))
    is_static = [metrics.num_budgets == 0 for _, metrics, _ in evaluated]
    lines = np.array([value for value, static in zip(values, is_static, strict=True) if static])
    points = []
    for (budget, metrics, _), value, static in zip(evaluated, values, is_static, strict=True):
        gains = np.full(value.shape[1], math.nan) if static else _gains(value, lines)
        points.append(
            Point(
                budget=str(budget),
                is_static=static,
                num_images=len(metrics.images),
                mean_keep_ratio=metrics.mean_keep_ratio,
                ap=metrics.precision.ap,
                ap_error=_error(value[0, 1:]),
                gain=float(gains[0]),
                gain_error=_error(gains[1:]),
                ap_without=tuple(value[0, 1:].tolist()),
            )
        )
    return points


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _groups(num_images: int) -> np.ndarray:
    """The group of each image, at random (always the same)."""
    return np.random.default_rng(0).permutation(num_images) % min(_NUM_GROUPS, num_images)


def _error(values: np.ndarray) -> float:
    """The delete-group jackknife standard error from the values without each group."""
    return float(np.sqrt((len(values) - 1) * values.var())) if len(values) > 1 else math.nan


def _gains(value: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """AP above the static line, of all images and without each group; NaN beyond the static ratios."""
    gains = np.full(value.shape[1], math.nan)
    for i, (ap, ratio) in enumerate(value.T):
        if len(lines):
            static = lines[lines[:, 1, i].argsort(), :, i]
            gains[i] = ap - np.interp(ratio, static[:, 1], static[:, 0], left=math.nan, right=math.nan)
    return gains


def with_gflops(points: Sequence[Point], model: Detr, size: tuple[int, int]) -> list[Point]:
    """The points with the multiply-adds of an image of (height, width) `size` at their mean keep ratios.

    Exact for a fixed ratio, since all counts are linear in the number of kept tokens; two ratios are counted.
    """
    batch = ImageBatch(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)), [size])
    if model.selector is None:
        (flops,) = [count_flops(model, batch)]
        return [dataclasses.replace(p, gflops=flops.total, encoder_gflops=flops.encoder) for p in points]
    low, high = (count_flops(model, batch, keep_ratio=ratio) for ratio in _COUNTED_RATIOS)

    def at(ratio: float, part: str) -> float:
        before, after = getattr(low, part), getattr(high, part)
        if high.num_kept == low.num_kept:  # the minimum of tokens exceeds both ratios
            return after
        slope = (after - before) / (high.num_kept - low.num_kept)
        return before + slope * (ratio * low.num_tokens - low.num_kept)

    return [
        dataclasses.replace(
            point,
            gflops=at(point.mean_keep_ratio, "total"),
            encoder_gflops=at(point.mean_keep_ratio, "encoder"),
        )
        for point in points
    ]


# ------------------------------------------------------------------------------------------------------ presentation
def curve_charts(points: Sequence[Point]) -> list[Chart]:
    """AP against each known cost."""
    axes = {
        "mean_keep_ratio": ("keep ratio", "tokens kept, mean over images (%)", 100.0),
        "gflops": ("multiply-adds", "giga multiply-adds per image", 1.0),
        "latency_ms": ("latency", "milliseconds per image", 1.0),
    }
    charts = []
    for key, (name, x_title, scale) in axes.items():
        if any(math.isfinite(getattr(point, key)) and math.isfinite(point.ap) for point in points):
            charts.append(
                Chart(
                    f"ap_{key}",
                    f"AP against {name}",
                    f"COCO AP on {points[0].num_images} images, with standard errors over images. Most of an error is "
                    "common to all budgets; the findings state the smaller errors of differences.",
                    x_title,
                    "AP (%)",
                    functools.partial(_draw, points=points, key=key, scale=scale),
                )
            )
    return charts


def _draw(axes: Axes, points: Sequence[Point], key: str, scale: float) -> None:
    static = sorted((point for point in points if point.is_static), key=lambda point: point.mean_keep_ratio)
    adaptive = [[point] for point in points if not point.is_static]
    for mine, style, size in ((static, "o-", 5), *((one, "D", 8) for one in adaptive)):
        if mine:
            axes.errorbar(
                [scale * getattr(point, key) for point in mine],
                [100 * point.ap for point in mine],
                [100 * point.ap_error for point in mine],
                fmt=style,
                markersize=size,
                capsize=3,
                label="one ratio for all images" if mine is static else f"per image: {mine[0].budget}",
            )


def curve_findings(points: Sequence[Point]) -> list[str]:
    """A sentence for each adaptive budget."""
    return [
        f"{point.budget} keeps {point.mean_keep_ratio:.1%} of the tokens on average: AP {point.ap:.4f} +- "
        f"{point.ap_error:.4f}"
        + (
            "; no static ratios on both sides to compare it with."
            if math.isnan(point.gain)
            else f", {point.gain:+.4f} +- {point.gain_error:.4f} against static ratios at an equal mean."
        )
        for point in points
        if not point.is_static
    ]


def curve_table(points: Sequence[Point]) -> list[list[str]]:
    """A header and a row of texts for each budget."""

    def text(value: float, spec: str) -> str:
        return "" if math.isnan(value) else format(value, spec)

    def with_error(value: float, error: float, spec: str) -> str:
        return text(value, spec) + (f" ± {error:.4f}" if math.isfinite(error) else "")

    return [
        ["budget", "kept", "AP", "AP above static", "GFLOPs", "encoder GFLOPs"],
        *(
            [
                point.budget,
                f"{point.mean_keep_ratio:.1%}",
                with_error(point.ap, point.ap_error, ".4f"),
                with_error(point.gain, point.gain_error, "+.4f"),
                text(point.gflops, ".4g"),
                text(point.encoder_gflops, ".4g"),
            ]
            for point in points
        ),
    ]


def curve_report(points: Sequence[Point], charts: Sequence[Chart], title: str) -> str:
    """Markdown: the title, findings, charts (as files beside it), and the table."""
    header, *rows = curve_table(points)
    table = [header, ["---"] * len(header), *rows]
    return "\n\n".join(
        [
            title,
            "\n".join(f"- {line}" for line in curve_findings(points)),
            *(f"![{chart.title}]({chart.key}.png)\n\n{chart.caption}" for chart in charts),
            "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n",
        ]
    )
