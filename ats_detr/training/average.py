"""A moving average of a model's weights, which often detects better than the weights themselves."""

from __future__ import annotations

import copy

import torch

from ats_detr.model import Detr


class MovingAverage:
    """`model`: a copy whose weights follow those of the trained one, exponentially, without waiting for the device.

    In step t (from 0) the average keeps min(decay, (1 + t) / (10 + t)) of itself: early weights, which are mostly
    random, are soon forgotten. Statistics of batch norms are averaged like weights.
    """

    def __init__(self, model: Detr, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Detr, step: int) -> None:
        """Move towards the weights of `model` after step number `step`."""
        own, other = list(self.model.state_dict().values()), list(model.state_dict().values())
        moving = [i for i, tensor in enumerate(own) if tensor.is_floating_point()]
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([own[i] for i in moving], [other[i] for i in moving], weight)
        for i in set(range(len(own))) - set(moving):
            own[i].copy_(other[i])
