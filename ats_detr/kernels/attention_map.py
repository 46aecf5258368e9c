"""The decoder cross-attention map (DAM): the public functions and the custom operator behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.attention import check_levels
from ats_detr.kernels.backend import choose_backend, runs_inside_graph
from ats_detr.kernels.reference import LevelShapes


def attention_map(
    locations_BQHLP2: Tensor, weights_BQHLP: Tensor, level_shapes: LevelShapes, *, backend: str | None = None
) -> Tensor:
    """How much attention each token receives, float32 [B, S]: weights spread bilinearly, summed over queries and heads.

    Sparse DETR's DAM: around (x*W, y*H) *without* the half-pixel shift of the sampling itself; the corners
    are the floor and the floor + 1, and corners outside the map are dropped, as are NaN locations. Carries no gradient.
    """
    if choose_backend(weights_BQHLP, backend) == "reference" and not runs_inside_graph():
        return reference.attention_map(locations_BQHLP2, weights_BQHLP, level_shapes)
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    return _new_map(None, locations, weights, level_shapes, locations_BQHLP2.shape[0], backend)


def deformable_attention_map(
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    level_shapes: LevelShapes,
    num_images: int,
    *,
    into: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention_map` of one deformable attention from its raw projections, float32 [B, S]; N = B*Q rows.

    into: a float32 [B, S] map to add to (and return), so that the layers of a decoder need one map between them.
    """
    if choose_backend(logits_NHLP, backend) == "reference" and not runs_inside_graph():
        new = reference.deformable_attention_map(
            reference_points, offsets_NHLP2, logits_NHLP, level_shapes, num_images
        )
        return new if into is None else into.add_(new)
    tensors = (reference_points, offsets_NHLP2, logits_NHLP)
    if into is None:
        return _new_map(*tensors, level_shapes, num_images, backend)
    _add(into, *tensors, level_shapes, backend)
    return into


def _new_map(reference_points, offsets, weights, level_shapes, num_images, backend) -> Tensor:
    num_tokens = sum(height * width for height, width in level_shapes)
    new = torch.zeros(num_images, num_tokens, dtype=torch.float32, device=weights.device)
    _add(new, reference_points, offsets, weights, level_shapes, backend)
    return new


def _add(target, reference_points, offsets, weights, level_shapes, backend) -> None:
    check_levels(level_shapes)
    sizes = [side for shape in level_shapes for side in shape]
    tensors = (
        None if reference_points is None else reference_points.detach(),
        offsets.detach(),
        weights.detach(),
    )
    torch.ops.ats_detr.add_attention_map(target, *tensors, sizes, choose_backend(weights, backend))


@torch.library.custom_op("ats_detr::add_attention_map", mutates_args=("target",))
def _add_attention_map(
    target: Tensor,
    reference_points: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    backend: str,
) -> None:
    """Adds to `target` [B, S]; without reference_points, `offsets` are locations and `weights` are used as they are."""
    if backend == "triton":
        from ats_detr.kernels.gpu import attention, dam

        with torch.cuda.device_of(target):
            problem = attention.prepare(None, sizes, reference_points, offsets, weights, None)
            dam.add_attention_map(problem, target)
            return
    level_shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    if reference_points is None:
        shape = (target.shape[0], -1)
        new = reference.attention_map(offsets.unflatten(0, shape), weights.unflatten(0, shape), level_shapes)
    else:
        new = reference.deformable_attention_map(
            reference_points, offsets, weights, level_shapes, target.shape[0]
        )
    target.add_(new)


@_add_attention_map.register_fake
def _(target, reference_points, offsets, weights, sizes, backend):
    return None
