"""Teachers that read the output of the student's frozen backbone stages instead of computing it again."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ats_detr.model import Detr


def share_frozen_stages(student: Detr, teacher: Detr) -> bool:
    """Let the teacher's backbone use the student's last output of the frozen stages. Returns whether it does.

    Only where the stages have equal structure and weights, to the bit, and behave the same in training and evaluation.
    """
    own: Any = student.backbone.body
    other: Any = teacher.backbone.body
    names = student.backbone.frozen_stages()
    if not names or not isinstance(other, nn.ModuleDict) or not set(names) <= set(other):
        return False
    for name in names:
        a, b = own[name].state_dict(), other[name].state_dict()
        if repr(own[name]) != repr(other[name]) or any(not torch.equal(a[key], b[key]) for key in a):
            return False
        if any(isinstance(module, _DIFFERENT_IN_TRAINING) for module in own[name].modules()):
            return False
    for name in names:
        is_read = name == names[-1] or name in own.return_layers
        other[name] = (_LastOutput(own[name]) if is_read else nn.Identity()).train(other[name].training)
    return True


_DIFFERENT_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.Dropout, DropPath)


class _LastOutput(nn.Module):
    """Returns the last output of another module in the dtype of its own input, which it does not read."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.output: Tensor | None = None
        source.register_forward_hook(self._store)

    def _store(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        assert self.output is not None, "the student must run on the batch first"
        return self.output.to(x.dtype)
