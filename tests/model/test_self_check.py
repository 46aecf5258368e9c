"""The self-check names wrong kernels, and PyTorch computes their operators. In Triton's interpreter."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ats_detr import detector as detector_module
from ats_detr.batch import ImageBatch
from ats_detr.detector import Detector
from ats_detr.kernels import dispatch, encode_boxes
from ats_detr.kernels.dispatch import tensors_of
from ats_detr.model import CompiledDetr
from ats_detr.model import compiled as compiled_module
from ats_detr.model.self_check import find_faults
from tests.kernels.test_tuning import tuning  # noqa: F401
from tests.model.test_compiled import assert_same_detections
from tests.model.test_detr import images, small_model
from tests.model.test_graph_cache import FakeGraphs
from tests.small_detector import small_detector

pytest.importorskip("triton")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels run on the CPU; no operator is known to be faulty."""
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    dispatch.FAULTY.clear()
    yield
    dispatch.FAULTY.clear()


def replace_launcher(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[..., Any]) -> None:
    """`change(launcher, *arguments)` in place of a launcher."""
    module_name, name = kernel.split(".")
    module = importlib.import_module(f"ats_detr.kernels.gpu.{module_name}")
    launcher = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: change(launcher, *arguments))


def one_percent_off(launcher: Callable[..., Any], *arguments: Any) -> Any:
    result = launcher(*arguments)
    for tensor in tensors_of([result]) if result is not None else tensors_of(arguments)[:1]:
        if tensor.is_floating_point():
            tensor.mul_(1.01)
    return result


def failing(launcher: Callable[..., Any], *arguments: Any) -> Any:
    raise RuntimeError("Triton Error [CUDA]: no kernel image is available\nfor execution")


def misplaced(launcher: Callable[..., Any], *arguments: Any) -> Any:
    token_index, *others = launcher(*arguments)
    return (token_index + 1, *others)


FAULTS = {
    "packed_feedforward": ("linear.packed_feedforward", one_percent_off, "differs by 0.0"),
    "packed_linear_": ("linear.packed_linear_", one_percent_off, "differs by 0.0"),
    "msda": ("attention.attend", failing, "fails (Triton Error [CUDA]: no kernel image is available)"),
    "select": ("selection.select", misplaced, "values wrong"),
}


@pytest.mark.parametrize(
    "name",
    [
        "packed_feedforward",
        "msda",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("packed_linear_", "select")),
    ],
)
@in_interpreter
@torch.no_grad()
def test_a_wrong_operator_is_named_and_computed_by_pytorch(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, change, fault = FAULTS[name]
    replace_launcher(monkeypatch, kernel, change)
    model, batch = small_model(num_encoder_layers=2), ImageBatch.collate(images((32, 32)))
    compiled = CompiledDetr(model)
    with caplog.at_level(logging.WARNING):
        output = compiled(batch)
    (record,) = caplog.records
    assert f"operator {name} " in record.message and fault in record.message
    assert dispatch.FAULTY == {(name, torch.device("cpu"))}
    monkeypatch.setenv("ATS_DETR_BACKEND", "reference")
    assert_same_detections(output, model(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_interpreter
@torch.no_grad()
def test_right_kernels_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = small_model(num_encoder_layers=2).to(dtype), ImageBatch.collate(images((32, 32)))
    images_B3HW = batch.images_B3HW.to(dtype)
    assert find_faults(lambda: model.detect(images_B3HW, batch.sizes_B2, supervision=False), dtype) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_right_kernels_pass_on_a_gpu(dtype: torch.dtype) -> None:
    """With the default precision of convolutions, TF32, and enough tokens for all blocks of the kernels."""
    model = small_model(width=256, num_encoder_layers=2).to("cuda", dtype)
    batch = ImageBatch.collate(images((320, 448)))
    images_B3HW, sizes_B2 = batch.images_B3HW.to("cuda", dtype), batch.sizes_B2.cuda()
    assert find_faults(lambda: model.detect(images_B3HW, sizes_B2, supervision=False), dtype) == {}


@in_interpreter
@torch.no_grad()
def test_a_pass_that_differs_as_a_whole_uses_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example if rows in use are wrong: every operator agrees, but not the passes."""
    monkeypatch.setenv("ATS_DETR_BACKEND", "reference")
    model, batch = small_model(num_encoder_layers=1), ImageBatch.collate(images((64, 64)))
    passes = [model.detect(batch.images_B3HW, batch.sizes_B2, supervision=False) for _ in range(2)]
    passes[1].last.boxes = passes[1].last.boxes + 1
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")

    def detect() -> Any:
        encode_boxes(torch.rand(1, 3, 4), 8)
        return passes.pop()

    assert find_faults(detect, torch.float32) == {"encode_boxes": "is part of a pass that differs"}


def test_a_detector_is_checked_before_its_first_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(detector_module, "self_check", lambda *arguments: not checks.append(arguments))
    monkeypatch.setattr(detector_module, "can_capture", lambda *_, **__: True)
    monkeypatch.setattr(compiled_module, "_CudaGraphs", FakeGraphs)
    monkeypatch.setenv("ATS_DETR_BACKEND", "")
    small = small_detector()
    detector = Detector(small.model, small.config, small.classes)
    image = np.zeros((64, 64, 3), np.uint8)
    for count in (0, 1, 1):
        detector.predict(image)
        assert len(checks) == count
    detector.predict([image] * 4, batch_size=2)
    assert len(checks) == 1


def test_the_outcome_is_kept_per_gpu_and_version(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    gpu, faults = torch.device("cuda", 0), {"msda": "fails"}
    assert tuning.known_faults(gpu, "float32|abc") is None
    tuning.remember_faults(gpu, "float32|abc", faults)
    tuning._table.cache_clear()
    assert tuning.known_faults(gpu, "float32|abc") == faults
    assert tuning.known_faults(gpu, "bfloat16|abc") is None
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert tuning.known_faults(gpu, "float32|abc") is None
    assert tuning.known_faults(torch.device("cpu"), "float32|abc") is None
