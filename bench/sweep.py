"""Cost and gain of token selection: multiply-adds, time, memory and AP per keep ratio, as rows, tables and charts.

    python -m bench.sweep --config configs/ats_r50_0.1_0.2.yaml --ratios 0.05,0.1,0.2,0.3,0.5,1.0
    python -m bench.sweep --config configs/quickstart.yaml --checkpoint quickstart --ap

Every keep ratio (the same for all images), the adaptive model, the dense encoder and other detectors run in one process
and in turns. The output folder gets `rows.jsonl`, a PNG of each chart, and `report.md`, which shows all of them.
Without `--checkpoint` weights are random and budgets meaningless; times and multiply-adds are valid.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ats_detr.batch import ImageBatch
from ats_detr.checkpoint import load_checkpoint, resolve_checkpoint
from ats_detr.config import Config, load_config
from ats_detr.console import run_cli
from ats_detr.curve import budget_curve, with_gflops
from ats_detr.data.coco import ClassMap
from ats_detr.distributed import choose_device
from ats_detr.errors import UserError
from ats_detr.evaluation import evaluate_budgets
from ats_detr.files import make_folder
from ats_detr.flops import Flops, count_flops
from ats_detr.model.output import BudgetOptions
from ats_detr.training.datasets import build_evaluation_loader
from bench.charts import Sweep
from bench.flops import given_subject, read_folder
from bench.latency import (
    IMAGE_SIZE,
    QUICK_SIZE,
    UNEVEN,
    Budgets,
    Setting,
    forced_budgets,
    generated_images,
    images_of,
    load_peers,
    measure,
    show,
)
from bench.measure import (
    Row,
    add_model_options,
    append_rows,
    environment,
    new_parser,
    progress_bar,
    shares,
    words,
)
from bench.peers import PEERS
from bench.report import section

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
NUM_JUDGED = 8
"""Number of generated images whose budgets are shown."""


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    device = choose_device(arguments.device)
    rounds = arguments.rounds or (2 if arguments.quick else 30 if device.type == "cuda" else 3)
    size = QUICK_SIZE if arguments.quick else arguments.image_size
    config = load_config(arguments.config, arguments.overrides)
    model = given_subject(config, arguments.checkpoint).model.eval()
    if model.selector is None:
        raise UserError(f"{arguments.config}: the model has no token selector, which a sweep needs")
    out = arguments.out or Path("runs") / "sweep" / f"{config.name}-{device.type}"
    make_folder(out)
    adaptive = model.selector.budget is not None
    choices: list[Budgets] = [*([None] if adaptive else []), *((ratio,) for ratio in arguments.ratios)]
    names = PEERS if arguments.peers == ["all"] else arguments.peers
    peers = load_peers([f"peer:{name}" for name in names], console)
    trained = arguments.checkpoint is not None
    setting = Setting(config.name, model, peers, device, arguments.dtype, rounds, trained, arguments.clock)
    batch_of = functools.partial(images_of, arguments.images, config, size)
    rows = flops_rows(setting, batch_of(1, "same"), choices, console)
    for count in arguments.batch:
        captured = ["captured", "captured-stages", "captured-dense"] if device.type == "cuda" else []
        modes = ["packed", "dense", *captured, *peers]
        batch = batch_of(count, "mixed")
        rows += measure(setting, batch, "same" if count == 1 else "mixed", modes, choices, console)
    rows += measure(setting, batch_of(len(UNEVEN), "mixed"), "mixed", ["packed", "padded"], [UNEVEN], console)
    if adaptive:
        judged = (
            [ImageBatch.collate([image]) for image in read_folder(arguments.images, NUM_JUDGED, config)]
            if arguments.images
            else [generated_image(index, NUM_JUDGED, size) for index in range(NUM_JUDGED)]
        )
        rows += budget_rows(setting, judged, console)
    if arguments.ap:
        rows += precision_rows(setting, config, arguments.checkpoint, choices, batch_of(1, "same"), rows)

    (out / "rows.jsonl").unlink(missing_ok=True)
    append_rows(rows, out / "rows.jsonl")
    sweep = Sweep(rows)
    for chart in sweep.charts():
        chart.save(out / f"{chart.key}.png")
    (out / "report.md").write_text(section(out / "rows.jsonl", pictures=""))
    show([row for row in rows if row["kind"] == "latency"], console)
    for line in sweep.findings():
        console.print(line)
    console.print(f"{out / 'report.md'}, a picture of each chart, and {out / 'rows.jsonl'}")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser("sweep", __doc__)
    parser.add_argument("--ap", action="store_true", help="evaluate too, on the config's validation images")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to use instead of generated ones")
    parser.add_argument(
        "--ratios", type=shares, default=RATIOS, metavar="A,B", help="keep ratios, default %(default)s"
    )
    parser.add_argument("--peers", type=words, default=["all"], metavar="A,B",
                        help=f"of {', '.join(PEERS)}; default all; \"\" for none")  # fmt: skip
    add_model_options(parser, IMAGE_SIZE, "30 on a GPU, 3 on a CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/sweep/<config>-<device>")
    arguments = parser.parse_args()
    if arguments.ap and not arguments.checkpoint:
        raise UserError("--ap needs trained weights: give --checkpoint")
    return arguments


def generated_image(index: int, count: int, size: tuple[int, int]) -> ImageBatch:
    """Image `index` of `count`, with 1 to 25 objects."""
    objects = 1 + round(24 * (index / max(1, count - 1)) ** 2)
    return generated_images(1, "same", size, seed=index, num_objects=objects)


# ---------------------------------------------------------------------------------------------------------------- rows
def flops_rows(
    setting: Setting, batch: ImageBatch, choices: Sequence[Budgets], console: Console
) -> list[Row]:
    """Giga multiply-adds of inference (`needed` of bench.flops), of each choice and of the dense encoder."""
    counted: list[tuple[Budgets, str, float, dict[str, float]]] = []
    with progress_bar(console, len(choices)) as advance:
        for choice in choices:
            with forced_budgets(setting.model, choice):
                flops = count_flops(setting.model, batch)
            counted.append((choice, "packed", flops.keep_ratio, parts_of(flops)))
            advance("counting")
    dense = parts_of(flops)
    for name in ("encoder attention", "encoder feed-forward"):  # proportional to the tokens that are updated
        dense[name] *= flops.num_tokens / flops.num_kept
    dense["encoder values"] = flops.dense_encoder - dense["encoder attention"] - dense["encoder feed-forward"]
    del dense["selection"]
    counted.append((None, "dense", 1.0, dense))
    return [
        {
            "kind": "flops",
            "config": setting.config,
            "mode": mode,
            "budgets": None if choice is None else list(choice),
            "keep_ratio": round(keep_ratio, 4),
            "gflops": round(sum(parts.values()), 4),
            "encoder_gflops": round(sum(n for name, n in parts.items() if name.startswith("encoder")), 4),
            "parts": {name: round(count, 4) for name, count in parts.items()},
            "image_size": list(batch.images_B3HW.shape[-2:]),
            **environment(setting.device),
        }
        for choice, mode, keep_ratio, parts in counted
    ]


def parts_of(flops: Flops) -> dict[str, float]:
    """The total by kind of layer."""

    def of(pattern: str) -> float:
        return sum(count for name, count in flops.by_module.items() if re.fullmatch(pattern, name))

    values = of(r"encoder\.layers\.\d+\.attention\.value_proj")
    feedforward = of(r"encoder\.layers\.\d+\.feedforward")
    parts = {
        "backbone": of(r"backbone|input_proj\.\d+"),
        "selection": of("selector"),
        "encoder values": values,
        "encoder attention": flops.encoder - values - feedforward,
        "encoder feed-forward": feedforward,
        "decoder": of("decoder"),
    }
    return {**parts, "queries": flops.total - sum(parts.values())}


def budget_rows(setting: Setting, images: Sequence[ImageBatch], console: Console) -> list[Row]:
    """The keep ratio that the model chooses for each image."""
    ratios = []
    model = setting.model.to(setting.device)
    with torch.inference_mode(), progress_bar(console, len(images)) as advance:
        for batch in images:
            batch = batch.to(setting.device)
            selection = model.select(model.tokenize(batch.images_B3HW, batch.sizes_B2))
            assert selection is not None
            ratios += selection.keep_ratio_B.tolist()
            advance("budgets")
    row = {"kind": "budgets", "config": setting.config, "trained": setting.trained}
    return [{**row, "keep_ratios": [round(ratio, 4) for ratio in ratios], **environment(setting.device)}]


def precision_rows(
    setting: Setting,
    config: Config,
    checkpoint: str,
    choices: Sequence[Budgets],
    batch: ImageBatch,
    measured: Sequence[Row],
) -> list[Row]:
    """COCO AP of each choice on the config's validation images, with the cost of an image like that of `batch`.

    The latency of a validation image is interpolated between the `measured` ones of fixed ratios.
    """
    class_map = ClassMap.from_dict(load_checkpoint(resolve_checkpoint(checkpoint))["classes"])
    loader = build_evaluation_loader(config, class_map)
    options: list[BudgetOptions] = [{} if choice is None else {"keep_ratio": choice[0]} for choice in choices]
    evaluated = evaluate_budgets(setting.model, loader, setting.device, options, show_progress=True)
    found = [
        ("auto" if choice is None else choice[0], metrics, detections)
        for choice, (metrics, detections) in zip(choices, evaluated, strict=True)
        if detections is not None
    ]
    points = budget_curve(found, loader.dataset.annotations)
    points = with_gflops(points, setting.model, (batch.images_B3HW.shape[2], batch.images_B3HW.shape[3]))
    times = sorted(
        (row["keep_ratio"], row["p50_ms"])
        for row in measured
        if row["kind"] == "latency"
        and (row["mode"], row["stage"], row["batch"]) == ("packed", "total", 1)
        and row["budgets"]
    )
    rows = []
    for choice, point, (_, metrics, _) in zip(choices, points, found, strict=True):
        kept = [record.keep_ratio for record in metrics.images]
        if times and times[0][0] - 0.01 <= min(kept) and max(kept) <= times[-1][0] + 0.01:
            latency = np.interp(kept, *zip(*times, strict=True)).mean()
            point = dataclasses.replace(point, latency_ms=round(float(latency), 3))
        row = {
            "kind": "precision",
            "config": setting.config,
            "budgets": None if choice is None else list(choice),
            "point": point.to_dict(),
        }
        rows.append({**row, **metrics.to_dict(), **environment(setting.device)})
    return rows


if __name__ == "__main__":
    run_cli(main)
