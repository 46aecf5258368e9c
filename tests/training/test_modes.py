"""Training modes with equal results: accumulation, recomputation, compilation, bfloat16, shared stages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from ats_detr.config import load_config
from ats_detr.model import Detr, build_model, detr
from ats_detr.training import trainer
from ats_detr.training.criterion import build_criterion, compute_losses
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.optim import MovingAverage
from ats_detr.training.setup import Run
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import (
    ADAPTIVE,
    SMALL_MODEL,
    merged,
    random_batch,
    small_config,
    small_run,
    small_tree,
)

ROOT = Path(__file__).parents[2]


def gradients(run: Run, batches: list[Any]) -> dict[str, Tensor]:
    run.parallel_model.train()
    run.state.optimizer.zero_grad()
    trainer.accumulate_gradients(run, batches, metrics=True)
    return {n: p.grad.clone() for n, p in run.state.model.named_parameters() if p.grad is not None}


def assert_close(own: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (own[name] - tensor).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


# ------------------------------------------------------------------------------------------------------- accumulation
def train(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    tree = merged(small_tree(folder, **changes), {"data": {"root": str(folder.parent / "data")}})
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    train_stages(plan_stages(load_config(folder / "config.yaml")), "all", torch.device("cpu"))
    return folder / "run"


def test_four_batches_of_four_are_one_of_sixteen(tmp_path: Path) -> None:
    """Gradients agree within 1e-5 for any distribution of objects over the batches; so do logged losses."""
    # Two channels per group of the group norms, see test_distributed.
    run = small_run(tmp_path, model={"width": 64}, train={"accumulate": 4})
    objects = [3, 0, 2, 1, 0, 0, 0, 0, 4, 4, 4, 4, 1, 0, 0, 2]
    batch, targets = random_batch(0, objects, size=64)
    parts = [
        (type(batch)(batch.images_B3HW[i : i + 4], batch.sizes[i : i + 4]), targets[i : i + 4])
        for i in range(0, 16, 4)
    ]
    whole, accumulated = gradients(run, [(batch, targets)]), gradients(run, parts)
    assert_close(accumulated, whole, 1e-5)
    values = [
        trainer.mean_on_host(trainer.accumulate_gradients(run, batches, metrics=True)[0])
        for batches in ([(batch, targets)], parts)
    ]
    for key, value in values[0].items():
        if key.startswith("loss") or key == "keep_ratio":
            assert values[1][key] == pytest.approx(value, abs=1e-5, rel=1e-5), key


def test_a_run_with_accumulation_has_the_steps_of_larger_batches(tmp_path: Path) -> None:
    large = train(tmp_path / "large", data={"batch_size": 16}, train={"epochs": 2})
    small = train(tmp_path / "small", data={"batch_size": 4}, train={"epochs": 2, "accumulate": 4})
    losses = []
    for folder in (large, small):
        entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        losses.append([entry["loss"] for entry in entries if entry["kind"] == "train"])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ------------------------------------------------------------------------------------- recomputation and compilation
def test_recomputed_layers_give_the_same_gradients_with_less_memory(tmp_path: Path) -> None:
    batch = random_batch(0, [3, 0, 2, 1], size=128)
    found = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        run = small_run(tmp_path, model={"dropout": 0.1}, train={"recompute": recompute})
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        run.parallel_model.train()
        torch.manual_seed(1)  # seed of the dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = compute_losses(run.parallel_model, run.criterion, None, *batch)[1]
        losses["loss"].backward()
        grads = {n: p.grad for n, p in run.state.model.named_parameters() if p.grad is not None}
        found[recompute] = grads, sum(kept.values())
    for name, gradient in found[False][0].items():
        assert torch.equal(found[True][0][name], gradient), name
    assert found[True][1] < 0.9 * found[False][1]


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_at_every_size(tmp_path: Path) -> None:
    batches = [random_batch(seed, [3, 0, 2, 1], size=size) for seed, size in ((0, 64), (1, 96), (2, 128))]
    plain = [gradients(small_run(tmp_path), [batch]) for batch in batches]
    run = small_run(tmp_path, train={"compile": True})
    for batch, expected in zip(batches, plain, strict=True):
        assert_close(gradients(run, [batch]), expected, 1e-5)


def test_a_failed_compilation_is_reported_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("there is no compiler here")

    compile_with = nn.Module.compile
    backend = lambda graph, inputs: no_compiler()  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compile_with(self, backend=backend, **k))
    run = small_run(tmp_path, train={"compile": True})
    with caplog.at_level("WARNING"):
        trainer.preflight_memory(run)
    assert "train.compile is OFF, this model cannot be compiled here: " in caplog.text
    assert_close(
        gradients(run, [random_batch(0, [1, 2, 0, 3], size=64)]),
        gradients(small_run(tmp_path), [random_batch(0, [1, 2, 0, 3], size=64)]),
        0.0,
    )


# ------------------------------------------------------------------------------------------------------ moving average
def test_the_moving_average_is_evaluated_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[Detr] = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer,
        "evaluate",
        lambda model, *a, **k: (evaluated.append(copy.deepcopy(model)), evaluate(model, *a, **k))[1],
    )
    run = train(tmp_path / "averaged", train={"ema_decay": 0.9, "epochs": 1})
    plain = train(tmp_path / "plain", train={"epochs": 1})
    kept, trained = (torch.load(folder / "final.pt")["model"] for folder in (run, plain))
    averaged = evaluated[0].state_dict()
    assert all(torch.equal(kept[name], averaged[name]) for name in averaged)
    assert not torch.equal(kept["level_embed"], trained["level_embed"])


def test_the_moving_average_equals_its_formula() -> None:
    torch.manual_seed(0)
    model: Any = nn.BatchNorm1d(3)
    average = MovingAverage(model, 0.5)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
        model.train()(torch.randn(4, 3))
        average.update(model, step)
        share = min(0.5, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            is_count = name == "num_batches_tracked"
            expected[name] = tensor.double() if is_count else share * expected[name] + (1 - share) * tensor
    for name, tensor in average.model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ bfloat16
def quickstart_losses(folder: Path, precision: str, num_steps: int) -> list[float]:
    """Loss of each of the first steps of the quickstart's weak teacher."""
    name = f"output_dir={folder / precision}"
    overrides = [
        f"data.root={folder / 'data'}",
        name,
        f"train.precision={precision}",
        "data.cache_images=true",
    ]
    config = load_config(ROOT / "configs" / "quickstart_weak.yaml", overrides)
    run = small_run(folder / precision, config)
    losses = []
    for batch, _ in zip(run.loaders.train.epoch(0), range(num_steps), strict=False):
        values = trainer.train_step(run, 0, [batch], metrics=False)
        run.state.progress.step += 1
        losses.append(values["loss"].item())
    return losses


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_quickstart_steps_in_bfloat16_have_the_loss_curve_of_float32(tmp_path: Path) -> None:
    curves = {
        precision: torch.tensor(quickstart_losses(tmp_path, precision, 200))
        for precision in ("float32", "bfloat16")
    }
    assert all(curve.isfinite().all() and len(curve) == 200 for curve in curves.values())
    means = {precision: curve.view(10, 20).mean(1) for precision, curve in curves.items()}
    ratio = means["bfloat16"] / means["float32"]
    print("mean losses of 20 steps each", {p: [round(x, 3) for x in m.tolist()] for p, m in means.items()})
    assert (ratio - 1).abs().max() < 0.05, ratio


