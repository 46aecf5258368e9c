"""A run resumes exactly, or is rejected: never with other settings or from the checkpoint of a different run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ats_detr import evaluation
from ats_detr.config import load_config
from ats_detr.errors import Stopped, UserError
from ats_detr.training import resume, run_log, setup, stages, trainer
from ats_detr.training.datasets import data_root
from ats_detr.training.resume import digest
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import small_config, small_tree, write_small_chain


def train(folder: Path, *overrides: str) -> None:
    config = load_config(folder / "config.yaml", overrides)
    train_stages(plan_stages(config, overrides), "all", torch.device("cpu"))


def train_until_killed(folder: Path, *overrides: str, num_saved: int) -> None:
    """Train, and end the process just before save number `num_saved` + 1."""
    saved = []

    def save_or_die(checkpoint: Any, path: Path, **keywords: Any) -> None:
        if len(saved) == num_saved:
            raise KeyboardInterrupt
        if path.name != resume.BEST:
            saved.append(path)
        save(checkpoint, path, **keywords)

    save = resume.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *overrides)


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(small_tree(folder, **changes)))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_config(folder)
    train_until_killed(folder, num_saved=1)
    return folder


@pytest.fixture
def half_done(killed: Path, tmp_path: Path) -> Path:
    """A run that was killed after the first of two epochs of four steps."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path)
    checkpoint["config"]["data"]["root"] = str(tmp_path / "data")
    torch.save(checkpoint, path)
    return tmp_path


def test_a_run_resumes_with_changed_learning_rates_and_weight_decay(half_done: Path) -> None:
    rates = ("train.learning_rate=1e-4", "train.backbone_learning_rate=1e-5", "train.weight_decay=0.5")
    train_until_killed(half_done, *rates, "train.epochs=3", num_saved=1)
    log = [json.loads(line) for line in (half_done / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line["learning_rate"] for line in log if line["kind"] == "train"]
    assert logged[:8] == pytest.approx([1e-3] * 4 + [1e-4] * 4)
    groups = torch.load(half_done / "run" / "checkpoint.pt")["optimizer"]["param_groups"]
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(
        {"rest": 1e-4, "backbone": 1e-5, "offsets": 1e-5}
    )
    assert {group["weight_decay"] for group in groups} == {0.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", "seed = 42, now 1"),
        ("model.selector.keep_ratio=0.5", "model.selector.keep_ratio = 0.3, now 0.5"),
        ("data.batch_size=2", "data.batch_size = 4, now 2"),
        ("data.synthetic.seed=1", "data.synthetic.seed = 0, now 1"),
        (
            f"data.train_short_sides={[64] * 99}",
            r"data.train_short_sides = \[64\], now \[64(, 64)*,? \.\.\.\)",
        ),
    ],
)
def test_a_run_does_not_resume_with_other_settings(half_done: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(half_done, override)


def edit_training_annotations(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    for file in folder.glob("data/*/annotations/instances_train2017.json"):
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))


