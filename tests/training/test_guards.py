"""Faults in training are skipped and logged, or stop the run with one line that states the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ats_detr.batch import Target
from ats_detr.config import load_config
from ats_detr.errors import UserError
from ats_detr.model import build_model
from ats_detr.training import trainer
from ats_detr.training.datasets import data_root
from ats_detr.training.guards import check_targets, largest_batch
from ats_detr.training.setup import Run, describe_run, settings_without_effect
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import ADAPTIVE, random_batch, small_config, small_run, small_tree


def train(folder: Path, **changes: Any) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(small_tree(folder, **changes)))
    config = load_config(folder / "config.yaml")
    train_stages(plan_stages(config), "all", torch.device("cpu"))


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def state_of(run: Run) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    for i, moments in enumerate(run.state.optimizer.state.values()):
        tensors |= {f"{i} {key}": value.clone() for key, value in moments.items()}
    return tensors


# ---------------------------------------------------------------------------------------------- not a finite gradient
BATCH_NORM = {"backbone": {"frozen_norm": False}}


def spoil_image(batch: Any) -> None:
    batch[0].images_B3HW[1, 0, 3, 5] = torch.nan


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, accumulated: int) -> None:
    run = small_run(tmp_path, model=BATCH_NORM, train={"accumulate": accumulated})
    good, bad = (random_batch(seed, [3, 0, 2, 1], size=64) for seed in (0, 1))
    spoil_image(bad)
    trainer.train_step(run, 0, [good] * accumulated, metrics=False)
    before = state_of(run)
    trainer.train_step(run, 0, [good] * (accumulated - 1) + [bad], metrics=False)
    after = state_of(run)
    assert all(torch.equal(after[name], before[name]) for name in before), (
        "statistics of batch norms included"
    )
    assert run.guard.num_skipped().item() == 1
    trainer.train_step(run, 0, [good] * accumulated, metrics=False)
    assert not torch.equal(state_of(run)["level_embed"], before["level_embed"])
    assert all(tensor.isfinite().all() for tensor in state_of(run).values())


def test_a_nan_in_a_gradient_alone_is_detected(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    parameter = run.state.model.get_parameter("encoder.layers.0.attention.value_proj.weight")
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    trainer.train_step(run, 0, [random_batch(0, [1, 1, 1, 1], size=64)], metrics=False)
    (record,) = run.guard.report(True)
    assert record["tensor"] == "the gradient of encoder.layers.0.attention.value_proj.weight"
    assert record["reason"] == f"{record['tensor']} is not finite"
    assert record["gradient_norms"]["encoder.layers.0.attention.value_proj.weight"] in ("inf", "nan")
    assert isinstance(record["gradient_norms"]["level_embed"], float)


def spoil_steps(patch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Put a NaN into the images of these steps (counted from 1)."""
    step = trainer.train_step

    def spoiled_step(run: Run, epoch: int, micro_batches: Any, *, metrics: bool) -> Any:
        if run.state.progress.step + 1 in steps:
            spoil_image(micro_batches[0])
        return step(run, epoch, micro_batches, metrics=metrics)

    patch.setattr(trainer, "train_step", spoiled_step)


def test_skipped_steps_are_counted_and_logged_with_images_and_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_steps(monkeypatch, {2, 5})
    with caplog.at_level("WARNING"):
        train(tmp_path, train={"log_every": 3})
    entries = logged(tmp_path, "skipped")
    assert [entry["step"] for entry in entries] == [2, 5]
    for entry in entries:
        assert len(entry["images"]) == 4
        assert entry["tensor"].startswith("logits of the last decoder layer hold")
        assert {"loss", "loss_ce"} <= entry["losses"].keys()
        assert "level_embed" in entry["gradient_norms"]
    assert "step 2 was skipped because logits of the last decoder layer hold" in caplog.text
    assert "values for image" in caplog.text and " is not finite" not in caplog.text
    final = torch.load(tmp_path / "run" / "final.pt")
    assert final["skipped_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in final["model"].values())


def test_a_run_without_finite_gradients_stops_and_names_the_first_bad_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, {3, 5, 6, 7, 8})
    with pytest.raises(
        UserError, match=r"no finite gradient in 3 steps in a row, from step 5, images .*: logits of the last"
    ):
        train(tmp_path, train={"max_skipped_steps": 3})
    assert [entry["step"] for entry in logged(tmp_path, "skipped")] == [3, 5, 6, 7]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["step"] == 4, "the last checkpoint before the fault remains"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"training diverged: \w+ is not finite after step 4; lower train\.learning"
    ):
        train(tmp_path, train={"epochs": 1, "learning_rate": 1e300})
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_detections_that_are_not_finite_end_an_evaluation_in_one_line(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    torch.nn.init.constant_(run.state.model.decoder_heads[-1].classify.bias, torch.nan)
    with pytest.raises(
        UserError, match=r"000001\.jpg: the scores or boxes of the model are not finite.*diverged"
    ):
        trainer.evaluate_run(run, is_last=True)


# --------------------------------------------------------------------------------------------------- labels and boxes
@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([10, 10, -5, 8], r"annotations\[4\] of 0+\d\.jpg: bbox \[10, 10, -5, 8\] is negative"),
        ([50, 10, 40, 8], r"1 boxes that reach far beyond their image: 0+\d\.jpg: bbox \[50\.0"),
        ([300, 300, 10, 10], r"1 boxes outside their image: .* in 64 x 64 pixels"),
    ],
)
def test_a_box_out_of_range_stops_the_run_before_its_first_step(
    tmp_path: Path, box: list[float], words: str
) -> None:
    (file,) = spoiled_annotations(tmp_path, {"bbox": box})
    with pytest.raises(UserError, match=words) as raised:
        train(tmp_path)
    assert str(file) in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_category_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    spoiled_annotations(tmp_path, {"category_id": 99})
    with pytest.raises(UserError, match=r"annotations\[4\] has category_id 99"):
        train(tmp_path)
    assert not (tmp_path / "run").exists()


