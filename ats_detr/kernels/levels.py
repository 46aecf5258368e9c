"""Sizes of the feature levels, in the forms that the operators accept."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ats_detr.kernels.dispatch import INTEGERS, invalid, runs_inside_graph

LevelShapes = Sequence[tuple[int, int]]


def as_level_shapes(level_shapes: LevelShapes | Tensor) -> LevelShapes | Tensor:
    """(height, width) of each level as integers; a tensor remains one while a compiler traces: its numbers are unknown.

    Raises ValueError for anything but integers >= 1, and for a tensor on a device.
    """
    tracing = runs_inside_graph()
    if not isinstance(level_shapes, Tensor):
        pairs = [tuple(pair) for pair in level_shapes]
        sides = [side for pair in pairs for side in pair]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"level_shapes {level_shapes}: must be (height, width) of each level")
        if not any(isinstance(side, Tensor) for side in sides):
            if not tracing:
                try:
                    pairs = [(operator.index(height), operator.index(width)) for height, width in pairs]
                except TypeError:
                    raise ValueError(f"level_shapes {level_shapes}: sizes must be integers") from None
            if any(side < 1 for side in sides):
                raise ValueError(f"level_shapes {pairs}: every side must be at least 1")
            return tuple(pairs)
        tensors = [torch.as_tensor(side) for side in sides]
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
        level_shapes = torch.stack(tensors).view(-1, 2) if device is None else torch.empty(0, device=device)
    if level_shapes.device.type != "cpu":
        raise ValueError(
            f"level_shapes is on {level_shapes.device}: reading it would synchronise with the device in every call; "
            "pass pairs of integers (the sizes of the feature maps) or a tensor on the CPU"
        )
    if level_shapes.ndim != 2 or level_shapes.shape[1] != 2 or level_shapes.dtype not in INTEGERS:
        raise invalid("level_shapes", level_shapes, "[L, 2], integers")
    return level_shapes if tracing else as_level_shapes(level_shapes.tolist())


def num_tokens_of(level_shapes: LevelShapes) -> int:
    """Tokens of all levels."""
    return sum(height * width for height, width in level_shapes)


def split_shapes(shapes: LevelShapes | Tensor) -> tuple[list[int], Tensor | None]:
    """Level shapes as the arguments `sizes` and `shapes_L2` of the custom operators, one of which is empty."""
    if isinstance(shapes, Tensor):
        return [], shapes
    return [side for shape in shapes for side in shape], None


def join_shapes(sizes: Sequence[int], shapes_L2: Tensor | None, num_tokens: int) -> LevelShapes:
    """The inverse of `split_shapes`, within an operator. Checks what `as_level_shapes` could not read from a tensor."""
    if shapes_L2 is None:
        return tuple(zip(sizes[::2], sizes[1::2], strict=True))
    shapes = as_level_shapes(shapes_L2.tolist())
    check_num_tokens(shapes, num_tokens)
    return shapes


def check_num_tokens(shapes: LevelShapes | Tensor, num_tokens: int) -> None:
    """Raises ValueError unless the levels have this number of tokens. A tensor's are checked within the operator."""
    if not isinstance(shapes, Tensor) and num_tokens_of(shapes) != num_tokens:
        raise ValueError(
            f"level_shapes {list(shapes)} have {num_tokens_of(shapes)} tokens: must have {num_tokens}"
        )
