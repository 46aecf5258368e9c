"""GroupNorm of feature maps straight into token rows, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from ats_detr.kernels.dispatch import (
    FLOATS,
    check_tensors,
    check_vectors,
    invalid,
    no_transforms,
    operator,
)
from ats_detr.kernels.packing import check_target

MAX_CHANNELS = 1024


def group_norm_(
    tokens_BSC: Tensor,
    map_BCHW: Tensor,
    num_groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Writes the GroupNorm of a map to its tokens, row-major, and returns them; computed in at least float32.

    (Wu and He, 2018.) For inference only.

    Args:
        tokens_BSC: [B, H * W, C], any floating point dtype; may be a slice of the tokens of all levels.
        map_BCHW: floating point. The kernels read channels-last memory; other maps are copied.
        num_groups: divides C. The kernels need powers of 2, for C at most 1024.
        weight_C, bias_C: factor and summand of each channel, floating point.
        backend: 'triton' or 'reference', see `choose_backend`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: a gradient would be recorded.
    """
    check_tensors(tokens=tokens_BSC, map=map_BCHW, weight=weight_C, bias=bias_C)
    if not (map_BCHW.ndim == 4 and map_BCHW.dtype in FLOATS):
        raise invalid("map", map_BCHW, "[B, C, H, W], floating point")
    batch, channels, height, width = map_BCHW.shape
    if not (tokens_BSC.shape == (batch, height * width, channels) and tokens_BSC.dtype in FLOATS):
        raise invalid("tokens", tokens_BSC, f"[{batch}, {height * width}, {channels}], floating point")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups {num_groups}: must be >= 1 and divide the {channels} channels")
    check_vectors(channels, weight=weight_C, bias=bias_C)
    check_target("tokens", tokens_BSC, map_BCHW, weight_C, bias_C)
    _group_norm_(
        tokens_BSC, map_BCHW, num_groups, weight_C, bias_C, eps,
        backend=backend, limitation=_limitation(tokens_BSC, channels, num_groups),
    )  # fmt: skip
    return tokens_BSC


def _limitation(tokens: Tensor, channels: int, num_groups: int) -> str | None:
    """Why the kernels cannot compute a map."""
    if channels > MAX_CHANNELS or channels & (channels - 1) or num_groups & (num_groups - 1):
        return f"{channels} channels in {num_groups} groups: must be powers of 2, at most {MAX_CHANNELS} channels"
    if tokens.stride(-1) != 1 and tokens.numel():
        return "the channels of a token are not contiguous"
    return no_transforms()


@operator("normalization.group_norm_", mutates_args=("tokens",))
def _group_norm_(
    tokens: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> None:
    if tokens.numel() == 0:
        return
    x = x if x.element_size() >= 4 else x.float()
    normed = torch.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    tokens.copy_(normed.flatten(2).transpose(1, 2))
