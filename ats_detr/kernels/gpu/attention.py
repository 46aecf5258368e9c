"""Launches the deformable attention kernels on contiguous enough tensors. Shapes are checked by the caller."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ats_detr.kernels.gpu import binned, msda, tuning
from ats_detr.kernels.gpu.common import INTERPRETING, SIZES
from ats_detr.kernels.gpu.host import cdiv, next_power_of_2

MAX_VALUE_PITCH = 65535  # elements from token to token: a line of a level has at most 32,767 tokens
PIECE = 64  # samples per step of reduce_tiles


class Problem(NamedTuple):
    """What every kernel of one call needs to know."""

    value: Tensor | None
    """None where only the samples matter (the attention map)."""
    reference: Tensor | None
    offsets: Tensor
    weights: Tensor
    image_index: Tensor | None
    sizes: tuple[tuple[int, int], ...]
    levels: tuple[int, ...]
    """(height << 16 | width) of eight levels, 0 for those that are not there."""
    thin: bool
    """Whether some level is one pixel wide or high."""
    large: bool
    """Whether some level has more than 2^24 pixels."""
    num_queries: int

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
        _, num_heads, num_levels, num_points = self.weights.shape
        return dict(
            HEADS=num_heads,
            LEVELS=num_levels,
            POINTS=num_points,
            OFFSET_PITCH=self.offsets.stride(0),
            REFERENCE=0 if self.reference is None else self.reference.shape[-1],
            enable_fp_fusion=True,
            num_stages=1,
        )

    def value_constants(self, kind: str) -> dict:
        """Compile-time constants of the kernels that read value rows as `kind`."""
        head_dim = self.value.shape[-1]
        columns = head_dim if kind == "plain" else head_dim // 2
        constants = self.constants()
        return dict(
            constants,
            HEAD_DIM=head_dim,
            VALUE_PITCH=self.value.stride(1),
            WEIGHT_PITCH=self.weights.stride(0),
            PACKED=self.image_index is not None,
            THIN=self.thin,
            LARGE=self.large,
            KIND=kind,
            COLUMNS=columns,
            WIDTH=next_power_of_2(columns),
            SAMPLES_PADDED=next_power_of_2(constants["LEVELS"] * constants["POINTS"]),
        )

    def key(self) -> tuning.Key:
        dtype = str(self.value.dtype).removeprefix("torch.")
        _, num_heads, num_levels, num_points = self.weights.shape
        return (dtype, num_heads, self.value.shape[-1], num_levels, num_points, self.reference is not None)


def prepare(
    value: Tensor | None,
    sizes: Sequence[int],
    reference: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    image_index: Tensor | None,
) -> Problem:
    """Copies what the kernels cannot address: they take the pitch from token to token and from query to query as it is
    (so that slices of one larger projection are read in place), and everything within contiguous and 16-byte
    aligned. Offsets within a tensor of N rows are int32, as are those from one line of a level to the next.
    """
    pairs, levels, thin, large = _level_sizes(tuple(sizes))
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
        value, reference, offsets, weights, image_index, sizes=pairs, levels=levels, thin=thin, large=large,
        num_queries=offsets.shape[0],
    )  # fmt: skip


def _rows_are_near(tensor: Tensor) -> bool:
    """Whether each row is contiguous and int32 offsets reach all of them."""
    contiguous = tensor.is_contiguous() or tensor[:1].is_contiguous()
    return contiguous and tensor.stride(0) * tensor.shape[0] < 2**31


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on: 16-bit channels are read as 32-bit words."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=256)
def _level_sizes(sizes: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], bool, bool]:
    """`sizes`, `levels`, `thin` and `large` of a problem."""
    pairs = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    levels = tuple(height << 16 | width for height, width in pairs)
    large = any(height * width > 2**24 for height, width in pairs)
    return pairs, levels + (0,) * (len(SIZES) - len(levels)), 1 in sizes, large


def row_kind(value: Tensor, whole_rows: bool = False) -> str:
    """How a row of values is read, see `common.load_row`."""
    head_dim, pitch = value.shape[-1], value.stride(1)
    if value.dtype == torch.float32:
        return "plain" if whole_rows or head_dim % 8 else "halves"
    if head_dim % 2 or pitch % 2:
        return "plain"
    return "bf16" if value.dtype == torch.bfloat16 else "fp16"


def _block(constants: dict, num_warps: int, multiple: int) -> int:
    """Rows per program that give every lane four consecutive words, `multiple` times over."""
    return max(1, 128 // constants["WIDTH"]) * num_warps * multiple


def forward(problem: Problem, num_rows: Tensor | None, out: Tensor | None = None) -> Tensor:
    """[N, H * D] deformable attention (in `out` if given); rows past `num_rows` are left as they are."""
    value, num_queries = problem.value, problem.num_queries
    num_heads, head_dim = value.shape[2:]
    if out is None:
        out = value.new_empty(num_queries, num_heads * head_dim)
    if problem.is_empty:
        return out.zero_()

    def launch(num_warps: int, unroll: int, multiple: int = 1, whole_rows: bool = False) -> None:
        constants = problem.value_constants(row_kind(value, whole_rows))
        block = _block(constants, num_warps, multiple)
        msda.msda_forward[(cdiv(num_queries * num_heads, block),)](
            value, problem.reference, problem.offsets, problem.weights, problem.image_index, num_rows, out,
            *problem.counts, value.shape[1], *problem.levels,
            **constants, COUNTED=num_rows is not None, BLOCK=block, UNROLL=unroll, num_warps=num_warps,
        )  # fmt: skip

    tuning.run("msda_forward", problem.key(), num_queries, value.device, launch)
    return out


def backward(
    problem: Problem, out: Tensor, grad_out: Tensor, need_value: bool, deterministic: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients by value (None unless needed), offsets and weights."""
    value, num_queries = problem.value, problem.num_queries
    grad_offsets = torch.empty_like(problem.offsets, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(problem.weights, memory_format=torch.contiguous_format)
    if problem.is_empty:
        return torch.zeros_like(value) if need_value else None, grad_offsets.zero_(), grad_weights.zero_()
    grad_out, out = _aligned(grad_out), _aligned(out)
    method = "none"
    if need_value:
        method = "sorted" if deterministic else tuning.value_gradient(problem.key(), num_queries)
        if method == "tiles" and problem.large:  # more tiles than `reduce_tiles` counts
            method = "atomic"
    grad_value = None
    if method == "atomic":
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)

    def launch(num_warps: int, unroll: int, multiple: int = 1) -> None:
        constants = problem.value_constants(row_kind(value))
        block = _block(constants, num_warps, multiple)
        msda.msda_backward[(cdiv(num_queries * value.shape[2], block),)](
            value, problem.reference, problem.offsets, problem.weights, problem.image_index, out, grad_out,
            grad_value, grad_offsets, grad_weights,
            *problem.counts, value.shape[1], *problem.levels,
            **constants, SCATTER=method == "atomic", BLOCK=block, UNROLL=unroll, num_warps=num_warps,
        )  # fmt: skip

    def reset() -> None:
        if grad_value is not None:
            grad_value.zero_()

    tuning.run(
        "msda_backward", (*problem.key(), method == "atomic"), num_queries, value.device, launch, reset
    )
    if method == "atomic":
        grad_value = _value_gradient_in_order(grad_value, value)
    elif method == "tiles":
        grad_value = value_gradient_tiled(problem, grad_out)
    elif method == "sorted":
        grad_value = value_gradient_sorted(problem, grad_out)
    return grad_value, grad_offsets, grad_weights