def spoiled_annotations(folder: Path, changes: dict[str, Any]) -> list[Path]:
    data_root(small_config(folder).data)  # generates the images
    files = list(folder.glob("data/*/annotations/instances_train2017.json"))
    for file in files:
        content = json.loads(file.read_text())
        content["annotations"][4] |= changes
        file.write_text(json.dumps(content))
    return files


def test_boxes_may_slightly_exceed_the_image(tmp_path: Path) -> None:
    spoiled_annotations(tmp_path, {"bbox": [-2, 30, 20, 37]})
    assert small_run(tmp_path).num_steps == 4


@pytest.mark.parametrize(
    ("label", "box", "words"),
    [
        (3, [0.5, 0.5, 0.1, 0.1], r"image 7: label 3 must be in \[0, 3\), the model's classes"),
        (-1, [0.5, 0.5, 0.1, 0.1], "image 7: label -1"),
        (0, [0.5, float("nan"), 0.1, 0.1], r"image 7: box \[0\.5, nan"),
        (0, [1.5, 0.5, 0.1, 0.1], r"image 7: box \[1\.5, .* must be in \[0, 1\]"),
    ],
)
def test_a_target_out_of_range_is_reported_with_its_image(label: int, box: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_targets([Target(7, (64, 64), torch.tensor([label]), torch.tensor([box]))], 3)


# ------------------------------------------------------------------------------------------------------- out of memory
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_is_reported_with_the_batch_and_its_sizes(tmp_path: Path, error: RuntimeError) -> None:
    run = small_run(tmp_path)

    def out_of_memory(*_: Any) -> None:
        raise error

    run.state.model.decoder.register_forward_hook(out_of_memory)
    with pytest.raises(
        UserError,
        match=r"out of memory with 4 images of 64 x 64 pixels \(padded\) and 6 objects \(images 0, 1, 2, 3\)",
    ):
        trainer.train_step(run, 0, [random_batch(0, [3, 0, 2, 1], size=64)], metrics=False)


def test_out_of_memory_in_the_evaluation_is_reported_after_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(trainer, "evaluate", out_of_memory)
    with pytest.raises(UserError, match="out of memory in the evaluation: lower data.eval_batch_size"):
        train(tmp_path)
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.state.model.decoder.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train_step(run, 0, [random_batch(0, [1, 1, 1, 1], size=64)], metrics=False)


def test_the_memory_preflight_runs_the_largest_batch_and_restores_all_state(tmp_path: Path) -> None:
    data = {"train_short_sides": [48, 96], "long_side": 160, "synthetic": {"max_aspect_ratio": 2.0}}
    run = small_run(tmp_path, model=BATCH_NORM | {"dropout": 0.1}, data=data)
    sizes = []
    run.state.model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    before, rng = state_of(run), torch.get_rng_state()
    trainer.preflight_memory(run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(run).items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in run.state.model.parameters())
    (tried,) = sizes
    expected, _ = largest_batch(run.loaders.train, run.config.data, range(2), torch.device("cpu"))
    assert tried == expected.images_B3HW.shape


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("crops", "rotate_90"), [([], False), ([64, 100], False), ([], True)])
def test_no_batch_of_any_epoch_is_larger_than_the_largest(
    tmp_path: Path, batch_size: int, crops: list[int], rotate_90: bool
) -> None:
    synthetic = {"max_aspect_ratio": 2.0, "num_train": 16}
    sides = {
        "train_short_sides": [48, 96],
        "long_side": 160,
        "crop_short_sides": crops,
        "crop_size": [40, 90],
        "rotate_90": rotate_90,
    }
    run = small_run(tmp_path, data={"batch_size": batch_size, "synthetic": synthetic, **sides})
    batches = [batch for epoch in range(5) for batch in run.loaders.train.epoch(epoch)]
    areas = [batch.images_B3HW.shape[-2:].numel() for batch, _ in batches]
    counts = [sum(len(target.labels_N) for target in targets) for _, targets in batches]
    largest, targets = largest_batch(run.loaders.train, run.config.data, range(5), torch.device("cpu"))
    area = largest.images_B3HW.shape[-2:].numel()
    assert max(areas) <= area < 1.5 * max(areas)
    assert max(counts) <= sum(len(target.labels_N) for target in targets)
    first, _ = largest_batch(run.loaders.train, run.config.data, range(1), torch.device("cpu"))
    assert first.images_B3HW.shape[-2:].numel() <= area


