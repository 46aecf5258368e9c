"""Evaluate a checkpoint on the validation images, or on another split: COCO AP, the budgets, and pictures."""

from __future__ import annotations

import copy
import math
import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ats_detr import distributed
from ats_detr.batch import bucket_size
from ats_detr.budgets import Budget, parse_budget
from ats_detr.checkpoint import (
    SHIPPED,
    config_of,
    load_checkpoint,
    load_detector,
    resolve_checkpoint,
    write_json,
)
from ats_detr.cli.options import CHECKPOINT, add_budget, add_config, add_overrides, require_replaceable
from ats_detr.config import Config, load_config
from ats_detr.console import console, say
from ats_detr.curve import (
    budget_curve,
    curve_charts,
    curve_findings,
    curve_report,
    curve_table,
    with_gflops,
)
from ats_detr.data.coco import ClassMap
from ats_detr.data.images import ImageFileError
from ats_detr.data.layout import Role
from ats_detr.data.loader import EvaluationLoader
from ats_detr.data.transforms import resized_size
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.evaluation import (
    METRICS,
    Metrics,
    evaluate,
    evaluate_budgets,
    warn_of_limits,
    warn_of_minimum,
)
from ats_detr.files import make_folder, replaced_file
from ats_detr.flops import count_flops
from ats_detr.model import CompiledDetr, Detr
from ats_detr.remote import is_remote
from ats_detr.training import run_log
from ats_detr.training.datasets import build_evaluation_loader
from ats_detr.training.stages import Stage
from ats_detr.visualize import draw_kept_tokens, plot_budgets


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser, default="the configuration stored in the checkpoint")
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument(
        "--split",
        choices=("val", "test", "train"),
        default="val",
        help="the images to evaluate on, as data.SPLIT_annotations; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for metrics.json and the pictures; default: evaluation/ beside the checkpoint, in the working"
        " directory where the checkpoint was fetched or is part of this package",
    )
    parser.add_argument(
        "--compile",
        choices=("float32", "bfloat16"),
        help="evaluate the compiled detector (Detector.compile) in this dtype",
    )
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="write all detections as COCO results (JSON)"
    )
    add_budget(parser)
    parser.add_argument(
        "--budgets",
        metavar="A,B,...",
        help="evaluate several budgets in one run, such as 0.05,0.1,0.2,0.4,auto,mean:0.15, and write charts of AP"
        " against cost with errors, instead of metrics.json and pictures",
    )
    add_overrides(parser, "data.eval_batch_size=8")


def run(arguments: Namespace) -> None:
    """Evaluate one checkpoint."""
    is_curve = arguments.budgets is not None
    texts = arguments.budgets.split(",") if is_curve else [arguments.budget]
    budgets = [parse_budget(text) for text in texts]
    if is_curve and (arguments.budget != "auto" or arguments.detections):
        raise UserError("--budgets excludes --budget and --detections: omit them")
    path = resolve_checkpoint(arguments.checkpoint)
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    else:
        config = config_of(load_checkpoint(path), path, arguments.overrides)
    folder = "evaluation" if arguments.split == "val" else f"evaluation_{arguments.split}"
    is_own = not is_remote(arguments.checkpoint) and SHIPPED not in path.parents
    output = arguments.output or (path.parent if is_own else Path()) / folder
    with distributed.process_group(config.device, config.train.timeout_minutes) as device:
        run_log.configure()
        compiled = getattr(torch, arguments.compile) if arguments.compile else None
        if is_curve:
            compare_budgets(config, path, output, device, budgets, split=arguments.split, compiled=compiled)
            return
        evaluate_checkpoint(
            config,
            path,
            output,
            device,
            split=arguments.split,
            compiled=compiled,
            budget=budgets[0],
            detections_file=arguments.detections,
        )


def evaluate_checkpoint(
    config: Config,
    path: Path,
    folder: Path,
    device: torch.device,
    *,
    split: Role = "val",
    compiled: torch.dtype | None = None,
    budget: Budget = "auto",
    detections_file: Path | None = None,
) -> None:
    """Print the metrics of a checkpoint on the images of a split of `config`, and write them with pictures.

    Called by every process of a distributed run; the first one writes.

    Args:
        folder: for metrics.json (with AP and AR of each class), pictures of `num_pictures` images and, for a model with
            a budget per image, budgets.png.
        compiled: dtype of the compiled detector. None: evaluate the model itself.
        budget: see `Detector.predict`.
        detections_file: for all detections, as COCO results.
    """
    detector, _ = _load(config, path, device)
    detector.budget, model = budget, detector.model
    options = detector.budget_options(budget)
    loader = build_evaluation_loader(config, detector.classes, split=split)
    make_folder(folder)
    if detections_file is not None:
        make_folder(detections_file.parent)
        if detections_file.is_dir() or not os.access(detections_file.parent, os.W_OK):
            raise UserError(f"--detections {detections_file}: cannot write this file; choose another one")
        require_replaceable("--detections", detections_file, b"[")
    evaluated = model if compiled is None else CompiledDetr(model, dtype=compiled)
    max_detections = config.evaluation.max_detections
    warn_of_limits(loader.dataset, config.model.num_queries, max_detections)
    metrics = evaluate(
        evaluated,
        loader,
        device,
        budget=options,
        max_detections=max_detections,
        detections_file=detections_file,
        show_progress=console.is_terminal,
    )
    warn_of_minimum(metrics, config.model.selector)
    if distributed.is_main():
        print_metrics(metrics)
        write_json({"budget": str(budget), **metrics.to_dict()}, folder / "metrics.json")
        write_pictures(detector, metrics, folder, split)
        say(f"written to {folder}: metrics.json and pictures")
    distributed.barrier()


