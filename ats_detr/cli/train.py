"""Train a detector and the teachers it needs.

Finished stages are reused, and an interrupted stage resumes from its last checkpoint.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ats_detr import distributed
from ats_detr.cli.eval import compare_stages
from ats_detr.cli.options import add_config, add_overrides
from ats_detr.config import load_config
from ats_detr.training import run_log
from ats_detr.training.stages import plan_stages, train_stages


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--stage",
        default="all",
        choices=("weak", "strong", "student", "all"),
        help="train only this stage; default: %(default)s",
    )
    add_overrides(parser, "train.epochs=12; they apply to the teachers too")


def run(arguments: Namespace) -> None:
    """Train, then compare the stages if the configuration asks for it."""
    config = load_config(arguments.config, arguments.overrides)
    stages = plan_stages(config, arguments.overrides)
    with distributed.process_group(config.device, config.train.timeout_minutes) as device:
        run_log.configure()
        train_stages(stages, arguments.stage, device)
        if config.summary and arguments.stage == "all":
            compare_stages(stages, config.run_dir, device)
