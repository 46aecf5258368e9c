"""`adapt` on modules as other projects write them, and what it refuses."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from ats_detr.kernels import adapt, install_shims, reference
from tests.kernels.cases import DEVICE, TOLERANCE, relative_error

SHAPES = ((6, 8), (3, 4))
SAMPLES = (2, 5, 4, 2, 3)  # B, Q, H, L, P


# ------------------------------------------------------------------------------------------ functions of other projects
def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights,
                                value_spatial_shapes_hw=None):  # fmt: skip
    """rfdetr's: values [B, H, D, S], weights [B, Q, H, L*P]; locations also [B, Q, H, L*P, 2]."""
    shapes = value_spatial_shapes_hw or value_spatial_shapes.tolist()
    samples = (len(shapes), -1)
    locations = sampling_locations.flatten(3, -2).unflatten(3, samples)
    return reference.multi_scale_deformable_attention(
        value.permute(0, 3, 1, 2), shapes, locations, attention_weights.unflatten(3, samples)
    )


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return reference.multi_scale_deformable_attention(
        value, value_spatial_shapes.tolist(), sampling_locations, attention_weights
    )


class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):  # fmt: skip
        raise AssertionError("the compiled extension was called")


def multi_scale_deformable_attention_v2(value, value_spatial_shapes, sampling_locations, attention_weights,
                                        num_points_list, method="default"):  # fmt: skip
    samples = (len(num_points_list), -1)
    return reference.multi_scale_deformable_attention(
        value, value_spatial_shapes, sampling_locations.unflatten(3, samples), attention_weights.unflatten(3, samples)
    )  # fmt: skip


def deformable_attention_core_func(value, shapes, locations, weights):
    """A function that nothing is known about."""


# --------------------------------------------------------------------------------------------- modules that call them
class Attention(nn.Module):
    """Values and samples as parameters, so that gradients are compared; subclasses call an operator."""

    compiled = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rand = functools.partial(torch.rand, generator=generator)
        self.value = nn.Parameter(rand(2, 60, 4, 8))
        self.locations = nn.Parameter(rand(*SAMPLES, 2))
        self.weights = nn.Parameter(rand(*SAMPLES))
        self.register_buffer("shapes", torch.tensor(SHAPES))
        self.register_buffer("start", torch.tensor([0, 48]))


class ChannelsFirst(Attention):
    merged = False

    def forward(self, hw: Any = None) -> Tensor:
        locations = self.locations.flatten(3, 4) if self.merged else self.locations
        return ms_deform_attn_core_pytorch(
            self.value.permute(0, 2, 3, 1), self.shapes, locations, self.weights.flatten(3), hw
        )


