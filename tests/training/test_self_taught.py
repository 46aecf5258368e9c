"""Training at random keep ratios, and budgets that a model teaches itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ats_detr.batch import Target
from ats_detr.cli.eval import compare_stages
from ats_detr.config import config_from_dict, load_config
from ats_detr.errors import Stopped, UserError
from ats_detr.model import TokenScores
from ats_detr.model.selector import TokenSelector
from ats_detr.training import resume, trainer
from ats_detr.training.distillation import SelfTaught, calibrated, draw_ratios
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import merged, random_batch, small_run, small_tree

SELECTOR: dict[str, Any] = {
    "keep_ratio": None,
    "min_ratio": 0.1,
    "max_ratio": 0.9,
    "num_budgets": 5,
    "min_tokens": 1,
    "train_ratios": [0.1, 0.9],
    "mean_ratio": 0.4,
}
SELF_TAUGHT: dict[str, Any] = {"model": {"selector": SELECTOR}, "teachers": "self"}


# -------------------------------------------------------------------------------------------------------- keep ratios
def test_a_quarter_of_the_images_has_the_smallest_ratio_and_a_quarter_the_largest() -> None:
    torch.manual_seed(0)
    ratios = torch.stack([draw_ratios(16, 0.03, 0.4) for _ in range(200)])
    smallest, largest = ratios == torch.tensor(0.03), ratios == torch.tensor(0.4)
    assert (smallest.sum(1) == 4).all() and (largest.sum(1) == 4).all(), "in every batch"
    assert smallest.any(0).all() and largest.any(0).all(), "on every place of the batch"
    between = ratios[~smallest & ~largest]
    assert 0.03 < between.min() and between.max() < 0.4
    middle = math.sqrt(0.03 * 0.4)
    assert (between < middle).float().mean() == pytest.approx(0.5, abs=0.03), "log-uniform"
    single = torch.cat([draw_ratios(1, 0.03, 0.4) for _ in range(2000)])
    assert (single == torch.tensor(0.03)).float().mean() == pytest.approx(0.25, abs=0.04)


def test_ratios_depend_on_the_seed_only() -> None:
    torch.manual_seed(3)
    first = draw_ratios(5, 0.1, 1.0)
    torch.manual_seed(3)
    assert torch.equal(draw_ratios(5, 0.1, 1.0), first)


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_images_of_a_step_keep_the_drawn_ratios(tmp_path: Path, is_adaptive: bool) -> None:
    selector = SELECTOR if is_adaptive else {"keep_ratio": 0.3, "train_ratios": [0.2, 0.8]}
    run = small_run(tmp_path, **merged(SELF_TAUGHT if is_adaptive else {}, {"model": {"selector": selector}}))
    found = []
    run.state.model.selector.register_forward_hook(lambda _, inputs, scores: found.append(scores))
    batches = run.loaders.train.epoch(0)
    for _ in range(2):
        torch.manual_seed(7)
        _, losses = trainer.train_step(run, 0, [next(batches)], metrics=False), found[-1]
        torch.manual_seed(7)
        expected = draw_ratios(4, *run.config.model.selector.train_ratios)
        assert torch.equal(losses.num_kept_B, (losses.num_valid_B * expected).long() + 1)
        assert losses.budget_B is None
    trainer.preflight_memory(run)
    largest = run.config.model.selector.train_ratios[1]
    assert torch.equal(found[-1].num_kept_B, (found[-1].num_valid_B * largest).long() + 1)


# ------------------------------------------------------------------------------------------------------- budget head
def test_the_logits_learn_the_number_of_objects(tmp_path: Path) -> None:
    run = small_run(tmp_path, **SELF_TAUGHT)
    model = run.state.model.train()
    batch, targets = random_batch(1, [2, 0, 3, 1])
    output = model(batch, keep_ratio=torch.tensor([0.1, 0.9, 0.5, 0.3]))
    losses = run.teachers(targets, output)
    logits = output.selection.budget_logits
    ratios, num_queries = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), run.config.model.num_queries
    errors = [
        (logit - math.sqrt(count / num_queries) * math.log(ratio / 0.1)) ** 2
        for count, row in zip([2, 0, 3, 1], logits, strict=True)
        for ratio, logit in zip(ratios, row, strict=True)
    ]
    torch.testing.assert_close(losses, {"loss_budget": torch.stack(errors).mean() / 2})
    (gradient,) = torch.autograd.grad(losses["loss_budget"], logits)
    assert (gradient != 0).all()


def test_the_learned_budgets_grow_with_the_square_root_of_the_number_of_objects() -> None:
    """From a noisy feature of the image."""
    torch.manual_seed(0)
    counts = torch.randint(0, 41, (2000,))
    features = torch.stack([(counts / 40).sqrt() + 0.02 * torch.randn(2000), torch.ones(2000)], 1)
    selector = TokenSelector(16, 0.02, 0.5, num_budgets=49)
    supervision = SelfTaught(selector, num_queries=100)
    targets = [
        Target(0, (8, 8), torch.zeros(n, dtype=torch.int64), torch.rand(n, 4)) for n in counts.tolist()
    ]
    head = torch.nn.Linear(2, 49)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = TokenScores(*[torch.zeros(0)] * 3, head(features), None)
        value = supervision(targets, SimpleNamespace(selection=scores))["loss_budget"]
        value.backward()
        return value

    optimizer.step(loss)
    budgets = selector.choose_budgets(head(features), cost=2.0)  # best ratio: sqrt(n / num_queries) / 2
    error = selector.ratio_of_budget(budgets) - ((counts / 100).sqrt() / 2).clamp(0.02, 0.5)
    assert float(error.abs().mean()) < 0.02


# -------------------------------------------------------------------------------------------------------- calibration
def test_calibrated_budgets_have_the_mean_and_the_weights_are_restored(tmp_path: Path) -> None:
    tree = merged(SELF_TAUGHT, {"data": {"synthetic": {"num_train": 60}}})
    run = small_run(tmp_path, **tree)
    model, loader = run.state.model, run.loaders.calibration
    with torch.no_grad():
        model.selector.budget[-1].weight.mul_(100)  # different images, different budgets
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    with calibrated(model, loader, 0.4, torch.device("cpu")):
        assert model.training
        model.eval()
        with torch.no_grad():
            ratios = torch.cat([model(batch).selection.keep_ratio_B for batch, _ in loader])
    assert len(ratios) == 60 and len(ratios.unique()) > 1
    assert float(ratios.mean()) == pytest.approx(0.4, rel=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_signal_stops_a_calibration(tmp_path: Path) -> None:
    run = small_run(tmp_path, **SELF_TAUGHT)
    before = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    run.signals.is_requested = lambda: True
    with pytest.raises(Stopped, match="run the same command to resume"):
        trainer.evaluate_run(run, is_last=True)
    assert not run.stage.checkpoint.exists()
    assert all(torch.equal(before[name], tensor) for name, tensor in run.state.model.state_dict().items())


def test_budgets_that_cannot_have_the_mean_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that finds all images equal gives all of them the same budget."""
    run = small_run(tmp_path, **SELF_TAUGHT)
    model = run.state.model
    torch.nn.init.zeros_(model.selector.budget[-1].weight)
    with calibrated(model, run.loaders.calibration, 0.4, torch.device("cpu")):
        pass
    assert "of the tokens on average, not model.selector.mean_ratio = 0.4" in caplog.text


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tree = small_tree(folder, **merged({**SELF_TAUGHT, "train": {"ema_decay": 0.5}}, changes))
    tree["data"]["root"] = str(folder.parent / "data")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def train(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    train_stages(plan_stages(load_config(path)), "all", torch.device("cpu"))
    return torch.load(path.parent / "run" / "final.pt", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a finished run."""
    path = write(tmp_path_factory.mktemp("self") / "finished")
    train(path)
    return path


def test_a_resumed_run_ends_with_the_same_bits(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the calibrated budgets of its moving average."""
    undisturbed = torch.load(finished.parent / "run" / "final.pt", weights_only=True)
    assert len(undisturbed["metrics"]["budget_histogram"]) == 5
    again = write(finished.parents[1] / "again")
    save = resume.save_checkpoint

    def save_and_die(*arguments: Any, **keywords: Any) -> None:
        save(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert (again.parent / "run" / "checkpoint.pt").exists()
    resumed = train(again)
    assert resumed["metrics"] == undisturbed["metrics"]
    for name, tensor in undisturbed["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name


def test_the_summary_compares_budgets_of_one_model(finished: Path, tmp_path: Path) -> None:
    stages = plan_stages(load_config(finished))
    compare_stages(stages, tmp_path, torch.device("cpu"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    num_tokens = 8**2 + 4**2 + 2**2 + 1
    for name, ratio in (("weak", 0.1), ("strong", 0.9)):
        assert summary[name]["mean_keep_ratio"] == pytest.approx((int(num_tokens * ratio) + 1) / num_tokens)
    mean = summary["student"]["mean_keep_ratio"]
    assert mean <= summary["static"]["mean_keep_ratio"] < mean + 1.5 / num_tokens
    assert summary["student"]["AP"] == torch.load(finished.parent / "run" / "final.pt")["metrics"]["AP"]


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_ratios": None}, "model.selector.train_ratios = None: .*must include min_ratio = 0.1"),
        ({"train_ratios": [0.2, 0.9]}, "must include min_ratio = 0.1 and max_ratio = 0.9"),
        ({"train_ratios": [0.5, 0.1]}, r"train_ratios = \(0.5, 0.1\): must be \[smallest, largest\]"),
        ({"train_ratios": [0, 0.9]}, r"must be \[smallest, largest\] with 0 < smallest"),
        ({"mean_ratio": None}, "mean_ratio = None: with teachers: self, must be between"),
        ({"mean_ratio": 0.95}, "mean_ratio = 0.95: with teachers: self, must be between"),
    ],
)
def test_impossible_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(write(tmp_path / "run", model={"selector": changes}))


def test_settings_of_teachers_have_no_effect_without_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.adaption = True: has no effect with teachers: self"):
        load_config(write(tmp_path / "run", model={"adaption": True}))
    with pytest.raises(UserError, match="loss.difficulty_iou = 0.6: has no effect with teachers: self"):
        load_config(write(tmp_path / "run", loss={"difficulty_iou": 0.6}))
    with pytest.raises(UserError, match="teachers = 'selv': must be"):
        load_config(write(tmp_path / "run", teachers="selv"))
    with pytest.raises(UserError, match="teachers = 'set': only an adaptive model has teachers"):
        config_from_dict({"teachers": "self"})
