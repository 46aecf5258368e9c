"""Check a COCO-format data set: `ats-detr datasets check PATH`.

Reads every record, decodes every image and reports all problems at once. The exit code is 1 if there are errors;
warnings and notes do not change it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import track

from ats_detr.cli.options import FAILURES, console
from ats_detr.data.check import check_dataset, find_splits, lines, plot_dataset
from ats_detr.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("check",))
    parser.add_argument("path", type=Path, help="a folder with annotations/*.json, or one annotation file")
    parser.add_argument(
        "--images", type=Path, help="folder of the images; default: determined from the annotation file"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the sizes and the class histograms into this file"
    )
    parser.add_argument(
        "--most", type=int, default=5, help="examples listed for each kind of problem; default: %(default)s"
    )


def run(arguments: Namespace) -> None:
    """Check the splits and print the findings."""
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
            raise UserError(f"--picture {picture}: cannot write this file ({error.strerror})") from None
        except ValueError as error:  # a suffix that Matplotlib does not support
            raise UserError(f"--picture {picture}: {error}") from None
    num_errors = sum(f.level == "error" for f in [*between, *(f for split in splits for f in split.findings)])
    drawn = "--picture FILE draws sizes and classes" if picture is None else f"sizes and classes: {picture}"
    console.print(f"{num_errors or 'no'} kinds of errors; {drawn}")
    if num_errors:
        sys.exit(FAILURES)
