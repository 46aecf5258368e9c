"""Compilation of kernels before their first launch, in parallel processes, for any NVIDIA GPU and without one.

`recorded` finds the variants of the kernels that a pass launches; `compile_variants` writes them to Triton's cache. A
variant is what Triton compiles separately: a kernel with the types of its arguments, the divisibility of integers and
addresses by 16, the values of its constants, and its launch options.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ats_detr.kernels import reference
from ats_detr.kernels.gpu import tuning


@dataclass(frozen=True)
class Pointer:
    """A tensor as Triton sees it. It stands in for the tensor where a kernel is compiled but not launched."""

    dtype: torch.dtype
    remainder: int
    """Of the address divided by 16."""

    def data_ptr(self) -> int:
        return self.remainder

    def ptr_range(self) -> int:
        return 2**40


@dataclass(frozen=True)
class Variant:
    """A kernel and the values that stand for its arguments."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    """Names and values, launch options included."""


@contextlib.contextmanager
def recorded(gpu: str | None) -> Iterator[dict[Variant, None]]:
    """Context in which tensors have no contents, and launches are recorded as variants instead of made.

    Tensors on the CPU stand for tensors on a GPU. Operators that are not tuned on the GPU of this name yet (None: on
    any) are recorded with all their configurations. Changes PyTorch and Triton for the whole process.
    """
    variants: dict[Variant, None] = {}

    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        arguments = tuple(
            (name, value if name in constants or name not in kernel.arg_names else _representative(value))
            for name, value in values.items()
        )
        variants[Variant(kernel.fn.__module__, kernel.fn.__name__, arguments)] = None

    def launch_all(
        operator: str, key: tuple, size: int, device: object, launch: Callable[..., Any], reset: object = None
    ) -> Any:
        known = None if gpu is None else tuning.known_configuration(operator, key, size, gpu)
        configurations = tuning.configurations(operator, key) if known is None else [known[0]]
        results = [launch(**configuration) for configuration in configurations]
        return results[0]

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", catch),
            (tuning, "run", launch_all),
            (FakeTensor, "is_cuda", True),
            (FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size()),
            (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
            (torch.cuda, "device_of", contextlib.nullcontext),
            (reference, "_rows_in_use", lambda x_KC, _: len(x_KC)),  # as on a GPU
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Launches())
        yield variants


class _Launches(TorchDispatchMode):
    """Launches the kernels of custom operators, also of tensors without contents."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        function = OPDEFS[name]._init_fn if name.startswith("ats_detr::") else func
        return function(*args, **(kwargs or {}))


def _representative(value: Any) -> Any:
    """A value that Triton compiles like this argument."""
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if type(value) is int and value != 1:
        number = 16 if value % 16 == 0 else 2
        return number if -(2**31) <= value < 2**31 else number + 2**40
    return 0.5 if type(value) is float else value


def compile_variants(
    variants: Iterable[Variant], architecture: int, num_processes: int
) -> Iterator[tuple[Variant, bool, str | None]]:
    """Compile for compute capability `architecture` / 10. Yields each variant as it finishes, whether it was compiled
    (False: it was in Triton's cache), and the error, if any."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _use_target, (architecture,)) as pool:
        try:
            waiting = {pool.submit(_compile, variant): variant for variant in variants}
            for future in as_completed(waiting):
                yield waiting[future], *future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Driver:
    """A driver of a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _use_target(architecture: int) -> None:
    triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", architecture, 32)))


def _compile(variant: Variant) -> tuple[bool, str | None]:
    outcomes: list[bool] = []
    triton.knobs.compilation.listener = lambda *_, cache_hit, **__: outcomes.append(not cache_hit)
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    try:
        kernel.run(grid=(1,), warmup=True, **dict(variant.arguments))
    except Exception as error:  # of the compiler
        return False, (str(error).strip() or type(error).__name__).splitlines()[0]
    return any(outcomes), None
