"""Who computes an operator: the Triton kernels or the PyTorch reference. Decided here and nowhere else."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "triton")
_KNOWS_EXPORT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""Whether `torch.compiler.is_exporting` is False under torch.compile: not in 2.11, and so in 2.14."""


def choose_backend(tensor: Tensor, backend: str | None = None, kernel_pays: bool = True) -> str:
    """'triton' or 'reference' for an operator on `tensor`.

    `backend` decides, then the environment variable ATS_DETR_BACKEND, then the device: CUDA runs the kernels
    where Triton is installed, everything else the reference. float64 always runs the reference. Asking for
    Triton on the CPU needs its interpreter (TRITON_INTERPRET=1 in the environment before Python starts).

    Operators launch their kernels under `torch.cuda.device_of(a tensor)`: Triton launches on the current GPU,
    wherever the tensors are.

    kernel_pays: False where PyTorch's own operators are as good: then CUDA runs the reference unless asked otherwise.
    """
    asked = backend or os.environ.get("ATS_DETR_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"backend {asked!r}: use one of {', '.join(BACKENDS)}")
    if asked == "reference" or tensor.dtype == torch.float64:
        return "reference"
    if asked is None:
        return "triton" if tensor.is_cuda and HAS_TRITON and kernel_pays else "reference"
    if not HAS_TRITON:
        raise ValueError("backend 'triton': the package triton is not installed; pip install triton")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"backend 'triton' on a {tensor.device.type} tensor: set TRITON_INTERPRET=1 before Python starts"
        )
    return "triton"


def runs_inside_graph() -> bool:
    """Whether a compiler is tracing: operators then go through their opaque custom op whatever the backend."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether torch.export is tracing. PyTorch 2.11 says so under torch.compile too: there strict export is taken for
    that."""
    return torch.compiler.is_exporting() and (_KNOWS_EXPORT or not torch.compiler.is_dynamo_compiling())
