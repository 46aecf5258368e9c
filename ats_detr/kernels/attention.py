"""Multi-scale deformable attention: the public functions and the custom operators behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.dispatch import (
    FLOATS,
    INTEGERS,
    autocast,
    check_tensors,
    invalid,
    no_transforms,
    operator,
    runs_inside_graph,
)
from ats_detr.kernels.levels import (
    MAX_SIDE,
    LevelShapes,
    as_level_shapes,
    beyond_kernels,
    check_num_tokens,
    join_shapes,
    split_shapes,
)

MAX_POINTS = 16
"""Limits of the Triton kernels. Calls beyond them run the reference, or raise with backend='triton'."""
MAX_HEAD_DIM = 256
"""Channels of a head that a kernel holds; wider heads take several launches."""


def deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes | Tensor,
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    image_index_N: Tensor | None = None,
    *,
    num_rows: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Deformable attention of packed queries from raw projections, [N, H*D]: softmax and sampling locations included.

    Args:
        value_BSHD: projected values of all tokens, padded tokens already zeroed; float32, float16 or bfloat16. Under
            autocast it is cast to the autocast dtype; coordinates and logits keep theirs.
        level_shapes: (height, width) of each level, finest first: pairs of integers or a CPU tensor [L, 2].
        reference_points: [N, L, 2] points, or [N, L, 4] boxes (cx, cy, w, h), normalised to each level's full map.
        offsets_NHLP2: (x, y): in pixels of the level for points; in units of half the box divided by P for boxes.
            Prefer float32: bfloat16 rounds an offset of 8 pixels to a sixteenth.
        logits_NHLP: attention logits; the softmax is over levels and points together.
        image_index_N: integers: the image that each query attends to. Any order; queries of one image side by side are
            faster. None: N = B*Q queries, Q for every image.
        num_rows: int32 [1] on the device: queries in use; later rows of the result are not written. Inference only.
        deterministic: bit-equal gradients from run to run. None: follows `torch.use_deterministic_algorithms`.
        backend: 'triton' or 'reference', see `choose_backend`.

    Sums are float32. If any tensor is float64, the reference runs, in float64. On a GPU the value's gradient of many
    queries, or a deterministic one, multiplies factors of 16 bits if it is float32 (relative error 4e-6), and factors
    of the value's own dtype if that is shorter.

    Non-finite input never reads or writes memory outside the tensors:

    - A sample with a NaN or infinite coordinate is NaN, and so is every sample of a query whose image index is not in
      0..B-1. The row (one head of one query) is then NaN, and so are the gradients by all of its logits. The sample
      adds nothing to the value's gradient, and the gradient by its offset is 0.
    - A row whose logits contain NaN or +inf, or are all -inf, is NaN, and so are its gradients.
    - A NaN or infinite value makes every sample whose two-by-two pixels contain it NaN or infinite. The kernels clamp
      these pixels into the map, the reference omits those outside: in the kernels (and in the reference without
      gradients) a sample outside the map also becomes NaN if one of the nearest pixels is not finite.
    - A NaN or infinite weight or output gradient makes the value's gradient NaN at these pixels; where the kernels
      sort samples by tile, at all pixels of the 8x8 tile.

    The kernels are differentiable once, in reverse mode; second derivatives raise RuntimeError. Forward mode and the
    transforms of torch.func run the reference.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; with backend='triton' also more than 8
            levels, 16 points, 32,767 pixels a side or 2^31 - 1 samples, output elements or value rows. Without it,
            such calls run the reference.
    """
    check_tensors(
        {"image_index_N": image_index_N, "num_rows": num_rows}, value_BSHD=value_BSHD,
        reference_points=reference_points, offsets_NHLP2=offsets_NHLP2, logits_NHLP=logits_NHLP,
    )  # fmt: skip
    shapes = as_level_shapes(level_shapes)
    check_samples(shapes, offsets_NHLP2, logits_NHLP)
    _check_value(value_BSHD, shapes, logits_NHLP.shape[1], logits_NHLP.device)
    check_references(reference_points, offsets_NHLP2)
    num_queries, batch = offsets_NHLP2.shape[0], value_BSHD.shape[0]
    if image_index_N is not None:
        _check_integers("image_index_N", image_index_N, (num_queries,))
    if batch == 0 and num_queries > 0:
        raise ValueError(f"{num_queries} queries for values of 0 images")
    if image_index_N is None and num_queries % max(1, batch):
        raise ValueError(f"{num_queries} queries do not split over {batch} images: pass image_index_N")
    if num_rows is not None:
        _check_integers("num_rows", num_rows, (1,) if num_rows.ndim else ())
    references: Tensor | None = reference_points
    if reference_points.requires_grad and torch.is_grad_enabled():
        # learned references (one-stage models, 300 queries): the operator has no gradient by them
        offsets_NHLP2 = reference.sampling_locations(reference_points, offsets_NHLP2, shapes)
        logits_NHLP = reference.attention_weights(logits_NHLP)
        references = None
    return _msda(
        autocast(value_BSHD), *split_shapes(shapes), references, offsets_NHLP2, logits_NHLP, image_index_N, num_rows,
        deterministic, [], backend=backend, limitation=limitation(shapes, logits_NHLP, value_BSHD),
    )  # fmt: skip


