"""torchrun restarts failed processes, and the run ends with the same result as an uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ats_detr.config import load_config
from tests.training.small import merged, small_tree

ROOT = Path(__file__).parents[2]
EPOCHS, IMAGES = 3, 16


def write_run(folder: Path, num_processes: int) -> Path:
    folder.mkdir()
    tree = small_tree(folder, model={"dropout": 0.1}, train={"epochs": EPOCHS, "checkpoint_every_steps": 1})
    data = {"root": str(folder.parent / "data"), "batch_size": 4 // num_processes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merged(tree, {"data": data, "deterministic": True})))
    return path


def launch(config: Path, num_processes: int, output: Any, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    command += [f"--nproc-per-node={num_processes}", "train.py", "--config", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def workers_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the training processes, by rank."""
    found = {}
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, child)
    return [found[rank] for rank in sorted(found)]


def run_to_end(folder: Path, num_processes: int, *, kills: int = 0, seed: int = 0) -> dict[str, Any]:
    """The final checkpoint of a training in which a random worker is killed at `kills` random steps."""
    config = write_run(folder, num_processes)
    load_config(config)
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(1, EPOCHS * IMAGES // 4 - 1), kills))
    log = folder / "run" / "log.jsonl"
    with (folder / "output").open("wb") as output:
        launcher = launch(config, num_processes, output)
        for lines in moments:
            while launcher.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
                time.sleep(0.002)
            os.kill(generator.choice(workers_of(launcher)), signal.SIGKILL)
            while launcher.poll() is None and log.read_bytes().count(b"\n") >= lines:
                # The next step counts from the step at which the restarted run resumes, which rewrites the log.
                if (folder / "output").read_bytes().count(b"resuming from") > moments.index(lines):
                    break
                time.sleep(0.01)
        code = launcher.wait(240)
    assert code == 0, (folder / "output").read_text()
    return torch.load(folder / "run" / "final.pt", weights_only=True)


def assert_restarts_change_nothing(tmp_path: Path, num_processes: int, kills: int) -> None:
    expected = run_to_end(tmp_path / "undisturbed", num_processes)
    killed = run_to_end(tmp_path / "killed", num_processes, kills=kills)
    output = (tmp_path / "killed" / "output").read_text()
    assert output.count("resuming from") == kills, "one process reports it after each restart"
    assert killed["step"] == expected["step"] == EPOCHS * IMAGES // 4
    for name, tensor in expected["model"].items():
        assert torch.equal(killed["model"][name], tensor), name


def test_two_processes_recover_from_a_killed_one_with_the_same_parameters(tmp_path: Path) -> None:
    assert_restarts_change_nothing(tmp_path, 2, kills=1)


@pytest.mark.slow
def test_four_processes_recover_from_two_killed_ones_with_the_same_parameters(tmp_path: Path) -> None:
    assert_restarts_change_nothing(tmp_path, 4, kills=2)


@pytest.mark.parametrize("told", ["a worker", "the launcher"])
def test_two_processes_save_and_stop_together_on_a_signal(tmp_path: Path, told: str) -> None:
    config = write_run(tmp_path / "signalled", 2)
    log = tmp_path / "signalled" / "run" / "log.jsonl"
    with (tmp_path / "output").open("wb") as output:
        launcher = launch(config, 2, output, "train.checkpoint_every_steps=0", "train.epochs=100")
        while launcher.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        if told == "a worker":
            os.kill(workers_of(launcher)[1], signal.SIGUSR1)
        else:
            launcher.terminate()
        code = launcher.wait(120)
    text = (tmp_path / "output").read_text()
    if told == "a worker":
        assert code == 0, text
    assert len(re.findall("small: stopped by SIG[A-Z1]+ after step", text)) == 1
    assert torch.load(tmp_path / "signalled" / "run" / "checkpoint.pt", weights_only=True)["step"] >= 2