def test_a_step_in_bfloat16_keeps_weights_and_losses_in_float32(tmp_path: Path) -> None:
    run = small_run(tmp_path, train={"precision": "bfloat16"})
    values = trainer.train_step(run, 0, [random_batch(0, [3, 0, 2, 1], size=64)], metrics=True)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert {parameter.dtype for parameter in run.state.model.parameters()} == {torch.float32}
    assert all(value.isfinite() for value in values.values())
    seen = []
    run.state.model.encoder.layers[0].register_forward_hook(lambda m, i, rows: seen.append(rows.dtype))
    run.state.model.backbone.body.register_forward_hook(lambda m, i, maps: seen.append(maps[0].dtype))
    trainer.train_step(run, 0, [random_batch(0, [3, 0, 2, 1], size=64)], metrics=False)
    assert torch.bfloat16 in seen, "something is computed in it"


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_are_cast_once_have_the_gradients_of_autocast(
    tmp_path: Path, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(tmp_path, train={"precision": "bfloat16", "recompute": recompute})
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    own = gradients(run, [batch])
    monkeypatch.setattr(detr, "cast_weights", lambda *_: {})
    autocast = gradients(run, [batch])
    assert_close(own, autocast, 0)


# ------------------------------------------------------------------------------------------------------ shared stages
FROZEN = {"backbone": {"frozen_stages": 1, "frozen_norm": True}}


def student_and_teachers(folder: Path, **changes: Any) -> tuple[Detr, Detr, Detr]:
    """Three models with the same backbone and random weights elsewhere."""
    torch.manual_seed(0)
    models = [
        build_model(small_config(folder, model=merged(merged(FROZEN, changes), own)).model, num_classes=3)
        for own in (ADAPTIVE, {}, {"selector": {"keep_ratio": 0.6}})
    ]
    for teacher in models[1:]:
        teacher.backbone.load_state_dict(models[0].backbone.state_dict())
        with torch.no_grad():  # trained stages differ
            list(teacher.backbone.parameters())[-1].add_(0.1)
    return models[0], models[1], models[2]


def test_frozen_stages_run_once_for_student_and_teachers_with_the_same_losses(tmp_path: Path) -> None:
    student, weak, strong = student_and_teachers(tmp_path)
    criterion = build_criterion(small_config(tmp_path), 3)
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    alone = compute_losses(student.train(), criterion, DualTeacher(weak, strong), *batch)[1]
    teachers = DualTeacher(weak, strong)
    assert teachers.connect(student) == ["weak", "strong"]
    assert not any(module.training for teacher in (weak, strong) for module in teacher.modules())
    stems = [model.backbone.body.conv1 for model in (student, weak, strong)]
    assert [isinstance(stem, nn.Identity) for stem in stems] == [False, True, True]
    together = compute_losses(student.train(), criterion, teachers, *batch)[1]
    for key, loss in alone.items():  # the teachers' own stages have folded norms
        torch.testing.assert_close(together[key], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["other weights", "trained", "other norms"])
def test_stages_that_differ_are_not_shared(tmp_path: Path, what: str) -> None:
    changes = {"other weights": {}, "trained": {"backbone": {"frozen_stages": 0}}}
    student, weak, strong = student_and_teachers(
        tmp_path, **changes.get(what, {"backbone": {"frozen_norm": False}})
    )
    if what == "other weights":
        with torch.no_grad():
            next(weak.backbone.parameters()).add_(1e-3)
    expected = ["strong"] if what == "other weights" else []
    assert DualTeacher(weak, strong).connect(student) == expected


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_teachers_in_bfloat16_stay_close(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With shared frozen stages, and without, which ConvNeXt has for its dropout."""
    monkeypatch.setitem(SMALL_MODEL, "backbone", {"name": name, "pretrained": False})
    student, weak, strong = student_and_teachers(tmp_path)
    criterion = build_criterion(small_config(tmp_path), 3)
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    expected = compute_losses(student.train(), criterion, DualTeacher(weak, strong), *batch)[1]
    teachers = DualTeacher(weak, strong)
    assert teachers.connect(student, torch.bfloat16) == (["weak", "strong"] if name == "resnet10t" else [])
    losses = compute_losses(student, criterion, teachers, *batch, precision=torch.bfloat16)[1]
    for name in ("loss_memory", "loss_budget"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=0.01)
