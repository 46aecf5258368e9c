"""The sigmoid focal loss (Lin et al. 2017) of a table in which few entries are objects and all others background."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: R rows, K classes, M objects.


@torch.no_grad()
def background_loss(logits_RK: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The loss summed over all entries, each taken as background, and its derivative [R, K]; dtype of the logits.

    (1 - alpha) p^gamma softplus(x), whose derivative is (1 - alpha) p^gamma (gamma (1 - p) softplus(x) + p).
    Needs no assignment of objects: the device computes it while the host makes one.
    """
    p = logits_RK.sigmoid()
    cost = F.softplus(logits_RK)
    weight = p.pow(gamma).mul_(1 - alpha)
    total = (weight * cost).sum()
    derivative = cost.mul_(1 - p).mul_(gamma).add_(p).mul_(weight)
    return total, derivative


class FocalLoss(torch.autograd.Function):
    """The sum of the loss where entries (rows_M[i], labels_M[i]) are objects; none may occur twice.

    Takes what `background_loss` computed of the same logits; the backward pass only scales that derivative and writes
    those of the objects into it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_RK: Tensor,
        background: Tensor,
        derivative_RK: Tensor,
        rows_M: Tensor,
        labels_M: Tensor,
        alpha: float,
        gamma: float,
    ) -> Tensor:
        x = logits_RK[rows_M, labels_M]
        p, cost = x.sigmoid(), F.softplus(-x)
        weight = alpha * (1 - p).pow(gamma)
        as_background = (1 - alpha) * p.pow(gamma) * F.softplus(x)
        ctx.save_for_backward(derivative_RK, rows_M, labels_M, -weight * (gamma * p * cost + (1 - p)))
        return background + (weight * cost - as_background).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        derivative_RK, rows_M, labels_M, of_objects_M = ctx.saved_tensors
        grad_RK = derivative_RK * gradient
        grad_RK[rows_M, labels_M] = of_objects_M * gradient
        return grad_RK, None, None, None, None, None, None
