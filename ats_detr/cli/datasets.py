"""Check a COCO-format dataset: `ats-detr datasets check PATH`.

Reads every record, decodes every image and reports all problems at once. The exit code is 1 if there are errors;
warnings and notes do not change it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from ats_detr.cli.options import FAILURES
from ats_detr.console import say, track
from ats_detr.data.check import Split, check_dataset, find_splits, lines, plot_dataset, report
from ats_detr.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("check",))
    parser.add_argument("path", type=Path, help="the folder of a dataset, or one annotation file")
    parser.add_argument(
        "--images", type=Path, help="folder of the images; default: determined from the annotation file"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result into this file as JSON")
    for setting, values in (
        ("exif", ("auto", "stored", "upright")),
        ("on_bad_image", ("error", "skip")),
        ("on_bad_annotation", ("error", "skip")),
    ):
        option = "--" + setting.replace("_", "-")
        parser.add_argument(option, choices=values, default=values[0], help=f"as data.{setting} in training")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the sizes and the class histograms into this file"
    )
    parser.add_argument(
        "--most", type=int, default=5, help="examples listed for each kind of problem; default: %(default)s"
    )


def run(arguments: Namespace) -> None:
    """Check the splits and print the findings."""
    if arguments.most < 0:
        raise UserError(f"--most {arguments.most}: must be >= 0")
    try:
        splits = find_splits(arguments.path, arguments.images)
    except UserError:
        _write_report([], arguments.json)
        raise

    check_dataset(
        splits,
        exif=arguments.exif,
        on_bad_image=arguments.on_bad_image,
        on_bad_annotation=arguments.on_bad_annotation,
        track=track,
    )
    for split in splits:
        say(
            f"{split.annotations} with {split.images}: {split.num_images} images, {split.num_objects} objects,"
            f" {len(split.categories)} categories"
        )
        for line in lines(split.findings, most=arguments.most):
            say(f"  {line}")
    _write_report(splits, arguments.json)
    picture = arguments.picture
    if picture is not None:
        try:
            plot_dataset(splits).savefig(picture)
        except OSError as error:
            raise UserError(f"--picture {picture}: cannot write this file ({error.strerror})") from None
        except ValueError as error:  # a suffix that Matplotlib does not support
            raise UserError(f"--picture {picture}: {error}") from None
    num_errors = sum(split.num_errors for split in splits)
    drawn = "--picture FILE draws sizes and classes" if picture is None else f"sizes and classes: {picture}"
    say(f"{num_errors or 'no'} kinds of errors; {drawn}")
    if num_errors:
        sys.exit(FAILURES)


def _write_report(splits: Sequence[Split], file: Path | None) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(report(splits), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot write this file ({error.strerror})") from None
