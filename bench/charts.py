"""The results of a sweep as sentences and charts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pandas
from matplotlib.axes import Axes

from ats_detr.charts import COLOURS, Chart
from ats_detr.curve import Point, curve_charts, curve_findings
from bench.measure import Row
from bench.tables import STAGES, label


def bar_chart(
    key: str, title: str, caption: str, x_title: str, frame: pandas.DataFrame, *, stacked: bool = False
) -> Chart:
    """Horizontal bars: a row of the frame is a bar (or a group of bars), a column is a colour."""

    def draw(axes: Axes) -> None:
        frame.plot.barh(ax=axes, stacked=stacked, width=0.7 if stacked else 0.8, color=COLOURS, legend=False)
        ends = frame.sum(axis=1) if stacked else frame.max(axis=1)
        for bars in axes.containers[-1:] if stacked else axes.containers:
            values = ends if stacked else bars.datavalues
            texts = [f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize=9)
        axes.invert_yaxis()  # the first at the top
        axes.set_xlim(0, 1.12 * ends.max())

    thickness = 0.34 if stacked or frame.shape[1] == 1 else 0.26 * frame.shape[1]
    return Chart(key, title, caption, x_title, "", draw, 1.7 + len(frame) * thickness)


class Sweep:
    """The rows of one run of bench.sweep. Charts show the smallest batch."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.flops = [row for row in rows if row["kind"] == "flops"]
        latency = [row for row in rows if row["kind"] == "latency"]
        batch = min(row["batch"] for row in latency)
        self.uneven = [row for row in latency if row["budgets"] and len(row["budgets"]) > 1]
        self.latency = [
            row
            for row in latency
            if row["batch"] == batch and row["mode"] != "padded" and row not in self.uneven
        ]
        self.config = self.flops[0]["config"]
        self.dense_flops = next(row for row in self.flops if row["mode"] == "dense")
        self.adaptive_flops = [
            row for row in self.flops if row["mode"] == "packed" and row["budgets"] is None
        ]
        self.fixed = sorted((row for row in self.flops if row["budgets"]), key=lambda row: row["keep_ratio"])
        """Multiply-adds of the fixed ratios, the smallest first."""

    def time(self, stage: str, flops: Row) -> float:
        """Median milliseconds of a stage with the mode and budgets of `flops`; NaN where there is no such stage."""
        wanted = flops["mode"], flops["budgets"], stage
        found = [row for row in self.latency if (row["mode"], row["budgets"], row["stage"]) == wanted]
        return found[0]["p50_ms"] if found else float("nan")

    # ------------------------------------------------------------------------------------------------------- findings
    def savings(self) -> list[tuple[float, dict[str, tuple[float, float]]]]:
        """Of each fixed ratio below 1: shares of the dense multiply-adds and milliseconds that it saves, of the encoder
        and of the whole pass.
        """
        found = []
        for row in self.fixed:
            if row["keep_ratio"] >= 0.999:
                continue
            saved = {}
            for stage, count in (("encoder", "encoder_gflops"), ("total", "gflops")):
                of_flops = 1 - row[count] / self.dense_flops[count]
                saved[stage] = of_flops, 1 - self.time(stage, row) / self.time(stage, self.dense_flops)
            found.append((row["keep_ratio"], saved))
        return found

    def findings(self) -> list[str]:
        """Sentences with the numbers that matter."""
        lines = []
        for ratio, saved in self.savings():
            words = [
                f"{name} saves {of_flops:.0%} of its multiply-adds and {of_time:.0%} of its time "
                f"({of_time / of_flops:.0%} of the saving became time)"
                for name, (of_flops, of_time) in zip(
                    ("the encoder", "the whole pass"), saved.values(), strict=True
                )
            ]
            lines.append(f"At {ratio:.0%} of the tokens {', '.join(words)}.")
        times = [self.time("encoder", row) for row in self.fixed]
        falls = all(before < after for before, after in itertools.pairwise(times))
        each = [f"{row['keep_ratio']:.0%} {time:.0f} ms" for row, time in zip(self.fixed, times, strict=True)]
        lines.append(
            f"Encoder latency {'falls' if falls else 'does NOT fall'} monotonically with the keep ratio: "
            f"{', '.join(each)}; dense {self.time('encoder', self.dense_flops):.0f} ms."
        )
        if self.uneven:
            encoder = {row["mode"]: row["p50_ms"] for row in self.uneven if row["stage"] == "encoder"}
            lines.append(
                f"Images of {self._uneven_budgets} in one batch: the packed encoder takes "
                f"{encoder['packed'] / encoder['padded']:.0%} of the time of the padded one."
            )
        return lines + curve_findings(self.curve())

    def curve(self) -> list[Point]:
        """The evaluated budgets; none without `--ap`."""
        return [Point.from_dict(row["point"]) for row in self.rows if row["kind"] == "precision"]

    @property
    def _uneven_budgets(self) -> str:
        return ", ".join(f"{share:.0%}" for share in self.uneven[0]["budgets"])

    # --------------------------------------------------------------------------------------------------------- charts
    def charts(self) -> list[Chart]:
        parts = pandas.DataFrame([row["parts"] for row in self.flops], index=list(map(label, self.flops)))
        charts = [
            Chart(
                "gflops",
                "Multiply-adds against keep ratio",
                "Multiply-adds of inference for one image. At 100 % they exceed those of the dense model, because of "
                "the selector and because the values of kept tokens are projected twice.",
                "tokens kept (%)",
                "giga multiply-adds per image",
                lambda axes: self._draw_against_keep_ratio(
                    axes, lambda row: {"model": row["gflops"], "encoder": row["encoder_gflops"]}
                ),
            ),
            Chart(
                "latency",
                "Latency against keep ratio",
                "Median of one pass over a batch. Token selection reduces the time of the encoder only.",
                "tokens kept (%)",
                "milliseconds",
                lambda axes: self._draw_against_keep_ratio(
                    axes, lambda row: {"model": self.time("total", row), "encoder": self.time("encoder", row)}
                ),
            ),
            Chart(
                "savings",
                "Savings in multiply-adds and in time",
                "Savings relative to the dense model. Where time lies below multiply-adds, memory traffic, small "
                "matrices and overheads take the difference; where it lies above, the saved multiply-adds were slower "
                "than average.",
                "tokens kept (%)",
                "saved (%)",
                self._draw_savings,
            ),
            bar_chart(
                "parts",
                "Multiply-adds by kind of layer",
                "Only the encoder scales with the kept tokens, except for its value projections: every token has a "
                "value.",
                "giga multiply-adds per image",
                parts.fillna(0.0),
                stacked=True,
            ),
            bar_chart(
                "stages",
                "Latency by stage",
                "Median milliseconds of each stage. In other DETRs, backbone is everything before the encoder.",
                "milliseconds",
                self._stage_times(),
                stacked=True,
            ),
        ]
        if self.uneven:
            frame = pandas.DataFrame(self.uneven).pivot(index="stage", columns="mode", values="p50_ms")
            charts.append(
                bar_chart(
                    "packing",
                    "Padded against packed",
                    f"One batch of {len(self.uneven[0]['budgets'])} images that keep {self._uneven_budgets} of their "
                    "tokens. The padded encoder, as published, computes every image with the largest budget of the "
                    "batch.",
                    "milliseconds",
                    frame.loc[["encoder", "total"], ["packed", "padded"]].rename({"total": "whole pass"}),
                )
            )
        for row in (row for row in self.rows if row["kind"] == "budgets"):
            counts = pandas.Series(row["keep_ratios"]).mul(100).round().value_counts().sort_index()
            weights = "" if row["trained"] else " The weights are random, and so are the budgets."
            charts.append(
                bar_chart(
                    "budgets",
                    "Budgets chosen by the model",
                    f"Keep ratio of each of {len(row['keep_ratios'])} images.{weights}",
                    "images",
                    counts.rename(lambda percent: f"{percent:.0f}%").to_frame("images"),
                )
            )
        return charts + curve_charts(self.curve())

    def _draw_against_keep_ratio(self, axes: Axes, values_of: Callable[[Row], dict[str, float]]) -> None:
        """Lines of the model and of its encoder over the fixed ratios, with those of the dense and adaptive model."""

        def frame(rows: Sequence[Row]) -> pandas.DataFrame:
            return pandas.DataFrame(map(values_of, rows), index=[100 * row["keep_ratio"] for row in rows])

        names = {"model": "whole model"}
        frame(self.fixed).rename(columns=names).plot(ax=axes, marker="o", markersize=5, legend=False)
        for colour, (name, value) in zip(COLOURS[2:], values_of(self.dense_flops).items(), strict=False):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.4, label=f"dense {name}")
        for row in self.adaptive_flops:
            values = values_of(row).values()
            axes.plot(
                [100 * row["keep_ratio"]] * 2,
                list(values),
                "o",
                markersize=9,
                color=COLOURS[4],
                label="adaptive",
            )
        axes.set(xlim=(0, None), ylim=(0, None))

    def _draw_savings(self, axes: Axes) -> None:
        frame = pandas.DataFrame(
            {
                f"{name}: {kind}": {100 * ratio: 100 * saved[stage][index] for ratio, saved in self.savings()}
                for stage, name in (("encoder", "encoder"), ("total", "whole pass"))
                for index, kind in enumerate(("multiply-adds", "time"))
            }
        )
        frame.plot(ax=axes, marker="o", markersize=5, legend=False)
        axes.set(xlim=(0, None), ylim=(0, None))

    def _stage_times(self) -> pandas.DataFrame:
        """A row for each mode in the order of the run, a column for each stage; other detectors may have no stages."""
        frame = pandas.DataFrame([{**row, "label": label(row)} for row in self.latency])
        stages = frame.pivot_table("p50_ms", "label", "stage", sort=False).reindex(columns=list(STAGES))
        whole = stages.pop("total").where(stages["encoder"].isna())
        if whole.notna().any():
            stages["not divided"] = whole
        return stages.fillna(0.0)
