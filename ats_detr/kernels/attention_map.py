"""The decoder cross-attention map (DAM): the public functions and the custom operator behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ats_detr.kernels import attention, reference
from ats_detr.kernels.backend import runs_inside_graph
from ats_detr.kernels.reference import LevelShapes


def attention_map(
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    level_shapes: LevelShapes | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """How much attention each token receives, float32 [B, S]: weights spread bilinearly, summed over queries and heads.

    Sparse DETR's DAM: around (x*W, y*H) *without* the half-pixel shift of the sampling itself; the corners
    are the floor and the floor + 1, and corners outside the map are dropped, as are NaN locations. Carries no gradient.
    """
    shapes = attention.as_level_shapes(level_shapes)
    attention.check_samples(shapes, locations_BQHLP2, weights_BQHLP, 2)
    chosen = attention.kernel_or_reference(None, shapes, weights_BQHLP, backend)
    if chosen == "reference" and not runs_inside_graph():
        return reference.attention_map(locations_BQHLP2, weights_BQHLP, shapes)
    map_BS = _zeros(locations_BQHLP2.shape[0], shapes, weights_BQHLP.device)
    _add(map_BS, None, locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1), shapes, chosen)
    return map_BS


def deformable_attention_map(
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    level_shapes: LevelShapes | Tensor,
    num_images: int,
    *,
    into: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention_map` of one deformable attention from its raw projections, float32 [B, S]; N = B*Q rows.

    Args:
        reference_points: as in `deformable_attention`, like the next three.
        offsets_NHLP2: [N, H, L, P, 2].
        logits_NHLP: [N, H, L, P].
        level_shapes: (height, width) of each level.
        num_images: B; N must be a multiple of it.
        into: a float32 [B, S] map to add to (and return), so that the layers of a decoder share one map.

    Raises ValueError for shapes, dtypes or devices that do not fit together, and like `deformable_attention` beyond the
    limits of the kernels.
    """
    shapes = attention.as_level_shapes(level_shapes)
    attention.check_samples(shapes, offsets_NHLP2, logits_NHLP, 1)
    attention.check_references(reference_points, offsets_NHLP2)
    num_queries = offsets_NHLP2.shape[0]
    if num_images < 0 or (num_images == 0 and num_queries > 0) or num_queries % max(1, num_images) != 0:
        raise ValueError(f"num_images {num_images}: {num_queries} queries must be a multiple of it")
    if into is not None:
        _check_map(into, shapes, num_images, logits_NHLP)
    chosen = attention.kernel_or_reference(None, shapes, logits_NHLP, backend)
    if chosen == "reference" and not runs_inside_graph():
        new = reference.deformable_attention_map(
            reference_points, offsets_NHLP2, logits_NHLP, shapes, num_images
        )
        return new if into is None else into.add_(new)
    map_BS = _zeros(num_images, shapes, logits_NHLP.device) if into is None else into
    _add(map_BS, reference_points, offsets_NHLP2, logits_NHLP, shapes, chosen)
    return map_BS


def _check_map(map_BS: Tensor, shapes: LevelShapes | Tensor, num_images: int, weights: Tensor) -> None:
    num_tokens = map_BS.shape[-1] if isinstance(shapes, Tensor) else attention.num_tokens_of(shapes)
    if map_BS.shape != (num_images, num_tokens) or map_BS.dtype != torch.float32:
        raise ValueError(
            f"into is {map_BS.dtype} {tuple(map_BS.shape)}: must be float32 [{num_images}, {num_tokens}]"
        )
    if map_BS.device != weights.device:
        raise ValueError(f"into is on {map_BS.device}: must be on {weights.device} like the weights")
    if map_BS.requires_grad:
        raise ValueError("into requires a gradient: the attention map carries none; pass into.detach()")


def _zeros(num_images: int, shapes: LevelShapes | Tensor, device: torch.device) -> Tensor:
    if isinstance(shapes, Tensor):
        raise ValueError(
            "level_shapes is a tensor: a compiled attention map needs pairs of integers or a map to add to (into=)"
        )
    return torch.zeros(num_images, attention.num_tokens_of(shapes), dtype=torch.float32, device=device)


def _add(map_BS, reference_points, offsets, weights, shapes, backend) -> None:
    sizes, shapes_L2 = attention.sizes_of(shapes)
    tensors = [None if tensor is None else tensor.detach() for tensor in (reference_points, offsets, weights)]
    torch.ops.ats_detr.add_attention_map(map_BS, *tensors, sizes, backend, shapes_L2)


@torch.library.custom_op("ats_detr::add_attention_map", mutates_args=("target",))
def _add_attention_map(
    target: Tensor,
    reference_points: Tensor | None,
    offsets: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    backend: str,
    shapes_L2: Tensor | None = None,
) -> None:
    """Adds to `target` [B, S]; without reference_points, `offsets` are locations and `weights` are used as they are."""
    shapes = attention.shapes_from(sizes, shapes_L2, target.shape[1])
    if backend == "triton":
        from ats_detr.kernels.gpu import attention_map as gpu
        from ats_detr.kernels.gpu.problem import prepare

        offsets, weights = (t.float() if t.dtype == torch.float64 else t for t in (offsets, weights))
        with torch.cuda.device_of(target):
            sizes, _ = attention.sizes_of(shapes)
            problem = prepare(None, sizes, reference_points, offsets, weights, None)
            if target.is_contiguous():
                gpu.add_attention_map(problem, target)
            else:
                new = torch.zeros(target.shape, dtype=target.dtype, device=target.device)
                gpu.add_attention_map(problem, new)
                target.add_(new)
            return
    if reference_points is None:
        shape = (target.shape[0], weights.shape[0] // max(1, target.shape[0]))
        new = reference.attention_map(offsets.unflatten(0, shape), weights.unflatten(0, shape), shapes)
    else:
        new = reference.deformable_attention_map(reference_points, offsets, weights, shapes, target.shape[0])
    target.add_(new)


@_add_attention_map.register_fake
def _(target, reference_points, offsets, weights, sizes, backend, shapes_L2=None):
    return None
