"""Inputs of the operators' tests, and how far a kernel may be from the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ats_detr.kernels import deformable_attention, multi_scale_deformable_attention
from ats_detr.kernels.reference import attention_weights, sampling_locations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative L2 error. float32: on a GPU the factors of a sorted value gradient have 16 bits (4e-6); else summation order
# and the order in which coordinates are computed. 16-bit: the result's own rounding, 2^-9 and 2^-12 on a GPU; Triton's
# interpreter truncates bfloat16 instead, hence twice that.
TOLERANCE = {torch.float32: 8e-6 if DEVICE == "cuda" else 5e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}


def relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double(), expected.double()
    scale = expected.norm().clamp(min=0.5 * max(1, expected.numel()) ** 0.5)  # one logit: its gradient is 0
    return ((result - expected).norm() / scale).item()


@dataclass(frozen=True)
class AttentionCase:
    """One deformable attention problem; everything not named here is drawn from `seed`."""

    levels: tuple[tuple[int, int], ...] = ((12, 17), (6, 9), (3, 5), (2, 3))
    counts: tuple[int, ...] = (7, 3)
    """Queries of each image; packed (ragged) unless all are equal."""
    heads: int = 2
    head_dim: int = 32
    points: int = 4
    reference: int = 2
    dtype: torch.dtype = torch.float32
    coordinates: torch.dtype = torch.float32
    """dtype of offsets and logits."""
    spread: float = 2.0
    """Standard deviation of the offsets, in pixels; references reach beyond the map."""
    strided: bool = False
    """Value, offsets and logits are slices of larger projections."""
    seed: int = 0

    def tensors(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, num_queries, num_levels = len(self.counts), sum(self.counts), len(self.levels)
        num_tokens = sum(height * width for height, width in self.levels)
        shape = (num_queries, self.heads, num_levels, self.points)
        copies = 3 if self.strided else 1
        value = normal(batch, num_tokens, copies, self.heads, self.head_dim).to(self.dtype)[:, :, copies // 2]
        offsets = (normal(num_queries, copies, *shape[1:], 2) * self.spread).to(self.coordinates)[
            :, copies // 2
        ]
        logits = normal(num_queries, copies, *shape[1:]).to(self.coordinates)[:, copies // 2]
        reference = torch.rand(num_queries, num_levels, self.reference, generator=generator) * 1.2 - 0.1
        image = None
        if len(set(self.counts)) > 1:
            image = torch.arange(batch).repeat_interleave(torch.tensor(self.counts)).int()
        gradient = normal(num_queries, self.heads * self.head_dim).to(self.dtype)
        names = dict(
            value=value, reference=reference, offsets=offsets, logits=logits, image=image, gradient=gradient
        )
        return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in names.items()}

    def run(self, fused: bool = True, exact: bool = False, **keywords) -> dict[str, Tensor]:
        """Output and gradients; `exact`: the reference in float64."""
        tensors = self.tensors()
        if (
            not fused
        ):  # locations and weights as another network would hand them over, in the coordinates' dtype
            tensors["offsets"] = sampling_locations(tensors["reference"], tensors["offsets"], self.levels)
            tensors["logits"] = attention_weights(tensors["logits"])
            tensors["offsets"], tensors["logits"] = (
                tensors[name].to(self.coordinates) for name in ("offsets", "logits")
            )
        if exact:
            tensors = {
                n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()
            }
            keywords = dict(keywords, backend="reference")
        inputs = {name: tensors[name].detach().requires_grad_() for name in ("value", "offsets", "logits")}
        value, offsets, logits = inputs.values()
        if fused:
            out = deformable_attention(
                value, self.levels, tensors["reference"], offsets, logits, tensors["image"], **keywords
            )
        else:
            shape = (len(self.counts), -1)
            out = multi_scale_deformable_attention(
                value, self.levels, offsets.unflatten(0, shape), logits.unflatten(0, shape), **keywords
            ).flatten(0, 1)
        out.backward(tensors["gradient"].to(out.dtype))
        return {"out": out.detach(), **{name: tensor.grad for name, tensor in inputs.items()}}
