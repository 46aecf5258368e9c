"""A model optimised for inference: folded batch norms, cast weights, and one CUDA graph per input shape."""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ats_detr.batch import ImageBatch
from ats_detr.kernels.convolution import probing
from ats_detr.kernels.dispatch import capture_lock, choose_backend
from ats_detr.model.attention import DeformableAttention
from ats_detr.model.detr import Detr
from ats_detr.model.encoder import LayerStack
from ats_detr.model.fusion import fold_batch_norms
from ats_detr.model.output import BatchDetections, DetectorOutput
from ats_detr.model.self_check import self_check
from ats_detr.text import first_line

logger = logging.getLogger(__name__)

_WARM_UP_PASSES = 3
"""Passes before a capture, in which kernels are tuned, cuDNN is probed, and libraries choose their algorithms."""
MAX_GRAPHS = 32
"""Default maximum number of CUDA graphs of a model."""
_MAX_FAILURES = 3
"""Successive captures that other threads may break before no graph is captured any more."""
_NUM_STREAMS = 32
"""Streams of a GPU, which `torch.cuda.Stream` returns in turns."""
_MAX_SHAPES = 10_000
"""Shapes whose calls are counted; the least recently used one is forgotten."""
_MAX_TRACES = 128
"""Recompile limit of torch.compile (default 8), shared by all models of a process. Further shapes run uncompiled."""

T = TypeVar("T")
Capture = Callable[..., Callable[..., Any]]
"""Of a function and its inputs: a function that replays it with other inputs of the same shapes."""


