"""Kernel launches, bytes and FLOPs of a pass and of a training step, and their least time; counted without a GPU.

    python -m bench.launches [--json FILE]

The R50 configuration at 800x1333 keeps 10 % of its tokens: `captured` is a pass of `Detector.compile`, `eager` a first
one of `Detector`, `training` a step with both teachers. Everything runs on tensors without contents. The launches of
our kernels are the real ones, caught on their way to the GPU; those of a PyTorch operator are the kernels that it makes
on CUDA (`_LAUNCHES`; 1 unless listed). A launch needs max(bytes / 4.3 TB/s, FLOP / 790 TFLOP/s, 2 us), as on an H200.
Training runs on CPU tensors in place of CUDA tensors, whose gradients need a driver; its backward pass is one stage.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pandas
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from ats_detr.batch import ImageBatch, Target
from ats_detr.config import Config, load_config
from ats_detr.kernels import reference
from ats_detr.kernels.gpu import tuning
from ats_detr.model import CompiledDetr, Detr, build_model, compiled, detr, selector, tokens
from ats_detr.model.output import BatchDetections
from ats_detr.precompile import remove_contents, select_share
from ats_detr.training import criterion, trainer
from ats_detr.training.distillation import DualTeacher
from ats_detr.training.guards import BatchNormSnapshot, StepGuard
from ats_detr.training.matcher import Match
from ats_detr.training.optim import build_optimizer
from ats_detr.training.resume import Progress
from bench.measure import CONFIGS, Row, append_rows, new_parser, row_file
from bench.tables import print_table

IMAGE_SIZE, KEEP_RATIO, NUM_CLASSES = (800, 1333), 0.1, 91
NUM_OBJECTS, MOST_OF_A_CLASS = 7, 2
"""Of each training image."""
BYTES_PER_S, FLOP_PER_S, LAUNCH_S = 4.3e12, 790e12, 2e-6
MODES = ("captured", "eager", "training")
PASSES = (("captured", "bfloat16", 1), ("captured", "bfloat16", 4), ("eager", "float32", 1), ("eager", "bfloat16", 1),
          ("training", "float32", 2), ("training", "bfloat16", 2))  # fmt: skip
"""(mode, dtype, images) of every count."""

_NO_KERNEL = {
    "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "select", "size", "slice", "split",
    "split_with_sizes", "squeeze", "stride", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view", "_local_scalar_dense",
}  # fmt: skip
_LAUNCHES = {
    "argsort": 6, "sort": 6, "topk": 5, "unique": 8, "nonzero": 4, "index_put": 4, "index_put_": 4,
    "_index_put_impl_": 4, "masked_fill": 2, "scatter": 2, "scatter_add": 2, "native_group_norm": 3,
    "convolution_backward": 3, "native_layer_norm_backward": 2, "native_group_norm_backward": 4,
    "embedding_dense_backward": 3, "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "_foreach_norm": 10, "_foreach_mul_": 5, "_foreach_add_": 5, "_foreach_lerp_": 10, "_fused_adamw_": 15,
}  # fmt: skip
_KINDS = {
    "convolution": ("convolution", "cudnn"), "product": ("addmm", "mm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",), "copy": ("_to_copy", "copy_", "clone", "cat", "stack"),
    "norm": ("native_layer_norm", "native_group_norm", "native_batch_norm"), "pool": ("max_pool2d",),
    "index": ("gather", "index", "scatter", "masked_fill", "where", "embedding"), "sort": ("sort", "topk", "argsort"),
}  # fmt: skip


class LaunchCounter(TorchDispatchMode):
    """Records all operator calls that launch kernels, in `calls`. Enter it inside `counted`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Row] = []
        self.stage = "other"
        self._caught: list[float] = []
        """Bytes of each launch of the custom operator that is being called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "prim":
            return func(*args, **kwargs)
        count_flop = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
        if namespace == "ats_detr":
            assert "triton" in args, f"{name} would run the reference"
            self._caught = []
            with self:
                result = OPDEFS[func._schema.name]._init_fn(*args)
            if self._caught:
                self.add("ours", len(self._caught), sum(self._caught), count_flop(*args, out_val=result))
            return result
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):  # as cuDNN's
            result = result.contiguous(memory_format=torch.channels_last)
        if name in _NO_KERNEL or func.is_view:
            return result
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        num_bytes = _bytes(inputs) + _bytes(outputs)
        if name in ("gather", "index_select", "index", "embedding"):
            num_bytes = 2 * _bytes(outputs) + _bytes(inputs[1:])
        elif name in ("fill_", "zero_"):
            num_bytes = _bytes(outputs)
        elif name == "sort":
            num_bytes *= 6
        elif name == "convolution":
            if args[2] is not None:  # cuDNN's convolutions have no bias
                self.add("elementwise", 1, 2 * _bytes(outputs))
            layout = torch.channels_last if args[0].is_contiguous(memory_format=torch.channels_last) else None
            if layout and not args[1].is_contiguous(
                memory_format=layout
            ):  # both maps and weights have one layout
                self.add("copy", 1, 2 * _bytes([args[1]]))
        kind = next((kind for kind, names in _KINDS.items() if name.startswith(names)), "elementwise")
        launches = _LAUNCHES.get(name, 1)
        if name == "_foreach_copy_":  # each launch copies up to 64 tensors and 320 chunks of 65,536 elements
            num_chunks = sum(-(-tensor.numel() // 65536) for tensor in args[0])
            launches = max(-(-len(args[0]) // 64), -(-num_chunks // 320))
        self.add(kind, launches, num_bytes, count_flop(*args, **kwargs, out_val=result))
        return result

    def add(self, kind: str, launches: int, num_bytes: float, flop: float = 0.0) -> None:
        """Record one call."""
        seconds = max(num_bytes / BYTES_PER_S, flop / FLOP_PER_S, launches * LAUNCH_S)
        self.calls.append(
            {"stage": self.stage, "kind": kind, "launches": launches, "megabytes": num_bytes / 1e6,
             "gflop": flop / 1e9, "floor_us": seconds * 1e6}
        )  # fmt: skip

    def catch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        """In place of a launch of a Triton kernel."""
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **keywords}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        name, num_bytes = kernel.__name__, _bytes(tensors.values())
        if name == "move_rows":  # these touch few rows of a dense tensor
            num_bytes = 2 * _bytes([t for name, t in tensors.items() if name.startswith("packed")])
        elif name == "clear_rows":
            num_bytes = _bytes([tensors["mask_ptr"]])
        elif name == "linear_rows" and values["SCATTER"]:
            out, written = tensors["out_ptr"], len(tensors["x_ptr"]) * values["OUT"]
            num_bytes += written * out.element_size() - _bytes([out])
        elif name == "msda_forward":  # at most four pixels of each sample
            value, num_samples = tensors["value_ptr"], tensors["weight_ptr"].numel()
            num_bytes -= max(0, _bytes([value]) - 4 * num_samples * value.shape[-1] * value.element_size())
        self._caught.append(num_bytes)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """`scaled_dot_product_attention`: one kernel on a GPU; without one, PyTorch takes its parts."""
        self.add("attention", 1, _bytes([query, query, key, value]), 4.0 * query.numel() * key.shape[-2])
        return query.transpose(1, 2).detach().transpose(1, 2)

    def staged(self, stack: contextlib.ExitStack, owner: Any, name: str, stage: str) -> None:
        """Make a method a stage until the stack is closed."""
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.stage = self.stage, stage
            try:
                return function(*args, **kwargs)
            finally:
                self.stage = before

        stack.enter_context(patch.object(owner, name, call))


def _bytes(tensors: Collection[Tensor]) -> float:
    """Bytes of the tensors; an expanded axis counts once."""
    used = [[n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n < 2] for t in tensors]
    return sum(t.element_size() * math.prod(sizes) for t, sizes in zip(tensors, used, strict=True))


# ------------------------------------------------------------------------------------------------- what is counted
def count_pass(mode: str, dtype: torch.dtype, images: int) -> list[Row]:
    """The calls of one pass over `images` images."""
    model = _build("ats_r50_0.1_0.2").eval()
    detector = CompiledDetr(model, dtype=dtype) if mode == "captured" else model
    model = detector.model if isinstance(detector, CompiledDetr) else model
    compiled.order_weights(model)  # as a Detector on CUDA
    with counted() as counter, torch.no_grad(), contextlib.ExitStack() as stack:
        remove_contents(model, "cuda")
        batch = ImageBatch(torch.empty(images, 3, *IMAGE_SIZE, device="cuda"), [IMAGE_SIZE] * images)
        for owner, name, stage in (
            (model.backbone, "forward", "backbone"), (model, "tokenize", "tokens"), (model, "select", "selection"),
            (detr, "token_geometry", "geometry"), (tokens.Tokens, "rows", "geometry"),
            (detr, "encode_boxes", "geometry"), (model.encoder, "forward", "encoder"),
            (model, "_propose", "proposals"), (model, "_queries", "proposals"), (model.decoder, "forward", "decoder"),
        ):  # fmt: skip
            counter.staged(stack, owner, name, stage)
        stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", counter.attention))
        run = detector if mode == "captured" else functools.partial(detector, supervision=False)
        if mode == "eager" and dtype != torch.float32:
            amp, supported = torch.cuda.amp.common, patch.object(torch.cuda, "is_bf16_supported")
            with patch.object(amp, "amp_definitely_not_available", return_value=False), supported:
                stack.enter_context(torch.autocast("cuda", dtype))
            run(batch)  # from now on the weights are cast
            counter.calls.clear()
        stack.enter_context(counter)
        output = run(batch)
        counter.stage = "detections"
        BatchDetections.from_output(output, torch.empty(images, 4, dtype=torch.int64, device="cuda"), 100)
    return counter.calls


def count_step(dtype: torch.dtype, images: int) -> list[Row]:
    """The calls of one training step with both teachers."""
    config = _config("ats_r50_0.1_0.2")
    student, weak, strong = map(_build, ("ats_r50_0.1_0.2", "ats_teacher_r50_0.1", "ats_teacher_r50_0.2"))
    teachers = DualTeacher(weak, strong)
    with patch.object(torch, "equal", return_value=True):
        teachers.connect(student, dtype)
    with counted() as counter, patch.object(FakeTensor, "is_cuda", True), contextlib.ExitStack() as stack:
        for model in (student, weak, strong):
            remove_contents(model, "cpu")
        optimizer = build_optimizer(student, config.train, images)
        for parameter in student.parameters():  # the first step creates the optimiser's state
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        run: Any = types.SimpleNamespace(
            config=config, device=torch.device("cpu"), num_steps=100, parallel_model=student, teachers=teachers,
            criterion=criterion.build_criterion(config, NUM_CLASSES), precision=dtype, budgets=None,
            batch_norms=BatchNormSnapshot(student), guard=StepGuard(10),
            state=types.SimpleNamespace(progress=Progress(), model=student, average=None, optimizer=optimizer),
        )  # fmt: skip
        batch = ImageBatch(torch.empty(images, 3, *IMAGE_SIZE), [IMAGE_SIZE] * images)
        objects = torch.zeros(NUM_OBJECTS, dtype=torch.int64), torch.empty(NUM_OBJECTS, 4)
        for owner, name, stage in (
            (student, "forward", "student"), (strong, "encode", "strong teacher"),
            (teachers, "_precision_of_weak", "weak teacher"), (trainer, "compute_losses", "losses"),
            (Tensor, "backward", "backward"),
        ):  # fmt: skip
            counter.staged(stack, owner, name, stage)
        for owner, name, value in (  # the host reads the contents of tensors here
            (torch, "equal", lambda *_: False), (criterion, "most_of_a_class", lambda _: MOST_OF_A_CLASS),
            (trainer, "check_targets", lambda *_: None), (criterion, "PendingMatches", _Matches),
            (reference, "_rows_in_use", lambda x_KC, _: len(x_KC)),
            (clip_grad, "_has_foreach_support", lambda *_: True),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, value))
        counter.stage = "optimizer"
        stack.enter_context(counter)
        targets = [Target(i, IMAGE_SIZE, *objects) for i in range(images)]
        trainer.train_step(run, 0, [(batch, targets)], metrics=False)
    return counter.calls


class _Matches:
    """`matcher.PendingMatches` of costs without contents: every object is matched."""

    problem = None

    def __init__(self, layers: Sequence[Any], targets: Sequence[Target], costs_RN: Tensor) -> None:
        self.num_layers, self.num_objects = len(layers), sum(len(target.labels_N) for target in targets)

    def finish(self) -> list[Match]:
        pairs = torch.empty(2, self.num_layers * self.num_objects, dtype=torch.int64).clone()  # the transfer
        self.all_pairs = pairs
        return [Match(*part) for part in pairs.split(self.num_objects, dim=1)]


@contextlib.contextmanager
def counted() -> Iterator[LaunchCounter]:
    """Context in which tensors have no contents, and our kernels are recorded instead of launched."""
    counter = LaunchCounter()
    tuning._chosen.clear()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", lambda kernel, *args, **keywords: counter.catch(kernel, *args, **keywords)),
            (tuning, "_choose", lambda operator, key, *_: (tuning.configurations(operator, key)[0], "")),
            (FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size()),
            (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
            (torch.cuda, "device_of", contextlib.nullcontext),
            (compiled, "can_capture", lambda *_: False),
            (compiled, "self_check", lambda *_: None),
            (selector, "select_tokens", functools.partial(select_share, share=KEEP_RATIO)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield counter
    tuning._chosen.clear()


def _config(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", ["model.backbone.pretrained=false"])


def _build(name: str) -> Detr:
    """The model of a configuration; budgets are computed, but all are KEEP_RATIO."""
    model = build_model(_config(name).model, NUM_CLASSES)
    assert model.selector is not None
    if model.selector.budget is not None:
        model.selector.max_ratio = KEEP_RATIO
    return model


def table(calls: Sequence[Row], by: str) -> pandas.DataFrame:
    """Launches, megabytes, GFLOP and floor of each 'stage' or 'kind', and in total."""
    sums = pandas.DataFrame(calls).groupby(by, sort=False).sum(numeric_only=True)
    sums.loc["total"] = sums.sum()
    return sums.astype({"launches": int}).round(1).reset_index()


def main() -> None:
    parser = new_parser("launches", __doc__)
    parser.add_argument("--json", type=row_file, help="append rows to this file, one JSON object a line")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for mode, name, images in [case for case in PASSES if case[0] in arguments.modes]:
        dtype = getattr(torch, name)
        calls = count_step(dtype, images) if mode == "training" else count_pass(mode, dtype, images)
        for by in ("stage", "kind"):
            print_table(table(calls, by), Console(), f"{mode}, {name}, images: {images}", "", 0)
        facts = {"mode": mode, "dtype": name, "images": images}
        rows += [facts | row for row in table(calls, "stage").to_dict("records")]
    append_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
