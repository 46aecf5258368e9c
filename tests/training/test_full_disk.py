"""Training on a full disk: a small tmpfs (needs root; skipped otherwise)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from ats_detr.config import load_config
from ats_detr.training import setup, trainer
from tests.training.small import small_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def train(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_full_disk_ends_the_run_in_one_line_without_loss(small_disk: Path, tmp_path: Path) -> None:
    tree = small_tree(tmp_path, train={"epochs": 3, "checkpoint_every_steps": 1})
    runs = {name: folder / "run" for name, folder in (("full", small_disk), ("undisturbed", tmp_path))}
    configs = {}
    for name, run in runs.items():
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tree | {"output_dir": str(run)}))
    config = load_config(configs["undisturbed"])
    trainer.train(setup.Stage(config.name, config, config.run_dir), torch.device("cpu"))

    done = train(configs["full"])
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert (
        "cannot write this checkpoint (No space left on device); the previous checkpoint is intact"
        in errors[0]
    )
    assert "Traceback" not in done.stderr
    assert torch.load(runs["full"] / "checkpoint.pt", weights_only=True)["step"] >= 1

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = train(configs["full"])
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    own, other = (torch.load(run / "final.pt", weights_only=True)["model"] for run in runs.values())
    assert all(torch.equal(own[name], other[name]) for name in other)
