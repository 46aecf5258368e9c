"""The page of a sweep: its charts, its findings as sentences, and its rows as a table."""

from __future__ import annotations

import base64
import html
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.charts import Chart, Series, save_picture, svg
from bench.measure import Row
from bench.tables import STAGES, label, latency_table, source


@dataclass(frozen=True)
class Page:
    """The result of `write_page`."""

    findings: list[str]
    pictures: list[Path]


def write_page(rows: Sequence[Row], out: Path) -> Page:
    """Writes `index.html`, which holds its charts as SVG, and a PNG of each chart into the folder `out`."""
    sweep = Sweep(rows)
    pictures, sections = [], []
    for chart in sweep.charts():
        picture = out / f"{chart.key}.png"
        save_picture(chart, picture)
        pictures.append(picture)
        drawing = base64.b64encode(svg(chart).encode()).decode()
        sections.append(
            f'<section id="{chart.key}"><p>{html.escape(chart.caption)}</p>'
            f'<img alt="{html.escape(chart.title)}" src="data:image/svg+xml;base64,{drawing}"></section>'
        )
    findings = sweep.findings()
    page = _TEMPLATE.format(
        title=html.escape(f"{sweep.config}: cost and gain of token selection"),
        where=html.escape(sweep.where),
        findings="".join(f"<li>{html.escape(line)}</li>" for line in findings),
        sections="\n".join(sections),
        table=latency_table([row for row in rows if row["kind"] == "latency"]).to_html(index=False, border=0),
    )
    (out / "index.html").write_text(page)
    return Page(findings, pictures)


