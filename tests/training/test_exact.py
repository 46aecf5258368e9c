"""Resuming is exact: an interrupted run ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ats_detr.config import load_config
from ats_detr.errors import Stopped, UserError
from ats_detr.training.resume import PREVIOUS, RESUMABLE
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import small_tree

EPOCHS, STEPS = 4, 4
SETTINGS: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "train": {"epochs": EPOCHS, "ema_decay": 0.9, "checkpoint_every_steps": 1},
    "deterministic": True,
}
FORKS = multiprocessing.get_context("forkserver")
"""Fork server that has imported everything: its children start quickly and inherit no threads."""
FORKS.set_forkserver_preload(["ats_detr.training.stages", "tests.training.test_exact"])


def write_run(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    tree = small_tree(folder, **SETTINGS)
    tree["data"]["root"] = str(folder.parent / "data")
    for key, value in changes.items():
        tree[key] |= value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def train(folder: Path) -> None:
    """Train the run in `folder` to its end."""
    torch.set_num_threads(1)
    config = load_config(folder / "config.yaml")
    train_stages(plan_stages(config), "all", torch.device("cpu"))


def train_quietly(folder: Path) -> None:
    """Train in a separate process."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    train(folder)


def train_until(folder: Path, condition: Callable[[], bool], number: int = signal.SIGKILL) -> int | None:
    """Train in another process and send it a signal once `condition` holds. Returns its exit code."""
    process = FORKS.Process(target=train_quietly, args=(folder,))
    process.start()
    while process.is_alive() and not condition():
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def final_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "run" / "final.pt", weights_only=True)


def assert_same_result(folder: Path, expected: Path) -> None:
    own, other = final_state(folder), final_state(expected)
    assert own["step"] == other["step"] == EPOCHS * STEPS
    assert own["best_ap"] == other["best_ap"]
    for name, tensor in other["model"].items():
        assert torch.equal(own["model"][name], tensor), name
    logs = [
        [
            {k: v for k, v in yaml.safe_load(line).items() if k != "images_per_second"}
            for line in (f / "run" / "log.jsonl").read_text().splitlines()
        ]
        for f in (folder, expected)
    ]
    assert logs[0] == logs[1], "every step and evaluation once, with the same numbers"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "undisturbed"
    write_run(folder)
    train(folder)
    return folder


def test_two_deterministic_runs_are_equal(undisturbed: Path) -> None:
    folder = undisturbed.parent / "again"
    write_run(folder)
    train(folder)
    assert_same_result(folder, undisturbed)


@pytest.mark.gpu
def test_two_deterministic_runs_on_a_gpu_are_equal(tmp_path: Path) -> None:
    states = []
    for name in ("first", "second"):
        write_run(tmp_path / name)
        config = load_config(tmp_path / name / "config.yaml", ["device=cuda"])
        train_stages(plan_stages(config), "all", torch.device("cuda"))
        states.append(final_state(tmp_path / name)["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def kill_at_random(undisturbed: Path, seed: int) -> None:
    """Kill a run at a random moment (in a step, between steps, in a save or an evaluation), then resume it."""
    folder = undisturbed.parent / f"killed-{seed}"
    write_run(folder)
    generator = random.Random(seed)
    lines = generator.randrange(EPOCHS * STEPS)
    more_seconds = generator.uniform(0, 0.15)
    log = folder / "run" / "log.jsonl"
    reached: list[float] = []

    def is_time() -> bool:
        if not reached and log.exists() and log.read_bytes().count(b"\n") >= lines:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] > more_seconds

    assert train_until(folder, is_time) == -signal.SIGKILL
    assert not (folder / "run" / "final.pt").exists()
    train(folder)
    assert_same_result(folder, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(undisturbed: Path, seed: int) -> None:
    kill_at_random(undisturbed, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_twenty_more_random_moments(undisturbed: Path, seed: int) -> None:
    kill_at_random(undisturbed, seed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_in_order(undisturbed: Path, number: int) -> None:
    folder = undisturbed.parent / f"signalled-{int(number)}"
    write_run(folder, train={**SETTINGS["train"], "checkpoint_every_steps": 0, "learning_rate": 1e-3})
    log = folder / "run" / "log.jsonl"
    code = train_until(folder, lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, number)
    assert code == 1, "multiprocessing's word for an exception: Stopped"
    saved = torch.load(folder / "run" / RESUMABLE, weights_only=True)
    assert (saved["epoch"], saved["epoch_step"]) != (0, 0)
    train(folder)
    own, other = final_state(folder)["model"], final_state(undisturbed)["model"]
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_stop_by_signal_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ats_detr.training import trainer

    write_run(tmp_path / "run")
    step = trainer.train_step

    def step_and_signal(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **keywords)

    monkeypatch.setattr(trainer, "train_step", step_and_signal)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 1; run the same command to resume"):
        train(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was before"


# -------------------------------------------------------------------------------------------- damaged checkpoints
def interrupted(folder: Path) -> Path:
    """A run killed after its second checkpoint."""
    write_run(folder)
    run = folder / "run"
    train_until(folder, (run / PREVIOUS).exists)
    if not (run / RESUMABLE).exists():  # killed between the two renames of a save
        shutil.copy(run / PREVIOUS, run / RESUMABLE)
    return run


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_the_middle(path: Path) -> None:
    """Zero a range of a file, as after a crash of the machine before all pages are on disk."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(4096))


@pytest.mark.parametrize("damage", [truncate, zero_the_middle])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used(
    undisturbed: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = undisturbed.parent / damage.__name__
    run = interrupted(folder)
    damage(run / RESUMABLE)
    with caplog.at_level("WARNING"):
        train(folder)
    assert f"{run / RESUMABLE}: a damaged checkpoint" in caplog.text
    assert f"using the previous checkpoint, {run / PREVIOUS}" in caplog.text
    assert_same_result(folder, undisturbed)


def test_without_an_intact_checkpoint_the_run_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = interrupted(folder)
    truncate(run / RESUMABLE)
    truncate(run / PREVIOUS)
    with pytest.raises(
        UserError, match="a damaged checkpoint .* there is no other checkpoint to resume from"
    ):
        train(folder)
