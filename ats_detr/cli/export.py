"""Export a detector as one graph that runs without this package.

The graph takes images of one padded size, in batches of any size: uint8 `images` [B, 3, H, W] and int64 `sizes`
[B, 2], the height and width of each image within its padding.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ats_detr.budgets import parse_budget
from ats_detr.cli.options import CHECKPOINT, add_budget, add_max_detections, image_size
from ats_detr.console import say
from ats_detr.detector import Detector
from ats_detr.export import export_file
from ats_detr.model_card import name_of_model


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("destination", type=Path, help="a file with the suffix .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="HxW",
        help="padded size of the images; default: that of a landscape image at the evaluation size",
    )
    add_budget(parser)
    add_max_detections(parser)


def run(arguments: Namespace) -> None:
    """Write the graph and report its size."""
    budget = parse_budget(arguments.budget)
    detector = Detector.from_checkpoint(arguments.checkpoint, device="cpu", budget=budget)
    export_file(
        detector,
        arguments.destination,
        arguments.size,
        max_detections=arguments.max_detections,
    )
    megabytes = arguments.destination.stat().st_size / 1e6
    say(f"{arguments.destination}: {name_of_model(detector.config.model)}, {megabytes:.1f} MB")
