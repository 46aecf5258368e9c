"""Evaluate a checkpoint: COCO AP, the budgets it used, pictures.

python eval.py --config configs/quickstart.yaml --checkpoint quickstart [key=value ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ats_detr import distributed
from ats_detr.checkpoint import config_of, load_checkpoint, resolve_checkpoint
from ats_detr.config import load_config
from ats_detr.errors import run_cli
from ats_detr.summary import evaluate_checkpoint
from ats_detr.training import run_log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a YAML file; default: the settings stored in the checkpoint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a file, a model's or a run's folder, or the name of a run under runs/",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for metrics.json and pictures; default: beside the checkpoint"
    )
    parser.add_argument(
        "--compile",
        choices=("float32", "bfloat16"),
        help="evaluate the compiled detector (Detector.compile), in this type",
    )
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="write all detections here as COCO results (JSON)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.eval_batch_size=8")
    arguments = parser.parse_intermixed_args()
    checkpoint = resolve_checkpoint(arguments.checkpoint)
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    else:
        config = config_of(load_checkpoint(checkpoint), checkpoint, arguments.overrides)
    output = arguments.output or checkpoint.parent / "evaluation"
    with distributed.process_group(config.device) as device:
        run_log.configure()
        compiled = getattr(torch, arguments.compile) if arguments.compile else None
        evaluate_checkpoint(
            config, checkpoint, output, device, compiled=compiled, detections_file=arguments.detections
        )


if __name__ == "__main__":
    run_cli(main)
