"""The published optimiser: groups, learning rates, schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ats_detr.config import TrainConfig
from ats_detr.training.optim import build_optimizer, learning_rate_factor, set_learning_rates


class Named(nn.Module):
    """A module with the parameter names that determine the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"frozen": nn.Linear(1, 1), "body": nn.Linear(1, 1)})
        self.backbone["frozen"].requires_grad_(False)
        self.encoder = nn.ModuleDict({"sampling_offsets": nn.Linear(1, 1), "value_proj": nn.Linear(1, 1)})
        self.reference_points = nn.Linear(1, 1)


def test_three_groups_with_rates_scaled_by_the_square_root_of_the_global_batch() -> None:
    model = Named()
    optimizer = build_optimizer(model, TrainConfig(), global_batch=64)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: (group["lr"], sorted(names[id(p)] for p in group["params"]))
        for group in optimizer.param_groups
    }
    assert groups == {
        "rest": (pytest.approx(4e-4), ["encoder.value_proj.bias", "encoder.value_proj.weight"]),
        "backbone": (pytest.approx(4e-5), ["backbone.body.bias", "backbone.body.weight"]),
        "offsets": (
            pytest.approx(4e-5),
            [
                "encoder.sampling_offsets.bias",
                "encoder.sampling_offsets.weight",
                "reference_points.bias",
                "reference_points.weight",
            ],
        ),
    }
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


def test_sgd_has_the_same_groups_and_skips_bad_steps() -> None:
    model = Named()
    optimizer = build_optimizer(model, TrainConfig(optimizer="sgd"), global_batch=16)
    expected = build_optimizer(model, TrainConfig(), global_batch=16)
    assert isinstance(optimizer, SGD)
    for own, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert (own["name"], own["lr"], own["weight_decay"]) == (
            other["name"],
            other["lr"],
            other["weight_decay"],
        )
        assert own["momentum"] == 0.9
    weight = model.encoder["value_proj"].weight
    before = weight.item()
    for is_bad, steps in ((1.0, 0), (0.0, 1)):
        weight.grad = torch.ones_like(weight)
        optimizer.found_inf = torch.tensor(is_bad)
        optimizer.step()
        assert weight.item() == pytest.approx(before - steps * 2e-4, abs=1e-6)


def test_rates_are_unscaled_without_scaling() -> None:
    config = TrainConfig(scale_learning_rate=False)
    assert build_optimizer(Named(), config, global_batch=64).param_groups[0]["lr"] == 2e-4


def test_the_step_schedule_drops_after_each_listed_epoch() -> None:
    config = TrainConfig(epochs=50, drop_epochs=(45, 40))
    factors = [learning_rate_factor(config, epoch * 7 + 6, 7) for epoch in (0, 39, 40, 44, 45, 49)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_drop_factor_applies_at_each_drop() -> None:
    config = TrainConfig(epochs=6, drop_epochs=(2, 4), drop_factor=0.5)
    assert [learning_rate_factor(config, epoch, 1) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_the_offset_factor_scales_its_group_only() -> None:
    config = TrainConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, offset_learning_rate_factor=0.5)
    groups = build_optimizer(Named(), config, global_batch=16).param_groups
    assert {group["name"]: group["lr"] for group in groups} == {
        "rest": 1e-3,
        "backbone": 1e-4,
        "offsets": 5e-4,
    }


def test_one_cycle_rises_to_the_full_rate_and_ends_near_zero() -> None:
    config = TrainConfig(epochs=10, schedule="one_cycle", warmup_share=0.2)
    factors = [learning_rate_factor(config, step, 10) for step in range(100)]
    assert max(factors) == 1
    assert factors.index(1) == 19
    assert all(a < b for a, b in pairwise(factors[:20]))
    assert all(a >= b for a, b in pairwise(factors[20:]))
    assert 0 < factors[-1] < 1e-3


def test_setting_the_rates_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(Named(), TrainConfig(), global_batch=16)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-5, 2e-6, 2e-6])
