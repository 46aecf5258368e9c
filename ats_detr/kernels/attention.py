"""Multi-scale deformable attention: the public functions and the custom operator behind them.

`ats_detr::msda` is opaque to torch.compile, because Inductor would inline the kernels and lose their tuning. It has a
fake implementation, gradients and a FLOP formula. On the CPU, or on request, it computes the reference.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ats_detr.kernels import reference
from ats_detr.kernels.backend import choose_backend, runs_inside_graph
from ats_detr.kernels.reference import LevelShapes

logger = logging.getLogger(__name__)

MAX_LEVELS, MAX_POINTS, MAX_SIDE = 8, 16, 32767
"""Limits of the Triton kernels. Calls beyond them run the reference, or raise with backend='triton'."""
MAX_HEAD_DIM = 256
"""Channels of a head that a kernel holds; wider heads take several calls."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


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
        value_BSHD: projected values of all tokens, padded tokens already zeroed; float32, float16 or bfloat16
            (float64 runs the reference). Under autocast it is cast to the autocast dtype; coordinates and
            logits keep theirs.
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

    Sums are float32 (with float64 offsets or logits too). On a GPU the value's gradient of many queries, or a
    deterministic one, multiplies factors of 16 bits if it is float32 (relative error 4e-6), and factors of the value's
    own dtype if that is shorter.

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

    Differentiable once, in reverse mode (`backward`, `torch.func.grad`, `torch.func.vjp`). Forward mode and, in the
    kernels, second derivatives raise RuntimeError.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; with backend='triton' also more than 8
            levels, 16 points, 32,767 pixels a side or 2^31 - 1 samples, output elements or value rows. Without it,
            such calls run the reference.
    """
    shapes = as_level_shapes(level_shapes)
    check_samples(shapes, offsets_NHLP2, logits_NHLP, 1)
    _check_value(value_BSHD, shapes, logits_NHLP)
    check_references(reference_points, offsets_NHLP2)
    num_queries, batch = offsets_NHLP2.shape[0], value_BSHD.shape[0]
    if image_index_N is not None:
        _check_index("image_index_N", image_index_N, (num_queries,), value_BSHD)
    if batch == 0 and num_queries > 0:
        raise ValueError(f"{num_queries} queries for values of 0 images")
    if image_index_N is None and num_queries % max(1, batch):
        raise ValueError(f"{num_queries} queries do not split over {batch} images: pass image_index_N")
    if num_rows is not None:
        _check_index("num_rows", num_rows, (1,), value_BSHD)
    chosen = kernel_or_reference(value_BSHD, shapes, logits_NHLP, backend)
    value_BSHD = _autocast(value_BSHD)
    if chosen == "reference" and not runs_inside_graph():
        return reference.deformable_attention(
            value_BSHD, shapes, reference_points, offsets_NHLP2, logits_NHLP, image_index_N, num_rows
        )
    if reference_points.requires_grad and torch.is_grad_enabled():
        # learned references (one-stage models, 300 queries): the kernels give no gradient by them
        offsets_NHLP2 = reference.sampling_locations(reference_points, offsets_NHLP2, shapes)
        logits_NHLP = reference.attention_weights(logits_NHLP)
        reference_points = None
    return _attend(
        value_BSHD, shapes, reference_points, offsets_NHLP2, logits_NHLP, image_index_N, num_rows, deterministic, chosen
    )  # fmt: skip


def multi_scale_deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes | Tensor,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    *,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The classical operator of Deformable DETR (eq. 3), [B, Q, H*D]; a drop-in for other DETRs.

    Takes normalised locations and softmaxed weights instead of raw projections. See `deformable_attention` for dtypes,
    non-finite input, keywords and errors. Prefer float32 locations: float16 rounds them to W/2048 pixels, bfloat16 to
    W/256.
    """
    shapes = as_level_shapes(level_shapes)
    check_samples(shapes, locations_BQHLP2, weights_BQHLP, 2)
    _check_value(value_BSHD, shapes, weights_BQHLP)
    batch, num_queries = locations_BQHLP2.shape[:2]
    if batch != value_BSHD.shape[0]:
        raise ValueError(f"locations of {batch} images for values of {value_BSHD.shape[0]}")
    chosen = kernel_or_reference(value_BSHD, shapes, weights_BQHLP, backend)
    value_BSHD = _autocast(value_BSHD)
    if chosen == "reference" and not runs_inside_graph():
        return reference.multi_scale_deformable_attention(value_BSHD, shapes, locations_BQHLP2, weights_BQHLP)
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    out = _attend(value_BSHD, shapes, None, locations, weights, None, None, deterministic, chosen)
    return out.unflatten(0, (batch, num_queries))


