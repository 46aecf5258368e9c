"""Multiply-adds of a detector per image, counted for given images and their budgets.

There are two conventions. Published figures of this family include training-time outputs: predictions at all tokens,
auxiliary heads, adaption layer. The inference count includes only operations that the detections depend on, but
projects the values of kept tokens twice (once for all layers together, then again in each layer). Both count four
multiply-adds per bilinear sample and channel; the weights of the corners are shared by all channels and not counted.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ats_detr.batch import ImageBatch
from ats_detr.model import DetectorOutput, Detr

with warnings.catch_warnings():  # fvcore compiles functions with torch.jit.script when it is imported
    warnings.simplefilter("ignore", category=FutureWarning)
    warnings.simplefilter("ignore", category=DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis

_GIGA = 1e9
_ENCODER_VALUE = re.compile(r"encoder\.layers\.\d+\.attention\.value_proj")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Giga multiply-adds per image, the mean over a batch."""

    total: float
    encoder: float
    """The encoder layers: value projections of all tokens, all other operations on kept tokens."""
    by_operator: dict[str, float]
    by_module: dict[str, float]
    """By module name, as in `model.named_modules()`; the empty name is the total."""
    keep_ratio: float
    """Kept share of the valid tokens, mean over images; 1 for a dense encoder."""
    num_tokens: float
    """Tokens per image, including padding."""
    num_kept: float
    """Kept tokens, mean over images."""

    @property
    def dense_encoder(self) -> float:
        """The count of the encoder layers if all tokens were kept.

        Exact, since all operations except the value projection of all tokens are proportional to the kept tokens.
        """
        counted, value = _value_projections(self.by_module)
        return value + (self.encoder - counted) * self.num_tokens / self.num_kept


def count_flops(model: Detr, batch: ImageBatch, *, as_published: bool = False) -> Flops:
    """Multiply-adds of one forward pass, counted by fvcore.

    Counts the reference operators, on a copy of the model on the CPU.

    Args:
        model: the model; it is not modified.
        batch: the images, on any device.
        as_published: use the convention of published figures (see above) instead of the inference count.
    """
    model, images = _on_cpu(model, batch)
    counted = _Counted(model, images.sizes, as_published)
    with _reference_operators(), _quiet(), torch.no_grad():
        analysis = FlopCountAnalysis(counted, images.images_B3HW)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::embedding_bag", _sampling_macs)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        by_module, by_operator = analysis.by_module(), analysis.by_operator()
    per_image = _GIGA * len(images)
    prefix = "model."
    modules = {"": by_module[""] / per_image}
    modules |= {
        name.removeprefix(prefix): count / per_image
        for name, count in by_module.items()
        if name.startswith(prefix)
    }
    operators = {name: count / per_image for name, count in by_operator.items()}
    if as_published:
        _remove_repeated_projections(modules, operators, "linear", _parents)
    return Flops(
        total=modules[""],
        encoder=modules["encoder.layers"],
        by_operator=operators,
        by_module=modules,
        **counted.kept(),
    )


