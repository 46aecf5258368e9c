"""The page of a sweep: its charts, its findings in words, and its rows as a table."""

from __future__ import annotations

import base64
import html
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.charts import Chart, Series, draw_interactive, draw_picture
from bench.measure import Row

STAGES = ("backbone", "select", "encoder", "decoder")
CPU_TIME = ", CPU time of the process: other programs were running"
"""What is said of times that are not what passed on the clock."""


@dataclass(frozen=True)
class Page:
    """What was written."""

    findings: list[str]
    pictures: list[Path]


def write_page(rows: Sequence[Row], out: Path) -> Page:
    """`index.html` and a PNG for each chart in the folder `out`."""
    from plotly.offline import get_plotlyjs

    sweep = Sweep(rows)
    pictures, sections = [], []
    for chart in sweep.charts():
        picture = out / f"{chart.key}.png"
        draw_picture(chart, picture)
        pictures.append(picture)
        still = base64.b64encode(picture.read_bytes()).decode()
        sections.append(
            f"<section><h2>{html.escape(chart.title)}</h2><p>{html.escape(chart.caption)}</p>"
            f"{draw_interactive(chart)}"
            f'<details><summary>as a picture</summary><img alt="{html.escape(chart.title)}" '
            f'src="data:image/png;base64,{still}"></details></section>'
        )
    findings = sweep.findings()
    page = _TEMPLATE.format(
        title=html.escape(f"{sweep.config}: what token selection costs and buys"),
        where=html.escape(sweep.where),
        findings="".join(f"<li>{html.escape(line)}</li>" for line in findings),
        sections="\n".join(sections),
        table=sweep.table(),
        plotly=get_plotlyjs(),
    )
    (out / "index.html").write_text(page)
    return Page(findings, pictures)


