"""The detector from a command line: python -m ats_detr {predict,info,export,convert,datasets} ...

Exit codes: 0, all done; 1, done but for what was named (files that cannot be read, errors in a dataset); 2, a mistake,
said in one line, and nothing was done; 130, interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track

from ats_detr.checkpoint import (
    CHECKPOINT_SUFFIXES,
    load_checkpoint,
    load_model,
    read_file,
    save_checkpoint,
    save_folder,
)
from ats_detr.config import ConfigError, apply_override, config_from_dict
from ats_detr.convert import from_official, is_official, to_official
from ats_detr.data.check import check_dataset, find_splits, lines, plot_dataset
from ats_detr.detector import THRESHOLD, Detector
from ats_detr.errors import UserError, run_cli
from ats_detr.evaluation import MAX_DETECTIONS
from ats_detr.flops import num_parameters
from ats_detr.info import describe, name_of_model
from ats_detr.predict import SHOWN, Shown, find_inputs, predict_files

console = Console(highlight=False, markup=False, soft_wrap=True)
PROBLEMS = 1
"""Exit code where something was named that could not be done, or is wrong."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    arguments.run(arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line; `run` of what it parses is a function of it."""
    parser = argparse.ArgumentParser(
        prog="python -m ats_detr", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_predict(commands)
    _add_info(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_datasets(commands)
    return parser


# ------------------------------------------------------------------------------------------------------------- predict
def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="detect objects in images, folders and videos",
        description="Detect objects. Writes predictions.json, pictures/, videos/ and gallery.html, a page to look "
        "through. Files that cannot be read are named, and the exit code is then 1.",
    )
    command.add_argument("paths", nargs="+", metavar="PATH", help="an image, a video, or a folder of them")
    command.add_argument(
        "--checkpoint",
        required=True,
        help="a file, a model's or a run's folder, or the name of a run under runs/",
    )
    command.add_argument("--out", type=Path, default=Path("predictions"), help="default: %(default)s")
    command.add_argument(
        "--show",
        type=_shown,
        default=SHOWN,
        metavar="boxes,tokens,budget",
        help="what is drawn into pictures/ and videos/; default: all",
    )
    command.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="smallest score; default: %(default)s"
    )
    command.add_argument("--max-detections", type=int, default=MAX_DETECTIONS, help="default: %(default)s")
    command.add_argument("--batch-size", type=int, default=1, help="changes nothing but the time; default: 1")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--allow-urls", action="store_true", help="fetch images from http(s) URLs")
    command.add_argument(
        "--stored-pixels", action="store_true", help="do not turn photographs as their EXIF data says"
    )
    command.set_defaults(run=_predict)


def _shown(text: str) -> tuple[Shown, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    unknown = [part for part in parts if part not in SHOWN]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: give some of {','.join(SHOWN)}")
    return tuple(part for part in SHOWN if part in parts)


def _predict(arguments: argparse.Namespace) -> None:
    inputs = find_inputs(arguments.paths)
    detector = Detector.from_checkpoint(arguments.checkpoint, device=arguments.device)
    if inputs.ignored:
        listed = ", ".join(path.name for path in inputs.ignored[:5])
        more = ", ..." if len(inputs.ignored) > 5 else ""
        console.print(
            f"ignored {len(inputs.ignored)} files that are neither images nor videos: {listed}{more}"
        )
    done = predict_files(
        detector,
        inputs,
        arguments.out,
        show=arguments.show,
        title=f"{detector.config.name}: {', '.join(arguments.paths)}",
        threshold=arguments.threshold,
        max_detections=arguments.max_detections,
        batch_size=arguments.batch_size,
        upright=not arguments.stored_pixels,
        allow_urls=arguments.allow_urls,
        show_progress=console.is_terminal,
    )
    for failure in done.failures:
        print(f"error: {failure}", file=sys.stderr)
    kept = f"; on average {fmean(done.keep_ratios):.1%} of the tokens kept" if done.keep_ratios else ""
    videos = f" and {done.num_videos} videos" if inputs.videos else ""
    console.print(f"{done.num_images} images{videos}, {len(done.failures)} failed{kept}")
    console.print(
        f"written to {arguments.out}: predictions.json, pictures" + (", gallery.html" * bool(done.gallery))
    )
    if done.failures:
        sys.exit(PROBLEMS)


# ---------------------------------------------------------------------------------------------------------------- info
def _add_info(commands: Any) -> None:
    command = commands.add_parser(
        "info",
        help="what a configuration or a checkpoint is",
        description="Architecture, keep ratios, parameters, multiply-adds, classes and training of a configuration "
        "(.yaml) or a checkpoint.",
    )
    command.add_argument("source", help="a YAML file, or what --checkpoint of predict takes")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.num_queries=100")
    command.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> None:
    rows = describe(arguments.source, arguments.overrides)
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        console.print(f"{what:<{width}}  {value}")


# -------------------------------------------------------------------------------------------------------------- export
def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a graph for onnxruntime, or a torch.export program",
        description="Write the detector as one graph that runs without this package. It takes images of one padded "
        "size, in batches of any size: uint8 `images` [B, 3, H, W] and int64 `sizes` [B, 2] of what is not padding.",
    )
    command.add_argument("checkpoint", help="what --checkpoint of predict takes")
    command.add_argument("destination", type=Path, help=".onnx or .pt2")
    command.add_argument(
        "--size", type=_size, metavar="HxW", help="of the padded images; default: a landscape of full size"
    )
    command.add_argument(
        "--keep-ratio", type=float, help="one budget for all images; default: the model's own"
    )
    command.add_argument("--max-detections", type=int, default=MAX_DETECTIONS, help="default: %(default)s")
    command.set_defaults(run=_export)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: give height and width, such as 832x1344")
    return int(height), int(width)


