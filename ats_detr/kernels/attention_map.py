"""The decoder cross-attention map (DAM): the public function and its custom operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ats_detr.kernels import attention, reference
from ats_detr.kernels.dispatch import check_tensors, invalid, operator
from ats_detr.kernels.levels import LevelShapes, as_level_shapes, join_shapes, num_tokens_of, split_shapes
from ats_detr.kernels.packing import check_no_overlap


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
    """How much attention each token receives, float32 [B, S]: weights spread bilinearly, summed over queries and heads.

    Sparse DETR's DAM, from the raw projections of one deformable attention, N = B*Q rows: around (x*W, y*H) *without*
    the half-pixel shift of the sampling itself; the corners are the floor and the floor + 1, and corners outside the
    map are dropped, as are samples with a NaN coordinate. Carries no gradient.

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
    check_tensors(
        {"into": into},
        reference_points=reference_points,
        offsets_NHLP2=offsets_NHLP2,
        logits_NHLP=logits_NHLP,
    )
    shapes = as_level_shapes(level_shapes)
    attention.check_samples(shapes, offsets_NHLP2, logits_NHLP)
    attention.check_references(reference_points, offsets_NHLP2)
    num_queries = offsets_NHLP2.shape[0]
    if num_images < 0 or (num_images == 0 and num_queries > 0) or num_queries % max(1, num_images) != 0:
        raise ValueError(f"num_images {num_images}: {num_queries} queries must be a multiple of it")
    if into is not None:
        num_tokens = into.shape[-1] if isinstance(shapes, Tensor) else num_tokens_of(shapes)
        if into.shape != (num_images, num_tokens) or into.dtype != torch.float32:
            raise invalid("into", into, f"float32 [{num_images}, {num_tokens}]")
        if into.requires_grad:
            raise ValueError("into requires a gradient: the attention map has none; pass into.detach()")
        check_no_overlap("into", into)
        map_BS = into
    elif isinstance(shapes, Tensor):
        raise ValueError(
            "level_shapes is a tensor: a compiled attention map needs pairs of integers or a map to add to (into=)"
        )
    else:
        map_BS = torch.zeros(
            num_images, num_tokens_of(shapes), device=logits_NHLP.device, dtype=torch.float32
        )
    raw = (tensor.detach() for tensor in (reference_points, offsets_NHLP2, logits_NHLP))
    limitation = attention.limitation(shapes, logits_NHLP)
    _add_attention_map(map_BS, *raw, *split_shapes(shapes), backend=backend, limitation=limitation)
    return map_BS


@operator("attention_map.add_attention_map", mutates_args=("target",))
def _add_attention_map(
    target: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sizes: Sequence[int],
    shapes_L2: Tensor | None,
) -> None:
    """Adds the map to `target` [B, S]."""
    shapes = join_shapes(sizes, shapes_L2, target.shape[1])
    target.add_(
        reference.deformable_attention_map(reference_points, offsets, logits, shapes, target.shape[0])
    )
