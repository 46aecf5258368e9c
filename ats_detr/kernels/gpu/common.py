"""What the deformable attention kernels share: levels, samples, hat weights, rows of values.

A *row* is one head of one query. Per sample the pixel window is clamped into the map and weighted by a hat function
max(0, 1 - |x - pixel|), which is bilinear interpolation with zeros outside, so that no load is masked and the
four corners share one address.

A row of values is read as two float32 half-tiles (see `load_row`): 16-bit channels as 32-bit words of two neighbours,
float32 channels as first and second half. Half as many lanes per row then repeat the index arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET: kernels run on the CPU, in NumPy
SIZES = [f"shape{level}" for level in range(8)]  # launch arguments that hold the level sizes
LOG2E = tl.constexpr(1.4426950408889634)


# Triton's functions of these names serve its compiler too and take 1.4 us a call from Python: a forward and a backward
# pass of attention made up to 19 such calls.
def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def operand_of(dtype: torch.dtype) -> tl.dtype:
    """Type of the factors of matrix products; sums are float32. The interpreter has no bfloat16 products."""
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if INTERPRETING else types.get(dtype, tl.float32)


@triton.jit
def level_size(
    LEVEL: tl.constexpr, shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7
):  # (height << 16 | width) each
    if LEVEL == 0:
        packed = shape0
    elif LEVEL == 1:
        packed = shape1
    elif LEVEL == 2:
        packed = shape2
    elif LEVEL == 3:
        packed = shape3
    elif LEVEL == 4:
        packed = shape4
    elif LEVEL == 5:
        packed = shape5
    elif LEVEL == 6:
        packed = shape6
    else:
        packed = shape7
    return packed >> 16, packed & 0xFFFF


@triton.jit
def view_as(ptr, dtype: tl.constexpr):
    return ptr.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def _load_tile(ptr, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    if COLUMNS == WIDTH:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=(column < COLUMNS)[None, :], other=0)


@triton.jit
def load_row(ptr, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Two float32 tiles [rows, WIDTH] out of the rows at `ptr`.

    KIND 'bf16' and 'fp16' read COLUMNS words of two channels (even, odd); 'halves' reads two runs of COLUMNS channels;
    'plain' one run (the second tile is then the first, and unused).
    """
    first = _load_tile(ptr, column, COLUMNS, WIDTH)
    if KIND == "bf16":
        return (first << 16).to(tl.float32, bitcast=True), (first & -65536).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        even = first.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (first >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return even, odd
    elif KIND == "halves":
        return first.to(tl.float32), _load_tile(ptr + COLUMNS, column, COLUMNS, WIDTH).to(tl.float32)
    else:
        return first.to(tl.float32), first.to(tl.float32)


@triton.jit
def store_row(ptr, first, second, mask, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """The inverse of `load_row`."""
    if KIND == "bf16" or KIND == "fp16":
        dtype: tl.constexpr = tl.bfloat16 if KIND == "bf16" else tl.float16
        even = first.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
        odd = second.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
        tl.store(ptr, even | (odd << 16), mask=mask)
    else:
        tl.store(ptr, first.to(ptr.dtype.element_ty), mask=mask)
        if KIND == "halves":
            tl.store(ptr + COLUMNS, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_pair(ptr, index):
    """(x, y) number `index` of an array of pairs, float32; one load of 4 or 8 bytes."""
    if ptr.dtype.element_ty == tl.float32:
        pair = tl.load(view_as(ptr, tl.int64) + index)
        return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(
            tl.float32, bitcast=True
        )
    else:
        pair = tl.load(view_as(ptr, tl.int32) + index)
        if ptr.dtype.element_ty == tl.bfloat16:
            return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        else:
            x = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return x, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_pair(ptr, x, y):
    """(x, y) packed as the words that `load_pair` reads from `ptr`."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype == tl.float32:
        low = x.to(tl.uint32, bitcast=True).to(tl.int64)
        return low | (y.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:
        low = x.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
        return low | (y.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def pair_words(ptr):
    if ptr.dtype.element_ty == tl.float32:
        return view_as(ptr, tl.int64)
    else:
        return view_as(ptr, tl.int32)


@triton.jit
def window(x, size, THIN: tl.constexpr):
    """First pixel of the clamped two-pixel window, the distance to it, and the hat weights of both pixels.

    Infinite and NaN coordinates get an in-range window and zero weights. THIN: some level is one pixel wide or high;
    the window's second pixel is then the first again, with weight 0.
    """
    base = tl.maximum(tl.minimum(tl.floor(x), size - 2.0), 0.0)
    t = x - base
    first = tl.clamp(1.0 - tl.abs(t), 0.0, 1.0)
    second = tl.clamp(1.0 - tl.abs(t - 1.0), 0.0, 1.0)
    if THIN:
        second = tl.where(size > 1.0, second, 0.0)
    return base, t, first, second


@triton.jit
def slopes(t, size, THIN: tl.constexpr):
    """Derivatives of the two hat weights by the coordinate: the right-hand ones at pixel centres."""
    first = tl.where(t < 0.0, tl.where(t >= -1.0, 1.0, 0.0), tl.where(t < 1.0, -1.0, 0.0))
    second = tl.where(t < 1.0, tl.where(t >= 0.0, 1.0, 0.0), tl.where(t < 2.0, -1.0, 0.0))
    if THIN:
        second = tl.where(size > 1.0, second, 0.0)
    return first, second


@triton.jit
def reference_on_level(reference_ptr, query, width, height, level, LEVELS: tl.constexpr, POINTS: tl.constexpr,
               REFERENCE: tl.constexpr):  # fmt: skip
    """Pixel coordinates of each query's reference on this level, and pixels per unit of offset.

    REFERENCE 2: points, 4: boxes (cx, cy, w, h), 0: none (then offsets are normalised locations, and levels may differ
    in POINTS).
    """
    x = -0.5
    y = -0.5
    x_unit = width
    y_unit = height
    if REFERENCE != 0:
        at = (query * LEVELS + level) * REFERENCE
        x = tl.fma(tl.load(reference_ptr + at).to(tl.float32), width, -0.5)
        y = tl.fma(tl.load(reference_ptr + at + 1).to(tl.float32), height, -0.5)
        x_unit = 1.0
        y_unit = 1.0
    if REFERENCE == 4:
        x_unit = tl.load(reference_ptr + at + 2).to(tl.float32) * width * (0.5 / POINTS[0])
        y_unit = tl.load(reference_ptr + at + 3).to(tl.float32) * height * (0.5 / POINTS[0])
    return x, y, x_unit, y_unit


@triton.jit
def images_of(image_ptr, query, queries_per_image, num_images, PACKED: tl.constexpr):
    """Image of each query, in 0..num_images-1, and what to add to the coordinates of its samples where PACKED: NaN
    for an image index out of that range (see `reference.sample_packed`), else 0."""
    if PACKED:
        index = tl.load(image_ptr + query)
        image = tl.maximum(tl.minimum(index, num_images - 1), 0)
        return image, tl.where(image == index, 0.0, float("nan"))
    else:
        return query // queries_per_image, 0.0


@triton.jit
def softmax_terms(weight_ptr, at, SAMPLES: tl.constexpr, PADDED: tl.constexpr):
    """Maximum of each row's SAMPLES logits, and 1 / sum of exp(logit - maximum): arguments of `softmax_weight`."""
    column = tl.arange(0, PADDED)
    logit = tl.load(
        weight_ptr + at[:, None] + column[None, :], mask=(column < SAMPLES)[None, :], other=float("-inf")
    )
    logit = logit.to(tl.float32)
    top = tl.max(logit, axis=1)
    return top, 1.0 / tl.sum(tl.exp2((logit - top[:, None]) * LOG2E), axis=1)


@triton.jit
def softmax_weight(logit, top, inverse_sum):
    """The maximum is subtracted from the logit itself: any common offset of the logits cancels exactly."""
    return tl.exp2((logit - top) * LOG2E) * inverse_sum


@triton.jit
def pixel_index(xb, yb, width, width_f, LARGE: tl.constexpr):
    """Index of pixel (xb, yb) within its level. float32 is exact up to 2^24 pixels; LARGE: some level has more."""
    if LARGE:
        return yb.to(tl.int32) * width + xb.to(tl.int32)
    else:
        return (yb * width_f + xb).to(tl.int32)


@triton.jit
def points_of(level, POINTS: tl.constexpr, LEVELS: tl.constexpr):
    """POINTS[level], for a tensor of levels."""
    points = level * 0 + POINTS[LEVELS - 1]
    for other in tl.static_range(LEVELS - 1):
        points = tl.where(level == other, POINTS[other], points)
    return points


@triton.jit
def first_sample(level, POINTS: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr):
    """FIRST[level], for a tensor of levels; a multiplication where all levels have as many points."""
    shift = level * 0 + (FIRST[LEVELS - 1] - (LEVELS - 1) * POINTS[0])
    for other in tl.static_range(LEVELS - 1):
        shift = tl.where(level == other, FIRST[other] - other * POINTS[0], shift)
    return level * POINTS[0] + shift


@triton.jit
def samples_of_level(
    reference_ptr, offset_ptr, query, offset_at, sample, height, width,
    level, LEVELS: tl.constexpr, POINTS: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """Pixel coordinates of samples; `query`, `offset_at`, `sample`, `level` and its sides broadcast against each other.

    The same to the last bit in every kernel: multiplications that are added are asked for as such.
    """
    x0, y0, x_unit, y_unit = reference_on_level(
        reference_ptr, query, width.to(tl.float32), height.to(tl.float32), level, LEVELS, POINTS, REFERENCE
    )
    x, y = load_pair(offset_ptr, offset_at + sample)
    if REFERENCE == 2:
        return x + x0, y + y0
    else:
        return tl.fma(x, x_unit, x0), tl.fma(y, y_unit, y0)