def multi_scale_deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes | Tensor,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    method: str = "default",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The classical operator of Deformable DETR (eq. 3), [B, Q, H*D]; a drop-in for other DETRs.

    Takes normalised locations and softmaxed weights instead of raw projections. See `deformable_attention` for dtypes,
    non-finite input, keywords and errors. Prefer float32 locations: float16 rounds them to W/2048 pixels, bfloat16 to
    W/256.

    Args:
        num_points: points of each level, at least 1, if levels differ (RT-DETRv2, D-FINE). The tensors are then
            [B, Q, H, sum of num_points, 2] and [B, Q, H, sum of num_points], level after level.
        padding_mode, align_corners, method: options of other implementations. Others than the default raise ValueError.
    """
    _check_options(padding_mode, align_corners, method)
    points: tuple[int, ...] = ()
    if num_points is not None:
        points = _check_num_points(num_points, level_shapes, locations_BQHLP2, weights_BQHLP)
        if len(set(points)) == 1:
            locations_BQHLP2 = locations_BQHLP2.unflatten(3, (len(points), -1))
            weights_BQHLP, points = weights_BQHLP.unflatten(3, (len(points), -1)), ()
    shapes = _check_classical(value_BSHD, level_shapes, locations_BQHLP2, weights_BQHLP, points)
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    out = _msda(
        autocast(value_BSHD), *split_shapes(shapes), None, locations, weights, None, None, deterministic, list(points),
        backend=backend, limitation=limitation(shapes, weights, value_BSHD, points),
    )  # fmt: skip
    return out.unflatten(0, locations_BQHLP2.shape[:2])


def differentiate_multi_scale(
    grad_out_BQC: Tensor,
    value_BSHD: Tensor,
    level_shapes: LevelShapes | Tensor,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    *,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `multi_scale_deformable_attention` by value, locations and weights: for code with an autograd
    function of its own. Autocast has no effect on them."""
    shapes = _check_classical(value_BSHD, level_shapes, locations_BQHLP2, weights_BQHLP)
    expected = (*locations_BQHLP2.shape[:2], value_BSHD.shape[2:].numel())
    if grad_out_BQC.shape != expected:
        raise invalid("grad_out_BQC", grad_out_BQC, f"{list(expected)}, like the output")
    grad_out = grad_out_BQC.flatten(0, 1).to(value_BSHD.dtype)
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    # The output matters for the softmax only, which is not part of this operator: the gradient stands in for it.
    grad_value, grad_locations, grad_weights = _msda_backward(
        grad_out, grad_out, value_BSHD, *split_shapes(shapes), None, locations, weights, None, True, deterministic,
        [], backend=backend, limitation=limitation(shapes, weights, value_BSHD),
    )  # fmt: skip
    return grad_value, grad_locations.view_as(locations_BQHLP2), grad_weights.view_as(weights_BQHLP)


def _check_classical(
    value_BSHD: Tensor,
    level_shapes: LevelShapes | Tensor,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    num_points: tuple[int, ...] = (),
) -> LevelShapes | Tensor:
    """The level shapes. Raises ValueError for arguments that do not fit together."""
    check_tensors(value_BSHD=value_BSHD, locations_BQHLP2=locations_BQHLP2, weights_BQHLP=weights_BQHLP)
    shapes = as_level_shapes(level_shapes)
    if not num_points:
        if weights_BQHLP.ndim == 4:
            requirement = (
                f"[B, Q, H, {len(shapes)}, P]; for the points of all levels in one dimension pass num_points"
            )
            raise invalid("weights_BQHLP", weights_BQHLP, requirement)
        check_samples(shapes, locations_BQHLP2, weights_BQHLP, ("locations_BQHLP2", "weights_BQHLP"))
    _check_value(value_BSHD, shapes, weights_BQHLP.shape[2], weights_BQHLP.device)
    if locations_BQHLP2.shape[0] != value_BSHD.shape[0]:
        raise ValueError(
            f"locations of {locations_BQHLP2.shape[0]} images for values of {value_BSHD.shape[0]}"
        )
    return shapes