@pytest.mark.parametrize("seed", range(3))
def test_the_memory_preflight_uses_the_largest_budget(tmp_path: Path, seed: int) -> None:
    """Of a student, whose random logits choose any budget."""
    run = small_run(tmp_path, model=ADAPTIVE, seed=seed)
    found = []
    run.state.model.selector.register_forward_hook(lambda _, inputs, scores: found.append(scores))
    trainer.preflight_memory(run)
    (scores,) = found
    assert torch.equal(scores.num_kept_B, (scores.num_valid_B * 0.6).long() + 1)
    assert not run.state.model.selector.budget._forward_hooks


# ---------------------------------------------------------------------------------------------- settings without effect
DROPS = {"drop_epochs": []}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["train.drop_epochs = [40] has no effect: the run has 2 epochs; set it to [1]"]),
        (
            {"train": {"epochs": 12}},
            ["train.drop_epochs = [40] has no effect: the run has 12 epochs; set it to [9]"],
        ),
        ({"train": {"epochs": 50}}, []),
        ({"train": {"drop_epochs": [1]}}, []),
        (
            {"train": {"drop_epochs": [1, 2]}},
            ["train.drop_epochs = [1, 2] has no effect: the run has 2 epochs"],
        ),
        ({"train": DROPS | {"drop_factor": 0.5}}, ["train.drop_factor = 0.5"]),
        ({"train": DROPS | {"warmup_share": 0.2}}, ["train.warmup_share = 0.2"]),
        ({"train": {"schedule": "one_cycle", "warmup_share": 0.2}}, []),
        (
            {"train": {"schedule": "one_cycle", "drop_epochs": [1], "drop_factor": 0.5}},
            ["train.drop_epochs = [1]", "train.drop_factor = 0.5"],
        ),
        ({"train": DROPS | {"checkpoint_every_steps": 4}}, ["train.checkpoint_every_steps = 4"]),
        ({"train": DROPS | {"checkpoint_every_steps": 3}}, []),
        ({"train": DROPS, "data": {"crop_size": [300, 400]}}, ["data.crop_size = [300, 400]"]),
        (
            {"train": DROPS, "data": {"short_side": 100}},
            ["data.short_side = 100 has no effect: it is limited by"],
        ),
        ({"train": DROPS, "data": {"train_short_sides": [70, 80]}}, ["data.train_short_sides = [70, 80]"]),
        ({"train": DROPS, "data": {"kind": "coco"}}, ["data.synthetic = {"]),
        ({"train": DROPS, "model": {"selector": {"min_tokens": 5}}}, ["model.selector.min_tokens = 5"]),
        ({"train": DROPS, "model": {"selector": {"num_budgets": 3}}}, ["model.selector.num_budgets = 3"]),
        ({"train": DROPS, "model": {"num_encoder_layers": 1}}, ["model.encoder_auxiliary = True"]),
        ({"train": DROPS, "loss": {"decoder_auxiliary": False}}, ["model.box_refine = True"]),
        (
            {"train": DROPS, "loss": {"decoder_auxiliary": False}, "model": {"num_decoder_layers": 1}},
            ["loss.decoder_auxiliary = False has no effect: there is one decoder layer"],
        ),
        (
            {"train": DROPS, "model": {"backbone": {"frozen_stages": 4, "frozen_norm": True}}},
            ["train.backbone_learning_rate = 0.001"],
        ),
    ],
)
def test_settings_without_effect_are_reported(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    config = small_config(tmp_path, **changes)
    found = settings_without_effect(config, build_model(config.model, 3), num_steps=4)
    assert len(found) == len(expected), found
    assert all(text.startswith(words) for text, words in zip(found, expected, strict=True)), found


def test_the_first_line_of_a_run_has_trained_and_frozen_parameters(tmp_path: Path) -> None:
    run = small_run(tmp_path, model={"backbone": {"frozen_stages": 4}, "feedforward_width": 2048})
    numbers = [0, 0]
    for name, parameter in run.state.model.named_parameters():
        numbers[name.startswith("backbone.")] += parameter.numel()
    words = [f"{number / 1e6:.2f} M" for number in numbers]
    assert words[0] != words[1] != "0.00 M"
    assert describe_run(run).startswith(
        f"small: {words[0]} trained and {words[1]} frozen parameters, 3 classes"
    )
