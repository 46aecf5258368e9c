"""A model optimised for inference: folded batch norms, cast weights, and one CUDA graph per input shape."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import time
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.kernels.dispatch import choose_backend
from ats_detr.model.attention import DeformableAttention
from ats_detr.model.decoder import Decoder
from ats_detr.model.detr import Detr
from ats_detr.model.encoder import Encoder
from ats_detr.model.fusion import fold_batch_norms
from ats_detr.model.output import DetectorOutput

logger = logging.getLogger(__name__)

_WARM_UP_PASSES = 3
"""Passes before a capture, in which kernels are tuned and libraries choose their algorithms."""
_MAX_TRACES = 128
"""Recompile limit of torch.compile (default 8), shared by all models of a process. Further shapes run uncompiled."""


class CompiledDetr:
    """`Detr.forward` of a frozen, optimised copy of a model, for inference.

    Batch norms are folded into the preceding convolutions, weights are cast, and convolutions use the channels-last
    layout. On CUDA with Triton, each input shape (batch, height, width) is captured as a CUDA graph at its first batch
    and replayed afterwards, so the host performs one copy and one launch per batch. Pad batches as in evaluation
    (`data.size_multiple`) to limit the number of shapes. The number of kept tokens may differ between passes.

    Calls from several threads run sequentially; they may use different streams. An enclosing autocast has no effect.
    A copy (`copy.deepcopy`, pickle) has the same weights and settings, and captures its own graphs.

    Args:
        model: the model; it is not modified.
        dtype: dtype of weights and features. Geometry, ranking scores, softmax and norms are computed in float32.
        fuse: compile the backbone with torch.compile, which fuses the operations after a convolution (bias, residual
            sum, activation). Compilation takes time for each of the first 128 shapes of a process; later shapes run
            uncompiled.
        max_graphs: maximum number of CUDA graphs; the least recently used one is dropped. Graphs share the memory of
            their activations; each has its own inputs and outputs.

    Raises:
        ValueError: if `max_graphs` < 1.
    """

    def __init__(
        self,
        model: Detr,
        *,
        dtype: torch.dtype = torch.float32,
        fuse: bool = False,
        max_graphs: int = 32,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs}, must be >= 1")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norms(model.backbone.body)
        self.model = model.to(dtype)
        for part in model.modules():
            if isinstance(part, (DeformableAttention, Encoder, Decoder)):
                part.fuse_weights()
        for part in (model.backbone, model.input_proj):
            part.to(memory_format=torch.channels_last)
        self.dtype, self.fuse, self.max_graphs = dtype, fuse, max_graphs
        self.device = model.level_embed.device
        self.warm_up_seconds: dict[tuple[int, int, int], float] = {}
        """Seconds until the first result of each (batch, height, width)."""
        if fuse:
            self.model.backbone.compile(dynamic=False)
        self._graphs: OrderedDict[tuple[int, int, int], _Graph] = OrderedDict()
        self._pool: Any = None
        self._captures = _can_capture(self.device, dtype)
        if self._captures:
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the model and the settings only: locks and CUDA graphs cannot be copied."""
        make = functools.partial(CompiledDetr, dtype=self.dtype, fuse=self.fuse, max_graphs=self.max_graphs)
        return make, (self.model,)

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> DetectorOutput:
        """Predictions, as `Detr.forward(batch, supervision=False)` returns them."""
        images_B3HW, sizes_B2 = batch.images_B3HW, batch.sizes_B2
        size = (len(batch), *images_B3HW.shape[-2:])
        with self._lock, _current(self.device), torch.autocast(self.device.type, enabled=False):
            started = time.perf_counter()
            if not self._captures:
                output = self._detect(images_B3HW, sizes_B2)
            else:
                output = self._replay(size, images_B3HW, sizes_B2)
            if size not in self.warm_up_seconds:
                self.warm_up_seconds[size] = time.perf_counter() - started
                logger.info("first batch of %d x %dx%d: %.1f s", *size, self.warm_up_seconds[size])
        return output

    def _detect(self, images_B3HW: Tensor, sizes_B2: Tensor) -> DetectorOutput:
        images_B3HW = images_B3HW.to(self.dtype, memory_format=torch.channels_last)
        with torch._dynamo.config.patch(recompile_limit=_MAX_TRACES):
            return self.model.detect(images_B3HW, sizes_B2, supervision=False)

    def _replay(self, size: tuple[int, int, int], *inputs: Tensor) -> DetectorOutput:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # the previous pass may be on another stream, from another thread
        graph = self._graphs.pop(size, None)
        if graph is None:
            graph = _Graph(self._detect, inputs, self._pool)
        self._graphs[size] = graph  # the last entry is the most recently used
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        output = _copied(graph(*inputs))
        self._done.record(stream)
        return output


def _can_capture(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether passes on this device can be captured; a warning says why a CUDA device cannot."""
    if device.type != "cuda":
        return False
    if choose_backend(torch.empty(0, dtype=dtype, device=device)) == "reference":
        logger.warning(
            "running without CUDA graphs: the reference operators synchronise with the device. For CUDA graphs, "
            "install triton, unset ATS_DETR_BACKEND, and use another dtype than float64"
        )
        return False
    return True


class _Graph:
    """A CUDA graph of `function` for inputs of fixed shapes.

    Graphs of one memory pool overwrite each other's activations: replay them sequentially, and copy the output.
    """

    def __init__(self, function: Any, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Allocations by other threads during the capture (of pinned memory, for example) are allowed and not captured.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.output


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Context in which `device` is the current GPU: streams, graphs and Triton launches use the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _copied(value: Any) -> Any:
    """A deep copy of the output, since the next replay overwrites the tensors of the graph."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _copied(getattr(value, field.name)) for field in fields(value)})
    return value
