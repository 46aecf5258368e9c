"""Sizes of the feature levels, in the forms that the operators accept."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ats_detr.kernels.dispatch import INTEGERS, invalid, runs_inside_graph

LevelShapes = Sequence[tuple[int, int]]
MAX_LEVELS = 8
"""Levels that the Triton kernels support."""
MAX_SIDE = 32767
"""Longest side of a level that they support."""


def as_level_shapes(level_shapes: LevelShapes | Tensor) -> LevelShapes | Tensor:
    """(height, width) of each level as integers; a tensor remains one while a compiler traces: its numbers are unknown.

    Raises ValueError for anything but integers >= 1, and for a tensor on a device.
    """
    pairs: list[tuple[Any, Any]] = []
    if not isinstance(level_shapes, Tensor):
        try:
            pairs = [(height, width) for height, width in level_shapes]
        except (TypeError, ValueError):
            raise ValueError(f"level_shapes {level_shapes}: must be (height, width) of each level") from None
    sides = [side for pair in pairs for side in pair]
    tensors = [tensor for tensor in (level_shapes, *sides) if isinstance(tensor, Tensor)]
    if not tensors:
        return _as_pairs(pairs)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"level_shapes is on {tensor.device}: reading it would synchronise with the device in every call; "
                "pass pairs of integers (the sizes of the feature maps) or a tensor on the CPU"
            )
    if not isinstance(level_shapes, Tensor):
        level_shapes = torch.stack([torch.as_tensor(side) for side in sides]).view(-1, 2)
    if level_shapes.ndim != 2 or level_shapes.shape[1] != 2 or level_shapes.dtype not in INTEGERS:
        raise invalid("level_shapes", level_shapes, "[L, 2], integers")
    return level_shapes if runs_inside_graph() else _as_pairs(level_shapes.tolist())


def _as_pairs(level_shapes: Sequence[Sequence[int]]) -> LevelShapes:
    if not runs_inside_graph():
        try:
            level_shapes = [tuple(map(operator.index, pair)) for pair in level_shapes]
        except TypeError:
            raise ValueError(f"level_shapes {level_shapes}: sizes must be integers") from None
    if any(side < 1 for pair in level_shapes for side in pair):
        raise ValueError(f"level_shapes {level_shapes}: every side must be at least 1")
    return tuple((height, width) for height, width in level_shapes)


def read_level_shapes(
    level_shapes: LevelShapes | Tensor, level_start: Sequence[int] | Tensor | None = None
) -> LevelShapes | Tensor:
    """Level shapes of callers that have them as a tensor on any device, as the operators take them.

    Reading a tensor waits for its device. On a GPU, the result is kept while the tensors exist and are not written to,
    so that the layers of a pass that share them wait once. A write through `tensor.data` is not noticed; tensors of
    inference mode do not record writes and are read again by each layer.

    Args:
        level_start: [L] index of each level's first token. The operators have no such argument: levels are adjacent.

    Raises ValueError for another `level_start`, whose numbers are not read while a compiler traces.
    """
    if not isinstance(level_shapes, Tensor):
        if level_start is None:
            return level_shapes
        level_shapes = torch.as_tensor(level_shapes)
    if level_start is not None:
        level_start = torch.as_tensor(level_start)
        if level_start.shape != level_shapes.shape[:1] or level_start.dtype not in INTEGERS:
            raise invalid("level_start", level_start, f"{list(level_shapes.shape[:1])}, integers")
    if runs_inside_graph():
        return level_shapes.cpu()
    tensors = [level_shapes] if level_start is None else [level_shapes, level_start]
    recorded = not any(tensor.is_cpu or tensor.is_inference() for tensor in tensors)
    if recorded and level_shapes in _read:
        seen, shapes = _read[level_shapes]
        if [(id(tensor), tensor._version) for tensor in tensors] == [(id(r()), v) for r, v in seen]:
            return shapes
    if level_shapes.ndim != 2 or level_shapes.shape[1] != 2 or level_shapes.dtype not in INTEGERS:
        raise invalid("level_shapes", level_shapes, "[L, 2], integers")
    numbers = torch.cat([tensor.flatten().to(level_shapes) for tensor in tensors]).tolist()
    sides = numbers[: level_shapes.numel()]
    shapes = pairs(sides)
    if level_start is not None:
        first = [num_tokens_of(shapes[:level]) for level in range(len(shapes))]
        if numbers[len(sides) :] != first:
            raise ValueError(
                f"level_start {numbers[len(sides) :]}: must be {first} for levels {list(shapes)}"
            )
    if recorded:
        _read[level_shapes] = ([(weakref.ref(tensor), tensor._version) for tensor in tensors], shapes)
    return shapes


_read = WeakIdKeyDictionary()
"""Level shapes by their tensor, with the tensors that were read and their versions."""


def beyond_kernels(level_shapes: LevelShapes) -> str | None:
    """The limitation of kernels on levels of these sizes; None if they support them."""
    if len(level_shapes) > MAX_LEVELS:
        return f"{len(level_shapes)} levels exceed the maximum of {MAX_LEVELS}"
    if any(side > MAX_SIDE for pair in level_shapes for side in pair):
        return f"a side of level_shapes {list(level_shapes)} exceeds the maximum of {MAX_SIDE} pixels"
    return None


def num_tokens_of(level_shapes: LevelShapes) -> int:
    """Tokens of all levels."""
    return sum(height * width for height, width in level_shapes)


def split_shapes(shapes: LevelShapes | Tensor) -> tuple[list[int], Tensor | None]:
    """Level shapes as the arguments `sizes` and `shapes_L2` of the custom operators, one of which is empty."""
    if isinstance(shapes, Tensor):
        return [], shapes
    return [side for shape in shapes for side in shape], None


def pairs(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(height, width) of each level of a flat list."""
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def join_shapes(sizes: Sequence[int], shapes_L2: Tensor | None, num_tokens: int) -> LevelShapes:
    """The inverse of `split_shapes`, within an operator. Checks what `as_level_shapes` could not read from a tensor."""
    if shapes_L2 is None:
        return pairs(sizes)
    shapes = _as_pairs(shapes_L2.tolist())
    check_num_tokens(shapes, num_tokens)
    return shapes


def check_num_tokens(shapes: LevelShapes | Tensor, num_tokens: int) -> None:
    """Raises ValueError unless the levels have this number of tokens. A tensor's are checked within the operator."""
    if not isinstance(shapes, Tensor) and num_tokens_of(shapes) != num_tokens:
        raise ValueError(
            f"level_shapes {list(shapes)} have {num_tokens_of(shapes)} tokens: must have {num_tokens}"
        )
