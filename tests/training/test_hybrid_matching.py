"""Hybrid one-to-many matching (`loss.one_to_many`): a second group of queries, in training only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ats_detr.batch import ImageBatch, Target
from ats_detr.config import LossConfig, load_config
from ats_detr.errors import Stopped, UserError
from ats_detr.model import DetectorOutput, Prediction
from ats_detr.training import trainer
from ats_detr.training.criterion import SetCriterion, compute_losses
from ats_detr.training.matcher import HungarianMatcher, PredictionRows
from ats_detr.training.setup import Run
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import random_batch, small_run, small_tree
from tests.training.test_criterion import NUM_CLASSES, random_output, random_prediction, random_targets

REPEATS = 3
OBJECTS = [3, 0, 2, 1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """20 detection queries and, of the 85 tokens, 60 in the second group."""
    return small_run(tmp_path, loss={"one_to_many": REPEATS})


def losses_of(
    run: Run, one_to_many: int, num_objects: Sequence[int] = OBJECTS, **changes: Any
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Output and losses of one batch with other numbers of one-to-many queries."""
    batch, targets = random_batch(0, list(num_objects), size=64)
    run.state.model.train().one_to_many = one_to_many
    output, losses, problem = compute_losses(run.state.model, run.criterion, None, batch, targets, **changes)
    assert problem is None
    return output, losses


def gradients_of(run: Run, total: Tensor) -> dict[str, Tensor]:
    run.state.optimizer.zero_grad()
    total.backward()
    named = run.state.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def total_of(run: Run, losses: dict[str, Tensor], second_group: bool) -> Tensor:
    """The weighted sum of the losses of the second group, or of all others."""
    weights = run.criterion.weights
    return sum(weights[k] * losses[k] for k in weights if k in losses and ("_many" in k) == second_group)


def test_detection_queries_have_the_outputs_and_the_whole_gradient_of_plain_training(run: Run) -> None:
    plain_output, plain = losses_of(run, 0)
    output, losses = losses_of(run, REPEATS)
    assert len(output.one_to_many) == 2
    assert output.one_to_many[0].boxes.shape == (4, REPEATS * 20, 4)
    assert plain_output.one_to_many == []
    torch.testing.assert_close(output.last.logits, plain_output.last.logits)
    torch.testing.assert_close(output.decoder_auxiliary[0].boxes, plain_output.decoder_auxiliary[0].boxes)
    torch.testing.assert_close(output.attention_map_BS, plain_output.attention_map_BS)
    assert torch.equal(output.query_index_BQ, plain_output.query_index_BQ)
    assert losses.keys() - plain.keys() == {
        f"loss_{kind}_many{i}" for kind in ("ce", "bbox", "giou") for i in ("", "_0")
    }
    for key in plain.keys() - {"loss"}:
        torch.testing.assert_close(losses[key], plain[key], msg=key)

    expected = gradients_of(run, plain["loss"])
    own = gradients_of(run, total_of(run, losses, second_group=False))
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    _, losses = losses_of(run, REPEATS)
    added = gradients_of(run, losses["loss"])
    _, losses = losses_of(run, REPEATS)
    second = gradients_of(run, total_of(run, losses, second_group=True))
    assert any(name.startswith("decoder.layers.0.self_attention") for name in second)
    for name, gradient in added.items():
        torch.testing.assert_close(
            gradient, expected[name] + second.get(name, torch.zeros(())), rtol=1e-4, atol=1e-5, msg=name
        )


@torch.no_grad()
def test_the_second_group_reaches_neither_inference_nor_checkpoints(run: Run) -> None:
    model = run.state.model.eval()
    batch, _ = random_batch(0, OBJECTS, size=64)
    names = list(model.state_dict())
    outputs, operators = [], []
    for model.one_to_many in (0, REPEATS):
        with torch.profiler.profile() as profile:
            outputs.append(model(batch))
        operators.append([(event.key, event.count) for event in profile.key_averages()])
    assert torch.equal(outputs[0].last.logits, outputs[1].last.logits)
    assert torch.equal(outputs[0].last.boxes, outputs[1].last.boxes)
    assert outputs[1].one_to_many == []
    assert sorted(operators[0]) == sorted(operators[1])
    assert list(model.state_dict()) == names
    assert not [name for name in names if "many" in name]


