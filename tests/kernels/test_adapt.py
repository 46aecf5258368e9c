"""`adapt` on modules as other projects write them, and what it refuses."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrize

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
    return Attention.original(
        value.permute(0, 3, 1, 2), shapes, locations, attention_weights.unflatten(3, samples)
    )


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return Attention.original(value, value_spatial_shapes.tolist(), sampling_locations, attention_weights)


class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):  # fmt: skip
        raise AssertionError("the compiled extension was called")


def multi_scale_deformable_attention_v2(value, value_spatial_shapes, sampling_locations, attention_weights,
                                        num_points_list, method="default"):  # fmt: skip
    samples = (len(num_points_list), -1)
    return Attention.original(
        value, value_spatial_shapes, sampling_locations.unflatten(3, samples), attention_weights.unflatten(3, samples)
    )  # fmt: skip


class MultiScaleDeformableAttnFunction_fp32(Function):
    """BEVFormer's; `forward` and `backward` of it are decorated."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):  # fmt: skip
        return Attention.original(value, value_spatial_shapes.tolist(), sampling_locations, attention_weights)


class MultiScaleDeformableAttnFunction_fp16(MultiScaleDeformableAttnFunction_fp32):
    pass


operators = ModuleType("operators")  # other files
operators.multi_scale_deformable_attn_pytorch = multi_scale_deformable_attn_pytorch
operators.MultiScaleDeformableAttnFunction_fp32 = MultiScaleDeformableAttnFunction_fp32
package = ModuleType("package")
package.operators = operators
extension = SimpleNamespace(ms_deform_attn_forward=None)
SCALE = 1.0


def deformable_attention_core_func(value, shapes, locations, weights):
    """A function that nothing is known about."""


# --------------------------------------------------------------------------------------------- modules that call them
class Attention(nn.Module):
    """Values and samples as parameters, so that gradients are compared; subclasses call an operator."""

    compiled = False
    original = staticmethod(reference.multi_scale_deformable_attention)

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


class Scaled(Attention):
    def forward(self) -> Tensor:
        return SCALE * multi_scale_deformable_attn_pytorch(
            self.value, self.shapes, self.locations, self.weights
        )


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
        assert type(model.layer) is build


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


# --------------------------------------------------------------------------------------------------------------- copies
def pickled(model: nn.Module) -> nn.Module:
    """In another process, nothing has been adapted before."""
    data = pickle.dumps(model)
    for name in [name for name in globals() if name.startswith("_ats_detr_")]:
        del globals()[name]
    return pickle.loads(data)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(model: nn.Module) -> nn.Module:
    """As nn.DataParallel makes one; it sets the parameters as attributes afterwards."""
    new = model._replicate_for_data_parallel()
    new._parameters = dict(model._parameters)
    return new


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved, replica])
@pytest.mark.parametrize("build", [ChannelsFirst, PointsPerLevel, MultiScaleDeformableAttention])
def test_copies_are_adapted_and_use_their_own_parameters(
    build: type[Attention], copied: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    expected = model()
    with adapt(model):
        other = copied(model)
    monkeypatch.setattr(Attention, "original", None)
    torch.testing.assert_close(other(), expected)
    other._parameters = {**model._parameters, "value": nn.Parameter(2 * model.value.detach())}
    torch.testing.assert_close(other(), 2 * expected)
    assert isinstance(other, build)
    with pytest.raises(ValueError, match="a copy of an adapted model has none: copy the model before adapt"):
        adapt(other)
    monkeypatch.undo()
    assert torch.equal(model(), expected)


def test_copies_within_a_process_share_the_code_that_is_compiled() -> None:
    model = nn.Sequential(ChannelsFirst(), ChannelsFirst())
    adapt(model)
    classes = {type(layer) for layer in (*model, *copy.deepcopy(model))}
    assert len(classes) == 1
    assert len({type(layer) for layer in pickle.loads(pickle.dumps(model))}) == 1
    assert classes.pop().__qualname__ == "ChannelsFirst"


def test_a_copy_of_a_subclass_of_an_adapted_class_keeps_its_class() -> None:
    model = ChannelsFirst()
    adapt(model)

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self) -> Tensor:
            return 2 * super().forward()

    other = copy.deepcopy(Doubled())
    assert type(other) is Doubled
    torch.testing.assert_close(other(), 2 * model())


