"""The registrar of the custom operators, and the choice between the Triton kernels and the PyTorch reference."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = __name__.partition(".")[0]
"""Of the operators in PyTorch: that of the package, as copies of these files under other names register their own."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "triton")
MIN_CAPABILITY = (8, 0)
"""Oldest GPUs that run the kernels with matrix products: before, they spill up to 11 KB or exceed the shared memory of
a program."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that the operators compute with; float64 in the reference only."""
capture_lock = threading.RLock()
"""Held while a CUDA graph is captured and where kernels are timed: a thread that synchronises the device breaks the
capture of another."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_KNOWS_EXPORT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""Whether `torch.compiler.is_exporting` is False under torch.compile: not in 2.11, and so in 2.14."""


def choose_backend(
    tensors: Tensor | Sequence[Tensor],
    backend: str | None = None,
    *,
    kernel_pays: bool = True,
    limitation: str | None = None,
) -> str:
    """'triton' or 'reference' for an operator on `tensors`.

    The argument `backend` decides, then the environment variable ATS_DETR_BACKEND, then the device: on CUDA the kernels
    run if Triton is installed, otherwise the reference does. float64 always runs the reference. On the CPU, 'triton'
    needs Triton's interpreter (TRITON_INTERPRET=1 in the environment before Python starts).

    Args:
        kernel_pays: False if PyTorch's own operators are as fast; 'triton' then has to be requested.
        limitation: why the kernels cannot compute this call; None if they can. The reference runs instead.

    Raises ValueError for an unknown backend, and if `backend` is 'triton' but the kernels cannot run.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    return _decide(tensors, backend, kernel_pays, limitation)[0]


def _decide(
    tensors: Sequence[Tensor], backend: str | None, kernel_pays: bool, limitation: str | None
) -> tuple[str, str]:
    """What `choose_backend` returns, and why."""
    requested = backend or os.environ.get("ATS_DETR_BACKEND") or None
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend {requested!r}: must be one of {', '.join(BACKENDS)}")
    by = "backend=" if backend else "ATS_DETR_BACKEND="
    if requested == "reference":
        return "reference", f"{by}reference"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "reference", "a tensor is float64"
    on_cuda = tensors[0].is_cuda
    if requested is None:
        if not on_cuda:
            return "reference", "the tensors are not on a CUDA device"
        if not HAS_TRITON:
            return "reference", "triton is not installed"
        if limitation is not None:
            return "reference", limitation
        if not kernel_pays:
            return "reference", "PyTorch's own operators are as fast"
        return "triton", "the tensors are on a CUDA device"
    if not HAS_TRITON:
        raise ValueError("backend 'triton': the package triton is not installed; pip install triton")
    if not on_cuda and (not tensors[0].is_cpu or os.environ.get("TRITON_INTERPRET", "0") != "1"):
        raise ValueError(
            f"backend 'triton' on a {tensors[0].device.type} tensor: must be on CUDA or, with TRITON_INTERPRET=1 set"
            " before Python starts, on the CPU"
        )
    if limitation is None:
        return "triton", f"{by}triton"
    if backend is None:  # the environment prefers the kernels
        return "reference", limitation
    raise ValueError(f"backend 'triton': {limitation}; use backend='reference' or omit it")


def runs_inside_graph() -> bool:
    """Whether a compiler is tracing. Every operator is then one opaque call, with either backend."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether torch.export is tracing. In PyTorch 2.11, strict export is mistaken for torch.compile."""
    return torch.compiler.is_exporting() and (_KNOWS_EXPORT or not torch.compiler.is_dynamo_compiling())


def no_transforms() -> str | None:
    """The limitation of kernels that support neither forward-mode differentiation nor torch.func; None outside both."""
    if runs_inside_graph():
        return None
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "forward-mode differentiation and the transforms of torch.func are not supported"
    return None