def _export(arguments: argparse.Namespace) -> None:
    from ats_detr.export import export_file  # torch's exporter takes seconds to load

    detector = Detector.from_checkpoint(arguments.checkpoint, device="cpu")
    export_file(
        detector,
        arguments.destination,
        arguments.size,
        max_detections=arguments.max_detections,
        keep_ratio=arguments.keep_ratio,
    )
    megabytes = arguments.destination.stat().st_size / 1e6
    console.print(f"{arguments.destination}: {name_of_model(detector.config.model)}, {megabytes:.1f} MB")


# ------------------------------------------------------------------------------------------------------------- convert
def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="a published checkpoint as one of ours, or one of ours as a published one",
        description="Convert a checkpoint of the published code (Deformable DETR, Sparse DETR, ATS-DETR) to one of "
        "ours, one of ours back, or one of ours to a model's folder. The direction follows from what SOURCE holds.",
    )
    command.add_argument("source", type=Path)
    command.add_argument(
        "destination",
        type=Path,
        help="ours: .safetensors, .pt, or a folder (model.safetensors and config.json); published: .pth",
    )
    command.add_argument(
        "--keep-adaption", action="store_true", help="keep the adaption layer, which only distillation uses"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as model.selector.keep_ratio=0.2"
    )
    command.set_defaults(
        run=lambda given: convert(
            given.source, given.destination, given.overrides, keep_adaption=given.keep_adaption
        )
    )


def convert(
    source: Path, destination: Path, overrides: Sequence[str] = (), *, keep_adaption: bool = False
) -> None:
    """Write `source` in the other of the two forms, and tell what it is. Raises UserError; writes whole files only."""
    is_folder = not destination.suffix
    if not is_folder and destination.suffix not in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"{destination}: give the destination the suffix .safetensors, .pt or .pth, or none for a folder"
        )
    content = read_file(source)
    if not is_official(content):
        if destination.suffix == ".safetensors" or overrides or keep_adaption:
            raise UserError(
                f"{source} is one of ours: it converts to a published .pth file or a folder, without further options"
            )
        if is_folder:
            save_folder(load_checkpoint(source), destination)
            console.print(f"{destination}: model.safetensors and config.json")
            return
        save_checkpoint(to_official(load_checkpoint(source)), destination)
        console.print(f"{destination}: as the published code stores it")
        return
    checkpoint = from_official(content, source=str(source), keep_adaption=keep_adaption)
    for override in overrides:
        apply_override(checkpoint["config"], override)
    try:
        config = config_from_dict(checkpoint["config"])
    except ConfigError as error:
        raise UserError(str(error)) from error
    (save_folder if is_folder else save_checkpoint)(checkpoint, destination)
    model, _ = load_model(destination)  # strict: what was written is exactly the model it claims to be
    for note in checkpoint["notes"]:
        console.print(note)
    console.print(
        f"{destination}: {name_of_model(config.model)}, {checkpoint['num_classes']} class rows,"
        f" {num_parameters(model) / 1e6:.1f} M parameters"
    )


# ------------------------------------------------------------------------------------------------------------ datasets
def _add_datasets(commands: Any) -> None:
    group = commands.add_parser("datasets", help="look at training data").add_subparsers(
        dest="action", required=True
    )
    command = group.add_parser(
        "check",
        help="everything that is wrong with a COCO-format dataset",
        description="Read every record and decode every image, and report everything that is wrong in one go. "
        "The exit code is 1 if there are errors; warnings and notes do not count.",
    )
    command.add_argument("path", type=Path, help="a folder with annotations/*.json, or one annotation file")
    command.add_argument("--images", type=Path, help="the folder of the images, where it cannot be guessed")
    command.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw sizes and class histograms; default: nothing is written",
    )
    command.add_argument(
        "--most", type=int, default=5, help="places that are listed of each kind; default: 5"
    )
    command.set_defaults(run=_check_dataset)


def _check_dataset(arguments: argparse.Namespace) -> None:
    splits = find_splits(arguments.path, arguments.images)

    def progress(items: Iterable[Any], what: str, number: int) -> Iterable[Any]:
        return track(items, what, total=number, transient=True, disable=not console.is_terminal)

    between = check_dataset(splits, track=progress)
    for split in splits:
        number = sum(split.objects_per_category.values())
        console.print(
            f"{split.annotations} with {split.images}: {len(split.sizes)} images, {number} objects,"
            f" {len(split.categories)} categories"
        )
        for line in lines(split.findings, most=arguments.most):
            console.print(f"  {line}")
    for line in lines(between, most=arguments.most):
        console.print(line)
    picture = arguments.picture
    if picture is not None:
        try:
            plot_dataset(splits).savefig(picture)
        except OSError as error:
            raise UserError(f"--picture {picture}: cannot write it ({error.strerror})") from None
        except ValueError as error:  # a suffix that Matplotlib does not know
            raise UserError(f"--picture {picture}: {error}") from None
    num_errors = sum(f.level == "error" for f in [*between, *(f for split in splits for f in split.findings)])
    drawn = "--picture FILE draws sizes and classes" if picture is None else f"sizes and classes: {picture}"
    console.print(f"{num_errors or 'no'} kinds of errors; {drawn}")
    if num_errors:
        sys.exit(PROBLEMS)


if __name__ == "__main__":
    run_cli(main)
