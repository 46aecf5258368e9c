"""What computed a call: the backend of each operator, the configuration of each kernel, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ats_detr.kernels.attention import multi_scale_deformable_attention
from ats_detr.kernels.dispatch import BACKENDS, recording


@dataclass(frozen=True)
class Choice:
    """The backend of an operator, or the configuration of a kernel."""

    name: str
    chosen: str
    """'triton' or 'reference', or the configuration of a kernel."""
    reason: str

    def __str__(self) -> str:
        indent = "" if self.chosen in BACKENDS else "    "
        return f"{indent}{self.name}: {self.chosen} ({self.reason})"


@dataclass(frozen=True)
class Explanation:
    """The choices of a call, in the order in which they were first made; printed as one line each."""

    calls: dict[Choice, int]
    """How often each was made."""

    def __str__(self) -> str:
        lines = [f"{choice}, {count} call{'s' * (count > 1)}" for choice, count in self.calls.items()]
        return "\n".join(lines) or "no operator was called"


def explain(
    *arguments: Any, function: Callable[..., Any] = multi_scale_deformable_attention, **keywords: Any
) -> Explanation:
    """Calls `function(*arguments, **keywords)`, and returns which backend and configuration computed it, and why.

        print(explain(value, level_shapes, locations, weights))
        print(explain(images, function=model))

    The call is made as usual: kernels are compiled and, on a GPU without measurements, timed. Within compiled and
    captured functions the backends were chosen before; only configurations of kernels are then reported, if any.
    """
    calls: Counter[Choice] = Counter()

    def record(name: str, chosen: Any, reason: str) -> None:
        if isinstance(chosen, dict):
            chosen = ", ".join(f"{key}={value}" for key, value in chosen.items())
        calls[Choice(name, chosen, reason)] += 1

    with recording(record):
        function(*arguments, **keywords)
    return Explanation(dict(calls))