def test_a_list_of_registered_modules_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Helper(), Helper())
    model[0].neighbours = [model[1], [model[0]]]
    expected = model[1]()
    model[0].alone = [alone := Helper()]
    adapt(alone)
    assert adapt(model).names == ("0", "1")
    monkeypatch.setattr(Attention, "original", None)
    torch.testing.assert_close(model[0].neighbours[0](), expected)
    torch.testing.assert_close(alone(), expected)


def test_globals_are_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is patched or set in the file after `adapt` is seen."""
    model = Scaled()
    expected = model()
    adapt(model)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    torch.testing.assert_close(model(), 3 * expected)
    assert type(model).forward.__globals__ is globals()


# ------------------------------------------------------------------------------------------- how the operator is called
class Called(Attention):
    """Subclasses reach the operator in another way than by a global name in `forward`."""

    def arguments(self) -> tuple[Tensor, ...]:
        return self.value, self.shapes, self.locations, self.weights


def attend(module: Called) -> Tensor:
    return multi_scale_deformable_attn_pytorch(*module.arguments())


def make_decorated(function: Callable) -> Callable:
    return lambda self: function(self)


def make_forward(function: Callable) -> Callable:
    def forward(self: Called) -> Tensor:
        return function(*self.arguments())

    return forward


class Helper(Called):
    def forward(self) -> Tensor:
        return self.helper() + 0

    def helper(self) -> Tensor:
        return multi_scale_deformable_attn_pytorch(*self.arguments())


class Inherited(Helper):
    def forward(self) -> Tensor:
        return super().forward() + 0


class InheritedTwice(Inherited):
    def helper(self) -> Tensor:
        return 2 * super().helper() / 2


class SuperOfClass(Inherited):
    def forward(self) -> Tensor:
        return super(SuperOfClass, self).forward()  # noqa: UP008


class SuperByString(Helper):
    def helper(self) -> Tensor:
        return getattr(super(), "helper")()  # noqa: B009


class ExplicitBase(Helper):
    def forward(self) -> Tensor:
        return Helper.helper(self)


class ModuleAlias(Called):
    def forward(self) -> Tensor:
        return operators.multi_scale_deformable_attn_pytorch(*self.arguments())


class NestedAlias(Called):
    def forward(self) -> Tensor:
        return package.operators.MultiScaleDeformableAttnFunction_fp32.apply(
            self.value, self.shapes, self.start, self.locations, self.weights, 64
        )


class GlobalHelper(Called):
    def forward(self) -> Tensor:
        return (lambda: attend(self))()


class PartialAttribute(Called):
    def __init__(self) -> None:
        super().__init__()
        self.core = functools.partial(multi_scale_deformable_attn_pytorch, attention_weights=self.weights)

    def forward(self) -> Tensor:
        return self.core(*self.arguments()[:3])


class StaticMethod(Called):
    core = staticmethod(multi_scale_deformable_attn_pytorch)

    def forward(self) -> Tensor:
        return self.core(*self.arguments())


class Closure(Called):
    forward = make_forward(multi_scale_deformable_attn_pytorch)


class BoundMethod(Helper):
    def __init__(self) -> None:
        super().__init__()
        self.call = self.helper

    def forward(self) -> Tensor:
        return self.call()


class Decorated(Called):
    @torch.no_grad()
    @renamed_arguments({})
    def forward(self) -> Tensor:
        return attend(self)


class ClassMethod(Called):
    @classmethod
    def attend(cls, module: Called) -> Tensor:
        return attend(module)

    def forward(self) -> Tensor:
        return self.attend(self)


class DecoratedSuper(Helper):
    @make_decorated
    def forward(self) -> Tensor:
        return super().forward()


class Registered(Called):
    """What knows its subclasses does not learn of an adapted module's class."""

    registry: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()
        cls.registry.append(cls)


class RegisteredSubclass(Registered, name="subclass"):
    def forward(self) -> Tensor:
        return attend(self) * len(self.registry)


class Half(Called):
    """BEVFormer."""

    def forward(self) -> Tensor:
        function = (
            MultiScaleDeformableAttnFunction_fp16 if self.compiled else MultiScaleDeformableAttnFunction_fp32
        )
        return function.apply(self.value, self.shapes, self.start, self.locations, self.weights, 64)


