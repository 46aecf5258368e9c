"""Multi-scale deformable attention: the public functions and the custom operator behind them.

`ats_detr::msda` is opaque to torch.compile (Inductor would otherwise inline the kernels and lose their
tuning). It has a fake implementation, gradients, and a FLOP formula; on the CPU, or where asked, it computes
the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ats_detr.kernels import reference
from ats_detr.kernels.backend import choose_backend, runs_inside_graph
from ats_detr.kernels.reference import LevelShapes

MAX_LEVELS, MAX_POINTS, MAX_HEAD_DIM, MAX_SIDE = 8, 16, 256, 32767


def deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    image_index_N: Tensor | None = None,
    *,
    num_rows: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Deformable attention of packed queries from raw projections, [N, H*D]: softmax and locations included.

    Args:
        value_BSHD: projected values of all tokens, padded tokens already zeroed; float32, float16 or bfloat16
            (float64 runs the reference). Under autocast it is cast to the autocast dtype; coordinates and
            logits stay as they are.
        level_shapes: (height, width) of each level, finest first, from the host.
        reference_points: [N, L, 2] points, or [N, L, 4] boxes (cx, cy, w, h), normalised to each level's full map.
        offsets_NHLP2: (x, y): in pixels of the level for points; in units of half the box divided by P for
            boxes. Prefer
            float32: bfloat16 rounds an offset of 8 pixels to a sixteenth.
        image_index_N: int32, ascending: the image each query attends to. None: N = B*Q queries, Q for every image.
        num_rows: int32 [1] on the device: queries in use; later rows of the result are not written. Inference only.
        deterministic: bit-equal gradients from run to run. None: as `torch.use_deterministic_algorithms` says.
        backend: 'triton' or 'reference', see `choose_backend`.

    Sums are float32. On a GPU the value's gradient of many queries, or a deterministic one, is made from factors of 16
    bits where it is float32 (relative error 4e-6), and of the value's own dtype where that is shorter.
    A row with a NaN or infinite coordinate is NaN; no memory outside the tensors is touched.
    """
    _check(value_BSHD, level_shapes, offsets_NHLP2, logits_NHLP)
    num_queries = offsets_NHLP2.shape[0]
    if reference_points.shape[:2] != offsets_NHLP2.shape[:3:2] or reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points {tuple(reference_points.shape)}: want [{num_queries}, {len(level_shapes)}, 2 or 4]"
        )
    if image_index_N is None and num_queries % max(1, value_BSHD.shape[0]):
        raise ValueError(
            f"{num_queries} queries do not split over {value_BSHD.shape[0]} images: pass image_index_N"
        )
    backend = choose_backend(value_BSHD, backend)
    value_BSHD = _autocast(value_BSHD)
    if backend == "reference" and not runs_inside_graph():
        return reference.deformable_attention(
            value_BSHD, level_shapes, reference_points, offsets_NHLP2, logits_NHLP, image_index_N, num_rows
        )
    if reference_points.requires_grad and torch.is_grad_enabled():
        # learned references (one-stage models, 300 queries): the kernels give no gradient by them
        offsets_NHLP2 = reference.sampling_locations(reference_points, offsets_NHLP2, level_shapes)
        logits_NHLP = reference.attention_weights(logits_NHLP)
        reference_points = None
    return torch.ops.ats_detr.msda(
        value_BSHD, _flat(level_shapes), reference_points, offsets_NHLP2, logits_NHLP, image_index_N, num_rows,
        deterministic, backend,
    )  # fmt: skip