def compare_budgets(
    config: Config,
    path: Path,
    folder: Path,
    device: torch.device,
    budgets: Sequence[Budget],
    *,
    split: Role = "val",
    compiled: torch.dtype | None = None,
) -> None:
    """Print AP and cost of a checkpoint at several budgets, and write budget_curve.json, budget_curve.md and charts.

    Called by every process of a distributed run; the first one writes.

    Args:
        budgets: see `Detector.predict`.
        compiled: see `evaluate_checkpoint`.
    """
    detector, _ = _load(config, path, device)
    options = list(map(detector.budget_options, budgets))
    loader = build_evaluation_loader(config, detector.classes, split=split)
    make_folder(folder)
    max_detections = config.evaluation.max_detections
    evaluated = evaluate_budgets(
        detector.model if compiled is None else CompiledDetr(detector.model, dtype=compiled),
        loader,
        device,
        options,
        max_detections=max_detections,
        show_progress=console.is_terminal,
    )
    if distributed.is_main():
        found = [
            (b, metrics, table)
            for b, (metrics, table) in zip(budgets, evaluated, strict=True)
            if table is not None
        ]
        points = budget_curve(found, loader.dataset.annotations, max_detections=max_detections)
        size = _most_common_size(config, loader)
        points = with_gflops(points, detector.model, size)
        number = f"{points[0].num_images} images"
        header, *rows = curve_table(points)
        table = Table(*header, title=number)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in curve_findings(points):
            say(line)
        charts = curve_charts(points)
        for chart in charts:
            chart.save(folder / f"{chart.key}.png")
        title = f"# {config.name}: AP against cost\n\n{number}; multiply-adds of an image of {size[1]} x {size[0]}."
        with replaced_file(folder / "budget_curve.md") as file:
            file.write(curve_report(points, charts, title).encode())
        metrics = [{**p.to_dict(), **m.to_dict()} for p, (_, m, _) in zip(points, found, strict=True)]
        write_json({"points": metrics}, folder / "budget_curve.json")
        say(f"written to {folder}: budget_curve.md, budget_curve.json and charts")
    distributed.barrier()


def _most_common_size(config: Config, loader: EvaluationLoader) -> tuple[int, int]:
    """(height, width) of the most common padded size of the images of all processes."""
    data = config.data
    sizes: Counter[tuple[int, int]] = Counter()
    for indices in loader.global_batches:
        resized = resized_size(loader.dataset.size(indices[0]), data.short_side, data.long_side)
        sizes[bucket_size(resized, data.size_multiple)] += len(indices)
    return sizes.most_common(1)[0][0]


def compare_stages(stages: Mapping[str, Stage], folder: Path, device: torch.device) -> None:
    """Compare the finished stages on the student's validation images: a table, pictures, and finally summary.json.

    summary.json contains, for each of `weak`, `strong`, `student` and `static`, AP and AP50 (0..1), the mean keep
    ratio, and the encoder's multiply-adds per image in units of 1e9; also the rank correlation of the student's budgets
    with the number of objects, the number of images, and the training time in minutes (without that of published
    teachers, which is unknown). `static` is a control: the weights of the student with its mean keep ratio for every
    image. Of a model without teachers, `weak` and `strong` are its weights with the smallest and the largest budget.

    Called by every process of a distributed run; the first one writes.
    """
    config = list(stages.values())[-1].config  # of the student
    detectors: dict[str, Detector] = {}
    seconds = 0.0
    for name, stage in stages.items():
        detector, checkpoint = _load(stage.config, stage.checkpoint, device)
        detectors[name] = detector
        seconds += checkpoint.get("train_seconds", 0.0)
    if config.teachers == "self":
        assert detector.model.selector is not None
        ratios = {"weak": detector.model.selector.min_ratio, "strong": detector.model.selector.max_ratio}
        detectors = {name: _at_ratio(detector, ratio) for name, ratio in ratios.items()}
        detectors["student"] = detector
    summary: dict[str, Any] = {}
    while detectors:
        name = next(iter(detectors))
        detector = detectors.pop(name)
        loader = build_evaluation_loader(config, detector.classes)
        metrics = evaluate(detector.model, loader, device, max_detections=config.evaluation.max_detections)
        if name == "student":
            detectors["static"] = _at_ratio(detector, metrics.mean_keep_ratio)
        if not distributed.is_main():
            continue
        everything = build_evaluation_loader(config, detector.classes, shared=False)
        summary[name] = {key: metrics.to_dict()[key] for key in ("AP", "AP50", "mean_keep_ratio")}
        summary[name]["encoder_gflops"] = mean_encoder_gflops(detector.model, everything)
        if name == "student":
            correlation = metrics.budget_object_spearman
            summary["budget_object_spearman"] = None if math.isnan(correlation) else correlation
            summary["num_val_images"] = len(metrics.images)
            write_pictures(detector, metrics, folder)
    if distributed.is_main():
        summary["train_minutes"] = seconds / 60
        print_comparison(summary)
        write_json(summary, folder / "summary.json")
        say(f"written to {folder}: budgets.png, pictures and summary.json")
    distributed.barrier()


