"""The compiled model, and the model with Triton kernels, give the same detections as the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ats_detr.batch import ImageBatch
from ats_detr.config import SelectorConfig
from ats_detr.kernels import deformable_attention, dispatch, packed_linear, select_tokens
from ats_detr.model import CompiledDetr, Detr
from ats_detr.model import compiled as compiled_module
from ats_detr.model.backbone import Backbone
from ats_detr.model.fusion import fold_batch_norms
from ats_detr.model.output import Detections, DetectorOutput, top_detections
from tests.model.test_detr import images, small_model

SIZES = ((96, 96), (64, 80), (96, 70))


def assert_same_detections(output: DetectorOutput, expected: DetectorOutput, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        output.last.logits.float(), expected.last.logits, atol=tolerance, rtol=tolerance
    )
    torch.testing.assert_close(output.last.boxes.float(), expected.last.boxes, atol=tolerance, rtol=tolerance)


FAMILY = {
    "adaptive": {},
    "fixed": {"selector": SelectorConfig(keep_ratio=0.3)},
    "by proposals": {"selector": SelectorConfig(keep_ratio=0.3, scores="proposals")},
    "dense": {"selector": None, "encoder_auxiliary": False},
    "one stage": {
        "selector": None,
        "encoder_auxiliary": False,
        "two_stage": False,
        "queries_from_memory": False,
        "class_specific_proposals": False,
        "box_refine": False,
    },
}


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY.keys())
@torch.no_grad()
def test_kernels_and_compiled_model_give_the_same_detections(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(**changes)
    batch = ImageBatch.collate(images(*SIZES))
    expected = model(batch)
    assert_same_detections(CompiledDetr(model)(batch), expected)
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    output = model(batch)
    assert_same_detections(output, expected)
    if output.selection is not None:
        assert not output.selection.plan.exact, "an exact plan needs a device-to-host synchronisation"


@torch.no_grad()
def test_the_whole_pass_is_one_graph() -> None:
    model = small_model()
    batch = ImageBatch.collate(images((64, 64), (32, 48)))
    assert_same_detections(traced(model)(batch), model(batch))


@pytest.mark.slow
@torch.no_grad()
def test_few_graphs_serve_every_size() -> None:
    """Dynamic graphs cover all image sizes and budgets; single images have separate ones.

    Duck shapes are off: with them, equal and different side lengths have separate traces.
    """
    model, traces = small_model(), []
    run = traced(model, traces)
    with shape_config.patch(use_duck_shape=False):
        for sizes in (SIZES, ((96, 160), (160, 96), (128, 90)), ((128, 192), (90, 90)), ((160, 96),) * 4):
            batch = ImageBatch.collate(images(*sizes))
            assert_same_detections(run(batch), model(batch))
        for size in ((128, 128), (96, 160)):
            batch = ImageBatch.collate(images(size))
            assert_same_detections(run(batch), model(batch))
    assert len(traces) <= 4, "six sizes"


@torch.no_grad()
def test_backbones_of_many_sizes_can_be_fused_in_one_process() -> None:
    """torch.compile has one recompile limit per process and raises beyond it."""
    counters["stats"].clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for num_queries in (10, 11):
            model = small_model(num_queries=num_queries)
            fused = CompiledDetr(model, fuse=True)
            for sizes in (((64, 96), (96, 64)), ((64, 96),)):
                batch = ImageBatch.collate(images(*sizes))
                assert_same_detections(fused(batch), model(batch))
    assert counters["stats"]["unique_graphs"] == 2, "models of the same architecture share graphs"


@torch.no_grad()
def test_an_enclosing_autocast_has_no_effect() -> None:
    model = small_model()
    batch = ImageBatch.collate(images((64, 96)))
    compiled = CompiledDetr(model)
    expected = compiled(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(batch)
    assert output.last.logits.dtype == torch.float32
    assert torch.equal(output.last.logits, expected.last.logits)


def traced(model: Detr, traces: list[object] | None = None) -> Callable[[ImageBatch], DetectorOutput]:
    """The model traced as one graph (without Inductor, which takes minutes). Graphs are appended to `traces`."""

    def backend(graph, inputs):
        if traces is not None:
            traces.append(graph)
        return graph.forward

    detect = torch.compile(model.detect, backend=backend, fullgraph=True, dynamic=True)
    return lambda batch: detect(batch.images_B3HW, batch.sizes_B2, supervision=False)


class _Pass(torch.nn.Module):
    """The model with its postprocessing, from pixels to boxes."""

    def __init__(self, model: Detr) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor, sizes_B2: Tensor) -> list[Detections]:
        output = self.model.detect(images_B3HW, sizes_B2, supervision=False)
        return top_detections(output.last, [(480, 640)] * len(images_B3HW))


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY.keys())
def test_a_cuda_pass_does_not_synchronise(changes: dict) -> None:
    """A complete pass with fake CUDA tensors, which have no contents: any read by the host would raise.

    Runs without a GPU.
    """
    model = _Pass(small_model(**changes))
    state = model.state_dict()
    with FakeTensorMode(), torch.no_grad():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in state.items()
        }
        pictures = torch.empty(3, 3, 128, 192, device="cuda")
        sizes = torch.empty(3, 2, dtype=torch.int64, device="cuda")
        detections = torch.func.functional_call(model, weights, (pictures, sizes))
        assert [len(found.boxes_xyxy_N4) for found in detections] == [50, 50, 50]
        assert detections[0].boxes_xyxy_N4.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            bool(detections[0].scores_N[0] > 0.5)


@pytest.mark.parametrize(
    ("has_triton", "requested", "dtype", "captured"),
    [
        (True, "", torch.bfloat16, True),
        (True, "", torch.float64, False),
        (True, "reference", torch.bfloat16, False),
        (False, "", torch.bfloat16, False),
    ],
)
def test_passes_of_the_reference_operators_are_not_captured(
    has_triton: bool, requested: str, dtype: torch.dtype, captured: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """They read the number of kept tokens on the host, which a capture does not allow."""
    monkeypatch.setenv("ATS_DETR_BACKEND", requested)
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    with FakeTensorMode():
        assert compiled_module.can_capture(torch.device("cuda"), dtype) == captured
    assert ["install triton" in record.message for record in caplog.records] == [True] * (not captured)
    assert not compiled_module.can_capture(torch.device("cpu"), dtype)


@torch.no_grad()
def test_a_pass_that_cannot_be_captured_runs_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(compiled_module, "can_capture", lambda *arguments: asked.append(arguments))
    model, batch = small_model(), ImageBatch.collate(images((64, 96)))
    compiled = CompiledDetr(model)
    assert asked == [(torch.device("cpu"), torch.float32)]
    for _ in range(2):
        assert_same_detections(compiled(batch), model(batch))
    assert not compiled.graphs.drop()


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_pass_by_inductor() -> None:
    model = small_model()
    batch = ImageBatch.collate(images(*SIZES))
    detect = torch.compile(model.detect, fullgraph=True)
    output = detect(batch.images_B3HW, batch.sizes_B2, supervision=False)
    assert_same_detections(output, model(batch))


@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_nearly_the_same_tokens() -> None:
    model = small_model()
    batch = ImageBatch.collate(images(*SIZES))
    expected, output = model(batch), CompiledDetr(model, dtype=torch.bfloat16)(batch)
    assert torch.equal(output.selection.num_kept_B, expected.selection.num_kept_B)
    kept, wanted = (o.selection.plan.slot_BS >= 0 for o in (output, expected))
    assert (kept & wanted).sum() >= 0.9 * wanted.sum()
    assert output.selection.scores_BS.dtype == output.last.boxes.dtype == torch.float32


def test_the_original_model_is_not_modified() -> None:
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CompiledDetr(model, dtype=torch.bfloat16)
    assert model.training and model.level_embed.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "frozen_norm"), [("resnet18", True), ("resnet10t", False), ("regnetz_b16", True)]
)
@torch.no_grad()
def test_folded_batch_norms_change_nothing(name: str, frozen_norm: bool) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, pretrained=False, frozen_stages=0, frozen_norm=frozen_norm).eval()
    for tensor_name, tensor in backbone.state_dict().items():
        if tensor_name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    image = torch.randn(1, 3, 64, 96)
    expected = backbone(image)
    assert fold_batch_norms(backbone.body) > 10
    for ours, theirs in zip(backbone(image), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def gpu_model() -> Detr:
    return small_model(width=64).cuda()


@pytest.mark.gpu
@torch.no_grad()
def test_captured_graphs_replay_the_same_detections_without_synchronisation() -> None:
    model = gpu_model()
    captured = CompiledDetr(model, max_graphs=2)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for sizes in (SIZES, ((96, 160), (160, 96)), ((64, 64),), SIZES, SIZES):
            batch = ImageBatch.collate(images(*sizes)).to("cuda")
            assert_same_detections(captured(batch), model(batch))
    batch = ImageBatch.collate(images(*SIZES)).pin_memory().to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch)
        captured(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(captured.warm_up_seconds) == 3


@pytest.mark.gpu
@torch.no_grad()
def test_fused_and_captured() -> None:
    model = gpu_model()
    compiled = CompiledDetr(model, fuse=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for _ in range(2):
            batch = ImageBatch.collate(images(*SIZES)).to("cuda")
            assert_same_detections(compiled(batch), model(batch))


@pytest.mark.slow
@torch.no_grad()
def test_values_are_updated_in_place_in_a_fused_graph() -> None:
    """Values are slices of one wide projection, as on CUDA; copying it in every layer would outweigh the benefit."""
    batch, num_tokens, width, num_layers = 1, 40, 32, 3
    level_shapes, heads = ((5, 8),), (4, 1, 2)
    wide, narrow = torch.nn.Linear(width, num_layers * width), torch.nn.Linear(width, width)
    references, offsets, logits = torch.rand(20, 1, 2), torch.randn(20, *heads, 2), torch.randn(20, *heads)

    def layers(x_BSC: Tensor, scores_BS: Tensor, num_keep_B: Tensor) -> Tensor:
        plan = select_tokens(scores_BS, num_keep_B, capacity=20)
        rows_KC = x_BSC.flatten(0, 1)[:20]
        for value_BSC in wide(x_BSC).chunk(num_layers, -1):
            packed_linear(
                rows_KC,
                narrow.weight,
                narrow.bias,
                plan.num_rows,
                memory_BSF=value_BSC,
                plan=plan,
                backend="triton",
            )
            value_BSHD = value_BSC.unflatten(-1, (heads[0], -1))
            rows_KC = rows_KC + deformable_attention(
                value_BSHD,
                level_shapes,
                references,
                offsets,
                logits,
                plan.image_index_K,
                num_rows=plan.num_rows,
            )
        return rows_KC[:7]

    inputs = torch.randn(batch, num_tokens, width), torch.randn(batch, num_tokens), torch.tensor([7])
    result, (code, *_) = run_and_get_code(torch.compile(layers, fullgraph=True), *inputs)
    torch.testing.assert_close(result, layers(*inputs))
    assert code.count("packed_linear_.default(") == num_layers
    assert "clone" not in code