def _value_gradient_in_order(summed: Tensor, value: Tensor) -> Tensor:
    kind = row_kind(value)
    if kind not in ("bf16", "fp16"):
        return summed.to(value.dtype)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    columns, num_rows = value.shape[-1] // 2, summed.numel() // value.shape[-1]
    width = next_power_of_2(columns)
    block = max(1, 2048 // width)
    msda.interleave_halves[(cdiv(num_rows, block),)](
        summed, out, num_rows, COLUMNS=columns, WIDTH=width, KIND=kind, BLOCK=block, num_warps=4
    )
    return out


def spatial_order(problem: Problem) -> Tensor:
    """int32 [N] queries image by image, neighbours on the image close to each other (by reference, or first sample)."""
    position = problem.offsets if problem.reference is None else problem.reference
    num_queries = problem.num_queries
    keys = torch.empty(num_queries, dtype=torch.int16, device=position.device)
    bits = max(0, 16 - (problem.value.shape[0] - 1).bit_length()) // 2
    binned.spatial_keys[(cdiv(num_queries, 256),)](
        position, problem.image_index, keys, *problem.counts[:2], PITCH=position.stride(0),
        PACKED=problem.image_index is not None, BITS=bits, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return keys.argsort().int()


def value_gradient_tiled(problem: Problem, grad_out: Tensor) -> Tensor:
    """Gradient by the value from samples sorted by tile, see `binned`."""
    value, weights, num_queries = problem.value, problem.weights, problem.num_queries
    order = spatial_order(problem)
    integers = dict(dtype=torch.int32, device=value.device)

    def launch(samples_per_program: int, num_warps: int, reduce_warps: int, owned: bool) -> Tensor:
        tiles = Tiles.of(problem, owned)
        copies = 4 if owned else 1
        counts = torch.zeros(1 + tiles.groups * tiles.total, **integers)
        ranks = torch.empty(copies, weights.numel(), **integers)
        points = next_power_of_2(weights.shape[3])
        block = max(1, samples_per_program // points)
        num_programs = cdiv(num_queries, block) * weights.shape[1] * weights.shape[2]
        binned.count_samples[(num_programs,)](
            problem.reference, problem.offsets, problem.image_index, order, counts, ranks,
            *problem.counts, tiles.total, *problem.levels, **problem.constants(),
            PACKED=problem.image_index is not None, OWNED=owned, POINTS_PADDED=points, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
        starts = counts.cumsum(0, dtype=torch.int32)
        # as many as there can be: how many samples are in several tiles, or in none, only the device knows
        samples = torch.empty(copies * weights.numel(), 4, **integers)
        _place_samples(problem, tiles, starts, ranks, samples)
        return _reduce_tiles(problem, tiles, samples, starts, grad_out, reduce_warps)

    density = tuning.density(weights.numel(), value.shape[:3].numel())
    return tuning.run("value_tiles", (*problem.key(), density), num_queries, value.device, launch)


class Tiles(NamedTuple):
    """How the levels of one image and head are cut."""

    sides: list[tuple[int, int]]
    """(rows, columns) of tiles of each level."""
    groups: int
    """Images x heads."""
    owned: bool
    """Whether tiles own their pixels, see `binned`."""

    @staticmethod
    def of(problem: Problem, owned: bool) -> Tiles:
        step = binned.WINDOW.value if owned else binned.CELLS.value
        sides = [(cdiv(height, step), cdiv(width, step)) for height, width in problem.sizes]
        return Tiles(sides, problem.value.shape[0] * problem.value.shape[2], owned)

    @property
    def total(self) -> int:
        return sum(rows * columns for rows, columns in self.sides)


def _place_samples(
    problem: Problem, tiles: Tiles, starts: Tensor | None, ranks: Tensor, samples: Tensor
) -> None:
    num_heads, num_levels, num_points = problem.weights.shape[1:]
    levels, points = next_power_of_2(num_levels), next_power_of_2(num_points)
    # 512 samples need 130 registers where tiles own their pixels, 256 half of that and 6 % more instructions (sm_90).
    block = max(1, (8192 if INTERPRETING else 256) // (levels * points))
    binned.place_samples[(cdiv(problem.num_queries * num_heads, block),)](
        problem.reference, problem.offsets, problem.weights, problem.image_index, starts, ranks, samples,
        *problem.counts, tiles.total, *problem.levels, **problem.constants(),
        WEIGHT_PITCH=problem.weights.stride(0), PACKED=problem.image_index is not None, OWNED=tiles.owned,
        LEVELS_PADDED=levels, POINTS_PADDED=points, BLOCK=block, num_warps=2,
    )  # fmt: skip


def _reduce_tiles(
    problem: Problem,
    tiles: Tiles,
    samples: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    num_warps: int,
    colors: Sequence[int] = (-1,),
) -> Tensor:
    """The value's gradient, in its dtype; a launch for each of `colors` (see `binned.reduce_tiles`)."""
    value = problem.value
    batch, num_tokens, num_heads, head_dim = value.shape
    num_samples = problem.counts[1] * problem.weights.shape[3]
    # Few long programs sum to memory less often, but are too few to fill the GPU where there is little to do.
    per_program = (16 if problem.weights.numel() >= 4 << 20 else 8) * PIECE
    num_tiles = [rows * columns for rows, columns in tiles.sides]
    splits = [  # as binned._splits: a level that is split there only would have two owners of a pixel
        max(1, (num_samples + number * (per_program // 2)) // (number * per_program)) for number in num_tiles
    ]
    own_levels = next((i for i, n in enumerate(splits) if n > 1), len(splits)) if tiles.owned else 0
    first_summed = sum(height * width for height, width in problem.sizes[:own_levels])
    summed_shape = (batch, num_tokens - first_summed, num_heads, head_dim)
    summed = torch.zeros(summed_shape, dtype=torch.float32, device=value.device)
    owned = torch.empty(value.shape, dtype=value.dtype, device=value.device) if tiles.owned else None

    operand = _operand(value)
    width = max(16, next_power_of_2(head_dim))
    if operand == tl.float32:  # three products for one: wider or more would spill
        width, num_warps, stages = min(width, 32), 4, 2
    else:
        width, stages = min(width, 128), 3
        num_warps = num_warps if width <= 32 else 4
    for color in colors:
        if color < 0:
            programs = sum(number * split for number, split in zip(num_tiles, splits, strict=True))
        else:
            programs = sum(
                ((rows + 1 - color // 2) // 2) * ((columns + 1 - color % 2) // 2)
                for rows, columns in tiles.sides
            )
        if programs == 0:
            continue
        binned.reduce_tiles[(tiles.groups * programs, cdiv(head_dim, width))](
            samples, starts, grad_out, owned, summed, num_tokens, first_summed, tiles.total, tiles.groups, num_samples,
            per_program, *problem.levels, HEADS=num_heads, HEAD_DIM=head_dim, LEVELS=len(tiles.sides), WIDTH=width,
            OWNED=tiles.owned, COLOR=color, OPERAND=operand, SPLIT=operand == tl.float32 and not INTERPRETING,
            PIECE=PIECE, STAGES=stages, num_warps=num_warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    if owned is None:
        return summed.to(value.dtype)
    if summed.numel():
        owned[:, first_summed:] = summed
    return owned


def _operand(value: Tensor) -> tl.dtype:
    """Type of the matrix products' factors (sums are float32); the interpreter has no bfloat16 products."""
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if INTERPRETING else types.get(value.dtype, tl.float32)


def value_gradient_sorted(problem: Problem, grad_out: Tensor) -> Tensor:
    """Gradient by the value, bit-equal from run to run, see `binned`."""
    value, weights, num_queries = problem.value, problem.weights, problem.num_queries
    num_heads, _, num_points = weights.shape[1:]
    tiles = Tiles.of(problem, owned=False)
    num_bins = tiles.groups * tiles.total
    num_samples = weights.numel()
    integers = dict(dtype=torch.int32, device=value.device)
    points_padded = next_power_of_2(num_points)
    block = max(1, 512 // points_padded)
    bins = torch.empty(num_samples, **integers)
    binned.bin_samples[(cdiv(num_queries * num_heads, block),)](
        problem.reference, problem.offsets, problem.image_index, bins,
        *problem.counts, tiles.total, num_bins, *problem.levels, **problem.constants(),
        PACKED=problem.image_index is not None, POINTS_PADDED=points_padded, BLOCK=block, num_warps=4,
    )  # fmt: skip
    sorted_bins, order = bins.sort(stable=True)
    starts = torch.searchsorted(sorted_bins, torch.arange(num_bins + 1, **integers), out_int32=True)
    positions = torch.empty(num_samples, **integers)
    binned.invert_permutation[(cdiv(num_samples, 1024),)](order, positions, num_samples, BLOCK=1024)
    samples = torch.empty(num_samples, 4, **integers)
    _place_samples(problem, tiles, None, positions, samples)
    return _reduce_tiles(problem, tiles, samples, starts, grad_out, num_warps=2, colors=range(4))