def count_flops_eager(model: Detr, batch: ImageBatch, *, as_published: bool = False) -> Flops:
    """Multiply-adds of one forward pass, counted by `torch.utils.flop_counter` during execution.

    It ignores norms and counts all executed operators, including those that the detections do not depend on. Bilinear
    sampling and the CPU attention kernel, which its table does not contain, are added here.
    """
    model, images = _on_cpu(model, batch)
    counted = _Counted(model, images.sizes, as_published)

    def sampling_flops(table: Any, rows: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * table[-1]

    def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    mapping = {
        torch.ops.aten._embedding_bag_forward_only: sampling_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    }
    with (
        _reference_operators(),
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        counted(images.images_B3HW)
    per_image = 2 * _GIGA * len(images)
    counts = counter.get_flop_counts()
    prefix = f"{_Counted.__name__}.model."
    modules = {"": counter.get_total_flops() / per_image}
    modules |= {
        name.removeprefix(prefix): sum(by_operator.values()) / per_image
        for name, by_operator in counts.items()
        if name.startswith(prefix)
    }
    by_operator = {str(name).removeprefix("aten."): n / per_image for name, n in counts["Global"].items()}
    if as_published:  # the counts of calling modules include those of called ones
        _remove_repeated_projections(modules, by_operator, "addmm", lambda leaf: ["", "encoder"])
    return Flops(
        total=modules[""],
        encoder=modules["encoder"],
        by_operator=by_operator,
        by_module=modules,
        **counted.kept(),
    )


def num_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of elements of all parameters; shared parameters are counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


class _Counted(nn.Module):
    """The model as a function of tensors, which fvcore can trace."""

    def __init__(self, model: Detr, sizes: list[tuple[int, int]], as_published: bool) -> None:
        super().__init__()
        self.model = model
        self.sizes, self.as_published = sizes, as_published
        self._output: DetectorOutput | None = None

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        output = self.model(ImageBatch(images_B3HW, self.sizes), supervision=self.as_published)
        self._output = output
        predictions = [output.last]
        others = []
        if self.as_published:
            predictions += [*output.decoder_auxiliary, *output.encoder_auxiliary]
            predictions += [output.encoder] if output.encoder is not None else []
            others = [output.adapted_memory_BSC] if output.adapted_memory_BSC is not None else []
        return (*(t for p in predictions for t in (p.logits, p.boxes)), *others)

    def kept(self) -> dict[str, float]:
        """The token counts of the last pass, as fields of Flops."""
        assert self._output is not None
        selection, num_tokens = self._output.selection, float(self._output.padding_mask_BS.shape[1])
        if selection is None:
            return {"keep_ratio": 1.0, "num_tokens": num_tokens, "num_kept": num_tokens}
        return {
            "keep_ratio": selection.keep_ratio_B.mean().item(),
            "num_tokens": num_tokens,
            "num_kept": selection.num_kept_B.float().mean().item(),
        }


def _on_cpu(model: Detr, batch: ImageBatch) -> tuple[Detr, ImageBatch]:
    return copy.deepcopy(model).cpu().eval().requires_grad_(False), batch.to("cpu")


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _sampling_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Weighted sums of value rows: four per bilinear sample."""
    return math.prod(_shape(inputs[1])) * _shape(inputs[0])[-1]


def _value_projections(by_module: dict[str, float]) -> tuple[float, float]:
    """The count of the encoder's value projections, with and without repeated projections of kept tokens.

    The first layer reads the raw tokens and repeats none.
    """
    counts = [n for name, n in by_module.items() if _ENCODER_VALUE.fullmatch(name)]
    return sum(counts), len(counts) * min(counts)


def _remove_repeated_projections(
    by_module: dict[str, float],
    by_operator: dict[str, float],
    operator: str,
    counted_in: Callable[[str], list[str]],
) -> None:
    """Subtract the repeated value projections of kept tokens from the counts, in place.

    Args:
        by_module: counts by module name.
        by_operator: counts by operator name.
        operator: name of the operator of the projections.
        counted_in: names of the modules whose counts include the module of a given name.
    """
    leaves = [name for name in by_module if _ENCODER_VALUE.fullmatch(name)]
    first = min(by_module[leaf] for leaf in leaves)
    for leaf in leaves:
        excess = by_module[leaf] - first
        for name in (leaf, *counted_in(leaf)):
            by_module[name] -= excess
        by_operator[operator] -= excess


def _parents(name: str) -> list[str]:
    return ["", *(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))]


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of the scores and the weighted sum of scaled dot-product attention."""
    *batch, num_queries, width = _shape(inputs[0])
    num_keys, value_width = _shape(inputs[1])[-2], _shape(inputs[2])[-1]
    return math.prod(batch) * num_queries * num_keys * (width + value_width)


@contextmanager
def _reference_operators() -> Iterator[None]:
    """Context that selects the reference backend: kernels are opaque to the counters and would not be counted."""
    requested = os.environ.get("ATS_DETR_BACKEND")
    os.environ["ATS_DETR_BACKEND"] = "reference"
    try:
        yield
    finally:
        if requested is None:
            del os.environ["ATS_DETR_BACKEND"]
        else:
            os.environ["ATS_DETR_BACKEND"] = requested


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without warnings about tracing: the trace is only counted, never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        yield