FOUND = [
    Helper, Inherited, InheritedTwice, ExplicitBase, ModuleAlias, NestedAlias, GlobalHelper, PartialAttribute,
    StaticMethod, Closure, BoundMethod, Decorated, DecoratedSuper, ClassMethod, RegisteredSubclass, Half,
    SuperOfClass, SuperByString,
]  # fmt: skip


@pytest.mark.parametrize("build", FOUND)
def test_the_operator_is_found_however_it_is_called(
    build: type[Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = build(), build()
    expected = attend(model)
    with adapt(model) as adaptation:
        assert adaptation.names == ("",)
        monkeypatch.setattr(Attention, "original", None)
        torch.testing.assert_close(model(), expected)
        with pytest.raises(TypeError, match="NoneType"):
            other()
    with pytest.raises(TypeError, match="NoneType"):
        model()


class CallableObject:
    def __init__(self, function: Callable) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Callable:
        return functools.partial(self.function, instance)


class SlottedObject(CallableObject):
    __slots__ = ("function",)


class ClassDecorator(Called):
    @CallableObject
    def forward(self) -> Tensor:
        return attend(self)


class SlottedDecorator(Called):
    @SlottedObject
    def forward(self) -> Tensor:
        return attend(self)


class Property(Called):
    @property
    def attended(self) -> Tensor:
        return attend(self)

    def forward(self) -> Tensor:
        return self.attended


class Sampler:
    def run(self, *arguments: Tensor) -> Tensor:
        return multi_scale_deformable_attn_pytorch(*arguments)


class HeldObject(Called):
    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler()

    def forward(self) -> Tensor:
        return self.sampler.run(*self.arguments())


Sampler.default = Sampler()  # a class that holds one of its instances


class Table(Called):
    def __init__(self) -> None:
        super().__init__()
        self.cores = {"torch": multi_scale_deformable_attn_pytorch}

    def forward(self) -> Tensor:
        return self.cores["torch"](*self.arguments())


class Default(Called):
    def forward(self, core: Callable = multi_scale_deformable_attn_pytorch) -> Tensor:
        return core(*self.arguments())


class LocalImport(Called):
    def forward(self) -> Tensor:
        from tests.kernels.test_adapt import multi_scale_deformable_attn_pytorch as core

        return core(*self.arguments())


class LocalModule(Called):
    def forward(self) -> Tensor:
        from tests.kernels import test_adapt

        return test_adapt.multi_scale_deformable_attn_pytorch(*self.arguments())


class ByString(Called):
    def forward(self) -> Tensor:
        return getattr(operators, "multi_scale_deformable_attn_pytorch")(*self.arguments())  # noqa: B009


class Extension(Called):
    def forward(self) -> Tensor:
        return extension.ms_deform_attn_forward(*self.arguments())


class TwoThings(Called):
    def forward(self) -> Tensor:
        self.multi_scale_deformable_attn_pytorch = 1
        return multi_scale_deformable_attn_pytorch(*self.arguments())


class Recursive(Called):
    def forward(self) -> Tensor:
        return attend_each(*self.arguments(), each=True)


class RecursiveByOther(Called):
    def forward(self) -> Tensor:
        return attend_halves(*self.arguments())


def attend_each(*arguments: Tensor, each: bool = False) -> Tensor:
    if each:
        return attend_each(*arguments)
    return multi_scale_deformable_attn_pytorch(*arguments)


def attend_halves(*arguments: Tensor) -> Tensor:
    return attend_or_halve(*arguments)


def attend_or_halve(*arguments: Tensor) -> Tensor:
    if arguments[0].shape[0] > 2:
        return attend_halves(*arguments)
    return multi_scale_deformable_attn_pytorch(*arguments)


class CallableSampler:
    def __call__(self, *arguments: Tensor) -> Tensor:
        return multi_scale_deformable_attn_pytorch(*arguments)


SAMPLER = CallableSampler()
NESTED = {"a": {"b": multi_scale_deformable_attn_pytorch}}


class GlobalObject(Called):
    def forward(self) -> Tensor:
        return SAMPLER(*self.arguments())


class GlobalTable(Called):
    def forward(self) -> Tensor:
        return NESTED["a"]["b"](*self.arguments())


class ClassTable(Called):
    cores: ClassVar[dict[str, Any]] = {"a": [multi_scale_deformable_attn_pytorch]}

    def forward(self) -> Tensor:
        return self.cores["a"][0](*self.arguments())


class HoldsList(Called):
    def __init__(self, item: Any) -> None:
        super().__init__()
        self.items = [item, {"itself": self}]
        self.items.append(self.items)

    def forward(self) -> Tensor:
        return self.items[0]()


class ListOfObjects(HoldsList):
    def __init__(self) -> None:
        super().__init__(CallableSampler())


class ListOfModules(HoldsList):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(Helper()))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (ClassDecorator, "a CallableObject holds ClassDecorator.forward"),
        (SlottedDecorator, "a SlottedObject holds SlottedDecorator.forward"),
        (Property, "a property holds Property.attended"),
        (HeldObject, "its sampler, a Sampler, calls it, and is no module"),
        (Table, "a dict holds multi_scale_deformable_attn_pytorch"),
        (Recursive, "attend_each calls itself"),
        (RecursiveByOther, "attend_halves calls itself"),
        (GlobalObject, "a CallableSampler calls it, and is no module"),
        (GlobalTable, "a dict holds multi_scale_deformable_attn_pytorch"),
        (ClassTable, "a list holds multi_scale_deformable_attn_pytorch"),
        (ListOfObjects, "a CallableSampler calls it, and is no module"),
        (ListOfModules, "a Helper calls it, and is no registered module: adapt it first"),
        (Default, "a tuple holds multi_scale_deformable_attn_pytorch"),
        (LocalImport, "forward reads multi_scale_deformable_attn_pytorch by an import within the function"),
        (LocalModule, "forward reads multi_scale_deformable_attn_pytorch of an object that is known only"),
        (ByString, "forward reads multi_scale_deformable_attn_pytorch as a string"),
        (Extension, "forward reads ms_deform_attn_forward of an object that is known only when it runs"),
        (TwoThings, "forward uses the name multi_scale_deformable_attn_pytorch for two things"),
    ],
)
def test_what_cannot_be_replaced_is_reported(build: type[Called], reason: str) -> None:
    model = build()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"1 deformable attentions cannot .*\n  {build.__name__}: {reason}"
        ):
            adapt(model)
    adaptation = adapt(nn.ModuleList([model, build()]), strict=False)
    assert adaptation.names == ()
    assert list(adaptation.skipped) == ["0", "1"]


