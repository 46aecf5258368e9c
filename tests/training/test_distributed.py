"""Several processes train like one process on their concatenated batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch import Tensor, nn

from ats_detr import distributed
from ats_detr.batch import ImageBatch, Target
from ats_detr.cli.eval import evaluate_checkpoint
from ats_detr.config import config_from_dict, load_config
from ats_detr.model import build_model
from ats_detr.training.criterion import build_criterion, compute_losses
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.optim import build_optimizer
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import ADAPTIVE, merged, random_batch, small_tree
from tests.training.test_exact import FORKS

ROOT = Path(__file__).parents[2]
OBJECTS_OF_STEPS = ([2, 1, 3, 4], [3, 2, 0, 0], [1, 0, 2, 1])
"""Objects of the four images of each step. Each process has two images; the second has no objects in step two."""


def train_three_steps(tree: dict[str, Any], rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Gradients of every step and the parameters after the last one."""
    torch.set_num_threads(1)
    config = config_from_dict(tree)
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=3).train()
    teachers = two_teachers(tree) if config.model.adaptive else None
    trained = distributed.parallel(model, torch.device("cpu"))
    optimizer = build_optimizer(model, config.train, global_batch=4)
    criterion = build_criterion(config, 3)
    result: dict[str, dict[str, Tensor]] = {}
    for step, objects in enumerate(OBJECTS_OF_STEPS):
        batch, targets = share_of(*random_batch(step, objects), rank, world_size)
        losses = compute_losses(trained, criterion, teachers, batch, targets)[1]
        losses["loss"].backward()
        result[f"gradient of step {step}"] = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return result


def two_teachers(tree: dict[str, Any]) -> DualTeacher:
    selectors = ({"keep_ratio": ratio, "min_ratio": None, "max_ratio": None} for ratio in (0.3, 0.6))
    own = ({"model": {"selector": selector, "adaption": False}, "teachers": None} for selector in selectors)
    configs = (config_from_dict(merged(tree, changes)) for changes in own)
    return DualTeacher(*(build_model(config.model, num_classes=3) for config in configs))


def share_of(
    batch: ImageBatch, targets: list[Target], rank: int, world_size: int
) -> tuple[ImageBatch, list[Target]]:
    size = len(targets) // world_size
    part = slice(rank * size, (rank + 1) * size)
    return ImageBatch(batch.images_B3HW[part], batch.sizes[part]), targets[part]


def run_process(rank: int, folder: str, tree: dict[str, Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = train_three_steps(tree, rank, 2)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_two_processes_equal_one_in_every_gradient_and_parameter(tmp_path: Path, kind: str) -> None:
    # Two channels per group of the group norms: with one, the gradient of the preceding bias is rounding noise,
    # which Adam turns into full steps. So is the gradient of the adaption bias, which the memory loss subtracts.
    tree = small_tree(tmp_path, model={"width": 64})
    if kind == "student":
        teachers = {name: {"config": f"{name}.yaml"} for name in ("weak", "strong")}
        tree = merged(tree, {"model": ADAPTIVE, "teachers": teachers})
    alone = train_three_steps(tree, 0, 1)
    mp.spawn(run_process, (str(tmp_path), tree), nprocs=2)
    together = torch.load(tmp_path / "result.pt")
    for what, expected in alone.items():
        assert expected.keys() == together[what].keys()
        for name, tensor in expected.items():
            difference = (together[what][name] - tensor).abs().max().item()
            # Float32 rounding: 6e-5 of the largest gradient of the stem. A wrong average differs by a factor of 2.
            # Parameters: a step of Adam is 1e-3, also from the rounding noise in the gradient of the keys' bias.
            is_parameter = what == "parameters"
            tolerance = 5e-5 if is_parameter else 1e-6 + 3e-4 * tensor.abs().max().item()
            noise = is_parameter and name == "adaption.bias"
            assert difference < tolerance or noise, f"{what}: {name} differs by {difference}"


def train_in_one_of_two(rank: int, folder: Path) -> None:
    """Training in one of two processes, as `train.py` does it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train_stages(plan_stages(load_config(folder / "config.yaml")), "all", torch.device("cpu"))
    dist.destroy_process_group()


def test_two_processes_with_trained_norms_evaluate_the_model_that_they_save(tmp_path: Path) -> None:
    """Each process has batch statistics of its own, and so has its moving average."""
    tree = small_tree(
        tmp_path,
        model={"backbone": {"frozen_norm": False}, "num_queries": 50},
        data={"batch_size": 2, "synthetic": {"num_val": 24, "max_objects": 2, "num_classes": 1}},
        train={"epochs": 3, "ema_decay": 0.7, "learning_rate": 2e-3},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    processes = [FORKS.Process(target=train_in_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    run = tmp_path / "run"
    config = load_config(tmp_path / "config.yaml")
    evaluate_checkpoint(config, run / "final.pt", tmp_path / "again", torch.device("cpu"))
    found, expected = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "again", run))
    assert found == {"budget": "auto", **expected}
    assert expected["AP"] > 0


def test_every_trained_parameter_has_a_gradient_also_without_objects(tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter; a missing gradient would be a deadlock."""
    config = config_from_dict(small_tree(tmp_path, model={"num_decoder_points": 3}))
    model = build_model(config.model, num_classes=3).train()
    assert [layer.cross_attention.num_points for layer in model.decoder.layers] == [3, 3]
    batch, targets = random_batch(0, [0, 0])
    compute_losses(model, build_criterion(config, 3), None, batch, targets)[1]["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