def test_images_with_less_tokens_than_queries_have_a_smaller_second_group(tmp_path: Path) -> None:
    run = small_run(tmp_path, loss={"one_to_many": REPEATS}, model={"num_queries": 70})
    output, losses = losses_of(run, REPEATS)
    assert output.last.boxes.shape[1] == 70
    assert output.one_to_many[0].boxes.shape[1] == 85 - 70
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("num_objects", [[0, 0, 0, 0], [5, 0, 1, 20]])
def test_any_number_of_objects_gives_every_parameter_a_finite_gradient(
    run: Run, num_objects: list[int]
) -> None:
    _, losses = losses_of(run, REPEATS, num_objects)
    gradients = gradients_of(run, losses["loss"])
    assert gradients.keys() == {name for name, p in run.state.model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if not any(num_objects):
        assert losses["loss_bbox_many"].item() == losses["loss_giou_many_0"].item() == 0
        assert losses["loss_ce_many"].item() > 0


def test_autocast_trains_both_groups(run: Run) -> None:
    _, expected = losses_of(run, REPEATS)
    _, losses = losses_of(run, REPEATS, precision=torch.bfloat16)
    for key in ("loss_ce", "loss_ce_many", "loss_giou_many_0"):
        assert losses[key].dtype == torch.float32
        assert losses[key].item() == pytest.approx(expected[key].item(), rel=0.1), key
    assert all(gradient.isfinite().all() for gradient in gradients_of(run, losses["loss"]).values())


def test_recomputed_layers_keep_the_groups_apart(run: Run) -> None:
    expected = gradients_of(run, losses_of(run, REPEATS)[1]["loss"])
    run.state.model.decoder.recompute = True
    own = gradients_of(run, losses_of(run, REPEATS)[1]["loss"])
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, msg=name)


# --------------------------------------------------------------------------------------------------- losses, matching
def test_the_losses_are_those_of_repeated_objects(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    output, targets = random_output(), random_targets((3, 2), g)
    output.one_to_many = [random_prediction(2, 30, g=g) for _ in range(2)]
    second_group = LossConfig(one_to_many=REPEATS)
    own = SetCriterion(NUM_CLASSES, second_group, class_specific_proposals=True)(output, targets, 5)
    repeated = [
        Target(t.image_id, t.original_size, t.labels_N.repeat(REPEATS), t.boxes_N4.repeat(REPEATS, 1))
        for t in targets
    ]
    output.decoder_auxiliary, output.last = output.one_to_many[:1], output.one_to_many[1]
    output.one_to_many = []
    expected = SetCriterion(NUM_CLASSES, class_specific_proposals=True)(output, repeated, 5 * REPEATS)
    for kind in ("ce", "bbox", "giou"):
        for layer in ("", "_0"):
            key = f"loss_{kind}_many{layer}"
            torch.testing.assert_close(own[key], expected[f"loss_{kind}{layer}"], msg=key)


def test_each_object_is_matched_to_as_many_rows_as_there_are() -> None:
    g = torch.Generator().manual_seed(0)
    targets = random_targets((4, 0, 1), g)
    for num_rows, num_pairs in ((20, 5 * REPEATS), (7, 7 + REPEATS)):  # 7 rows: not enough for 4 objects
        prediction: Prediction = random_prediction(3 * num_rows, g=g)
        rows = PredictionRows(
            name="rows",
            logits_RT=prediction.logits,
            boxes_R4=prediction.boxes,
            starts=range(0, 3 * num_rows + 1, num_rows),
            repeats=REPEATS,
        )
        (match,) = HungarianMatcher()([rows], targets)
        assert len(match.rows_M.unique()) == len(match.rows_M) == num_pairs
        assert match.objects_M.bincount(minlength=5).max() == REPEATS
        of_image = match.rows_M // num_rows
        assert torch.equal(of_image, torch.where(match.objects_M < 4, 0, 2))


# ------------------------------------------------------------------------------------------------------------ training
def train(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """The final weights of a run of two epochs of two steps."""
    folder.mkdir(exist_ok=True)
    data = {"root": str(folder.parent / "data"), "synthetic": {"num_train": 8}}
    loss = {"one_to_many": REPEATS, "class_loss": "matchability_aware"}
    tree = small_tree(folder, data=data, loss=loss, model={"dropout": 0.1})
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "config.yaml", overrides)
    train_stages(plan_stages(config, overrides), "all", torch.device("cpu"))
    return torch.load(folder / "run" / "final.pt", weights_only=True)["model"]


def test_a_run_resumes_with_the_same_bits_and_only_with_the_same_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path / "whole")
    step = trainer.train_step

    def signalled(run: Run, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        run.signals.received = "SIGTERM"
        return step(run, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", signalled)
        with pytest.raises(Stopped, match="after step 1"):
            train(tmp_path / "interrupted")
    with pytest.raises(UserError, match="loss.one_to_many = 3, now 2"):
        train(tmp_path / "interrupted", "loss.one_to_many=2")
    own = train(tmp_path / "interrupted")
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_a_one_stage_model_has_no_second_group(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("loss: {one_to_many: 2}")
    with pytest.raises(UserError, match="loss.one_to_many = 2: has no effect without model.two_stage"):
        load_config(tmp_path / "config.yaml")


def test_the_memory_preflight_includes_the_second_group(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    detect = run.state.model.forward

    def forward(batch: ImageBatch, **keywords: Any) -> DetectorOutput:
        output = detect(batch, **keywords)
        seen.append(len(output.one_to_many))
        return output

    monkeypatch.setattr(run.state.model, "forward", forward)
    trainer.preflight_memory(run)
    assert seen == [2]