class CompiledDetr:
    """`Detr.forward` of a frozen, optimised copy of a model, for inference.

    Batch norms are folded into the preceding convolutions, weights are cast, and convolutions use the channels-last
    layout. On CUDA with Triton, each input shape (batch, height, width) is captured as a CUDA graph at its first batch
    and replayed afterwards, so the host performs one copy and one launch per batch. Pad batches as in evaluation
    (`data.size_multiple`) to limit the number of shapes. The number of kept tokens may differ between passes.

    Calls from several threads run sequentially; they may use different streams. An enclosing autocast has no effect.
    The first pass compares the Triton kernels with their definitions in PyTorch (see `model.self_check`).
    A shape that cannot be captured (too little memory, for example) is reported once and runs as a normal pass.
    A copy (`copy.deepcopy`, pickle) has the same weights and settings, and captures its own graphs.

    Args:
        model: the model; it is not modified.
        dtype: dtype of weights and features. Geometry, ranking scores, softmax and norms are computed in float32.
        fuse: compile the backbone with torch.compile, which fuses the operations after a convolution (bias, residual
            sum, activation). Compilation takes time for each of the first 128 shapes of a process; later shapes run
            uncompiled.
        max_graphs: maximum number of CUDA graphs; the least recently used one is dropped. Graphs share the memory of
            their activations; each has its own inputs and outputs. 0: none.

    Raises:
        ValueError: if `max_graphs` < 0.
    """

    def __init__(
        self,
        model: Detr,
        *,
        dtype: torch.dtype = torch.float32,
        fuse: bool = False,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self.model = freeze_weights(copy.deepcopy(model), dtype)
        self.dtype, self.fuse, self.max_graphs = dtype, fuse, max_graphs
        self.graphs = GraphCache(max_graphs, capture_at=1)
        self.device = self.model.level_embed.device
        self._is_checked = False
        self.warm_up_seconds: dict[tuple[int, int, int], float] = {}
        """Seconds until the first result of each (batch, height, width)."""
        if fuse:
            self.model.backbone.compile(dynamic=False)
        self._lock = threading.Lock()
        self._captures = max_graphs > 0 and can_capture(self.device, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the model and the settings only: locks and CUDA graphs cannot be copied."""
        make = functools.partial(CompiledDetr, dtype=self.dtype, fuse=self.fuse, max_graphs=self.max_graphs)
        return make, (self.model,)

    def __call__(
        self, batch: ImageBatch, *, keep_ratio: float | None = None, cost: float | None = None
    ) -> DetectorOutput:
        """Predictions, as `Detr.forward(batch, supervision=False, ...)` returns them.

        A graph holds one `keep_ratio`, and any `cost`.
        """
        costs = scalars(cost, self.device)
        detect = functools.partial(self._detect, keep_ratio)
        return self._run((keep_ratio, len(costs)), detect, batch.images_B3HW, batch.sizes_B2, *costs)

    def detect(
        self,
        batch: ImageBatch,
        scale_B4: Tensor,
        max_detections: int,
        *,
        keep_ratio: float | None = None,
        cost: float | None = None,
    ) -> BatchDetections:
        """Detections of a batch, see `BatchDetections.from_output`; postprocessing is part of the CUDA graph."""

        def detect(
            images_B3HW: Tensor, sizes_B2: Tensor, scale_B4: Tensor, *costs: Tensor
        ) -> BatchDetections:
            output = self._detect(keep_ratio, images_B3HW, sizes_B2, *costs)
            return BatchDetections.from_output(output, scale_B4, max_detections)

        costs = scalars(cost, self.device)
        key = (max_detections, keep_ratio, len(costs))
        return self._run(key, detect, batch.images_B3HW, batch.sizes_B2, scale_B4, *costs)

    @torch.inference_mode()
    def _run(self, kind: Hashable, function: Callable[..., T], images_B3HW: Tensor, *inputs: Tensor) -> T:
        batch, _, height, width = images_B3HW.shape
        size = (batch, height, width)
        with self._lock, torch.autocast(self.device.type, enabled=False):
            started = time.perf_counter()
            if not self._is_checked:
                self._is_checked = True
                first = images_B3HW[:1].to(self.dtype, memory_format=torch.channels_last)
                self._captures = self_check(self.model, first, inputs[0]) and self._captures
            if self._captures:
                output = self.graphs.run((kind, size), function, images_B3HW, *inputs)
            else:
                output = function(images_B3HW, *inputs)
            if size not in self.warm_up_seconds:
                self.warm_up_seconds[size] = time.perf_counter() - started
                logger.info("first batch of %d x %dx%d: %.1f s", *size, self.warm_up_seconds[size])
        return output

    def _detect(
        self, keep_ratio: float | None, images_B3HW: Tensor, sizes_B2: Tensor, cost: Tensor | None = None
    ) -> DetectorOutput:
        images_B3HW = images_B3HW.to(self.dtype, memory_format=torch.channels_last)
        with torch._dynamo.config.patch(recompile_limit=_MAX_TRACES):
            return self.model.detect(
                images_B3HW, sizes_B2, supervision=False, keep_ratio=keep_ratio, cost=cost
            )


def scalars(cost: float | None, device: torch.device) -> tuple[Tensor, ...]:
    """The cost of a pass as an input of its graph, so that another cost needs no other graph; none without a cost."""
    return () if cost is None else (torch.full((), cost, device=device),)


def freeze_weights(model: Detr, dtype: torch.dtype) -> Detr:
    """The model, optimised in place for inference with weights that never change again.

    In evaluation mode and without gradients, with folded batch norms, weights in `dtype` (those of convolutions in
    channels-last memory), and the weights of projections of the same rows as one.
    """
    fold_batch_norms(model.eval().requires_grad_(False).backbone.body)
    model.to(dtype)
    for part in model.modules():
        if isinstance(part, (DeformableAttention, LayerStack)):
            part.fuse_weights()
    order_weights(model)
    return model


def order_weights(model: Detr) -> None:
    """Store the weights of convolutions in channels-last memory, in place; cuDNN would copy them in each pass."""
    for part in (model.backbone, model.input_proj):
        part.to(memory_format=torch.channels_last)


def can_capture(device: torch.device, dtype: torch.dtype, *, warn: bool = True) -> bool:
    """Whether passes on this device can be captured; a warning says why those of a CUDA device cannot."""
    if device.type != "cuda":
        return False
    if choose_backend(torch.empty(0, dtype=dtype, device=device)) == "reference":
        if warn:
            logger.warning(
                "running without CUDA graphs: the reference operators synchronise with the device. For CUDA graphs, "
                "install triton, unset ATS_DETR_BACKEND, and use another dtype than float64"
            )
        return False
    return True


def model_state(model: Detr) -> list[Any] | None:
    """What a captured pass of `model` holds fixed: compare it to find out whether a graph is outdated.

    The addresses of its tensors (values may change in place), plain attributes of its modules, and the settings of
    PyTorch that choose kernels. None: the pass must run in Python, because of hooks, training mode, autocast, a
    dispatch mode, or another `forward`.
    """
    if (
        type(model).forward is not Detr.forward
        or torch.is_autocast_enabled("cuda")
        or _get_current_dispatch_mode() is not None
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
    ):
        return None
    state: list[Any] = [
        os.environ.get("ATS_DETR_BACKEND"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    ]
    for module in model.modules():
        if module.training or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        state.append(id(module))
        for value in vars(module).values():
            if type(value) in (bool, int, float, str):
                state.append(value)
        for tensors in (module._parameters, module._buffers):
            state += [None if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
    return state


@dataclass
class _Shape:
    """What is known of one key of a `GraphCache`."""

    num_calls: int = 0
    """Since the start, or since its graph was dropped."""
    num_captures: int = 0
    replay: Callable[..., Any] | None = None
    state: list[Any] | None = None
    tensors: list[Tensor] = field(default_factory=list)
    """Keep the memory that the graph reads, even if the model no longer uses it."""

    def drop(self) -> None:
        self.replay, self.state, self.tensors, self.num_calls = None, None, [], 0


class GraphCache:
    """Runs functions of tensors, and captures each as a CUDA graph when its key occurs for the `capture_at`-th time.

    After a graph is dropped, its key has to occur twice as often as before its last capture: more keys than graphs, or
    a model that changes again and again, do not cause a capture at every call. A failed capture is reported, and
    nothing is captured from then on, unless another thread broke it: then its key has to occur twice as often, too, and
    the third such failure in a row ends the captures. Threads may share it. A copy has the same settings and no graphs.

    Args:
        max_graphs: maximum number of graphs; the least recently used one is dropped.
        capture_at: 1 captures at the first call of a key.
        capture: None: as CUDA graphs that share the memory of their activations.
    """

    def __init__(self, max_graphs: int, *, capture_at: int, capture: Capture | None = None) -> None:
        if max_graphs < 0:
            raise ValueError(f"max_graphs = {max_graphs}: must be >= 0")
        self.max_graphs, self.capture_at, self.capture = max_graphs, capture_at, capture
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        """The last entry is the most recently used."""
        self._is_able, self._is_prepared = max_graphs > 0, False
        self._num_failures = 0
        """Since the last successful capture."""
        self._capture: Capture = capture or _CudaGraphs()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(GraphCache, capture_at=self.capture_at, capture=self.capture)
        return make, (self.max_graphs,)

    def run(
        self,
        key: Hashable,
        function: Callable[..., T],
        *inputs: Tensor,
        eager: Callable[[], T] | None = None,
        prepare: Callable[[], bool] = lambda: True,
        state: Callable[[], list[Any] | None] = list,
        tensors: Iterable[Tensor] = (),
    ) -> T:
        """`function(*inputs)`, replayed if there is a graph.

        Args:
            key: of all that determines the pass, except the contents of the inputs and `state`.
            function: without device-to-host synchronisation.
            inputs: tensors of the same shapes for a key.
            eager: runs instead of `function` where nothing is captured.
            prepare: runs once, before the first capture. False: nothing is captured.
            state: of what `function` depends on. Graphs of another state are dropped; None: must run in Python.
            tensors: further tensors that `function` reads. Their memory is kept as long as the graph.
        """
        with self._lock:
            shape = self._shapes.setdefault(key, _Shape())
            self._shapes.move_to_end(key)
            if shape.replay is not None:
                output = shape.replay(*inputs)
                current = state()  # while the GPU computes
                if current == shape.state:
                    return output
                if current is not None:
                    self.drop()
            elif self._is_able:
                shape.num_calls += 1
                is_due = shape.num_calls >= self.capture_at << shape.num_captures
                if (
                    is_due
                    and (current := state()) is not None
                    and self._try_capture(shape, prepare, function, inputs)
                ):
                    shape.state, shape.tensors = current, [tensor.detach() for tensor in tensors]
                    assert shape.replay is not None
                    return shape.replay(*inputs)
            self._limit()
        run = functools.partial(function, *inputs) if eager is None else eager
        try:
            return run()
        except torch.OutOfMemoryError:
            with self._lock:  # the graphs may hold the memory that is missing
                if not self.drop():
                    raise
                self._is_able = False
            logger.warning("out of memory: all CUDA graphs are dropped, and passes are no longer captured")
        torch.cuda.empty_cache()
        return run()

    def drop(self) -> int:
        """Drop all graphs. Returns their number."""
        dropped = [shape for shape in self._shapes.values() if shape.replay is not None]
        for shape in dropped:
            shape.drop()
        return len(dropped)

    def _try_capture(
        self,
        shape: _Shape,
        prepare: Callable[[], bool],
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
    ) -> bool:
        try:
            if not self._is_prepared:
                self._is_prepared = True
                if not prepare():
                    raise RuntimeError("PyTorch computes faulty operators")
            shape.replay = self._capture(function, *inputs)
        except Exception as error:  # of any library; an error of the pass itself is raised by the normal pass
            reason = first_line(error)
            self._num_failures += 1
            if _is_broken_by_another_thread(error) and self._num_failures < _MAX_FAILURES:
                shape.num_calls, shape.num_captures = 0, shape.num_captures + 1
                logger.warning(
                    "the capture of a CUDA graph is tried again later; another thread seems to have synchronised the "
                    "device meanwhile: %s",
                    reason,
                )
                return False
            self._is_able = False
            logger.warning("passes run without CUDA graphs, since one cannot be captured: %s", reason)
            return False
        self._num_failures = 0
        shape.num_captures += 1
        self._limit()
        return True

    def _limit(self) -> None:
        graphs = [shape for shape in self._shapes.values() if shape.replay is not None]
        for shape in graphs[: max(0, len(graphs) - self.max_graphs)]:
            shape.drop()
        while len(self._shapes) > _MAX_SHAPES:
            self._shapes.popitem(last=False)


def _is_broken_by_another_thread(error: BaseException) -> bool:
    """Whether a capture was invalid at its end although it made no call that captures do not allow."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__context__
    text = "\n".join(messages)  # of the CUDA errors 901 and 900
    return "previous error during capture" in text and "not permitted when stream is capturing" not in text


_streams: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, torch.cuda.Stream] = weakref.WeakKeyDictionary()
"""The stream of the capture of each graph that exists."""


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is neither that of warm-ups nor that of the graphs of another pool."""
    used = {_warm_up_stream(device), *_streams.values()}
    for _ in range(_NUM_STREAMS):
        if (stream := torch.cuda.Stream(device)) not in used:
            return stream
    raise RuntimeError(f"all {_NUM_STREAMS} streams of {device} are in use by CUDA graphs of other models")


class GraphPool:
    """CUDA graphs of one memory pool, which overwrite each other's activations: replay them sequentially.

    cuBLAS has a workspace for each stream, in the memory that was current at its first use, and PyTorch may free it
    when a graph that was captured on the stream is deleted. Graphs of other pools and warm-ups therefore use other
    streams.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        """Of all captures. That of `torch.cuda.graph` is on the GPU of the first capture of the process: the graph of a
        model on another GPU would be empty."""

    def capture(self, function: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of `function`, and the output that its replays write. Runs the function first, see `probing`.

        Waits for the captures of other threads, and for the timing of kernels there.
        """
        with capture_lock, torch.cuda.device(device):
            stream, self._stream = self._stream, None  # after a failed capture, nothing of it is used again
            # PyTorch may refuse another capture in a pool without graphs.
            if stream is None or stream.device != device or stream not in _streams.values():
                stream, self._pool = _capture_stream(device), torch.cuda.graph_pool_handle()
            caller, warm_up = torch.cuda.current_stream(), _warm_up_stream(device)
            warm_up.wait_stream(caller)
            try:
                with torch.cuda.stream(warm_up), probing():
                    for _ in range(_WARM_UP_PASSES):
                        function()
            finally:  # the memory of the inputs may be used again
                caller.wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            # Restores the caller's stream after a capture that failed, which `torch.cuda.graph` does not.
            with (
                torch.cuda.stream(stream),
                # Other threads may allocate during the capture (pinned memory, for example); this is not captured.
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                output = function()
            _streams[graph] = self._stream = stream
        return graph, output


class _CudaGraphs:
    """Captures functions as CUDA graphs of one `GraphPool`. Replays may be on different streams."""

    def __init__(self) -> None:
        self._graphs = GraphPool()
        self._done: torch.cuda.Event | None = None
        """The end of the last replay."""

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
        device = inputs[0].device
        with torch.cuda.device(device):
            self._wait()
            own_inputs = tuple(tensor.clone() for tensor in inputs)
            graph, output = self._graphs.capture(lambda: function(*own_inputs), device)
        return functools.partial(self._replay, graph, own_inputs, output)

    def _replay(
        self, graph: torch.cuda.CUDAGraph, own_inputs: tuple[Tensor, ...], output: Any, *inputs: Tensor
    ) -> Any:
        # Streams, graphs and Triton launches use the current GPU.
        with torch.cuda.device(own_inputs[0].device):
            self._wait()
            for own, new in zip(own_inputs, inputs, strict=True):
                own.copy_(new, non_blocking=True)
                own.record_stream(torch.cuda.current_stream())  # outlives a graph dropped meanwhile
            graph.replay()
            copy = _copied(output)
            self._done = torch.cuda.Event()
            self._done.record()
        return copy

    def _wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


def _copied(value: Any) -> Any:
    """A deep copy of the output, since the next replay overwrites the tensors of the graph."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _copied(getattr(value, field.name)) for field in fields(value)})
    return value
