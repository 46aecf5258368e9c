"""Dual teacher supervision: image AP equal to the nested loops, budget labels, memory loss, frozen teachers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ats_detr import checkpoint
from ats_detr.batch import Target, most_of_a_class
from ats_detr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from ats_detr.checkpoint import load_checkpoint, save_checkpoint, save_folder
from ats_detr.config import LossConfig, config_to_dict, load_config
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.model import Detections, build_model, top_detections
from ats_detr.training.average_precision import greedy_match, image_average_precision
from ats_detr.training.criterion import build_criterion
from ats_detr.training.distillation import (
    BudgetCounts,
    DifficultyCache,
    DualTeacher,
    budget_labels,
    memory_loss,
)
from ats_detr.training.setup import Stage
from ats_detr.training.stages import load_teachers, plan_stages
from tests.training.definitions import nested_loops_ap
from tests.training.small import ADAPTIVE, merged, random_batch, small_config, write_small_chain


# ------------------------------------------------------------------------------ average precision of an image
def noisy_scene(
    g: torch.Generator, num_objects: int, num_found: int, num_classes: int
) -> tuple[Detections, Target]:
    """Several detections around each object, some with wrong labels, which compete for matches."""
    size = torch.rand(num_objects, 2, generator=g) * 0.2 + 0.1
    boxes = torch.cat([torch.rand(num_objects, 2, generator=g) * 0.4 + 0.3, size], dim=1)
    labels = torch.randint(num_classes, (num_objects,), generator=g)
    if num_objects:
        source = torch.randint(num_objects, (num_found,), generator=g)
        around, found_labels = boxes[source], labels[source]
    else:
        around, found_labels = torch.full((num_found, 4), 0.5), torch.zeros(num_found, dtype=torch.int64)
    jitter = torch.randn(num_found, 4, generator=g) * 0.02
    wrong = torch.rand(num_found, generator=g) < 0.2
    found_labels = torch.where(wrong, torch.randint(num_classes, (num_found,), generator=g), found_labels)
    pixels = cxcywh_to_xyxy(around + jitter) * torch.tensor([640, 480, 640, 480])
    scores = torch.rand(num_found, generator=g).sort(descending=True).values
    return Detections(scores, found_labels, pixels), Target(0, (480, 640), labels, boxes)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75])
def test_image_ap_equals_the_nested_loops(threshold: float) -> None:
    g = torch.Generator().manual_seed(int(threshold * 100))
    shapes = [(n, d, k) for n in (0, 1, 3, 8, 20) for d in (0, 1, 7, 60) for k in (1, 4)]
    scenes = [noisy_scene(g, *shape) for shape in shapes]
    detections, targets = [d for d, _ in scenes], [t for _, t in scenes]
    most = most_of_a_class(targets)
    result = image_average_precision(detections, targets, threshold, most_of_a_class=most)
    expected = torch.tensor([nested_loops_ap(d, t, threshold) for d, t in scenes])
    assert ((expected > 0.05) & (expected < 0.95)).sum() > 10  # neither trivial value
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_objects", [1, 2, 3, 7, 10, 37, 49, 64])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_perfect_image_has_ap_of_exactly_one(num_objects: int, num_classes: int) -> None:
    """The easy class needs AP >= 1: a rounding error would make every image hard."""
    g = torch.Generator().manual_seed(num_objects)
    _, target = noisy_scene(g, num_objects, 0, num_classes)
    boxes = cxcywh_to_xyxy(target.boxes_N4) * torch.tensor([640, 480, 640, 480])
    found = Detections(torch.ones(num_objects), target.labels_N, boxes)
    assert image_average_precision([found], [target]).item() == 1.0


def test_a_batch_without_objects_and_one_without_detections() -> None:
    g = torch.Generator().manual_seed(0)
    empty = [noisy_scene(g, 0, 5, 3), noisy_scene(g, 0, 2, 3)]
    assert image_average_precision([d for d, _ in empty], [t for _, t in empty]).tolist() == [1.0, 1.0]
    silent = [noisy_scene(g, 2, 0, 3), noisy_scene(g, 0, 0, 3)]
    assert image_average_precision([d for d, _ in silent], [t for _, t in silent]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_parallel_matching_equals_sequential_matching(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    iou_BDN = torch.rand(3, 40, 12, generator=g)
    iou_BDN = torch.where(iou_BDN < torch.rand(3, 40, 1, generator=g), -1.0, iou_BDN)
    expected = torch.zeros(3, 40, dtype=torch.bool)
    for image, table in enumerate(iou_BDN.clone()):
        for detection in range(40):
            best, obj = table[detection].max(0)
            if best >= 0:
                expected[image, detection] = True
                table[:, obj] = -1
    assert torch.equal(greedy_match(iou_BDN), expected)


# ---------------------------------------------------------------------------------------------- budget labels
def test_labels_of_two_budgets_are_as_published() -> None:
    ap = torch.tensor([0.0, 0.5, 0.75, 0.99999, 1.0])
    assert budget_labels(ap).tolist() == [1, 1, 1, 1, 0]
    assert budget_labels(ap, bias=0.75).tolist() == [1, 1, 0, 0, 0]


def test_more_budgets_have_evenly_spaced_thresholds() -> None:
    ap = torch.tensor([1.0, 0.9, 0.75, 0.7, 0.5, 0.26, 0.2, 0.0])
    assert budget_labels(ap, num_budgets=5).tolist() == [0, 1, 1, 2, 2, 3, 4, 4]
    assert budget_labels(ap, bias=0.5, num_budgets=3).tolist() == [0, 0, 0, 0, 0, 1, 2, 2]


# ------------------------------------------------------------------------------------------------ memory loss
SHAPES = ((4, 6), (2, 3), (1, 2), (1, 1))


def memories(g: torch.Generator, channels: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = sum(h * w for h, w in SHAPES)
    padding = torch.zeros(3, num_tokens, dtype=torch.bool)
    padding[1, ::3] = True
    padding[2, 5:20] = True
    student, teacher = torch.randn(2, 3, num_tokens, channels, generator=g)
    return student, teacher, padding


def test_the_memory_loss_ignores_scale_and_offset_of_a_channel_and_padded_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher, padding = memories(g)
    moved = student * torch.linspace(0.5, 3, 8) + torch.linspace(-2, 2, 8)
    moved[padding] = 1e4
    expected = memory_loss(student, teacher, padding, SHAPES)
    torch.testing.assert_close(memory_loss(moved, teacher, padding, SHAPES), expected, atol=1e-5, rtol=1e-5)
    assert memory_loss(student, student, padding, SHAPES).item() == 0
    assert expected.item() > 0.1


def test_a_constant_channel_has_a_zero_gradient_instead_of_nan() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher, padding = memories(g)
    student[..., 2] = 1.5
    teacher[..., 5] = -0.5
    student.requires_grad_()
    memory_loss(student, teacher, padding, SHAPES).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[..., 2] == 0).all()
    assert (student.grad[..., 3][~padding] != 0).any()
    assert (student.grad[padding] == 0).all()


def test_the_memory_loss_is_float32_for_half_precision_memories() -> None:
    student, teacher, padding = memories(torch.Generator().manual_seed(0))
    loss = memory_loss(student.bfloat16(), teacher.bfloat16(), padding, SHAPES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, memory_loss(student, teacher, padding, SHAPES), atol=0.01, rtol=0)


# ---------------------------------------------------------------------------------------------------- the two teachers
def test_the_student_has_gradients_and_the_teachers_do_not_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weak, strong, student = (
        build_model(small_config(tmp_path, model=model).model, num_classes=3)
        for model in ({}, {"selector": {"keep_ratio": 0.6}}, ADAPTIVE)
    )
    teachers = DualTeacher(weak, strong)
    before = [parameter.clone() for teacher in (weak, strong) for parameter in teacher.parameters()]
    batch, targets = random_batch(seed=0, num_objects=[3, 0])
    losses = teachers(batch, targets, student.train()(batch))
    assert set(losses) == {"loss_budget", "loss_memory", "easy_images"}
    sum(losses.values()).backward()
    assert not weak.training
    assert not strong.training
    after = [parameter for teacher in (weak, strong) for parameter in teacher.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    for name in (
        "selector.budget.2.weight",
        "adaption.weight",
        "encoder.layers.0.attention.value_proj.weight",
    ):
        assert student.get_parameter(name).grad.abs().sum() > 0, name
    for name in ("decoder_heads.0.classify.weight", "selector.score.4.weight"):
        assert student.get_parameter(name).grad is None, name  # the criterion trains detections and scores


def test_a_cached_difficulty_is_computed_once_and_stored_in_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weak, student = (
        build_model(small_config(tmp_path, model=model).model, num_classes=3) for model in ({}, ADAPTIVE)
    )
    teachers = DualTeacher(weak, copy.deepcopy(weak), cache_difficulty=True)
    seen: list[int] = []
    weak.backbone.register_forward_hook(lambda _, images, maps: seen.append(len(images[0])))
    batch, targets = random_batch(seed=0, num_objects=[3, 0, 2, 1], size=64)
    output = student.train()(batch)
    first = teachers(batch, targets, output)["loss_budget"]
    assert torch.equal(teachers(batch, targets, output)["loss_budget"], first)
    assert seen == [4]
    again = DifficultyCache()
    again.load(teachers.difficulty.state(), torch.device("cpu"))
    assert torch.equal(again.get([2, 0]), teachers.difficulty.get([2, 0]))
    assert teachers.difficulty.get([0, 99]) is None
    other_batch, other = random_batch(seed=1, num_objects=[1, 1], size=64)
    other[1].image_id = -99
    teachers(other_batch, other, student(other_batch))
    assert seen == [4, 2], "a batch with an image that is not known is judged whole"
    assert teachers.difficulty.get([-99]) is not None, "ids may be negative"


def test_the_label_of_an_image_depends_on_the_ap_of_the_weak_teacher(tmp_path: Path) -> None:
    """Its detections as objects make an image easy; objects that it does not detect make it hard."""
    torch.manual_seed(0)
    weak, student = (
        build_model(small_config(tmp_path, model=model).model, num_classes=3) for model in ({}, ADAPTIVE)
    )
    batch, targets = random_batch(seed=0, num_objects=[1, 1])
    best = top_detections(weak.eval()(batch).last, [target.original_size for target in targets], 1)[0]
    targets[0].labels_N = best.labels_N
    targets[0].boxes_N4 = xyxy_to_cxcywh(best.boxes_xyxy_N4 / 128).detach()
    targets[1].boxes_N4 = torch.tensor([[0.01, 0.01, 0.002, 0.002]])
    output = student.train()(batch)
    easy_and_hard = torch.nn.functional.cross_entropy(output.selection.budget_logits, torch.tensor([0, 1]))
    losses = DualTeacher(weak, weak)(batch, targets, output)
    assert losses["loss_budget"].item() == easy_and_hard.item()
    assert losses["easy_images"].item() == 0.5


def test_one_budget_for_all_images_of_an_epoch_is_a_problem() -> None:
    counts = BudgetCounts(3, torch.device("cpu"))
    assert counts.problem() is None
    for _ in range(2):
        counts.add(torch.tensor([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor(0.5))
        counts.add(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor(1.0))
        assert "budget 2 of 3 for all 3 images; the weak teacher finds 66.7% of them easy" in (
            counts.problem() or ""
        )
        counts.reset()
    counts.add(torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]), torch.tensor(0.5))
    assert counts.problem() is None


def test_level_weights_scale_the_levels_of_the_memory_loss() -> None:
    student, teacher, padding = memories(torch.Generator().manual_seed(0))
    own = [
        memory_loss(student, teacher, padding, SHAPES, [float(i == level) for i in range(len(SHAPES))])
        for level in range(len(SHAPES))
    ]
    weights = [0.5, 0.0, 2.0, 0.25][: len(SHAPES)]
    expected = sum(weight * loss for weight, loss in zip(weights, own, strict=True))
    torch.testing.assert_close(memory_loss(student, teacher, padding, SHAPES, weights), expected)
    assert all(loss > 0 for loss in own)


def test_the_difficulty_bias_lowers_all_thresholds() -> None:
    precision = torch.tensor([0.0, 0.3, 0.5, 0.9])
    assert budget_labels(precision, bias=1.0).tolist() == [1, 1, 1, 1]
    assert budget_labels(precision, bias=0.5).tolist() == [1, 1, 0, 0]
    assert budget_labels(precision, bias=0.5, num_budgets=3).tolist() == [2, 1, 0, 0]


def test_the_settings_of_the_teachers_reach_the_losses(tmp_path: Path) -> None:
    changes = {"loss": {"difficulty_iou": 0.7, "budget_weight": 3.0, "memory_weight": 0.5}}
    changes["teachers"] = {"difficulty_bias": 0.4, "level_weights": [0.1, 0.2, 0.3, 0.4]}
    path = write_small_chain(tmp_path)
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes)))
    stages = plan_stages(load_config(path))
    for name in ("weak", "strong"):
        save_random_detector(stages[name])
    config = stages["student"].config
    supervision = load_teachers(config, stages, torch.device("cpu")).supervision
    assert (supervision.bias, supervision.iou_threshold) == (0.4, 0.7)
    assert supervision.level_weights == (0.1, 0.2, 0.3, 0.4)
    weights = build_criterion(config, 3).weights
    assert (weights["loss_budget"], weights["loss_memory"], weights["loss_bbox_0"]) == (3.0, 0.5, 5.0)
    assert stages["weak"].config.loss == LossConfig()


def test_the_iou_threshold_determines_the_matches_of_the_weak_teacher(tmp_path: Path) -> None:
    """A detection with IoU 0.6 makes an image easy at threshold 0.5 and hard at 0.7."""
    torch.manual_seed(0)
    weak, student = (
        build_model(small_config(tmp_path, model=model).model, num_classes=3) for model in ({}, ADAPTIVE)
    )
    batch, targets = random_batch(seed=0, num_objects=[1])
    (best,) = top_detections(weak.eval()(batch).last, [(128, 128)], 1)
    targets[0].labels_N = best.labels_N
    box = xyxy_to_cxcywh(best.boxes_xyxy_N4 / 128).detach()
    targets[0].boxes_N4 = box * torch.tensor([1, 1, 0.6, 1])
    output = student.train()(batch)
    for threshold, label in ((0.5, 0), (0.7, 1)):
        teachers = DualTeacher(weak, weak, iou_threshold=threshold, num_detections=1)
        expected = torch.nn.functional.cross_entropy(output.selection.budget_logits, torch.tensor([label]))
        assert teachers(batch, targets, output)["loss_budget"].item() == expected.item()


def save_random_detector(stage: Stage) -> None:
    """A finished checkpoint of a stage with random weights."""
    model = build_model(stage.config.model, num_classes=3)
    checkpoint = {
        "model": model.state_dict(),
        "config": config_to_dict(stage.config),
        "num_classes": 3,
        "classes": ClassMap.from_categories({i: f"class {i}" for i in range(3)}).to_dict(),
        "epoch": 1,
        "finished": True,
    }
    save_checkpoint(checkpoint, stage.checkpoint)


def test_a_given_teacher_is_anything_that_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, a model folder, and a file by name, here in place of one that is fetched."""
    path = write_small_chain(tmp_path)
    stages = plan_stages(load_config(path))
    for name in ("weak", "strong"):
        save_random_detector(stages[name])
    weak, strong = (stages[name].checkpoint for name in ("weak", "strong"))
    save_folder(load_checkpoint(strong), tmp_path / "folder")
    monkeypatch.setattr(checkpoint, "fetch", {"hf://someone/teacher/strong.pt": strong}.get)
    monkeypatch.setattr(checkpoint, "is_remote", lambda source: str(source).startswith("hf:"))
    for given in (tmp_path / "folder", strong.parent, "hf://someone/teacher/strong.pt"):
        settings = [f"teachers.weak.checkpoint={weak}", f"teachers.strong.checkpoint={given}"]
        planned = plan_stages(load_config(path, settings), settings)
        found = load_teachers(planned["student"].config, planned, torch.device("cpu"))
        assert found.weights == load_teachers(stages["student"].config, stages, torch.device("cpu")).weights
    for given, message in (
        ("hf://nothing", "must be hf://owner/repo"),
        (tmp_path / "no.pt", "no checkpoint; must be a file"),
    ):
        monkeypatch.undo()
        settings = [f"teachers.strong.checkpoint={given}"]
        with pytest.raises(UserError, match=rf"teachers\.strong\.checkpoint = {given}: {message}"):
            plan_stages(load_config(path, settings), settings)
    settings = [f"teachers.strong.checkpoint={weak}"]
    planned = plan_stages(load_config(path, settings), settings)
    with pytest.raises(UserError, match=r"keep_ratio 0\.3, but the strong teacher needs 0\.6"):
        load_teachers(planned["student"].config, planned, torch.device("cpu"))
