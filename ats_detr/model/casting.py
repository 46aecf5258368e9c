"""Weights cast to the dtype of a training pass, by one operation for many of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
"""Modules whose parameters autocast would cast at each use. Their subclasses may use them differently."""


def cast_weights(module: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of the convolutions and linear layers of a module in `dtype`, by prefixed name.

    For `torch.func.functional_call`. Parameters that have this dtype are omitted, and layers that torch.compile
    compiles, since it fuses their casts. All gradients become ready, and may be exchanged between processes, at once.
    """
    weights = {name: weight for name, weight in _weights(module, prefix) if weight.dtype != dtype}
    return dict(zip(weights, _CastWeights.apply(dtype, *weights.values()), strict=True)) if weights else {}


def _weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if module._compiled_call_impl is not None:
        return
    if type(module) in _LAYERS:
        for name, weight in module.named_parameters(recurse=False):
            yield f"{prefix}{name}", weight
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


class _CastWeights(torch.autograd.Function):
    """Casts weights, and their gradients in the backward pass, with one operation for all."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        new = cast(weights, dtype)
        ctx.mark_non_differentiable(
            *[own for own, weight in zip(new, weights, strict=True) if not weight.requires_grad]
        )
        return tuple(new)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = iter(cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return (None, *[None if gradient is None else next(present) for gradient in gradients])


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`, by one operation."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return list(tensors)
    new = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(new, list(tensors))
    return new