def drop_an_image(content: dict[str, Any]) -> None:
    gone = content["images"].pop(2)["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != gone]


def add_an_image(content: dict[str, Any]) -> None:
    content["images"].append({**content["images"][0], "id": 99})


def renumber_an_image(content: dict[str, Any]) -> None:
    drop_an_image(content)
    add_an_image(content)


@pytest.mark.parametrize(
    ("edit", "number"), [(drop_an_image, 15), (add_an_image, 17), (renumber_an_image, 16)]
)
def test_a_run_does_not_resume_on_other_images(
    half_done: Path, edit: Callable[[dict[str, Any]], None], number: int
) -> None:
    edit_training_annotations(half_done, edit)
    words = rf"run was trained on other images \(16 images, now {number}; their ids or sizes differ\): restore the"
    with pytest.raises(UserError, match=words):
        train(half_done)


def test_moved_data_and_other_evaluation_settings_are_accepted_and_other_data_are_not(
    half_done: Path,
) -> None:
    path = half_done / "run" / "checkpoint.pt"
    shutil.move(half_done / "data", half_done / "moved")
    moved = f"data.root={half_done / 'moved'}"
    checkpoint = torch.load(path)
    del checkpoint["is_evaluated"]  # a checkpoint of an older version cannot prove that the data are the same
    images = checkpoint.pop("training_images")
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"data\.root = "):
        train(half_done, moved)
    torch.save(checkpoint | {"training_images": images}, path)
    train(half_done, moved, "data.short_side=32", "data.synthetic.num_val=5", "evaluation.max_detections=7")
    assert torch.load(half_done / "run" / "final.pt")["step"] == 8
    with pytest.raises(UserError, match="trained on other images"):
        train(half_done, moved, "data.train_annotations=annotations/instances_val2017.json")
    with pytest.raises(
        UserError, match=r"to train further, set train\.init_from=.*final\.pt and another output_dir"
    ):
        train(half_done, moved, "train.epochs=3")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer", None, "invalid content under 'optimizer'"),
        ("optimizer", {}, "the state of optimiser or random numbers is invalid"),
        ("rng", [], "the state of optimiser or random numbers is invalid"),
        ("rng", [{"cpu": torch.zeros(3)}], "the state of optimiser or random numbers is invalid"),
        ("epoch", -1, "invalid content under 'epoch'"),
        ("epoch_step", "3", "invalid content under 'epoch_step'"),
        ("step", None, "invalid content under 'step'"),
    ],
)
def test_an_invalid_state_is_one_line(half_done: Path, key: str, value: Any, words: str) -> None:
    path = half_done / "run" / "checkpoint.pt"
    torch.save(torch.load(path) | {key: value}, path)
    with pytest.raises(UserError, match=words) as raised:
        train(half_done)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_an_older_version_resumes(half_done: Path) -> None:
    path = half_done / "run" / "checkpoint.pt"
    checkpoint = torch.load(path)
    del checkpoint["training_images"], checkpoint["is_evaluated"]
    torch.save(checkpoint, path)
    train(half_done)
    assert torch.load(half_done / "run" / "final.pt")["step"] == 8


def test_a_run_does_not_resume_with_other_classes_or_processes(half_done: Path) -> None:
    path = half_done / "run" / "checkpoint.pt"
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"num_processes": 2}, path)
    with pytest.raises(UserError, match="num_processes = 2, now 1"):
        train(half_done)
    torch.save(checkpoint, path)
    for file in half_done.glob("data/*/annotations/*.json"):
        content = json.loads(file.read_text())
        content["categories"][1]["name"] = "newcomer"
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"classes\.categories\.1\.name = .*, now 'newcomer'"):
        train(half_done)


def test_fewer_epochs_than_started_are_rejected_and_as_many_finish_the_run(half_done: Path) -> None:
    path = half_done / "run" / "checkpoint.pt"
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"epoch_step": 1}, path)
    with pytest.raises(UserError, match=r"train\.epochs = 1: must be >= 2, the epochs that .* has started"):
        train(half_done, "train.epochs=1")
    torch.save(checkpoint, path)
    train(half_done, "train.epochs=1")
    assert torch.load(half_done / "run" / "final.pt")["step"] == 4


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_failed_evaluation_loses_no_epoch(tmp_path: Path, epochs: int) -> None:
    """In the middle of a run and at its end: after the repair, only the evaluation is repeated."""
    write_config(tmp_path, train={"epochs": epochs})
    image = data_root(small_config(tmp_path).data) / "val2017" / "000003.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(UserError, match=r"000003\.jpg cannot be read"):
            train(tmp_path)
        checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
        assert (checkpoint["epoch"], checkpoint["is_evaluated"]) == (1, False)
    image.write_bytes(content)
    train(tmp_path)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(1, 4 * epochs + 1))
    assert [line["step"] for line in log if line["kind"] == "evaluation"] == [4, 8][:epochs]


