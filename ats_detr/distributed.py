"""Communication between the processes of torchrun. Every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ats_detr.batch import Target
from ats_detr.errors import UserError
from ats_detr.text import first_line

T = TypeVar("T")

_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Read error",
    "Timed out",
)
"""Messages of gloo after another process has ended."""


_store: dist.Store | None = None
"""Shared by the processes of torchrun, for announcements."""


@contextmanager
def process_group(device: str, timeout_minutes: float = 30) -> Iterator[torch.device]:
    """The device of this process; within the context the processes of torchrun are connected.

    Args:
        device: `auto` (CUDA if there is any, else the CPU), `cpu`, `cuda` or `cuda:1`. NCCL connects GPUs, gloo CPUs.
        timeout_minutes: longest wait for another process.

    Raises UserError where another process ends or does not respond.
    """
    global _store
    chosen = choose_device(device)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched or dist.is_initialized():
        yield chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    timeout = timedelta(minutes=timeout_minutes)
    store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all attempts, which still holds the addresses of earlier processes. (On several
        # nodes each counts its own attempts: there torchrun has to make new stores, see docs/distributed.md.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)
    _store = store
    try:
        yield chosen
    except RuntimeError as error:  # of gloo; NCCL's DistBackendError is one too
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST_CONTACT):
            raise
        raise UserError(
            f"lost the connection to another process of this run ({first_line(error)}); see the error of that process"
        ) from error
    finally:
        _store = None
        dist.destroy_process_group()


def choose_device(device: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA if available, otherwise the CPU. Raises UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device = {device!r}: must be auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {device!r}: CUDA is not available to torch; must be auto or cpu")
    return chosen


def is_restarted() -> bool:
    """Whether torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 <= rank < world_size."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process has rank 0, the one that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """The values of all processes in rank order, on every process. Values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """The value of rank 0, on every process. Values must be picklable."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def announce(key: str, value: str) -> None:
    """Publish a value to all processes, without waiting for them. The first announcement of a key counts."""
    if _store is not None:
        _store.compare_set(key, "", value)


def announced(key: str) -> str | None:
    """The announced value, if any."""
    if _store is None or not _store.check([key]):
        return None
    return _store.get(key).decode()


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of rank 0: the statistics of batch norms differ between processes."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model wrapped in DistributedDataParallel where there are several processes."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def gradient_averaging(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Within the context, backward passes of a `parallel` model average gradients or accumulate them per process."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes, on every process. Differentiable."""
    return _SumOverProcesses.apply(tensor) if world_size() > 1 else tensor


class _SumOverProcesses(torch.autograd.Function):
    """Every process uses the sum, so the gradient of a summand is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverProcesses.apply(gradient)


def global_num_boxes(targets: Sequence[Target], device: torch.device) -> torch.Tensor:
    """float32 scalar: objects in the batches of all processes, at least 1, divided by the number of processes.

    DDP averages gradients over processes: losses divided by this number have the gradient of one process with the whole
    batch. (The published code clamps after the division, which differs where a global batch has fewer objects than
    there are processes.)
    """
    count = torch.tensor(float(sum(len(target.labels_N) for target in targets))).to(device, non_blocking=True)
    return sum_over_processes(count).clamp(min=1) / world_size()