# ------------------------------------------------------------------------------------------------ checks of arguments
def as_level_shapes(level_shapes: LevelShapes | Tensor) -> LevelShapes | Tensor:
    """The sizes as a tuple of pairs of ints; while a compiler traces, a tensor stays one (its numbers are not known).

    Raises ValueError for anything but integers >= 1, and for a tensor on a device.
    """
    tracing = runs_inside_graph()
    if not isinstance(level_shapes, Tensor):
        pairs = [tuple(pair) for pair in level_shapes]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"level_shapes {level_shapes}: must be (height, width) of each level")
        if not any(isinstance(side, Tensor) for pair in pairs for side in pair):
            if not tracing:
                try:
                    pairs = [(operator.index(height), operator.index(width)) for height, width in pairs]
                except TypeError:
                    raise ValueError(f"level_shapes {level_shapes}: sizes must be integers") from None
            if any(side < 1 for pair in pairs for side in pair):
                raise ValueError(f"level_shapes {pairs}: every side must be at least 1")
            return tuple(pairs)
        sides = [torch.as_tensor(side) for pair in pairs for side in pair]
        _refuse_device(sides)
        level_shapes = torch.stack(sides).view(-1, 2)
    _refuse_device([level_shapes])
    if level_shapes.ndim != 2 or level_shapes.shape[1] != 2 or level_shapes.dtype not in _INTEGERS:
        raise ValueError(
            f"level_shapes of shape {tuple(level_shapes.shape)} and {level_shapes.dtype}: must be integers [L, 2]"
        )
    return level_shapes if tracing else as_level_shapes(level_shapes.tolist())


def _refuse_device(sizes: Sequence[Tensor]) -> None:
    for tensor in sizes:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"level_shapes is on {tensor.device}: reading it would synchronise with the device in every call; pass "
                "pairs of integers (the sizes of the feature maps) or a tensor on the CPU"
            )


def num_tokens_of(level_shapes: LevelShapes) -> int:
    """Tokens of the whole pyramid."""
    return sum(height * width for height, width in level_shapes)


def check_samples(shapes: LevelShapes | Tensor, offsets: Tensor, weights: Tensor, num_leading: int) -> None:
    """Offsets [..., H, L, P, 2] and weights [..., H, L, P] of `shapes`, with `num_leading` axes before H."""
    if (
        weights.ndim != num_leading + 3
        or weights.shape[-2] != len(shapes)
        or offsets.shape != (*weights.shape, 2)
    ):
        queries = "N" if num_leading == 1 else "B, Q"
        raise ValueError(
            f"offsets or locations {tuple(offsets.shape)} and weights {tuple(weights.shape)}: must be "
            f"[{queries}, H, {len(shapes)}, P, 2] and [{queries}, H, {len(shapes)}, P] for {len(shapes)} levels"
        )
    if offsets.dtype not in _FLOATS or weights.dtype not in _FLOATS:
        raise ValueError(
            f"offsets or locations of {offsets.dtype}, weights of {weights.dtype}: must be floating point"
        )
    if offsets.device != weights.device:
        raise ValueError(
            f"offsets on {offsets.device} and weights on {weights.device}: must be on one device"
        )


def _check_value(value_BSHD: Tensor, shapes: LevelShapes | Tensor, weights: Tensor) -> None:
    if value_BSHD.ndim != 4 or value_BSHD.shape[2] != weights.shape[-3]:
        raise ValueError(
            f"value_BSHD {tuple(value_BSHD.shape)}: must be [B, S, H, D], with H = {weights.shape[-3]} heads as "
            f"in the weights {tuple(weights.shape)}"
        )
    if not isinstance(shapes, Tensor) and num_tokens_of(shapes) != value_BSHD.shape[1]:
        raise ValueError(
            f"level_shapes {list(shapes)} have {num_tokens_of(shapes)} tokens, value_BSHD has {value_BSHD.shape[1]}"
        )
    if value_BSHD.dtype not in _FLOATS:
        raise ValueError(f"value_BSHD of {value_BSHD.dtype}: must be floating point")
    if value_BSHD.device != weights.device:
        raise ValueError(
            f"value_BSHD on {value_BSHD.device} and weights on {weights.device}: must be on one device"
        )