def test_a_signal_ends_an_evaluation_and_resuming_repeats_only_that(
    half_done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_batches = []

    def batch_and_signal(self: Any, *arguments: Any) -> None:
        num_batches.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        add(self, *arguments)

    add = evaluation._Found.add
    with monkeypatch.context() as patch:
        patch.setattr(evaluation._Found, "add", batch_and_signal)
        with pytest.raises(Stopped, match="stopped by SIGINT after step 4; run the same command") as raised:
            train(half_done)
    assert len(num_batches) == 1, "of two"
    assert raised.value.exit_code == 130
    train(half_done)
    log = [json.loads(line) for line in (half_done / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_leftovers_of_killed_runs_are_removed(half_done: Path) -> None:
    run = half_done / "run"
    (run / ".ats-detr-0123.tmp").write_bytes(b"half a checkpoint")
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text() + '{"kind": "tra')
    checkpoint = (run / "checkpoint.pt").read_bytes()
    train(half_done)
    finished = {path.name for path in run.iterdir()} - {"best.pt"}
    assert finished == {"config.yaml", "final.pt", "metrics.json", "log.jsonl", "tensorboard"}
    (run / "checkpoint.pt").write_bytes(checkpoint)  # as if killed before its deletion
    train(half_done)
    assert {path.name for path in run.iterdir()} - {"best.pt"} == finished


def test_the_log_is_replaced_atomically(half_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = half_done / "run" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"kind": "train", "step": 5}) + "\n")
    before = log.read_bytes()

    def die(source: Path, *_: Any) -> None:
        assert log.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", lambda a, b: die(a) if b == log else os.rename(a, b))
    with pytest.raises(KeyboardInterrupt):
        train(half_done)
    assert log.read_bytes() == before
    assert not list(log.parent.glob(".ats-detr*"))


@pytest.mark.parametrize("line", ["3", "null", "[]", '{"step": "x"}', "[" * 100_000, "{"])
def test_lines_that_are_no_log_entries_are_dropped(tmp_path: Path, line: str) -> None:
    file = tmp_path / "log.jsonl"
    kept = json.dumps({"kind": "train", "step": 1}) + "\n"
    file.write_text(kept + line + "\n" + kept)
    run_log._drop_entries_after(file, 1, evaluated=True)
    assert file.read_text() == kept * 2


def test_a_run_restarted_by_torchrun_resumes_even_with_resume_never(
    half_done: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with caplog.at_level("INFO"):
        train(half_done, "train.resume=never")
    assert "resuming from" in caplog.text
    assert torch.load(half_done / "run" / "final.pt")["step"] == 8


def test_a_killed_retraining_removes_the_previous_training(tmp_path: Path) -> None:
    write_config(tmp_path, train={"epochs": 1})
    train(tmp_path)
    first = torch.load(tmp_path / "run" / "final.pt")["model"]
    train_until_killed(tmp_path, "seed=1", "train.resume=never", num_saved=0)
    assert not list((tmp_path / "run").glob("*.pt"))
    train(tmp_path, "seed=1")
    assert digest(torch.load(tmp_path / "run" / "final.pt")["model"]) != digest(first)


def test_a_retraining_of_all_stages_removes_later_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["train.resume=never"]
    config = load_config(write_small_chain(tmp_path), overrides)
    removed: dict[str, list[str]] = {}

    def note(stage: setup.Stage, *_: Any, outdated: Sequence[Path]) -> None:
        removed[stage.name] = [path.name for path in outdated]

    monkeypatch.setattr(stages, "train", note)
    monkeypatch.setattr(stages, "load_teachers", lambda *_: None)
    train_stages(plan_stages(config, overrides), "all", torch.device("cpu"))
    assert removed == {"weak": ["strong", "student"], "strong": ["student"], "student": []}


@pytest.mark.parametrize("fails", ["loaders", "memory"])
def test_a_rejected_retraining_keeps_previous_results_and_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Also if a launcher restarts it: the files in the folder belong to the previous training."""

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("not today")

    write_config(tmp_path, train={"epochs": 1})
    train(tmp_path)
    final = tmp_path / "run" / "final.pt"
    before = final.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            *((setup, "build_loaders") if fails == "loaders" else (trainer, "preflight_memory")), fail
        )
        with pytest.raises(UserError, match="not today"):
            train(tmp_path, "seed=1", "train.resume=never")
    assert final.read_bytes() == before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(tmp_path, "seed=1", "train.resume=never")
    assert final.read_bytes() != before
    trained = final.read_bytes()
    train(tmp_path, "seed=1", "train.resume=never")  # a second start has nothing to do
    assert final.read_bytes() == trained
