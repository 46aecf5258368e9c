"""train.py and eval.py: all three stages, resuming after a kill, and errors in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.training.small import files_of_at_most, small_tree, write_small_chain

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """The output and exit code of a command."""

    code: int
    out: str
    err: str


def run(script: str, *arguments: str | Path) -> Done:
    """Run a script in this process, since starting Python and torch takes longer than these trainings."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return Done(code, out.getvalue(), err.getvalue())


def run_apart(*arguments: str | Path) -> Done:
    """Start a Python process in the folder of the project."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all three stages."""
    folder = tmp_path_factory.mktemp("chain")
    config = write_small_chain(folder)
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**tree, "summary": True}))
    done = run("train.py", "--config", config)
    assert done.code == 0, done.err
    return folder


def test_one_command_trains_teachers_and_student_and_compares_them(chain: Path) -> None:
    summary = json.loads((chain / "run" / "summary.json").read_text())
    stages = ("weak", "strong", "student")
    assert summary.keys() == {*stages, "static", "budget_object_spearman", "num_val_images", "train_minutes"}
    assert summary["num_val_images"] == 7
    for stage in stages:
        assert summary[stage].keys() == {"AP", "AP50", "mean_keep_ratio", "encoder_gflops"}
        files = {path.name for path in (chain / "run" / stage).iterdir()} - {"best.pt"}
        assert files == {"config.yaml", "final.pt", "metrics.json", "log.jsonl", "tensorboard"}
    weak, strong, student = (summary[stage] for stage in stages)
    assert summary["static"].keys() == student.keys()
    assert summary["static"]["mean_keep_ratio"] == pytest.approx(student["mean_keep_ratio"], abs=1 / 20)
    assert 0 < weak["encoder_gflops"] <= student["encoder_gflops"] <= strong["encoder_gflops"]
    assert (chain / "run" / "budgets.png").exists()
    assert len(list((chain / "run" / "pictures").glob("*.png"))) == 2


