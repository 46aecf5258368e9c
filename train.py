"""Train a detector, and the teachers it needs: python train.py --config configs/quickstart.yaml [key=value ...]"""

from __future__ import annotations

import argparse

from ats_detr import distributed
from ats_detr.config import load_config
from ats_detr.errors import run_cli
from ats_detr.summary import summarise
from ats_detr.training import run_log
from ats_detr.training.stages import plan_stages, train_stages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "--stage",
        default="all",
        choices=("weak", "strong", "student", "all"),
        help="train one stage of the chain only; finished stages are skipped in any case",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that win over the file's, such as train.epochs=12; they reach the teachers too",
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    stages = plan_stages(config, arguments.overrides)
    with distributed.process_group(config.device) as device:
        run_log.configure()
        train_stages(stages, arguments.stage, device)
        if config.summary and arguments.stage == "all":
            summarise(stages, config.run_dir, device)


if __name__ == "__main__":
    run_cli(main)
