"""Prepare a checkpoint for mean budgets, such as `--budget mean:0.15`.

Runs the model up to the choice of the budget on images without annotations, and adds the mean keep ratio at each cost
of tokens to the checkpoint, in place. Use images like those of the application. Of the folder of a dataset, the test or
validation images are used. A file that cannot be read is reported and skipped; the exit code is then 1.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from ats_detr.budgets import CALIBRATION
from ats_detr.checkpoint import SHIPPED, add_to_checkpoint, read_own_file, resolve_checkpoint
from ats_detr.cli.options import CHECKPOINT, FAILURES
from ats_detr.cli.predict import find_inputs
from ats_detr.console import complain, say, track
from ats_detr.data.images import is_url
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.remote import is_remote


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help=f"{CHECKPOINT}; one that is fetched must be converted first")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image, or a folder of them")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="affects only the speed; default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")


def run(arguments: Namespace) -> None:
    """Calibrate, store the result, and report the means that it reaches."""
    path = None if is_remote(arguments.checkpoint) else resolve_checkpoint(arguments.checkpoint)
    if path is None or SHIPPED.resolve() in path.resolve().parents:
        raise UserError(
            f"{arguments.checkpoint}: a fetched or shipped checkpoint is not changed; make a copy first: ats-detr"
            f" convert {arguments.checkpoint} FOLDER"
        )
    read_own_file(path)  # before the work
    inputs = find_inputs(arguments.paths)
    if others := [*inputs.videos, *filter(is_url, inputs.images)]:
        raise UserError(
            f"{others[0]}: calibration needs image files, not videos or URLs; store them as images"
        )
    images = inputs.images
    detector = Detector.from_checkpoint(path, device=arguments.device)
    failures: list[Exception] = []
    try:
        calibration = detector.calibrate(
            track(images, "calibrating", len(images)),
            batch_size=arguments.batch_size,
            on_bad_image=failures.append,
        )
    finally:
        for failure in failures:
            complain(str(failure))
    add_to_checkpoint({CALIBRATION: calibration.to_dict()}, path)
    means = calibration.mean_keep_ratios
    say(
        f"{path}: calibrated on {calibration.num_images} images; mean budgets of {min(means):.3g} to {max(means):.3g},"
        f" {calibration.mean_of(0.0):.3g} as trained"
    )
    if failures:
        sys.exit(FAILURES)