# ------------------------------------------------------------------------------------------------ checks of arguments
def check_samples(
    shapes: LevelShapes | Tensor,
    offsets: Tensor,
    weights: Tensor,
    names: tuple[str, str] = ("offsets_NHLP2", "logits_NHLP"),
) -> None:
    """Raises ValueError unless these are offsets [..., H, L, P, 2] and weights [..., H, L, P] of `shapes`."""
    leading = "N" if "_N" in names[1] else "B, Q"
    if not (
        weights.ndim == 5 - (leading == "N") and weights.shape[-2] == len(shapes) and weights.dtype in FLOATS
    ):
        raise invalid(
            names[1],
            weights,
            f"[{leading}, H, {len(shapes)}, P] for level_shapes of {len(shapes)}, floating point",
        )
    if not (offsets.shape == (*weights.shape, 2) and offsets.dtype in FLOATS):
        raise invalid(
            names[0], offsets, f"{[*weights.shape, 2]} for {names[1]} {list(weights.shape)}, floating point"
        )


def _check_num_points(
    num_points: Sequence[int], level_shapes: LevelShapes | Tensor, locations: Tensor, weights: Tensor
) -> tuple[int, ...]:
    """The points of each level. Raises ValueError unless the tensors hold as many."""
    check_tensors(locations=locations, weights=weights)
    try:
        points = tuple(map(index, num_points))
    except TypeError:
        points = ()
    if min(points, default=0) < 1:
        raise ValueError(f"num_points {num_points}: must be integers >= 1, one for each level")
    num_levels = len(as_level_shapes(level_shapes))
    if len(points) != num_levels:
        raise ValueError(f"num_points {points}: must be {num_levels} numbers, one for each level")
    if weights.ndim != 4 or weights.shape[3] != sum(points) or weights.dtype not in FLOATS:
        raise invalid("weights", weights, f"[B, Q, H, {sum(points)}] for num_points {points}, floating point")
    if locations.shape != (*weights.shape, 2) or locations.dtype not in FLOATS:
        raise invalid("locations", locations, f"{[*weights.shape, 2]}, floating point")
    return points


def _check_options(padding_mode: str, align_corners: bool, method: str) -> None:
    if method != "default":
        raise ValueError(
            f"method {method!r}: must be 'default'; 'discrete' reads the nearest pixel, which is another operator"
            " without a gradient by the locations"
        )
    if padding_mode != "zeros" or align_corners:
        raise ValueError(
            f"padding_mode {padding_mode!r}, align_corners {align_corners}: must be 'zeros' and False, as in Deformable"
            " DETR; for others call torch.nn.functional.grid_sample"
        )


def _check_value(
    value_BSHD: Tensor, shapes: LevelShapes | Tensor, num_heads: int, device: torch.device
) -> None:
    if not (value_BSHD.ndim == 4 and value_BSHD.shape[2] == num_heads and value_BSHD.dtype in FLOATS):
        raise invalid("value_BSHD", value_BSHD, f"[B, S, H, D] with H = {num_heads} heads, floating point")
    if value_BSHD.device != device:
        raise ValueError(f"value_BSHD on {value_BSHD.device}, weights on {device}: must be on one device")
    check_num_tokens(shapes, value_BSHD.shape[1])


def check_references(reference_points: Tensor, offsets_NHLP2: Tensor) -> None:
    """Raises ValueError unless these are points or boxes for the offsets."""
    num_queries, _, num_levels = offsets_NHLP2.shape[:3]
    shape = reference_points.shape
    if not (
        len(shape) == 3
        and shape[:2] == (num_queries, num_levels)
        and shape[2] in (2, 4)
        and reference_points.dtype in FLOATS
    ):
        raise invalid(
            "reference_points", reference_points, f"[{num_queries}, {num_levels}, 2 or 4], floating point"
        )


def _check_integers(name: str, index: Tensor, shape: tuple[int, ...]) -> None:
    if not (index.shape == shape and index.dtype in INTEGERS):
        raise invalid(name, index, f"{list(shape)}, integers")