def _at_ratio(detector: Detector, ratio: float) -> Detector:
    """A copy that keeps this share of the tokens of every image."""
    model = copy.deepcopy(detector.model)
    assert model.selector is not None
    model.selector.fix_ratio(ratio)
    return Detector(model, detector.config, detector.classes)


def _load(config: Config, path: Path, device: torch.device) -> tuple[Detector, dict[str, Any]]:
    """The detector of `config` with the weights of a checkpoint, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = load_detector(config, checkpoint, path).to(device)
    return Detector(model, config, ClassMap.from_dict(checkpoint["classes"]), checkpoint), checkpoint


def mean_encoder_gflops(model: Detr, loader: EvaluationLoader) -> float:
    """Mean multiply-adds of the encoder per image, in units of 1e9, at each image's own budget."""
    total, num_images = 0.0, 0
    for batch, _ in loader:
        total += count_flops(model, batch).encoder * len(batch)
        num_images += len(batch)
    return total / num_images


def write_pictures(detector: Detector, metrics: Metrics, folder: Path, split: Role = "val") -> None:
    """Write pictures/ of images of all difficulties and, for a model with several budgets, budgets.png.

    An image has <rank>_<image id>_detections.png and, where the model selects tokens, ..._tokens.png. The rank orders
    the images by number of objects, fewest first.
    """
    config = detector.config
    loader = build_evaluation_loader(
        config, detector.classes, shared=False, num_images=config.num_pictures, split=split
    )
    dataset = loader.dataset
    make_folder(folder / "pictures")
    indices = [index for batch in loader.global_batches for index in batch]
    for rank, index in enumerate(sorted(indices, key=lambda index: (dataset.num_objects[index], index))):
        try:
            image = dataset.read_image(index)
        except ImageFileError:
            if dataset.on_bad_image == "error":
                raise
            continue
        (result,) = detector.predict(image, keep_tokens=True)
        image_id, count = dataset.image_id(index), int(dataset.num_objects[index])
        stem = f"{folder}/pictures/{rank:02d}_{image_id:06d}"
        result.draw().save(f"{stem}_detections.png")
        if result.kept_tokens is not None:
            title = f"image {image_id}, {count} object{'s' * (count != 1)}: {result.budget.text}"
            draw_kept_tokens(image, result.kept_tokens, title=title).save(f"{stem}_tokens.png")
    if metrics.num_budgets:
        plot_budgets(metrics).savefig(folder / "budgets.png")


def print_metrics(metrics: Metrics) -> None:
    """Print the COCO metrics, the mean keep ratio and a histogram of the budgets."""
    values = metrics.to_dict()
    table = Table(title=f"{len(metrics.images)} images")
    for column in ("", "", "value"):
        table.add_column(column, justify="right" if column else "left")
    for key, meaning in METRICS.items():
        table.add_row(key, meaning, _number(values[key]))
    table.add_row(
        "keep ratio", "mean share of tokens that the encoder updates", f"{metrics.mean_keep_ratio:.1%}"
    )
    for budget, count in enumerate(metrics.budget_histogram):
        table.add_row(f"budget {budget}", "images with this budget; budget 0 is the smallest", str(count))
    if metrics.num_skipped:
        table.add_row("skipped", "unreadable images", str(metrics.num_skipped))
    console.print(table)


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Print a table of the stages."""
    table = Table(title=f"{summary['num_val_images']} validation images")
    for column in ("", "AP", "AP50", "mean keep ratio", "encoder GFLOPs"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("weak", "strong", "student", "static"):
        row = summary[name]
        ratio, gflops = f"{row['mean_keep_ratio']:.1%}", f"{row['encoder_gflops']:.4f}"
        table.add_row(name, _number(row["AP"]), _number(row["AP50"]), ratio, gflops)
    console.print(table)
    correlation = summary["budget_object_spearman"]
    found = "the budget is the same for all images" if correlation is None else f"Spearman {correlation:.2f}"
    say("static: the weights of the student, with the same share of tokens for every image")
    say(f"budget against number of objects: {found}; trained in {summary['train_minutes']:.1f} minutes")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
