"""Self-check: whether the Triton kernels of a pass compute what their definitions in PyTorch compute, on this GPU.

Every operator of one pass runs both, on the same inputs. One that differs, or whose kernels fail, is reported with its
name and computed by its definition from then on. The outcome is stored with the tuning results.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels.agreement import TOLERANCE, difference
from ats_detr.kernels.dispatch import FAULTY, Operator, choose_backend, observed, tensors_of
from ats_detr.model.detr import Detr
from ats_detr.model.output import DetectorOutput
from ats_detr.text import first_line

logger = logging.getLogger(__name__)

_KEPT_BY_BOTH, _SORTED = 0.9, {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of whole passes: share of kept tokens in common, and mean difference of sorted scores and boxes. Roundings may
exchange tokens of nearly equal scores."""


def self_check(model: Detr, images_B3HW: Tensor, sizes_B2: Tensor) -> bool:
    """Compare kernels and definitions in a pass over the first image, unless the outcome is known.

    Nothing is done where the definitions run anyway. Raises no error of the kernels. Returns whether no kernel is known
    to be faulty: definitions may synchronise with the device, which a capture does not allow.
    """
    device, dtype = model.level_embed.device, model.level_embed.dtype
    if choose_backend(model.level_embed.detach()) != "triton":
        return True
    from ats_detr.kernels.gpu import tuning  # Triton is optional

    key = f"{dtype}|{_digest(model)}"
    faults = tuning.known_faults(device, key)
    if faults is None:
        inputs = images_B3HW[:1], sizes_B2[:1]
        try:
            faults = find_faults(lambda: model.detect(*inputs, supervision=False), dtype)
        except Exception as error:  # of the pass itself, or too little memory for the definitions
            reason = first_line(error)
            logger.warning("the self-check of the kernels was not possible: %s", reason)
            return True
        tuning.remember_faults(device, key, faults)
    for name, fault in faults.items():
        logger.warning("self-check: operator %s %s; PyTorch computes it instead", name, fault)
        FAULTY.add((name, device))
    return not faults


def find_faults(detect: Callable[[], DetectorOutput], dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with the kernels of each faulty operator of a pass, by its name."""
    faults: dict[str, str] = {}
    used: set[str] = set()

    def compare(operator: Operator, arguments: tuple[Any, ...], launch: Callable[..., Any]) -> Any:
        used.add(operator.name)
        others = [
            argument.clone() if position in operator.mutated else argument
            for position, argument in enumerate(arguments)
        ]
        result, fault = None, faults.get(operator.name)
        if fault is None:
            try:
                result = launch(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler or the driver
                fault = f"fails ({first_line(error)})"
        expected = operator.definition(*others)
        changed = [(arguments[position], others[position]) for position in operator.mutated]
        if fault is None:
            results, wanted = tensors_of([result]), tensors_of([expected])
            pairs = [*zip(results, wanted, strict=True), *changed]
            dtypes = {tensor.dtype for tensor in [*tensors_of(arguments), *wanted]}
            tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
            fault = difference(pairs, operator.rows_in_use(arguments), tolerance)
        if fault is None:
            return result
        faults[operator.name] = fault
        for target, value in changed:
            target.copy_(value)
        return expected

    with observed(compare):
        output = detect()
    with observed(lambda operator, arguments, launch: operator.definition(*arguments)):
        unfused = detect()
    if not _same_detections(output, unfused, dtype):
        faults |= dict.fromkeys(used - faults.keys(), "is part of a pass that differs")
    return faults


def _same_detections(output: DetectorOutput, expected: DetectorOutput, dtype: torch.dtype) -> bool:
    """Whether two passes keep nearly the same tokens, and have nearly the same scores and boxes in any order."""
    if output.selection is not None and expected.selection is not None:
        kept, wanted = (o.selection.plan.slot_BS >= 0 for o in (output, expected))
        if (kept & wanted).sum() < _KEPT_BY_BOTH * torch.maximum(kept.sum(), wanted.sum()):
            return False
    columns = [
        torch.cat([o.last.logits.float().sigmoid().amax(-1, keepdim=True), o.last.boxes.float()], -1)
        .sort(1)
        .values
        for o in (output, expected)
    ]
    return bool((columns[0] - columns[1]).abs().mean() <= _SORTED[dtype])


def _digest(model: Detr) -> str:
    """Of the shapes of a model's tensors, which determine its kernels."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