def check_references(reference_points: Tensor, offsets_NHLP2: Tensor) -> None:
    """Raises ValueError unless these are points or boxes for the offsets."""
    num_queries, _, num_levels = offsets_NHLP2.shape[:3]
    shape = reference_points.shape
    if len(shape) != 3 or shape[:2] != (num_queries, num_levels) or shape[2] not in (2, 4):
        raise ValueError(f"reference_points {tuple(shape)}: must be [{num_queries}, {num_levels}, 2 or 4]")
    if reference_points.dtype not in _FLOATS:
        raise ValueError(f"reference_points of {reference_points.dtype}: must be floating point")
    if reference_points.device != offsets_NHLP2.device:
        raise ValueError(
            f"reference_points on {reference_points.device}, offsets on {offsets_NHLP2.device}: must be on one device"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], value: Tensor) -> None:
    if index.shape != shape and not (shape == (1,) and index.ndim == 0):
        raise ValueError(f"{name} {tuple(index.shape)}: must be {list(shape)}")
    if index.dtype not in _INTEGERS:
        raise ValueError(f"{name} of {index.dtype}: must be int32")
    if index.device != value.device:
        raise ValueError(f"{name} on {index.device}: must be on {value.device} like the values")


def kernel_or_reference(
    value: Tensor | None, shapes: LevelShapes | Tensor, weights: Tensor, backend: str | None
) -> str:
    """`choose_backend`, where the kernels can hold the problem; else 'reference', or ValueError if asked for Triton."""
    chosen = choose_backend(weights if value is None else value, backend)
    if chosen == "reference":
        return chosen
    limit = _limit(value, shapes, weights)
    if limit is None:
        return chosen
    if backend == "triton":
        raise ValueError(f"backend 'triton': {limit}; backend='reference' has no such limit")
    if not runs_inside_graph():
        logger.debug("deformable attention runs the reference: %s", limit)
    return "reference"


def _limit(value: Tensor | None, shapes: LevelShapes | Tensor, weights: Tensor) -> str | None:
    """What the kernels cannot hold, None for nothing."""
    num_levels, num_points = weights.shape[-2:]
    if num_levels > MAX_LEVELS:
        return f"{num_levels} levels, at most {MAX_LEVELS}"
    if num_points > MAX_POINTS:
        return f"{num_points} points, at most {MAX_POINTS}"
    if not isinstance(shapes, Tensor) and any(side > MAX_SIDE for pair in shapes for side in pair):
        return f"level_shapes {list(shapes)}, sides of at most {MAX_SIDE} pixels"
    if runs_inside_graph():  # sizes may be unknown
        return None
    num_rows, num_heads = weights.shape[:-3].numel(), weights.shape[-3]
    if weights.numel() >= 2**31:
        return f"{weights.numel()} samples, fewer than 2^31"
    if value is None:
        return None
    head_dim = min(value.shape[3], MAX_HEAD_DIM)
    if num_heads * head_dim > 2 * MAX_SIDE:
        return f"{num_heads} heads of {head_dim} channels, at most {2 * MAX_SIDE} channels in all"
    if num_rows * num_heads * head_dim >= 2**31 or value.shape[:3].numel() >= 2**31:
        return f"values {tuple(value.shape)} for {num_rows} queries, fewer than 2^31 output elements and value rows"
    return None


def _autocast(value: Tensor) -> Tensor:
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(device))
    return value


def sizes_of(shapes: LevelShapes | Tensor) -> tuple[list[int], Tensor | None]:
    """Arguments `sizes` and `shapes_L2` of the custom operators."""
    if isinstance(shapes, Tensor):
        return [], shapes
    return [side for shape in shapes for side in shape], None


def shapes_from(sizes: Sequence[int], shapes_L2: Tensor | None, num_tokens: int) -> LevelShapes:
    """The inverse of `sizes_of` within an operator. Checks what `as_level_shapes` could not read from a tensor."""
    if shapes_L2 is None:
        return list(zip(sizes[::2], sizes[1::2], strict=True))
    shapes = as_level_shapes(shapes_L2.tolist())
    if num_tokens_of(shapes) != num_tokens:
        raise ValueError(
            f"level_shapes {list(shapes)} have {num_tokens_of(shapes)} tokens, must have {num_tokens}"
        )
    if any(side > MAX_SIDE for pair in shapes for side in pair):
        raise ValueError(f"level_shapes {list(shapes)}: sides of at most {MAX_SIDE} pixels")
    return shapes