def multi_scale_deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    *,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The classical operator of Deformable DETR (eq. 3), [B, Q, H*D]; a drop-in for other DETRs.

    Normalised locations and softmaxed weights come from memory; see `deformable_attention` for dtypes,
    special values and keywords. Prefer float32 locations: float16 rounds them to W/2048 pixels, bfloat16 to W/256.
    """
    batch, num_queries = locations_BQHLP2.shape[:2]
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    _check(value_BSHD, level_shapes, locations, weights)
    if batch != value_BSHD.shape[0]:
        raise ValueError(f"locations of {batch} images for values of {value_BSHD.shape[0]}")
    backend = choose_backend(value_BSHD, backend)
    value_BSHD = _autocast(value_BSHD)
    if backend == "reference" and not runs_inside_graph():
        return reference.multi_scale_deformable_attention(
            value_BSHD, level_shapes, locations_BQHLP2, weights_BQHLP
        )
    out = torch.ops.ats_detr.msda(
        value_BSHD, _flat(level_shapes), None, locations, weights, None, None, deterministic, backend
    )
    return out.view(batch, num_queries, -1)


def _check(
    value_BSHD: Tensor, level_shapes: LevelShapes, offsets_NHLP2: Tensor, weights_NHLP: Tensor
) -> None:
    num_tokens, num_heads, head_dim = value_BSHD.shape[1:]
    if sum(height * width for height, width in level_shapes) != num_tokens:
        raise ValueError(f"levels {list(level_shapes)} do not make up the value's {num_tokens} tokens")
    check_levels(level_shapes)
    want = (num_heads, len(level_shapes))
    if weights_NHLP.shape[1:3] != want or offsets_NHLP2.shape != (*weights_NHLP.shape, 2):
        raise ValueError(
            f"offsets {tuple(offsets_NHLP2.shape)} and weights {tuple(weights_NHLP.shape)}: want [N, {num_heads}, "
            f"{len(level_shapes)}, P, 2] and the same without the last 2"
        )
    if weights_NHLP.shape[3] > MAX_POINTS or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{weights_NHLP.shape[3]} points, {head_dim} channels a head: at most {MAX_POINTS} and {MAX_HEAD_DIM}"
        )


def check_levels(level_shapes: LevelShapes) -> None:
    """Raises ValueError where the kernels cannot hold the sizes."""
    if len(level_shapes) > MAX_LEVELS:
        raise ValueError(f"{len(level_shapes)} levels: at most {MAX_LEVELS}")
    if any(not 1 <= side <= MAX_SIDE for shape in level_shapes for side in shape):
        raise ValueError(f"levels {list(level_shapes)}: every side is at least 1 and at most {MAX_SIDE}")


def _autocast(value: Tensor) -> Tensor:
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(device))
    return value


def _flat(level_shapes: LevelShapes) -> list[int]:
    return [side for shape in level_shapes for side in shape]


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
) -> Tensor:
    """[N, H*D]; without reference_points, `offsets` are locations and `weights` are used as they are."""
    if backend == "triton":
        from ats_detr.kernels.gpu import attention

        with torch.cuda.device_of(value):
            problem = attention.prepare(value, sizes, reference_points, offsets, weights, image_index)
            return attention.forward(problem, num_rows)
    return _reference(value, sizes, reference_points, offsets, weights, image_index, num_rows)


def _reference(value, sizes, reference_points, offsets, weights, image_index, num_rows=None) -> Tensor:
    level_shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    if reference_points is not None:
        return reference.deformable_attention(
            value, level_shapes, reference_points, offsets, weights, image_index, num_rows
        )
    return reference.sample_packed(value, level_shapes, offsets, weights, image_index, num_rows)


@_msda.register_fake
def _(value, sizes, reference_points, offsets, weights, image_index, num_rows, deterministic, backend):
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by value (empty unless needed), offsets and weights."""
    if backend == "triton":
        from ats_detr.kernels.gpu import attention

        with torch.cuda.device_of(value):
            if deterministic is None:
                deterministic = torch.are_deterministic_algorithms_enabled()
            problem = attention.prepare(value, sizes, reference_points, offsets, weights, image_index)
            grad_value, *grads = attention.backward(problem, out, grad_out, need_value, deterministic)
            return (value.new_empty(0) if grad_value is None else grad_value, *grads)

    # Within a compiled graph or a counter of operations nothing would be recorded: inference_mode(False) changes that.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, offsets, weights)]
        again = _reference(inputs[0], sizes, reference_points, *inputs[1:], image_index)
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
):
    grad_value = value.new_empty(value.shape if need_value else 0)
    return grad_value, offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)


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
    ) = inputs
    ctx.has_capacity = num_rows is not None
    ctx.save_for_backward(value, reference_points, offsets, weights, image_index, output)


def _differentiate(ctx, grad_out):
    if ctx.has_capacity:
        raise RuntimeError(
            "deformable_attention with num_rows has no gradient: capacity plans are for inference"
        )
    value, reference_points, offsets, weights, image_index, out = ctx.saved_tensors
    need_value = ctx.needs_input_grad[0]
    grad_value, grad_offsets, grad_weights = torch.ops.ats_detr.msda_backward(
        grad_out, out, value, ctx.sizes, reference_points, offsets, weights, image_index, need_value, ctx.deterministic,
        ctx.backend,
    )  # fmt: skip
    grad_value = grad_value if need_value else None
    return grad_value, None, None, grad_offsets, grad_weights, None, None, None, None


torch.library.register_autograd("ats_detr::msda", _differentiate, setup_context=_save)


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
