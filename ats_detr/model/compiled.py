"""A detector made ready to run: folded, cast, and on CUDA replayed as one graph per size of batch."""

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
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ats_detr.batch import ImageBatch
from ats_detr.model.detr import Detr
from ats_detr.model.output import DetectorOutput

logger = logging.getLogger(__name__)

_WARM_UP_PASSES = 3
"""Before a capture: the first tunes the kernels, and libraries choose their algorithms."""
_MOST_TRACES = 128
"""All models of a process share torch.compile's limit, whose default is 8: past it a new size runs as it is."""


class CompiledDetr:
    """`Detr.forward` of a frozen copy of a model, for inference.

    Done once: batch norms are folded into the convolutions before them, weights are cast, convolutions get
    channels-last weights. On CUDA the launches of a whole pass are then captured as a CUDA graph for every (batch,
    height, width) met, and replayed: the host does a copy and one launch per batch. Give it batches padded as the
    evaluation pads them (`data.size_multiple`), and there are few sizes; the tokens that images keep may differ from
    pass to pass.

    Calls from several threads run one after another, on whatever streams. Autocast around a call changes nothing.
    A copy (`copy.deepcopy`, pickle) has the weights and the settings; it captures graphs of its own.

    Args:
        model: left as it is.
        dtype: of weights and features. Geometry, ranking scores, softmax and norms are computed in float32.
        fuse: have torch.compile make one kernel of what follows a convolution of the backbone (bias, residual sum,
            activation), which takes a while for every size; of the first 128 sizes in a process.
        max_graphs: sizes whose graphs are kept, the most recently used ones. They share the memory of their
            activations; each has its own inputs and outputs.
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
            raise ValueError(f"max_graphs is {max_graphs}, must be at least 1")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norms(model.backbone.body)
        self.model = model.to(dtype)
        for part in (model.backbone, model.input_proj):
            part.to(memory_format=torch.channels_last)
        self.dtype, self.fuse, self.max_graphs = dtype, fuse, max_graphs
        self.device = model.level_embed.device
        self.warm_up_seconds: dict[tuple[int, int, int], float] = {}
        """Time until the first result of each (batch, height, width)."""
        if fuse:
            self.model.backbone.compile(dynamic=False)
        self._graphs: OrderedDict[tuple[int, int, int], _Graph] = OrderedDict()
        self._pool: Any = None
        if self.device.type == "cuda":
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made from: neither locks nor graphs, which belong to their device memory, can be copied."""
        make = functools.partial(CompiledDetr, dtype=self.dtype, fuse=self.fuse, max_graphs=self.max_graphs)
        return make, (self.model,)

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> DetectorOutput:
        """What `Detr.forward(batch, supervision=False)` returns."""
        images_B3HW, padding_mask_BHW = batch.images_B3HW, batch.padding_mask_BHW
        size = (len(batch), *images_B3HW.shape[-2:])
        with self._lock, _current(self.device), torch.autocast(self.device.type, enabled=False):
            started = time.perf_counter()
            if self.device.type != "cuda":
                output = self._detect(images_B3HW, padding_mask_BHW)
            else:
                output = self._replay(size, images_B3HW, padding_mask_BHW)
            if size not in self.warm_up_seconds:
                self.warm_up_seconds[size] = time.perf_counter() - started
                logger.info("first batch of %d x %dx%d: %.1f s", *size, self.warm_up_seconds[size])
        return output

    def _detect(self, images_B3HW: Tensor, padding_mask_BHW: Tensor) -> DetectorOutput:
        images_B3HW = images_B3HW.to(self.dtype, memory_format=torch.channels_last)
        with torch._dynamo.config.patch(recompile_limit=_MOST_TRACES):
            return self.model.detect(images_B3HW, padding_mask_BHW, supervision=False)

    def _replay(self, size: tuple[int, int, int], *inputs: Tensor) -> DetectorOutput:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # another thread's pass, on a stream of its own
        graph = self._graphs.pop(size, None)
        if graph is None:
            graph = _Graph(self._detect, inputs, self._pool)
        self._graphs[size] = graph  # the last is the most recently used
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        output = _copied(graph(*inputs))
        self._done.record(stream)
        return output


class _Graph:
    """A CUDA graph of `function` on inputs of fixed shapes.

    Graphs of one memory pool overwrite each other's activations: replay one after another, and copy the output.
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
        # What other threads allocate meanwhile (pinned memory, say) is no part of it and does no harm.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.output


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Streams, graphs and Triton's launches go to the current GPU, not to that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _copied(value: Any) -> Any:
    """The same with tensors of its own: the next replay overwrites those of the graph."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _copied(getattr(value, field.name)) for field in fields(value)})
    return value


def fold_batch_norms(network: nn.Module) -> int:
    """Fold batch norms in evaluation mode into the convolutions that feed nothing else, in place; how many were.

    A network that torch.fx cannot trace is left as it is.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # a tracer may fail on anything that a network's forward does
        logger.info("batch norms are not folded, the network cannot be traced: %s", error)
        return 0
    modules = dict(network.named_modules())
    num_folded = 0
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if norm is None or not _is_batch_norm(norm) or node.args[0].op != "call_module":
            continue
        convolution = modules[node.args[0].target]
        # Subclasses may do something else with their weights, and a module may be called more than once.
        if type(convolution) is not nn.Conv2d or len(node.args[0].users) > 1:
            continue
        if sum(other.target == node.args[0].target for other in graph.nodes) > 1:
            continue
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight, convolution.bias = weight, bias
        parent, _, name = node.target.rpartition(".")
        setattr(network.get_submodule(parent), name, _what_follows(norm))
        num_folded += 1
    return num_folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_batch_norm(m) or super().is_leaf_module(m, module_qualified_name)


def _is_batch_norm(module: nn.Module) -> bool:
    """Also timm's frozen ones, which are no subclasses."""
    has_statistics = getattr(module, "running_mean", None) is not None
    return has_statistics and hasattr(module, "eps") and not module.training


def _what_follows(norm: nn.Module) -> nn.Module:
    """What a batch norm of timm does after normalising: dropout (idle in evaluation), activation."""
    return getattr(norm, "act", nn.Identity())