class Sweep:
    """The rows of one run of bench.sweep. Charts show the smallest batch; the table shows all."""

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

    @property
    def where(self) -> str:
        """Images, machine, versions, date and commit."""
        row = self.latency[0]
        size = "x".join(map(str, row["image_size"]))
        return f"images {size}, batch {row['batch']}, {row['dtype']}; {source(self.latency)}"

    # ------------------------------------------------------------------------------------------------------- look-ups
    def time(self, stage: str, mode: str = "packed", budgets: list[float] | None = None) -> float:
        """Median milliseconds; NaN where there is no such stage."""
        found = [r for r in self.latency if (r["mode"], r["budgets"], r["stage"]) == (mode, budgets, stage)]
        return found[0]["p50_ms"] if found else float("nan")

    def fixed(self) -> list[Row]:
        """Multiply-adds of the fixed ratios, the smallest first."""
        fixed = [row for row in self.flops if row["budgets"] is not None]
        return sorted(fixed, key=lambda row: row["keep_ratio"])

    def adaptive(self) -> Row | None:
        return next((row for row in self.flops if row["mode"] == "packed" and row["budgets"] is None), None)

    def modes(self) -> dict[str, dict[str, float]]:
        """Label -> stage -> median milliseconds, in the order of the run."""
        found: dict[str, dict[str, float]] = {}
        for row in self.latency:
            found.setdefault(label(row), {})[row["stage"]] = row["p50_ms"]
        return found

    # ------------------------------------------------------------------------------------------------------- findings
    def savings(self) -> list[tuple[float, dict[str, tuple[float, float]]]]:
        """Of each fixed ratio below 1: shares of the dense multiply-adds and milliseconds that it saves, of the encoder
        and of the whole pass.
        """
        found = []
        for row in self.fixed():
            if row["keep_ratio"] >= 0.999:
                continue
            saved = {}
            for stage, count in (("encoder", "encoder_gflops"), ("total", "gflops")):
                of_flops = 1 - row[count] / self.dense_flops[count]
                of_time = 1 - self.time(stage, budgets=row["budgets"]) / self.time(stage, "dense")
                saved[stage] = of_flops, of_time
            found.append((row["keep_ratio"], saved))
        return found

    def findings(self) -> list[str]:
        """Sentences with the numbers that matter."""
        lines = []
        for ratio, saved in self.savings():
            words = []
            for stage, name in (("encoder", "the encoder"), ("total", "the whole pass")):
                of_flops, of_time = saved[stage]
                words.append(
                    f"{name} saves {of_flops:.0%} of its multiply-adds and {of_time:.0%} of its time "
                    f"({of_time / of_flops:.0%} of the saving became time)"
                )
            lines.append(f"At {ratio:.0%} of the tokens {', '.join(words)}.")
        times = [self.time("encoder", budgets=row["budgets"]) for row in self.fixed()]
        falls = all(before < after for before, after in itertools.pairwise(times))
        lines.append(
            f"Encoder latency {'falls' if falls else 'does NOT fall'} monotonically with the keep ratio: "
            + ", ".join(
                f"{row['keep_ratio']:.0%} {time:.0f} ms"
                for row, time in zip(self.fixed(), times, strict=True)
            )
            + f"; dense {self.time('encoder', 'dense'):.0f} ms."
        )
        if self.uneven:
            encoder = {row["mode"]: row["p50_ms"] for row in self.uneven if row["stage"] == "encoder"}
            budgets = ", ".join(f"{share:.0%}" for share in self.uneven[0]["budgets"])
            lines.append(
                f"Images of {budgets} in one batch: the packed encoder takes "
                f"{encoder['packed'] / encoder['padded']:.0%} of the time of the padded one."
            )
        return lines

    # --------------------------------------------------------------------------------------------------------- charts
    def charts(self) -> list[Chart]:
        charts = [
            self.flops_chart(),
            self.latency_chart(),
            self.savings_chart(),
            self.parts_chart(),
            self.stages_chart(),
        ]
        optional = [self.uneven_chart(), self.budgets_chart(), self.precision_chart()]
        return charts + [chart for chart in optional if chart is not None]

    def flops_chart(self) -> Chart:
        def giga(row: Row) -> tuple[float, float]:
            return row["gflops"], row["encoder_gflops"]

        return Chart(
            "gflops",
            "Multiply-adds against keep ratio",
            "Multiply-adds of inference for one image. At 100 % they exceed those of the dense model, because of the "
            "selector and because the values of kept tokens are projected twice.",
            "tokens kept (%)",
            "giga multiply-adds per image",
            self._against_keep_ratio(
                [giga(row) for row in self.fixed()],
                giga(self.dense_flops),
                giga(self.adaptive() or self.dense_flops),
            ),
        )

    def latency_chart(self) -> Chart:
        def times(mode: str = "packed", budgets: list[float] | None = None) -> tuple[float, float]:
            return self.time("total", mode, budgets), self.time("encoder", mode, budgets)

        return Chart(
            "latency",
            "Latency against keep ratio",
            "Median of one pass over a batch. Token selection reduces the time of the encoder only.",
            "tokens kept (%)",
            "milliseconds",
            self._against_keep_ratio(
                [times(budgets=row["budgets"]) for row in self.fixed()], times("dense"), times()
            ),
        )

    def _against_keep_ratio(
        self,
        fixed: list[tuple[float, float]],
        dense: tuple[float, float],
        adaptive: tuple[float, float],
    ) -> list[Series]:
        """Lines from (whole model, encoder) of the fixed ratios, the dense model and the adaptive one."""
        ratios = [100 * row["keep_ratio"] for row in self.fixed()]
        series = []
        for index, name in enumerate(("whole model", "encoder")):
            series.append(Series(name, ratios, [pair[index] for pair in fixed]))
        for index, name in enumerate(("dense model", "dense encoder")):
            series.append(Series(name, [], [dense[index]], "level"))
        if chosen := self.adaptive():
            series.append(Series("adaptive", [100 * chosen["keep_ratio"]] * 2, adaptive, "points"))
        return series

    def savings_chart(self) -> Chart:
        savings = self.savings()
        ratios = [100 * ratio for ratio, _ in savings]
        names = (("encoder", "encoder"), ("total", "whole pass"))
        kinds = (("multiply-adds", 0), ("time", 1))
        return Chart(
            "savings",
            "Savings in multiply-adds and in time",
            "Savings relative to the dense model. Where time lies below multiply-adds, memory traffic, small matrices "
            "and overheads take the difference; where it lies above, the saved multiply-adds were slower than average.",
            "tokens kept (%)",
            "saved (%)",
            [
                Series(f"{name}: {kind}", ratios, [100 * saved[stage][index] for _, saved in savings])
                for stage, name in names
                for kind, index in kinds
            ],
        )

    def parts_chart(self) -> Chart:
        names = list(dict.fromkeys(part for row in self.flops for part in row["parts"]))
        return Chart(
            "parts",
            "Multiply-adds by kind of layer",
            "Only the encoder scales with the kept tokens, except for its value projections: every token has a value.",
            "giga multiply-adds per image",
            "",
            [
                Series(
                    name, list(map(label, self.flops)), [row["parts"].get(name, 0.0) for row in self.flops]
                )
                for name in names
            ],
            "stacked bars",
        )

    def stages_chart(self) -> Chart:
        modes = self.modes()
        series = [
            Series(stage, list(modes), [stages.get(stage, 0.0) for stages in modes.values()])
            for stage in STAGES[:-1]
        ]
        # Detectors without stages.
        whole = [0.0 if "encoder" in stages else stages["total"] for stages in modes.values()]
        if any(whole):
            series.append(Series("not divided", list(modes), whole))
        return Chart(
            "stages",
            "Latency by stage",
            "Median milliseconds of each stage. In other DETRs, backbone is everything before the encoder.",
            "milliseconds",
            "",
            series,
            "stacked bars",
        )

    def uneven_chart(self) -> Chart | None:
        if not self.uneven:
            return None
        budgets = ", ".join(f"{share:.0%}" for share in self.uneven[0]["budgets"])
        series = []
        for mode in ("packed", "padded"):
            mine = {row["stage"]: row["p50_ms"] for row in self.uneven if row["mode"] == mode}
            series.append(Series(mode, ["encoder", "whole pass"], [mine["encoder"], mine["total"]]))
        return Chart(
            "packing",
            "Padded against packed",
            f"One batch of {len(self.uneven[0]['budgets'])} images that keep {budgets} of their tokens. The padded "
            "encoder, as published, computes every image with the largest budget of the batch.",
            "milliseconds",
            "",
            series,
            "grouped bars",
        )

    def budgets_chart(self) -> Chart | None:
        row = next((row for row in self.rows if row["kind"] == "budgets"), None)
        if row is None:
            return None
        counts = sorted(
            Counter(f"{ratio:.0%}" for ratio in row["keep_ratios"]).items(),
            key=lambda item: float(item[0][:-1]),
        )
        weights = "" if row["trained"] else " The weights are random, and so are the budgets."
        return Chart(
            "budgets",
            "Budgets chosen by the model",
            f"Keep ratio of each of {len(row['keep_ratios'])} images.{weights}",
            "images",
            "",
            [Series("images", [ratio for ratio, _ in counts], [count for _, count in counts])],
            "grouped bars",
        )

    def precision_chart(self) -> Chart | None:
        rows = [row for row in self.rows if row["kind"] == "precision" and row["AP"] is not None]
        if not rows:
            return None
        fixed = [row for row in rows if row["budgets"] is not None]
        adaptive = [row for row in rows if row["budgets"] is None]

        def series(name: str, mine: list[Row], style: str) -> Series:
            times = [self.time("total", budgets=row["budgets"]) for row in mine]
            labels = [f"{row['mean_keep_ratio']:.0%}" for row in mine]
            return Series(name, times, [100 * row["AP"] for row in mine], style, labels)  # type: ignore[arg-type]

        return Chart(
            "precision",
            "AP against latency",
            f"COCO AP on {rows[0]['num_images']} validation images. Labels: share of tokens kept.",
            "milliseconds of one pass",
            "AP (%)",
            [series("fixed ratio", fixed, "line")]
            + ([series("adaptive", adaptive, "points")] if adaptive else []),
            from_zero=False,
        )


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #f5f6f8; margin: 0; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }}
h2 {{ font-size: 17px; margin: 0; }}
.where, section p {{ color: #555c66; margin: 2px 0 12px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); align-items: start; gap: 18px; }}
section, .findings {{ background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 16px; min-width: 0; }}
.findings {{ margin: 0 0 18px; padding-left: 34px; }}
img {{ width: 100%; }}
.wide {{ overflow-x: auto; margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: right; padding: 3px 10px; border-bottom: 1px solid #e8ebef; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
@media (max-width: 600px) {{ .charts {{ grid-template-columns: 1fr; }} }}
</style>
</head><body><main>
<h1>{title}</h1><p class="where">{where}</p>
<ul class="findings">{findings}</ul>
<div class="charts">
{sections}
</div>
<section class="wide"><h2>All passes</h2>{table}</section>
</main>
</body></html>
"""
