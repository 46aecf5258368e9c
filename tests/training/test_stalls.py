"""No wait is unbounded: loader processes, other ranks, other runs and full memory end a run in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import get_worker_info

from ats_detr import files
from ats_detr.checkpoint import save_checkpoint, write_json
from ats_detr.config import load_config
from ats_detr.data import images, loader
from ats_detr.data.loader import TrainingLoader
from ats_detr.errors import Stopped, UserError
from ats_detr.files import exclusive_use
from ats_detr.training import signals
from ats_detr.training.datasets import Loaders, build_loaders
from ats_detr.training.resume import Checkpoints
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import small_config, small_tree
from tests.training.test_exact import FORKS

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(small_tree(folder, **changes)))
    return folder / "config.yaml"


def train(config: Path) -> None:
    torch.set_num_threads(1)
    train_stages(plan_stages(load_config(config)), "all", torch.device("cpu"))


# --------------------------------------------------------------------------------------------------- loader processes
def loader_with_workers(folder: Path, timeout_minutes: float = 1) -> TrainingLoader:
    train = {"timeout_minutes": timeout_minutes}
    return build_loaders(small_config(folder, data={"num_workers": 2}, train=train)).train


def test_batches_that_do_not_fit_into_shared_memory_are_sent_by_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")

    expected = list(loader_with_workers(tmp_path).epoch(0))
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_space)
    found = list(loader_with_workers(tmp_path).epoch(0))
    assert len(found) == len(expected) == 4
    for (batch, targets), (other, other_targets) in zip(found, expected, strict=True):
        assert torch.equal(batch.images_B3HW, other.images_B3HW)
        assert other.images_B3HW.is_shared()
        assert not batch.images_B3HW.is_shared()
        for target, wanted in zip(targets, other_targets, strict=True):
            assert torch.equal(target.boxes_N4, wanted.boxes_N4)
            assert torch.equal(target.labels_N, wanted.labels_N)


@pytest.mark.parametrize(
    ("number", "minutes", "words"),
    [
        (
            signal.SIGKILL,
            1,
            "memory may be too small: lower data.num_workers, or enlarge /dev/shm .*--shm-size",
        ),
        (
            signal.SIGSTOP,
            0.02,
            r"no batch in train\.timeout_minutes = 0\.02\); .* data\.num_workers=0 uses no",
        ),
    ],
    ids=["killed", "stalled"],
)
def test_a_killed_or_stalled_worker_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, minutes: float, words: str
) -> None:
    def read_or_stop(*arguments: Any) -> Any:
        if get_worker_info().id == 0:
            os.kill(os.getpid(), number)
        return sample(*arguments)

    sample = loader._sample
    monkeypatch.setattr(loader, "_sample", read_or_stop)  # inherited by the workers
    monkeypatch.setattr(loader, "_POLL_SECONDS", 0.1)
    training = loader_with_workers(tmp_path, minutes)
    with pytest.raises(UserError, match=words) as raised:
        list(training.epoch(0))
    assert "\n" not in str(raised.value)
    workers = training.reader._loader._iterator._workers
    training.reader.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_a_worker_that_stalls_between_epochs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [batch.images_B3HW for batch, _ in loader_with_workers(tmp_path).epoch(1)]
    monkeypatch.setattr(loader, "_POLL_SECONDS", 1.0)
    training = loader_with_workers(tmp_path)
    list(training.epoch(0))
    stalled = training.reader._loader._iterator._workers[0]
    os.kill(stalled.pid, signal.SIGSTOP)
    found = [batch.images_B3HW for batch, _ in training.epoch(1)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert "loader processes did not respond for 1 s and are replaced" in caplog.text
    stalled.join(5)
    assert not stalled.is_alive()


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_an_image_that_stalls_this_process_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_image: str
) -> None:
    def stalled(descriptor: int, mode: str) -> Any:
        time.sleep(60)

    data, train = {"num_workers": 0, "on_bad_image": on_bad_image}, {"timeout_minutes": 0.01}
    training = build_loaders(small_config(tmp_path, data=data, train=train)).train
    monkeypatch.setattr(images, "open", stalled, raising=False)
    with pytest.raises(
        UserError, match=r"no batch in train\.timeout_minutes = 0\.01\); the disk may not respond$"
    ):
        list(training.epoch(0))


def test_a_signal_while_waiting_for_data_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    epoch_of = TrainingLoader.epoch

    def stalled(self: TrainingLoader, epoch: int, *limits: int) -> Any:
        for number, batch in enumerate(epoch_of(self, epoch, *limits)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoader, "epoch", stalled)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 2"):
            train(config)
    train(config)
    assert torch.load(tmp_path / "run" / "final.pt")["step"] == 8


@pytest.mark.parametrize("place", [(Checkpoints, "save_result"), (Loaders, "close")])
def test_a_signal_at_the_end_of_a_stage_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    function = getattr(*place)

    def after_signal(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        function(*arguments)

    monkeypatch.setattr(*place, after_signal)
    with pytest.raises(Stopped, match="stopped by SIGTERM.*; run the same command to resume"):
        train(write_config(tmp_path, train={"epochs": 1}))
    assert (tmp_path / "run" / "final.pt").exists()


def train_and_block(config: Path, module: str, function: str) -> None:
    """Train until this function is called, which waits forever."""

    def wait_forever(*arguments: Any, **keywords: Any) -> None:
        (config.parent / "blocked").touch()
        os.read(os.pipe()[0], 1)

    signals.GRACE_SECONDS = 0.5
    setattr(sys.modules[module], function, wait_forever)
    with (config.parent / "output").open("w") as output:
        os.dup2(output.fileno(), 2)
    train(config)


@pytest.mark.parametrize(("module", "function"), [("trainer", "train_step"), ("resume", "save_checkpoint")])
def test_a_signal_ends_a_process_that_waits_forever(tmp_path: Path, module: str, function: str) -> None:
    config = write_config(tmp_path)
    process = FORKS.Process(target=train_and_block, args=(config, f"ats_detr.training.{module}", function))
    process.start()
    while process.is_alive() and not (tmp_path / "blocked").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 2
    (line,) = [text for text in (tmp_path / "output").read_text().splitlines() if "error" in text]
    assert line.startswith("error: ended 0 s after SIGTERM, waiting for other processes, data or a disk;")


# -------------------------------------------------------------------------------------------------------- other runs
def use(folder: Path) -> None:
    with exclusive_use(folder):
        (folder / "used").touch()
        time.sleep(60)


def test_two_runs_cannot_use_one_folder_and_a_killed_one_releases_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"epochs": 1})
    run = tmp_path / "run"
    run.mkdir()
    process = FORKS.Process(target=use, args=(run,))
    process.start()
    while not (run / "used").exists():
        time.sleep(0.01)
    with pytest.raises(
        UserError, match="run: another run is using this folder; wait for it, stop it, or choose"
    ):
        train(config)
    assert {path.name for path in run.iterdir()} == {"used", ".ats-detr.lock"}, "nothing was written"
    process.kill()
    process.join()
    train(config)
    assert (run / "final.pt").exists()


def test_a_process_that_stalls_while_it_generates_images_is_waited_for_at_most_30_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files._WAIT_MINUTES == 30
    monkeypatch.setattr(files, "_WAIT_MINUTES", 0.005)
    process = FORKS.Process(target=use, args=(tmp_path,))
    process.start()
    while not (tmp_path / "used").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(
        UserError, match=r"another run is using this folder \(waited 0\.005 minutes\); wait for"
    ):
        build_loaders(small_config(tmp_path, data={"root": str(tmp_path)}))
    process.kill()
    process.join()
    build_loaders(small_config(tmp_path, data={"root": str(tmp_path)}))


def test_temporary_files_follow_no_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("model.pt", "metrics.json"):
        (tmp_path / f"{name}.tmp").symlink_to(victim)
    (tmp_path / "metrics.json").symlink_to(victim)
    save_checkpoint({"model": {}}, tmp_path / "model.pt")
    write_json({}, tmp_path / "metrics.json")
    assert victim.read_text() == "precious"
    (tmp_path / ".ats-detr.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot write to this folder"), exclusive_use(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------------------------------------ whole processes
def start(config: Path, *launcher: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *launcher, "train.py", "--config", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_training_finishes_with_64_mb_of_shared_memory_or_says_how_much_it_needs(
    tmp_path: Path, coco_tiny: Path
) -> None:
    data = {
        "kind": "coco",
        "root": str(coco_tiny),
        "num_workers": 2,
        "train_short_sides": [640],
        "long_side": 800,
    }
    config = write_config(tmp_path, data=data, train={"epochs": 1})
    for size, code in (("64m", 0), ("8k", 2)):
        script = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} train.py --config {config}"
        command = ["unshare", "-m", "sh", "-c", script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip("cannot mount a tmpfs here")
        assert done.returncode == code, done.stderr
        (tmp_path / "run" / "final.pt").unlink(missing_ok=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: loading images failed (no space in /dev/shm); ")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 6, 9, 12])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_ends_a_run_within_30_seconds(
    tmp_path: Path, number: int, seconds: float
) -> None:
    config = write_config(tmp_path, data={"num_workers": 2}, train={"epochs": 1000, "evaluate_every": 2})
    process = start(config)
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (0, 130, -number)
    assert "Traceback" not in output
    if process.returncode != -number and "interrupted" not in output:
        assert "run the same command to resume" in output.splitlines()[-1]
        assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_stalled_process_of_two_ends_the_run_in_one_line(tmp_path: Path) -> None:
    train = {"epochs": 1000, "timeout_minutes": 0.1}
    config = write_config(tmp_path, data={"batch_size": 2}, train=train)
    process = start(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: lost the connection to another process of this run (")