def test_the_log_holds_every_step_and_evaluation(chain: Path) -> None:
    lines = [json.loads(line) for line in (chain / "run" / "student" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [1, 2]
    assert {"loss", "loss_ce", "loss_budget", "loss_memory", "learning_rate", "keep_ratio"} <= lines[0].keys()
    assert all(0 <= line["easy_images"] <= 1 for line in lines if line["kind"] == "train")


def test_a_student_with_one_budget_for_all_images_is_reported(chain: Path, tmp_path: Path) -> None:
    """No untrained teacher finds an image easy, and the student starts with the weights of one."""
    given = [f"teachers.{name}.checkpoint={chain / 'run' / name / 'final.pt'}" for name in ("weak", "strong")]
    settings = ("train.epochs=1", "train.learning_rate=0.1", f"output_dir={tmp_path}", "summary=false")
    done = run("train.py", "--config", chain / "student.yaml", "--stage", "student", *given, *settings)
    assert done.code == 0, done.err
    assert (
        "epoch 1: the student chose budget 2 of 2 for all 16 images; the weak teacher finds 0.0%" in done.out
    )


def test_finished_stages_are_not_trained_again(chain: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (chain / "run").rglob("final.pt")}
    between = ("num_pictures=2", "--stage", "strong", "data.num_workers=1")
    done = run("train.py", "--config", chain / "student.yaml", *between)
    assert done.code == 0, done.err
    assert "strong: already finished" in done.out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_stage_with_other_settings_is_not_reused(chain: Path) -> None:
    done = run("train.py", "--config", chain / "student.yaml", "train.epochs=3")
    assert done.code == 2
    assert "was trained with other settings (train.epochs = 2, now 3)" in done.err


def test_a_finished_stage_with_another_initialisation_is_rejected(chain: Path) -> None:
    done = run("train.py", "--config", chain / "student.yaml", "train.init_from=weak")
    assert_one_line(done, "was trained with other settings (train.init_from = 'strong', now 'weak')")


def test_a_finished_student_of_other_teachers_is_rejected(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "weak.pt"
    spoil_checkpoint(
        chain / "run" / "weak" / "final.pt", other, lambda c: next(iter(c["model"].values())).add_(1)
    )
    done = run("train.py", "--config", chain / "student.yaml", f"teachers.weak.checkpoint={other}")
    assert_one_line(done, "was trained with other settings (teacher_weights.weak = ")


def spoil_checkpoint(source: Path, destination: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = torch.load(source)
    spoil(checkpoint)
    torch.save(checkpoint, destination)


def test_evaluation_gives_the_metrics_of_training(chain: Path, tmp_path: Path) -> None:
    arguments = ("--detections", tmp_path / "detections.json", "num_pictures=1")
    done = run("eval.py", "data.eval_batch_size=3", *evaluation_of(chain, tmp_path), *arguments)
    assert done.code == 0, done.err
    assert_equal_metrics(tmp_path, chain / "run" / "student")
    for words in ("AP50", "keep ratio", "budget 1"):
        assert words in done.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json",
        "detections.json",
        "pictures",
        "budgets.png",
    }
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert all(entry.keys() == {"image_id", "category_id", "bbox", "score"} for entry in detections)
    assert len({entry["image_id"] for entry in detections}) == 7
    checkpoint = chain / "run" / "student" / "final.pt"
    before = checkpoint.read_bytes()
    done = run("eval.py", *evaluation_of(chain, tmp_path), "--detections", checkpoint)
    assert_one_line(
        done, "final.pt: this file exists and was not written by --detections; choose another one"
    )
    assert checkpoint.read_bytes() == before


def test_two_processes_evaluate_an_odd_number_of_images_like_one(chain: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart(*launcher, "eval.py", *evaluation_of(chain, tmp_path), "data.eval_batch_size=2")
    assert done.code == 0, done.err
    assert_equal_metrics(tmp_path, chain / "run" / "student")
    assert done.out.count("keep ratio") == 1, "only one process prints"


def evaluation_of(chain: Path, output: Path) -> tuple[str | Path, ...]:
    checkpoint = chain / "run" / "student" / "final.pt"
    return ("--config", chain / "student.yaml", "--checkpoint", checkpoint, "--output", output)


def assert_equal_metrics(folder: Path, expected_folder: Path) -> None:
    found, expected = (json.loads((f / "metrics.json").read_text()) for f in (folder, expected_folder))
    assert found.pop("budget") == "auto"
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        write_small_chain(folder, model={"dropout": 0.1})
    assert run("train.py", "--config", undisturbed / "weak.yaml").code == 0
    code = (
        "import os, runpy, sys, ats_detr.training.resume as resume\n"
        "save = resume.save_checkpoint\n"
        "die = lambda path: path.name == 'checkpoint.pt' and os.kill(os.getpid(), 9)\n"
        "resume.save_checkpoint = lambda c, path, **k: (save(c, path, **k), die(path))\n"
        f"sys.argv = ['train.py', '--config', {str(killed / 'weak.yaml')!r}]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    assert run_apart("-c", code).code == -9
    assert {path.name for path in (killed / "run").glob("*.pt")} - {"best.pt"} == {"checkpoint.pt"}
    done = run("train.py", "--config", killed / "weak.yaml")
    assert done.code == 0, done.err
    assert "resuming from" in done.out
    states = [torch.load(folder / "run" / "final.pt")["model"] for folder in (undisturbed, killed)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    steps = [json.loads(line)["step"] for line in (killed / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8], "train and evaluation entries, none twice"


def test_a_teacher_of_another_architecture_is_rejected_before_writing(chain: Path, tmp_path: Path) -> None:
    teacher = chain / "run" / "strong" / "final.pt"
    config = write_small_chain(tmp_path, model={"num_encoder_layers": 3})
    given = [f"teachers.{name}.checkpoint={teacher}" for name in ("weak", "strong")]
    done = run("train.py", "--config", config, *given)
    assert_one_line(done, r"strong/final.pt: a checkpoint of another architecture")
    assert not (tmp_path / "run").exists()


def test_swapped_teachers_are_rejected(chain: Path, tmp_path: Path) -> None:
    given = [
        f"teachers.{name}.checkpoint={chain / 'run' / other / 'final.pt'}"
        for name, other in (("weak", "strong"), ("strong", "weak"))
    ]
    done = run("train.py", "--config", chain / "student.yaml", f"output_dir={tmp_path / 'run'}", *given)
    assert_one_line(done, "has model.selector.keep_ratio 0.6, but the weak teacher needs 0.3")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_classes_is_rejected(chain: Path, tmp_path: Path) -> None:
    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"]["categories"][2]["name"] = "newcomer"

    other = tmp_path / "strong.pt"
    spoil_checkpoint(chain / "run" / "strong" / "final.pt", other, rename)
    given = (
        f"teachers.weak.checkpoint={chain / 'run' / 'weak' / 'final.pt'}",
        f"teachers.strong.checkpoint={other}",
    )
    done = run("train.py", "--config", chain / "student.yaml", f"output_dir={tmp_path / 'run'}", *given)
    assert_one_line(
        done, "the strong teacher was trained on other classes than the student's data has: class 2"
    )
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_budget_unlike_the_students_is_rejected(chain: Path) -> None:
    done = run("train.py", "--config", chain / "student.yaml", "model.selector.min_ratio=0.2")
    assert_one_line(
        done, "has model.selector.keep_ratio 0.3, must equal model.selector.min_ratio 0.2 of its student"
    )


def test_a_missing_teacher_is_reported(chain: Path) -> None:
    done = run("train.py", "--config", chain / "student.yaml", "teachers.weak.checkpoint=/nowhere.pt")
    assert_one_line(done, "teachers.weak.checkpoint = /nowhere.pt: no checkpoint; must be a file, a folder")


def test_an_unknown_backbone_is_reported(tmp_path: Path) -> None:
    config = write_small_chain(tmp_path)
    done = run("train.py", "--config", config, "model.backbone.name=resnet19")
    assert_one_line(done, "model.backbone.name = 'resnet19': timm has no model of this name")
    assert not (tmp_path / "run").exists()


def test_two_processes_train_all_stages_with_images_without_objects(tmp_path: Path) -> None:
    synthetic = {"min_objects": 0, "max_objects": 1}
    config = write_small_chain(tmp_path, data={"batch_size": 1, "synthetic": synthetic}, train={"epochs": 1})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart(*launcher, "train.py", "--config", config)
    assert done.code == 0, done.err
    assert done.out.count("student epoch 1: ") == 1, "only one process prints"
    log = [json.loads(line) for line in (tmp_path / "run" / "student" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7, 8, 8], "16 images, two in each step"
    assert log[-1]["num_images"] == 7


def test_one_of_several_processes_reports_an_error(chain: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart(*launcher, "train.py", "--config", chain / "student.yaml", "train.epochs=3")
    assert done.code != 0
    assert done.err.count("was trained with other settings") == 1


@pytest.mark.parametrize("device", ["meta", "abacus"])
def test_an_unavailable_device_is_rejected(chain: Path, device: str) -> None:
    done = run("train.py", "--config", chain / "student.yaml", f"device={device}")
    assert_one_line(done, f"device = {device!r}: must be auto, cpu or cuda")


def test_budgets_below_the_minimum_raise_a_warning(chain: Path, tmp_path: Path) -> None:
    command = ("eval.py", *evaluation_of(chain, tmp_path))
    assert "model.selector.min_tokens" not in run(*command).out
    assert (
        "7 of 7 images keep model.selector.min_tokens = 300"
        in run(*command, "model.selector.min_tokens=300").out
    )


def test_an_unknown_setting_is_rejected_with_the_nearest_name(chain: Path) -> None:
    assert_one_line(
        run("train.py", "--config", chain / "student.yaml", "train.epoch=1"), "did you mean train.epochs?"
    )


@pytest.fixture
def coco(chain: Path, tmp_path: Path) -> Path:
    """A COCO-format data set and a training config for it, which a test may damage."""
    (source,) = (chain / "data").glob("synthetic-*")
    shutil.copytree(source, tmp_path / "coco")
    data = {"kind": "coco", "root": str(tmp_path / "coco"), "cache_images": False}
    tree = small_tree(tmp_path, data=data, train={"epochs": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_any_coco_format_folder_can_be_trained_on(coco: Path) -> None:
    done = run("train.py", "--config", coco / "config.yaml")
    assert done.code == 0, done.err
    assert (coco / "run" / "final.pt").exists()


def no_folder(data: Path) -> str:
    shutil.rmtree(data / "train2017")
    return f"{data}/annotations/instances_train2017.json: none of"


def no_annotations(data: Path) -> str:
    shutil.rmtree(data / "annotations")
    return f"{data}: it contains no annotation file"


def annotations_not_json(data: Path) -> str:
    (data / "annotations" / "instances_train2017.json").write_text("{'images': ")
    return "instances_train2017.json is not JSON"


def annotations_not_coco(data: Path) -> str:
    (data / "annotations" / "instances_train2017.json").write_text('{"images": []}')
    return "not a COCO instances file: no list under 'annotations', 'categories'"


def categories_that_the_model_lacks(data: Path) -> str:
    path = data / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 77, "name": "newcomer"})
    content["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    return "category ids outside the model's 3 classes: 77 (newcomer)"


def missing_image(data: Path) -> str:
    (data / "train2017" / "000005.jpg").unlink()
    return f"{data}/annotations/instances_train2017.json: 1 im"


@pytest.mark.parametrize(
    "spoil",
    [
        no_folder,
        no_annotations,
        annotations_not_json,
        annotations_not_coco,
        categories_that_the_model_lacks,
        missing_image,
    ],
    ids=lambda function: function.__name__,
)
def test_invalid_data_is_reported_before_writing(coco: Path, spoil: Callable[[Path], str]) -> None:
    words = spoil(coco / "coco")
    assert_one_line(run("train.py", "--config", coco / "config.yaml"), words)
    assert not (coco / "run").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_stops_the_run_or_is_skipped(coco: Path, num_workers: int) -> None:
    path = coco / "coco" / "train2017" / "000005.jpg"
    path.write_bytes(path.read_bytes()[:300])
    command = ("train.py", "--config", coco / "config.yaml", f"data.num_workers={num_workers}")
    assert_one_line(run(*command), f"{path} cannot be read")
    assert not list((coco / "run").glob("*.pt*"))
    done = run(*command, "data.on_bad_image=skip")
    assert done.code == 0, done.err
    assert f"skipped: image {path}" in done.out


def test_a_full_disk_stops_the_run_in_one_line_without_a_partial_checkpoint(coco: Path) -> None:
    with files_of_at_most(200_000):
        done = run("train.py", "--config", coco / "config.yaml")
    assert_one_line(done, "cannot write this checkpoint")
    assert not list((coco / "run").glob("*.pt*"))


def test_evaluation_rejects_classes_that_the_checkpoint_lacks(chain: Path, coco: Path) -> None:
    words = categories_that_the_model_lacks(coco / "coco")
    checkpoint = chain / "run" / "weak" / "final.pt"
    arguments = ("--config", coco / "config.yaml", "--checkpoint", checkpoint, "--output", coco / "out")
    assert_one_line(run("eval.py", *arguments), words)
    assert not (coco / "out").exists()


def assert_one_line(done: Done, words: str) -> None:
    assert done.code == 2, done.err
    assert words in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.err
