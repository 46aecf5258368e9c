"""One deformable attention problem as the kernels take it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ats_detr.kernels.attention import MAX_SIDE
from ats_detr.kernels.gpu import tuning
from ats_detr.kernels.gpu.common import SIZES, next_power_of_2
from ats_detr.kernels.levels import LevelShapes

MAX_VALUE_PITCH = 2 * MAX_SIDE + 1
"""Elements from token to token: those of a line of a level have 32-bit offsets."""


class Problem(NamedTuple):
    """What every kernel of one call needs to know."""

    value: Tensor | None
    """None where only the samples matter (the attention map)."""
    reference: Tensor | None
    offsets: Tensor
    weights: Tensor
    image_index: Tensor | None
    sizes: LevelShapes
    levels: tuple[int, ...]
    """(height << 16 | width) of eight levels, 0 for those that are not there."""
    thin: bool
    """Whether some level is one pixel wide or high."""
    large: bool
    """Whether some level has more than 2^24 pixels."""
    num_queries: int
    points: tuple[int, ...]
    """Points of each level."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """num_queries, queries_per_image and num_images, as the kernels take them."""
        num_images = self.value.shape[0]
        return self.num_queries, max(1, self.num_queries // num_images), num_images

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sum: the output is 0 then."""
        return self.value.numel() == 0 or self.weights.numel() == 0

    def constants(self) -> dict:
        """Compile-time constants common to the kernels."""
        return dict(
            HEADS=self.weights.shape[1],
            LEVELS=len(self.points),
            POINTS=self.points,
            FIRST=tuple(itertools.accumulate(self.points, initial=0))[:-1],
            OFFSET_PITCH=self.offsets.stride(0),
            REFERENCE=0 if self.reference is None else self.reference.shape[-1],
            enable_fp_fusion=True,
            num_stages=1,
        )

    def value_constants(self, kind: str) -> dict:
        """Compile-time constants of the kernels that read value rows as `kind`."""
        head_dim = self.value.shape[-1]
        columns = head_dim if kind == "plain" else head_dim // 2
        return dict(
            self.constants(),
            HEAD_DIM=head_dim,
            VALUE_PITCH=self.value.stride(1),
            WEIGHT_PITCH=self.weights.stride(0),
            PACKED=self.image_index is not None,
            THIN=self.thin,
            LARGE=self.large,
            KIND=kind,
            COLUMNS=columns,
            WIDTH=next_power_of_2(columns),
            SAMPLES_PADDED=next_power_of_2(sum(self.points)),
        )

    def key(self) -> tuning.Key:
        dtype = str(self.value.dtype).removeprefix("torch.")
        num_points = self.points[0] if len(set(self.points)) == 1 else "-".join(map(str, self.points))
        num_heads, head_dim = self.value.shape[2:]
        return (dtype, num_heads, head_dim, len(self.points), num_points, self.reference is not None)

    def unrolled(self, factor: int) -> tuple[int, ...]:
        """Points per step of each level's loop: the largest divisor of its points that is below twice `factor`."""
        return tuple(max(s for s in range(1, 2 * factor) if number % s == 0) for number in self.points)


def prepare(
    value: Tensor | None,
    shapes: LevelShapes,
    reference: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    image_index: Tensor | None,
    num_points: Sequence[int] = (),
) -> Problem:
    """Copies tensors that the kernels cannot address. The strides of tokens and queries are arbitrary (slices of one
    larger projection are read in place); the data of a token or query must be contiguous and 16-byte aligned. Offsets
    within a tensor of N rows are int32, as are those from one line of a level to the next.
    """
    levels, thin, large = _pack_levels(tuple(shapes))
    if value is not None:
        batch, num_tokens, _, head_dim = value.shape
        in_place = value.stride(3) == 1 and value.stride(2) == head_dim and value.data_ptr() % 16 == 0
        in_place = in_place and value.stride(1) <= MAX_VALUE_PITCH
        if not in_place or (batch > 1 and value.stride(0) != num_tokens * value.stride(1)):
            value = value.clone(memory_format=torch.contiguous_format)
    if not _rows_are_near(offsets) or offsets.stride(0) % 2 or offsets.data_ptr() % 16:
        offsets = offsets.clone(memory_format=torch.contiguous_format)
    if not _rows_are_near(weights):
        weights = weights.clone(memory_format=torch.contiguous_format)
    if reference is not None:
        reference = reference.contiguous()
    if image_index is not None:
        if image_index.dtype == torch.int64:  # a cast alone would wrap around: 2^32 would be image 0
            image_index = image_index.clamp(-1, 2**31 - 1)
        image_index = image_index.to(torch.int32).contiguous()
    return Problem(
        value, reference, offsets, weights, image_index, sizes=shapes, levels=levels, thin=thin, large=large,
        num_queries=offsets.shape[0], points=tuple(num_points) or (weights.shape[3],) * weights.shape[2],
    )  # fmt: skip


def _rows_are_near(tensor: Tensor) -> bool:
    """Whether each row is contiguous and int32 offsets reach all of them."""
    contiguous = tensor.is_contiguous() or tensor[:1].is_contiguous()
    return contiguous and tensor.stride(0) * tensor.shape[0] < 2**31


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on: 16-bit channels are read as 32-bit words."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=256)
def _pack_levels(shapes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], bool, bool]:
    """`levels`, `thin` and `large` of a problem."""
    # Only the numbers in a tensor have not been checked before.
    if any(max(shape) > MAX_SIDE for shape in shapes):
        raise ValueError(
            f"level_shapes {list(shapes)}: the kernels support sides of at most {MAX_SIDE} pixels"
        )
    levels = tuple(height << 16 | width for height, width in shapes)
    large = any(height * width > 2**24 for height, width in shapes)
    return levels + (0,) * (len(SIZES) - len(levels)), any(1 in shape for shape in shapes), large


def row_kind(value: Tensor, whole_rows: bool = False) -> str:
    """How a row of values is read, see `common.load_row`."""
    head_dim, pitch = value.shape[-1], value.stride(1)
    if value.dtype == torch.float32:
        return "plain" if whole_rows or head_dim % 8 else "halves"
    if head_dim % 2 or pitch % 2:
        return "plain"
    return "bf16" if value.dtype == torch.bfloat16 else "fp16"
