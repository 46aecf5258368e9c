"""Whether two computations of the same result agree."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest root mean square of the differences of a result, relative to that of the result itself, by the dtypes of the
arguments and results. float32 includes products in TF32, of 11 bits; 16-bit dtypes include intermediate results that
only the definition rounds. In the interpreter at most 3e-7, 4e-4 and 5e-3 were measured."""
_PEAK = 32
"""Single differences may be so many times larger."""


def difference(pairs: list[tuple[Tensor, Tensor]], num_rows: int | None, tolerance: float) -> str | None:
    """How the first results differ from the second; None if they agree in their first `num_rows` rows. Synchronises."""
    for result, expected in pairs:
        kinds = [f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (result, expected)]
        if kinds[0] != kinds[1]:
            return f"returns {kinds[0]} instead of {kinds[1]}"
        result, expected = result[:num_rows], expected[:num_rows]
        same = (result == expected) | (result.isnan() & expected.isnan())
        if same.all():
            continue
        if not expected.is_floating_point():
            return f"has {int((~same).sum())} of {same.numel()} values wrong"
        error = torch.where(same, 0.0, result.float() - expected.float()).abs()
        size = torch.where(expected.isfinite(), expected.float(), 0.0).abs()
        scale = size.square().mean().sqrt()
        share = error.square().mean().sqrt() / scale
        if not (share <= tolerance and (error / (scale + size)).max() <= _PEAK * tolerance):
            return f"differs by {float(share):.2g} of its result (at most {tolerance:g} is expected)"
    return None