def renamed_arguments(names: dict[str, str]) -> Callable:
    """A decorator as mmcv has one."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            return function(*args, **{names.get(key, key): value for key, value in keywords.items()})

        return wrapper

    return decorate


class MultiScaleDeformableAttention(Attention):
    """mmcv, mmdet, GroundingDINO and detrex: this name, with projections in it."""

    @renamed_arguments({"residual": "identity"})
    def forward(self, identity: float = 0.0, *, scale: float = 1.0) -> Tensor:
        if self.compiled:
            output = MultiScaleDeformableAttnFunction.apply(
                self.value, self.shapes, self.start, self.locations, self.weights, 64
            )
        else:
            output = multi_scale_deformable_attn_pytorch(
                self.value, self.shapes, self.locations, self.weights
            )
        return output * scale + identity


class PointsPerLevel(Attention):
    num_points_list = (3, 3)

    def __init__(self, method: str = "default") -> None:
        super().__init__()
        self.method = method
        self.core = multi_scale_deformable_attention_v2

    def forward(self) -> Tensor:
        samples = self.locations.flatten(3, 4), self.weights.flatten(3)
        return self.core(self.value, SHAPES, *samples, self.num_points_list, self.method)


class Unknown(Attention):
    def forward(self) -> Tensor:
        return deformable_attention_core_func(self.value, self.shapes, self.locations, self.weights)


def results(model: nn.Module, **keywords: Any) -> list[Tensor]:
    model.zero_grad()
    output = model(**keywords)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("build", "keywords"),
    [
        (ChannelsFirst, {}),
        (ChannelsFirst, {"hw": SHAPES}),
        (MultiScaleDeformableAttention, {"residual": 0.5, "scale": 2.0}),
        (PointsPerLevel, {}),
    ],
)
def test_adapted_module_computes_the_same(
    build: type[Attention], keywords: dict[str, Any], backend: str
) -> None:
    model, other = nn.Sequential(), nn.Sequential()
    model.layer, other.layer = build().to(DEVICE), build().to(DEVICE)
    for merged in (False, True) if build is ChannelsFirst else (False,):
        model.layer.merged = other.layer.merged = merged
        expected = results(model.layer, **keywords)
        with adapt(model, backend=backend) as adaptation:
            assert adaptation.names == ("layer",)
            assert adaptation.skipped == {}
            for adapted in (model, copy.deepcopy(model)):
                for result, correct in zip(results(adapted.layer, **keywords), expected, strict=True):
                    assert relative_error(result, correct) < TOLERANCE[torch.float32]
            assert all(map(torch.equal, results(other.layer, **keywords), expected))
        assert all(map(torch.equal, results(model.layer, **keywords), expected))
        assert "forward" not in vars(model.layer)


def test_the_autograd_function_is_replaced_too() -> None:
    model = MultiScaleDeformableAttention().to(DEVICE)
    expected = results(model)
    model.compiled = True
    with pytest.raises(AssertionError, match="compiled extension"):
        model()
    with adapt(model):
        torch.testing.assert_close(results(model), expected)


def test_modules_around_a_compiled_extension() -> None:
    """Deformable DETR, DINO, MaskDINO, Mask2Former."""
    install_shims("MultiScaleDeformableAttention")
    caller = importlib.import_module("tests.kernels.compiled_caller")
    del sys.modules["MultiScaleDeformableAttention"], sys.modules["tests.kernels.compiled_caller"]
    model = caller.MSDeformAttn().to(DEVICE)
    arguments = [tensor.to(DEVICE) for tensor in caller.inputs()]
    expected = model(*arguments)
    caller.extension = None  # neither the extension nor the fallback is called from here on
    caller.reference = None
    with adapt(model) as adaptation:
        assert adaptation.names == ("",)
        for model.compiled in (True, False):
            torch.testing.assert_close(model(*arguments), expected)


def test_torch_compile_uses_the_adapted_operator() -> None:
    """The globals of an adapted forward are looked up where they are, not in the module that the forward is from."""
    torch._dynamo.reset()
    for build in (ChannelsFirst, PointsPerLevel, MultiScaleDeformableAttention):
        model = build().to(DEVICE)
        expected = results(model)
        adapt(model)
        graphs = []

        def record(graph: torch.fx.GraphModule, inputs: Any, graphs: list = graphs) -> Any:
            graphs.append(graph.code)
            return graph

        compiled = torch.compile(model, backend=record, fullgraph=True)
        torch.testing.assert_close(results(compiled), expected)
        assert len(graphs) == 1
        assert "ats_detr.msda" in graphs[0]


class Interrupted(Attention):
    """Compiled in two parts."""

    def forward(self) -> Tensor:
        torch._dynamo.graph_break()
        return multi_scale_deformable_attn_pytorch(self.value, self.shapes, self.locations, self.weights) + 0


def test_torch_compile_keeps_adapted_and_other_modules_of_a_class_apart() -> None:
    """torch.compile keeps what it compiled by the code object of a forward, also of its parts."""
    for first in ("adapted", "other"):
        torch._dynamo.reset()
        models = {"adapted": Interrupted().to(DEVICE), "other": Interrupted().to(DEVICE)}
        expected = models["other"]()
        adaptation = adapt(models["adapted"])
        graphs: list[str] = []

        def record(graph: torch.fx.GraphModule, inputs: Any, graphs: list = graphs) -> Any:
            graphs.append(graph.code)
            return graph

        for name in sorted(models, key=lambda name: name != first):
            graphs.clear()
            torch.testing.assert_close(torch.compile(models[name], backend=record)(), expected)
            assert any("ats_detr.msda" in code for code in graphs) == (name == "adapted")
        adaptation.undo()
        graphs.clear()
        torch.testing.assert_close(torch.compile(models["adapted"], backend=record)(), expected)
        assert not any("ats_detr.msda" in code for code in graphs)


def test_a_pickled_model_is_loaded_unadapted() -> None:
    model = MultiScaleDeformableAttention()
    expected = model()
    with adapt(model):
        loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(), expected)
    adapt(loaded)


# ------------------------------------------------------------------------------------------------------ what is refused
def test_what_was_looked_for_is_named_where_nothing_was_found() -> None:
    message = "no deformable attention in Linear: looked for modules of class MultiScaleDeformableAttention and for "
    with pytest.raises(
        ValueError, match=message + ".*multi_scale_deformable_attn_pytorch.*MSDeformAttnFunction"
    ):
        adapt(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model is a list: must be a torch\.nn\.Module"):
        adapt([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="backend 'cuda': must be one of reference, triton"):
        adapt(MultiScaleDeformableAttention(), backend="cuda")


class OtherLayer(Attention):
    def forward(self, value: Tensor) -> Tensor:
        return value


OtherLayer.__name__ = "MultiScaleDeformableAttention"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            Unknown,
            r"deformable_attention_core_func\(value, shapes, locations, weights\) is not a known version",
        ),
        (OtherLayer, r"MultiScaleDeformableAttention.forward\(self, value\) is not a known version"),
        (lambda: PointsPerLevel("discrete"), "method 'discrete' reads the nearest pixel"),
    ],
)
def test_an_unknown_version_is_not_passed_over(build: Callable[[], Attention], reason: str) -> None:
    model = nn.ModuleDict({"known": ChannelsFirst(), "other": build()})
    with pytest.raises(ValueError, match=rf"1 deformable attentions cannot be replaced.*\n  other: {reason}"):
        adapt(model)
    assert "forward" not in vars(model.known)
    adaptation = adapt(model, strict=False)
    assert adaptation.names == ("known",)
    assert list(adaptation.skipped) == ["other"]


def test_a_changed_method_is_noticed_when_it_is_called() -> None:
    model = PointsPerLevel()
    adapt(model)
    model.method = "discrete"
    with pytest.raises(ValueError, match="method 'discrete': must be 'default'"):
        model()


def test_a_model_is_adapted_once() -> None:
    for build in (ChannelsFirst, PointsPerLevel, MultiScaleDeformableAttention):
        model = build()
        adaptation = adapt(model)
        with pytest.raises(ValueError, match=r"the model is adapted already: call undo\(\)"):
            adapt(model)
        adaptation.undo()
        adaptation.undo()
        adapt(model).undo()


def test_what_replaced_a_forward_is_neither_lost_nor_overwritten() -> None:
    model = ChannelsFirst()
    adaptation = adapt(model)
    adapted = model.forward
    model.forward = functools.partial(adapted)
    with pytest.raises(RuntimeError, match=r"cannot undo: \.forward was replaced after adapt"):
        adaptation.undo()
    model.forward = adapted
    adaptation.undo()
    model.forward = functools.partial(model.forward)
    with pytest.raises(ValueError, match=r"its forward was replaced by functools\.partial"):
        adapt(model)