class Unused(Called):
    def forward(self) -> Tensor:
        from tests.kernels.test_adapt import multi_scale_deformable_attn_pytorch  # noqa: F401

        return self.value


class Overridden(Helper):
    def __init__(self) -> None:
        super().__init__()
        self.function_name = multi_scale_deformable_attn_pytorch.__name__

    def forward(self) -> Tensor:
        return self.value

    def helper(self) -> Tensor:
        return self.value


@pytest.mark.parametrize("build", [Unused, Overridden])
def test_what_does_not_run_is_not_reported(build: type[Called]) -> None:
    with pytest.raises(ValueError, match=f"no deformable attention in {build.__name__}"):
        adapt(build())


# ---------------------------------------------------------------------------------------------------------- what raises
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
    assert type(model.known) is ChannelsFirst
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
    with pytest.raises(RuntimeError, match="cannot undo: forward of the model was replaced after adapt"):
        adaptation.undo()
    del model.forward
    parametrize.register_parametrization(model, "value", nn.Identity())  # also changes the class
    with pytest.raises(RuntimeError, match="cannot undo: __class__ of the model was replaced after adapt"):
        adaptation.undo()
    parametrize.remove_parametrizations(model, "value")
    adaptation.undo()
    model.forward = print
    with pytest.raises(
        ValueError, match="its forward was replaced by <built-in function print>: call adapt before"
    ):
        adapt(model)


@pytest.mark.parametrize("wrap", [functools.partial, lambda old: lambda: old(), lambda old: old])
def test_a_forward_that_was_wrapped_before_is_adapted(
    wrap: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Inherited()
    expected = model()
    wrapped = model.forward = wrap(model.forward)
    with adapt(model):
        monkeypatch.setattr(Attention, "original", None)
        torch.testing.assert_close(model(), expected)
    assert model.forward is wrapped
    with pytest.raises(TypeError, match="NoneType"):
        model()