def limitation(
    shapes: LevelShapes | Tensor,
    weights: Tensor,
    value: Tensor | None = None,
    points_of_levels: Sequence[int] = (),
) -> str | None:
    """Why the kernels cannot compute this problem; None if they can."""
    num_levels = len(shapes)
    num_points = max(points_of_levels) if points_of_levels else weights.shape[-1]
    if num_points > MAX_POINTS:
        return f"{num_points} points exceed the maximum of {MAX_POINTS}"
    # Of a tensor only the number of levels is known.
    if found := beyond_kernels([(1, 1)] * num_levels if isinstance(shapes, Tensor) else shapes):
        return found
    if runs_inside_graph():  # sizes may be unknown
        return None
    *leading, num_heads = weights.shape[: -1 if points_of_levels else -2]
    num_rows = math.prod(leading)
    if weights.numel() >= 2**31 or 4 * num_rows * num_levels >= 2**31:
        return f"{weights.numel()} samples of {num_rows} queries exceed 32-bit offsets"
    if value is not None:
        head_dim = min(value.shape[3], MAX_HEAD_DIM)
        if num_heads * head_dim > 2 * MAX_SIDE:
            return f"{num_heads} heads of {head_dim} channels exceed the maximum of {2 * MAX_SIDE} channels"
        if num_rows * num_heads * head_dim >= 2**31 or value.shape[:3].numel() >= 2**31:
            return f"values {list(value.shape)} for {num_rows} queries exceed 32-bit offsets"
    return no_transforms()


# ------------------------------------------------------------------------------------------------ the custom operators
@operator("attention.attend", name="msda")
def _msda(
    value: Tensor, sizes: Sequence[int], shapes_L2: Tensor | None, reference_points: Tensor | None, offsets: Tensor,
    weights: Tensor, image_index: Tensor | None, num_rows: Tensor | None, deterministic: bool | None,
    num_points: Sequence[int],
) -> Tensor:  # fmt: skip
    """[N, H*D]; without reference_points, `offsets` are locations and `weights` are used unchanged.

    num_points: of each level, where they differ: offsets are then [N, H, sum of num_points, 2]. Otherwise empty.
    """
    shapes = join_shapes(sizes, shapes_L2, value.shape[1])
    if reference_points is None:
        return reference.sample_packed(value, shapes, offsets, weights, image_index, num_rows, num_points)
    return reference.deformable_attention(
        value, shapes, reference_points, offsets, weights, image_index, num_rows
    )


@_msda.register_fake
def _(value: Tensor, *arguments: Any) -> Tensor:
    return value.new_empty(arguments[3].shape[0], value.shape[2] * value.shape[3])


@operator("attention.differentiate", name="msda_backward")
def _msda_backward(
    grad_out: Tensor, out: Tensor, value: Tensor, sizes: Sequence[int], shapes_L2: Tensor | None,
    reference_points: Tensor | None, offsets: Tensor, weights: Tensor, image_index: Tensor | None, need_value: bool,
    deterministic: bool | None, num_points: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by value (empty unless needed), offsets and weights."""
    # Within a compiled graph or a counter of operations nothing would be recorded: inference_mode(False) changes that.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, offsets, weights)]
        out = _msda.definition(
            inputs[0], sizes, shapes_L2, reference_points, *inputs[1:], image_index, None, deterministic, num_points
        )  # fmt: skip
        gradients = torch.autograd.grad(out, inputs, grad_out, materialize_grads=True)
    # Contiguous, as the fake operator below promises to compilers.
    grad_value, grad_offsets, grad_weights = (gradient.contiguous() for gradient in gradients)
    return grad_value if need_value else value.new_empty(0), grad_offsets, grad_weights


@_msda_backward.register_fake
def _(grad_out: Tensor, out: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, offsets, weights, _, need_value, *_ = arguments
    grad_value = value.new_empty(value.shape if need_value else 0)
    return grad_value, offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, *samples, num_rows, ctx.deterministic, ctx.num_points = inputs
    ctx.has_capacity = num_rows is not None
    ctx.save_for_backward(output, value, *samples)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple:
    if ctx.has_capacity:
        raise RuntimeError(
            "deformable_attention with num_rows has no gradient: capacity plans are for inference"
        )
    out, value, *samples = ctx.saved_tensors
    need_value = ctx.needs_input_grad[0]
    grad_value, grad_offsets, grad_weights = _msda_backward.packet(
        grad_out, out, value, ctx.sizes, *samples, need_value, ctx.deterministic, ctx.num_points, ctx.backend
    )
    return grad_value if need_value else None, None, None, None, grad_offsets, grad_weights, *(None,) * 4


def _refuse(ctx: Any, *gradients: Tensor) -> tuple:
    raise RuntimeError(
        "deformable_attention has no second derivative (double backward); backend='reference' may have one"
    )


_msda.register_autograd(_differentiate, _save)
_msda_backward.register_autograd(_refuse, lambda ctx, inputs, output: None)


@_msda.register_flops
def _flops(value: Sequence[int], *arguments: Any) -> int:
    """Four corners of every sample: a multiplication and an addition per channel, and the interpolation weights."""
    num_samples = torch.Size(arguments[4]).numel()
    return 2 * 4 * num_samples * value[-1]


@_msda_backward.register_flops
def _(grad_out: Sequence[int], out: Sequence[int], *arguments: Any) -> int:
    return 2 * _flops(*arguments)