class Sweep:
    """The rows of one run, looked at from several sides. Charts show the smallest batch; the table shows all."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.flops = [row for row in rows if row["kind"] == "flops"]
        latency = [row for row in rows if row["kind"] == "latency"]
        batch = min(row["batch"] for row in latency)
        self.latency = [row for row in latency if row["batch"] == batch and row["mode"] != "padded"]
        self.uneven = [row for row in latency if row["budgets"] and len(row["budgets"]) > 1]
        self.latency = [row for row in self.latency if row not in self.uneven]
        self.config = self.flops[0]["config"]
        self.dense_flops = next(row for row in self.flops if row["mode"] == "dense")

    @property
    def where(self) -> str:
        """Machine, versions, images, date and commit."""
        row = self.latency[0]
        height, width = row["image_size"]
        versions = ", ".join(
            f"{name} {row[name]}" for name in ("torch", "triton", "transformers") if name in row
        )
        threads = f", {num_threads(row['threads'])}" if "threads" in row else ""
        return (
            f"{row['machine']}{threads}; {versions}; {row['dtype']}, images {height}x{width}, batch {row['batch']}; "
            f"median of {row['rounds']} rounds{CPU_TIME if row['clock'] == 'cpu' else ''}; "
            f"{row['date']}, commit {row['commit']}"
        )

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

    def contenders(self) -> dict[str, dict[str, float]]:
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
        fixed, adaptive = self.fixed(), self.adaptive()
        ratios = [100 * row["keep_ratio"] for row in fixed]
        series = [
            Series("whole model", ratios, [row["gflops"] for row in fixed]),
            Series("encoder", ratios, [row["encoder_gflops"] for row in fixed]),
            Series("dense model", [], [self.dense_flops["gflops"]], "level"),
            Series("dense encoder", [], [self.dense_flops["encoder_gflops"]], "level"),
        ]
        if adaptive is not None:
            x = 100 * adaptive["keep_ratio"]
            series.append(
                Series(
                    "adaptive, as it decides",
                    [x, x],
                    [adaptive["gflops"], adaptive["encoder_gflops"]],
                    "points",
                )
            )
        return Chart(
            "gflops",
            "Multiply-adds against keep ratio",
            "What inference computes for one image. At 100 % that is more than dense: the selector, and the values of "
            "kept tokens, which are projected twice.",
            "tokens kept (%)",
            "giga multiply-adds per image",
            series,
        )

    def latency_chart(self) -> Chart:
        fixed, adaptive = self.fixed(), self.adaptive()
        ratios = [100 * row["keep_ratio"] for row in fixed]
        series = [
            Series("whole pass", ratios, [self.time("total", budgets=row["budgets"]) for row in fixed]),
            Series("encoder", ratios, [self.time("encoder", budgets=row["budgets"]) for row in fixed]),
            Series("dense, whole pass", [], [self.time("total", "dense")], "level"),
            Series("dense, encoder", [], [self.time("encoder", "dense")], "level"),
        ]
        if adaptive is not None:
            x = 100 * adaptive["keep_ratio"]
            series.append(
                Series(
                    "adaptive, as it decides", [x, x], [self.time("total"), self.time("encoder")], "points"
                )
            )
        return Chart(
            "latency",
            "Latency against keep ratio",
            "Median of one pass over a batch. What the encoder saves is saved once; backbone and decoder stay.",
            "tokens kept (%)",
            "milliseconds",
            series,
        )

    def savings_chart(self) -> Chart:
        savings = self.savings()
        ratios = [100 * ratio for ratio, _ in savings]
        names = (("encoder", "encoder"), ("total", "whole pass"))
        kinds = (("multiply-adds", 0), ("time", 1))
        return Chart(
            "savings",
            "What became of the multiply-adds saved",
            "Saved compared with the dense model. Where time lies below multiply-adds, the saving is lost to memory "
            "traffic, small matrices and overheads; where it lies above, the multiply-adds left out were slow ones.",
            "tokens kept (%)",
            "saved of the dense model's (%)",
            [
                Series(f"{name}: {kind}", ratios, [100 * saved[stage][index] for _, saved in savings])
                for stage, name in names
                for kind, index in kinds
            ],
        )

    def parts_chart(self) -> Chart:
        rows = [*self.flops]
        names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
        return Chart(
            "parts",
            "Multiply-adds by kind of layer",
            "Only the encoder shrinks with the tokens, and of that not the value projections: every token has a value.",
            "giga multiply-adds per image",
            "",
            [
                Series(part, [label(row) for row in rows], [row["parts"].get(part, 0.0) for row in rows])
                for part in names
            ],
            "stacked bars",
        )

    def stages_chart(self) -> Chart:
        contenders = self.contenders()
        rest = {
            name: stages["total"] - sum(stages.get(stage, 0.0) for stage in STAGES)
            for name, stages in contenders.items()
        }
        series = [
            Series(stage, list(contenders), [stages.get(stage, 0.0) for stages in contenders.values()])
            for stage in STAGES
        ]
        # Detectors that are one piece; medians of stages do not add up to the median of the whole to the last digit.
        whole = {name: time if "encoder" not in contenders[name] else 0.0 for name, time in rest.items()}
        if any(whole.values()):
            series.append(Series("all in one", list(whole), list(whole.values())))
        return Chart(
            "stages",
            "Where the time goes",
            "Median milliseconds of each stage. Of other libraries' DETRs, backbone is all that is before the encoder.",
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
            f"One batch of {len(self.uneven[0]['budgets'])} images that keep {budgets} of their tokens. Padded, as "
            "published, every image pays for the hungriest.",
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
        weights = "" if row["trained"] else " Random weights: these budgets mean nothing."
        return Chart(
            "budgets",
            "Budgets that the model chose",
            f"Keep ratio given to each of {len(row['keep_ratios'])} images.{weights}",
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
            f"COCO AP on {rows[0]['num_images']} validation images; the labels are the tokens kept.",
            "milliseconds of one pass",
            "AP (%)",
            [series("same share for every image", fixed, "line")]
            + ([series("adaptive, as it decides", adaptive, "points")] if adaptive else []),
            from_zero=False,
        )

    # ---------------------------------------------------------------------------------------------------------- table
    def table(self) -> str:
        """Every whole pass, all batch sizes, as HTML."""
        headings = ("", "tokens kept", "batch", "images", "p50 ms", "p95 ms", "images/s", "peak MB")
        lines = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
        for row in self.rows:
            if row["kind"] != "latency" or row["stage"] != "total":
                continue
            kept = "" if row["mode"].startswith("peer:") else f"{row['keep_ratio']:.1%}"
            memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            cells = (label(row), kept, row["batch"], row["images"], f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}",
                     f"{row['images_per_s']:.2f}", memory)  # fmt: skip
            lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
        return "<table>" + "\n".join(lines) + "</table>"


def num_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def label(row: Row) -> str:
    """What a contender is called in charts and tables."""
    mode = row["mode"]
    if mode.startswith("peer:"):
        return mode.removeprefix("peer:")
    if mode == "dense":
        return "dense"
    before = "" if mode == "packed" else f"{mode}, "
    if row["budgets"] is None:
        return f"{before}adaptive"
    spelled = " ".join(f"{share:.0%}" for share in row["budgets"])
    return f"{before}{spelled} kept" if len(row["budgets"]) == 1 else f"{mode} {spelled}"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #f5f6f8; margin: 0; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }} h2 {{ font-size: 17px; margin: 0; }}
.where, section p {{ color: #555c66; margin: 2px 0 12px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 18px; }}
section, .findings {{ background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 16px; min-width: 0; }}
.findings {{ margin: 0 0 18px; padding-left: 34px; }}
details {{ margin-top: 8px; color: #555c66; }} img {{ width: 100%; }}
.wide {{ overflow-x: auto; margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: right; padding: 3px 10px; border-bottom: 1px solid #e8ebef; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
@media (max-width: 600px) {{ .charts {{ grid-template-columns: 1fr; }} }}
</style>
<script>{plotly}</script>
</head><body><main>
<h1>{title}</h1><p class="where">{where}</p>
<ul class="findings">{findings}</ul>
<div class="charts">
{sections}
</div>
<section class="wide"><h2>Every whole pass</h2>{table}</section>
</main>
<script>
addEventListener("load", () => {{
  for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
}});
</script>
</body></html>
"""
