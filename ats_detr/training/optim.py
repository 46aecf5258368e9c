"""The optimiser of the published runs, its learning rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import itertools
import math
from bisect import bisect_right

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ats_detr.config import TrainConfig
from ats_detr.model import Detr

_OFFSET_NAMES = ("reference_points", "sampling_offsets")
_REFERENCE_BATCH = 16


def build_optimizer(model: nn.Module, config: TrainConfig, global_batch: int) -> Optimizer:
    """AdamW or SGD with three groups: `rest`, `backbone`, and `offsets` (sampling offsets and reference points).

    With `scale_learning_rate` both learning rates are multiplied by sqrt(global_batch / 16). Frozen parameters and
    empty groups are omitted. The fused implementation skips a step where its attribute `found_inf` is a tensor of 1.

    Args:
        global_batch: images per step, over all processes.
    """
    scale = math.sqrt(global_batch / _REFERENCE_BATCH) if config.scale_learning_rate else 1.0
    learning_rates = {
        "rest": config.learning_rate * scale,
        "backbone": config.backbone_learning_rate * scale,
        "offsets": config.learning_rate * scale * config.offset_learning_rate_factor,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in learning_rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name)].append(parameter)
    groups = [
        {"params": parameters, "name": name, "lr": learning_rates[name], "base_lr": learning_rates[name]}
        for name, parameters in members.items()
        if parameters
    ]
    if config.optimizer == "sgd":
        optimizer = SGD(groups, momentum=0.9, weight_decay=config.weight_decay, fused=True)
        for parameter in itertools.chain(*members.values()):
            # torch leaves the momentum uninitialised where the first step is skipped.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _group_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return "offsets" if any(part in name for part in _OFFSET_NAMES) else "rest"


def learning_rate_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor on the learning rates of all groups in a step, where 0 is the first step of the run.

    Schedule `step`: `drop_factor` to the power of the completed epochs in `drop_epochs`. Schedule `one_cycle`: linear
    from 0 to 1 over `warmup_share` of the run, then a cosine down to 0.
    """
    if config.schedule == "step":
        return config.drop_factor ** bisect_right(sorted(config.drop_epochs), step // steps_per_epoch)
    total = config.epochs * steps_per_epoch
    warmup = max(1, round(config.warmup_share * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class MovingAverage:
    """Exponential moving average of a model's weights and batch norm statistics, in the copy `model`.

    The decay of step t (from 0) is min(decay, (1 + t) / (10 + t)), which limits the influence of the initial weights.
    Updates need no device-to-host synchronisation.
    """

    def __init__(self, model: Detr, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Detr, step: int) -> None:
        """Update the average with the weights of `model` after step `step`."""
        own, other = list(self.model.state_dict().values()), list(model.state_dict().values())
        moving = [i for i, tensor in enumerate(own) if tensor.is_floating_point()]
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([own[i] for i in moving], [other[i] for i in moving], weight)
        for i in set(range(len(own))) - set(moving):
            own[i].copy_(other[i])