def _attend(
    value: Tensor,
    shapes: LevelShapes | Tensor,
    reference_points: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    image_index: Tensor | None,
    num_rows: Tensor | None,
    deterministic: bool | None,
    backend: str,
) -> Tensor:
    """[N, H*D] by the custom operator, once for every MAX_HEAD_DIM channels."""
    sizes, shapes_L2 = sizes_of(shapes)
    apply = torch.ops.ats_detr.msda if runs_inside_graph() else _Attention.apply
    if backend == "triton":  # float32 is what the kernels compute in
        offsets = offsets.float() if offsets.dtype == torch.float64 else offsets
        weights = weights.float() if weights.dtype == torch.float64 else weights
    arguments = (reference_points, offsets, weights, image_index, num_rows, deterministic, backend, shapes_L2)
    head_dim = value.shape[3]
    if backend == "reference" or head_dim <= MAX_HEAD_DIM:
        return apply(value, sizes, *arguments)
    num_parts = -(-head_dim // MAX_HEAD_DIM)
    parts = value.split(
        -(-head_dim // (8 * num_parts)) * 8, dim=3
    )  # equal but for the last, whole 16-byte words
    outs = [apply(part, sizes, *arguments).unflatten(1, part.shape[2:]) for part in parts]
    return torch.cat(outs, dim=2).flatten(1)


# -------------------------------------------------------------------------------------------------- the custom operator
@torch.library.custom_op("ats_detr::msda", mutates_args=())
def _msda(
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    image_index: Tensor | None,
    num_rows: Tensor | None,
    deterministic: bool | None,
    backend: str,
    shapes_L2: Tensor | None = None,
) -> Tensor:
    """[N, H*D]; without reference_points, `offsets` are locations and `weights` are used as they are."""
    shapes = shapes_from(sizes, shapes_L2, value.shape[1])
    if backend == "triton":
        from ats_detr.kernels.gpu import attention
        from ats_detr.kernels.gpu import problem as problems

        with torch.cuda.device_of(value):
            problem = problems.prepare(
                value, sizes_of(shapes)[0], reference_points, offsets, weights, image_index
            )
            return attention.forward(problem, num_rows)
    return _reference(value, shapes, reference_points, offsets, weights, image_index, num_rows)


def _reference(value, shapes, reference_points, offsets, weights, image_index, num_rows=None) -> Tensor:
    if reference_points is not None:
        return reference.deformable_attention(
            value, shapes, reference_points, offsets, weights, image_index, num_rows
        )
    return reference.sample_packed(value, shapes, offsets, weights, image_index, num_rows)


@_msda.register_fake
def _(
    value, sizes, reference_points, offsets, weights, image_index, num_rows, deterministic, backend, shapes_L2=None
):  # fmt: skip
    return value.new_empty(offsets.shape[0], value.shape[2] * value.shape[3])


@torch.library.custom_op("ats_detr::msda_backward", mutates_args=())
def _msda_backward(
    grad_out: Tensor,
    out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    image_index: Tensor | None,
    need_value: bool,
    deterministic: bool | None,
    backend: str,
    shapes_L2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by value (empty unless needed), offsets and weights."""
    shapes = shapes_from(sizes, shapes_L2, value.shape[1])
    if backend == "triton":
        from ats_detr.kernels.gpu import attention
        from ats_detr.kernels.gpu import problem as problems

        with torch.cuda.device_of(value):
            if deterministic is None:
                deterministic = torch.are_deterministic_algorithms_enabled()
            problem = problems.prepare(
                value, sizes_of(shapes)[0], reference_points, offsets, weights, image_index
            )
            grad_value, *grads = attention.backward(problem, out, grad_out, need_value, deterministic)
            return (value.new_empty(0) if grad_value is None else grad_value, *grads)

    # Within a compiled graph or a counter of operations nothing would be recorded: inference_mode(False) changes that.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, offsets, weights)]
        again = _reference(inputs[0], shapes, reference_points, *inputs[1:], image_index)
        gradients = torch.autograd.grad(again, inputs, grad_out, materialize_grads=True)
    # Contiguous, as the fake operator below promises to compilers.
    grad_value, grad_offsets, grad_weights = (gradient.contiguous() for gradient in gradients)
    return grad_value if need_value else value.new_empty(0), grad_offsets, grad_weights


@_msda_backward.register_fake
def _(
    grad_out,
    out,
    value,
    sizes,
    reference_points,
    offsets,
    weights,
    image_index,
    need_value,
    deterministic,
    backend,
    shapes_L2=None,
):
    grad_value = value.new_empty(value.shape if need_value else 0)
    return grad_value, offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)


# ----------------------------------------------------------------------------------------------------------- gradients
def _save(ctx, inputs, output) -> None:
    (
        value,
        ctx.sizes,
        reference_points,
        offsets,
        weights,
        image_index,
        num_rows,
        ctx.deterministic,
        ctx.backend,
        shapes_L2,
    ) = inputs
    ctx.has_capacity = num_rows is not None
    ctx.save_for_backward(value, reference_points, offsets, weights, image_index, shapes_L2, output)


def _differentiate(ctx, grad_out, backward=torch.ops.ats_detr.msda_backward):
    if ctx.has_capacity:
        raise RuntimeError(
            "deformable_attention with num_rows has no gradient: capacity plans are for inference"
        )
    value, reference_points, offsets, weights, image_index, shapes_L2, out = ctx.saved_tensors
    need_value = ctx.needs_input_grad[0]
    grad_value, grad_offsets, grad_weights = backward(
        grad_out, out, value, ctx.sizes, reference_points, offsets, weights, image_index, need_value, ctx.deterministic,
        ctx.backend, shapes_L2,
    )  # fmt: skip
    grad_value = grad_value if need_value else None
    return grad_value, None, None, grad_offsets, grad_weights, None, None, None, None, None


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "deformable_attention has no second derivative (double backward); backend='reference' may have one"
    )


def _refuse_forward_mode(ctx, *tangents):
    raise RuntimeError(
        "deformable_attention has no forward-mode derivative (jvp): use reverse mode (backward, torch.func.vjp)"
    )


torch.library.register_autograd("ats_detr::msda", _differentiate, setup_context=_save)
torch.library.register_autograd("ats_detr::msda_backward", _refuse_second_derivative)


class _Attention(torch.autograd.Function):
    """`ats_detr::msda` for eager calls: unlike the registered operator it supports torch.func and refuses forward mode
    instead of returning no tangent."""

    setup_context = staticmethod(_save)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.ats_detr.msda(*arguments)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        recorded = torch.is_grad_enabled()  # by create_graph, or by torch.func
        return _differentiate(
            ctx, grad_out, _Gradients.apply if recorded else torch.ops.ats_detr.msda_backward
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.stack(_map(_Attention.apply, info.batch_size, in_dims, arguments)), 0


class _Gradients(torch.autograd.Function):
    """`ats_detr::msda_backward` where its result is differentiated again or belongs to a transform of torch.func."""

    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ats_detr.msda_backward(*arguments)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        each = _map(_Gradients.apply, info.batch_size, in_dims, arguments)
        return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


def _map(function, batch_size: int, in_dims: tuple, arguments: tuple) -> list:
    """Results of one call for each entry along the axes that torch.vmap maps over."""
    return [
        function(
            *(
                a.select(dim, i) if isinstance(dim, int) else a
                for a, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(batch_size)
    ]


@register_flop_formula(torch.ops.ats_detr.msda)
def _flops(
    value_shape, sizes, reference_shape, offsets_shape, weights_shape, *args, out_shape=None, **kwargs
) -> int:
    """Four corners of every sample: a multiplication and an addition per channel, and the interpolation weights."""
    num_queries, num_heads, num_levels, num_points = weights_shape
    return 2 * 4 * num_queries * num_heads * num_levels * num_points * value_shape[-1]


@register_flop_formula(torch.ops.ats_detr.msda_backward)
def _backward_flops(grad_shape, out_shape_, value_shape, sizes, reference_shape, offsets_shape, weights_shape, *args,
                    out_shape=None, **kwargs) -> int:  # fmt: skip
    return 2 * _flops(value_shape, sizes, reference_shape, offsets_shape, weights_shape)
