"""Multiply-adds of a detector per image, counted for given images and their budgets.

There are two conventions. Published figures of this family include training-time outputs: predictions at all tokens,
auxiliary heads, adaption layer. The inference count includes only operations that the detections depend on, but
projects the values of kept tokens twice (once for all layers together, then again in each layer). Both count four
multiply-adds per bilinear sample and channel (the weights of the corners are shared by all channels and not counted)
and five per value of a LayerNorm or GroupNorm, as fvcore does; batch norms are folded into convolutions.
"""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ats_detr.batch import ImageBatch
from ats_detr.model import Detr

_ENCODER_VALUE = re.compile(r"encoder\.layers\.\d+\.attention\.value_proj")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Giga multiply-adds per image, the mean over a batch."""

    total: float
    encoder: float
    """The encoder layers: value projections of all tokens, all other operations on kept tokens."""
    dense_encoder: float
    """The encoder layers if all tokens were kept. Exact, since all operations except the value projection of all
    tokens are proportional to the kept tokens."""
    by_module: dict[str, float]
    """Count of each module that is called, including the modules that it calls, by the name in
    `model.named_modules()`. Repeated projections are included, also with `as_published`."""
    keep_ratio: float
    """Kept share of the valid tokens, mean over images; 1 for a dense encoder."""
    num_tokens: float
    """Tokens per image, including padding."""
    num_kept: float
    """Kept tokens, mean over images."""


def count_flops(
    model: Detr, batch: ImageBatch, *, as_published: bool = False, keep_ratio: float | None = None
) -> Flops:
    """Multiply-adds of one forward pass, counted by `torch.utils.flop_counter`.

    Counts the reference operators, on a copy of the model on the CPU: kernels are opaque to the counter.

    Args:
        model: the model; it is not modified.
        batch: the images, on any device.
        as_published: use the convention of published figures (see above) instead of the inference count.
        keep_ratio: of all images. None: the budgets of the model.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with patch.dict(os.environ, ATS_DETR_BACKEND="reference"), torch.no_grad(), counter:
        output = model(batch.to("cpu"), supervision=as_published, keep_ratio=keep_ratio)
    scale = 2e9 * len(batch)  # the counter counts a multiply-add as two operations
    prefix = f"{type(model).__name__}."
    modules = {
        name.removeprefix(prefix): sum(by_operator.values()) / scale
        for name, by_operator in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    projections = [count for name, count in modules.items() if _ENCODER_VALUE.fullmatch(name)]
    once = len(projections) * min(projections)  # the first layer reads the raw tokens and repeats none
    repeated = sum(projections) - once if as_published else 0.0
    num_tokens = num_kept = float(output.padding_mask_BS.shape[1])
    keep_ratio = 1.0
    if output.selection is not None:
        num_kept = output.selection.num_kept_B.float().mean().item()
        keep_ratio = output.selection.keep_ratio_B.mean().item()
    return Flops(
        total=counter.get_total_flops() / scale - repeated,
        encoder=modules["encoder"] - repeated,
        dense_encoder=once + (modules["encoder"] - sum(projections)) * num_tokens / num_kept,
        by_module=modules,
        keep_ratio=keep_ratio,
        num_tokens=num_tokens,
        num_kept=num_kept,
    )


def num_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of elements of all parameters; shared parameters are counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def _norm(x: Any, *_: Any, **__: Any) -> int:
    return 2 * 5 * math.prod(x)


def _sampling(table: Any, rows: Any, *_: Any, **__: Any) -> int:
    """Weighted sums of value rows: four per bilinear sample."""
    return 2 * math.prod(rows) * table[-1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FORMULAS = {
    torch.ops.aten.native_layer_norm: _norm,
    torch.ops.aten.native_group_norm: _norm,
    torch.ops.aten._embedding_bag_forward_only: _sampling,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""Operators that the counter's own table lacks, of the shapes of their arguments; two for a multiply-add."""