def product_limitation(device: torch.device) -> str | None:
    """The limitation of kernels with matrix products, see MIN_CAPABILITY; otherwise that of `no_transforms`."""
    capability = compute_capability(device)
    if capability is not None and capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return no_transforms()


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; None for other devices and on machines without a GPU."""
    return _compute_capability(device) if device.type == "cuda" else None


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: 2 of the 2.3 s of importing the operators.
compute_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the autocast dtype of its device if autocast is enabled; float64 keeps its dtype."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


FAULTY: set[tuple[str, torch.device]] = set()
"""Operators whose kernels a self-check found to be wrong on a device; their definitions run instead."""
_observer: ContextVar[Callable[..., Any] | None] = ContextVar("observer", default=None)


recorder: Callable[[str, Any, str], None] | None = None
"""While `explain` runs, it is called with each operator or kernel, the backend or configuration, and the reason."""


@contextmanager
def recording(record: Callable[[str, Any, str], None]) -> Iterator[None]:
    """Context in which the choices of all threads are recorded: gradients are computed by other threads on CUDA."""
    global recorder
    previous, recorder = recorder, record
    try:
        yield
    finally:
        recorder = previous


@contextmanager
def observed(observer: Callable[[Operator, tuple, Callable[..., Any]], Any]) -> Iterator[None]:
    """Context in which `observer(operator, arguments, launch)` computes each operator of this thread that would run its
    kernels; `launch(*arguments)` runs them."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class Operator:
    """A custom operator: a definition in PyTorch and the launcher of its Triton kernels, which have the same signature.

    The registered operator has one more argument, the chosen backend. It is opaque to torch.compile, because Inductor
    would inline the kernels and lose their tuning. Called eagerly, the reference runs as ordinary PyTorch operators.
    """

    def __init__(
        self, definition: Callable[..., Any], kernel: str, name: str | None, mutates_args: Iterable[str]
    ) -> None:
        self.definition = definition
        module, launcher = kernel.split(".")
        self.name = name or launcher
        schema = torch.library.infer_schema(definition, mutates_args=mutates_args)
        signature, returns = schema.rsplit(") ->", 1)

        def launch_kernels(*arguments: Any) -> Any:
            # Imported here: Triton is optional, and reads TRITON_INTERPRET on import.
            function = getattr(importlib.import_module(f"{__package__}.gpu.{module}"), launcher)
            # Triton launches on the current GPU, not on that of the tensors.
            with torch.cuda.device_of(tensors_of(arguments)[0]):
                return function(*arguments)

        def launch(*arguments: Any) -> Any:
            if FAULTY and (self.name, tensors_of(arguments)[0].device) in FAULTY:
                return definition(*arguments)
            observer = _observer.get()
            return (
                launch_kernels(*arguments) if observer is None else observer(self, arguments, launch_kernels)
            )

        self._launch = launch
        names = [argument.name for argument in torch._C.parse_schema(f"f{schema}").arguments]
        self.mutated = [names.index(name) for name in mutates_args]
        """Positions of the arguments that are written to."""
        # Results with a row per token of a memory have no unused rows.
        has_unused_rows = "num_rows" in names and not any(name.startswith("memory") for name in names)
        self._num_rows = names.index("num_rows") if has_unused_rows else None

        self._registered = torch.library.custom_op(
            f"{NAMESPACE}::{self.name}",
            lambda *arguments: self._compute(arguments[:-1], arguments[-1]),
            mutates_args=mutates_args,
            schema=f"{signature}, str backend) ->{returns}",
        )
        self.packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        """The registered operator."""
        if returns.strip() == "()":
            self.register_fake(lambda *arguments: None)

    def __call__(
        self,
        *arguments: Any,
        backend: str | None = None,
        kernel_pays: bool = True,
        limitation: str | None = None,
        registered: bool = False,
    ) -> Any:
        """Computes the operator with the backend that `choose_backend` chooses.

        registered: call the registered operator even for an eager reference, for its gradients.

        Raises ValueError if the tensors are not all on one device.
        """
        tensors = tensors_of(arguments)
        if not runs_inside_graph():
            check_one_device(self.name, tensors)
            if any(arguments[position].is_neg() for position in self.mutated):
                limitation = "writing to a view with the negative bit is not supported"
        chosen, reason = _decide(tensors, backend, kernel_pays, limitation)
        if not runs_inside_graph() and recorder is not None:
            if chosen == "triton" and (self.name, tensors[0].device) in FAULTY:
                recorder(self.name, "reference", "a self-check found the kernels to be wrong on this device")
            else:
                recorder(self.name, chosen, reason)
        if chosen == "reference" and not registered and not runs_inside_graph():
            return self._compute(arguments, chosen)
        if chosen == "triton" and _is_plain_call(tensors):
            for position in self.mutated:
                if not arguments[position].is_inference():
                    torch.autograd.graph.increment_version(arguments[position])
                elif not torch.is_inference_mode_enabled():
                    raise RuntimeError(
                        f"{self.name}: a tensor made under torch.inference_mode() cannot be written to outside; call"
                        " it under torch.inference_mode() or clone the tensor"
                    )
            return self._compute(arguments, chosen)
        return self.packet(*arguments, chosen)

    def rows_in_use(self, arguments: Sequence[Any]) -> int | None:
        """Number of rows that the kernels write in each result; None: all. Synchronises with the device."""
        num_rows = None if self._num_rows is None else arguments[self._num_rows]
        return None if num_rows is None else int(num_rows)

    def _compute(self, arguments: Sequence[Any], backend: str) -> Any:
        if self.mutated and not torch._C._are_functorch_transforms_active():  # their tensors have no storage
            written = [arguments[position] for position in self.mutated]
            arguments = [
                argument.clone()  # would be read and written in no order
                if position not in self.mutated
                and isinstance(argument, Tensor)
                and share_storage(argument, *written)
                else argument
                for position, argument in enumerate(arguments)
            ]
        return self.definition(*arguments) if backend == "reference" else self._launch(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`fake` takes the arguments of the definition and returns empty tensors like its results."""
        self._registered.register_fake(lambda *arguments: fake(*arguments[:-1]))
        return fake

    def register_autograd(self, backward: Callable[..., tuple], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`, for the arguments of the definition. `ctx.backend` is the backend."""

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.backend = inputs[-1]
            setup_context(ctx, inputs[:-1], output)

        self._registered.register_autograd(
            lambda ctx, *gradients: (*backward(ctx, *gradients), None), setup_context=setup
        )

    def register_flops(self, count: Callable[..., int]) -> Callable[..., int]:
        """`count` takes the definition's arguments, shapes for tensors, and returns the floating point operations."""

        def formula(*arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
            return count(*arguments[:-1])

        register_flop_formula(self.packet)(formula)
        return count


def operator(
    kernel: str, *, name: str | None = None, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Makes a definition the custom operator `ats_detr::NAME`. `kernel`: 'MODULE.LAUNCHER' in `ats_detr.kernels.gpu`;
    the operator has the launcher's name unless `name` is given."""
    return lambda definition: Operator(definition, kernel, name, mutates_args)


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among the arguments of an operator, those in lists included."""
    tensors = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors += [item for item in argument if isinstance(item, Tensor)]
    return tensors


def check_tensors(optional: Mapping[str, object] | None = None, /, **required: object) -> None:
    """Raises TypeError for arguments that are not tensors (`optional`: or None), and ValueError for sparse tensors."""
    given = {name: argument for name, argument in (optional or {}).items() if argument is not None}
    for name, argument in {**required, **given}.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} of type {type(argument).__name__}: must be a torch.Tensor")
        if argument.layout != torch.strided:
            raise ValueError(f"{name} of layout {argument.layout}: must be dense; call .to_dense()")


def check_one_device(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError if the tensors of operator `name` are on several devices."""
    devices = dict.fromkeys(str(tensor.device) for tensor in tensors)
    if len(devices) > 1:
        raise ValueError(f"{name}: all tensors must be on one device, got {', '.join(devices)}")


def _is_plain_call(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing records or traces a call: its kernels are then launched without PyTorch's dispatcher."""
    return (
        not runs_inside_graph()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and _get_current_dispatch_mode() is None
        and all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg() for tensor in tensors)
        and no_transforms() is None
        and not torch.jit.is_tracing()
    )


def share_storage(source: Tensor, *written: Tensor) -> bool:
    """Whether writing to one of `written` may change `source`."""
    storage = source.untyped_storage()
    if storage.device.type == "meta":  # without contents
        return False
    return any(tensor.untyped_storage().data_ptr() == storage.data_ptr() for tensor in written)


def refuse_gradients(what: str, *arguments: object) -> None:
    """Raises RuntimeError where a gradient would be recorded of operators without one."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise RuntimeError(
            f"{what} have no gradient: call them under torch.no_grad(), or train with torch.nn.functional"
        )


def check_vectors(width: int, **vectors: Tensor | None) -> None:
    """Raises ValueError unless the vectors that are given are floating point and have `width` entries."""
    for name, vector in vectors.items():
        if vector is not None and not (vector.shape == (width,) and vector.dtype in FLOATS):
            raise invalid(name, vector, f"[{width}], floating point")


def invalid(name: str, tensor: Tensor, requirement: str) -> ValueError:
    """The error for an argument of the wrong shape or dtype: its name, shape and dtype, and what it must be."""
    return ValueError(f"{name} {list(tensor.shape)} of {tensor.dtype}: must be {requirement}")
