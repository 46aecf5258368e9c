"""Code written for the compiled extensions runs without them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ats_detr.kernels import install_shims, multi_scale_deformable_attention, shims
from tests.kernels.cases import DEVICE

EXTENSION = "MultiScaleDeformableAttention"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every test starts without shims, and leaves none."""
    yield
    for name in [*shims.BACKWARD, "groundingdino", "tests.kernels.compiled_caller"]:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_module_written_for_the_extension_trains_a_step(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATS_DETR_BACKEND", backend)
    assert EXTENSION in install_shims()
    caller = importlib.import_module("tests.kernels.compiled_caller")
    arguments = [tensor.to(DEVICE) for tensor in caller.inputs()]
    states = []
    for compiled in (True, False):
        torch.manual_seed(0)
        module = caller.MSDeformAttn().to(DEVICE)
        module.compiled = compiled
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        before = module(*arguments).square().mean()
        before.backward()
        optimizer.step()
        assert module(*arguments).square().mean() < before
        states.append(module.state_dict())
    for name, expected in states[1].items():
        torch.testing.assert_close(states[0][name], expected, rtol=1e-5, atol=1e-6)


def test_mmcv_form_writes_the_gradients_into_tensors() -> None:
    install_shims("mmcv._ext")
    extension = importlib.import_module("mmcv._ext")
    value = torch.randn(2, 60, 4, 8, requires_grad=True)
    locations = torch.rand(2, 5, 4, 2, 3, 2, requires_grad=True)
    weights = torch.rand(2, 5, 4, 2, 3, requires_grad=True)
    fixed = (
        value.detach(),
        torch.tensor([[6, 8], [3, 4]]),
        torch.tensor([0, 48]),
        locations.detach(),
        weights.detach(),
    )
    out = multi_scale_deformable_attention(value, [(6, 8), (3, 4)], locations, weights)
    torch.testing.assert_close(extension.ms_deform_attn_forward(*fixed, im2col_step=64), out)
    names = (
        "value",
        "value_spatial_shapes",
        "value_level_start_index",
        "sampling_locations",
        "attention_weights",
    )
    named = dict(zip(names, fixed, strict=True))
    torch.testing.assert_close(extension.ms_deform_attn_forward(**named, im2col_step=64), out)
    expected = torch.autograd.grad(out.sum(), (value, locations, weights))
    gradients = [torch.zeros_like(tensor) for tensor in expected]
    assert extension.ms_deform_attn_backward(*fixed, torch.ones_like(out), *gradients, im2col_step=64) is None
    torch.testing.assert_close(gradients, list(expected))


def test_other_operators_of_mmcv_are_there_and_raise_when_called() -> None:
    install_shims()
    extension = importlib.import_module("mmcv._ext")
    assert hasattr(extension, "nms")
    assert extension.get_compiler_version() == extension.get_compiling_cuda_version() == "n/a"
    with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms: .* needs a compiled mmcv"):
        extension.nms(torch.zeros(1))
    with pytest.raises(AttributeError, match="has no 'dcn_v3_forward'"):
        importlib.import_module("detrex._C").dcn_v3_forward  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_does_not_change_the_dtype(dtype: torch.dtype) -> None:
    value = torch.randn(1, 4, 2, 8, dtype=dtype)
    locations, weights = torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = shims.ms_deform_attn_forward(
            value, torch.tensor([[2, 2]]), torch.tensor([0]), locations, weights
        )
    assert out.dtype == dtype


def test_level_start_index_must_be_that_of_adjacent_levels() -> None:
    arguments = (torch.rand(1, 3, 2, 2, 2, 2), torch.rand(1, 3, 2, 2, 2))
    value, shapes = torch.randn(1, 8, 2, 8), torch.tensor([[2, 2], [2, 2]])
    with pytest.raises(
        ValueError, match=r"level_start \[4, 0\]: must be \[0, 4\] for levels \[\(2, 2\), \(2, 2\)\]"
    ):
        shims.ms_deform_attn_forward(value, shapes, torch.tensor([4, 0]), *arguments)


@pytest.mark.parametrize(
    "start", [torch.tensor([0.0, 4.5]), torch.tensor([0]), torch.tensor([[0, 4]]), [0.0, 4.5]]
)
@pytest.mark.parametrize("shapes", [torch.tensor([[2, 2], [2, 2]]), [(2, 2), (2, 2)]])
def test_level_start_index_must_be_integers(shapes: object, start: object) -> None:
    with pytest.raises(ValueError, match=r"level_start \[.*\] of torch\..*: must be \[2\], integers"):
        shims.read_level_shapes(shapes, start)
    assert shims.read_level_shapes(shapes, [0, 4]) == ((2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"level_start \[0, 5\]: must be \[0, 4\]"):
        shims.read_level_shapes(shapes, [0, 5])


@pytest.mark.parametrize("is_cpu", [True, False])
def test_shapes_that_were_written_to_are_read_again(is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
    shapes, start = torch.tensor([[2, 3], [1, 2]]), torch.tensor([0, 6])
    assert shims.read_level_shapes(shapes, start) == ((2, 3), (1, 2))
    shapes[0] = torch.tensor([3, 2])
    assert shims.read_level_shapes(shapes, start) == ((3, 2), (1, 2))
    start[1] = 5
    with pytest.raises(ValueError, match="level_start"):
        shims.read_level_shapes(shapes, start)
    with torch.inference_mode():
        shapes = torch.tensor([[2, 3]])
        shims.read_level_shapes(shapes)
        shapes[0, 0] = 7
        assert shims.read_level_shapes(shapes) == ((7, 3),)


def test_shapes_on_the_cpu_follow_an_array_that_shares_their_memory() -> None:
    array = np.array([[2, 3], [1, 2]])
    shapes = torch.from_numpy(array)
    assert shims.read_level_shapes(shapes) == ((2, 3), (1, 2))
    array[0] = (3, 2)
    assert shims.read_level_shapes(shapes) == ((3, 2), (1, 2))


def test_shapes_are_read_once_for_all_layers_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading synchronizes with the GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    shapes, start = torch.tensor([[2, 3], [1, 2]]), torch.tensor([0, 6])
    for _ in range(12):
        shims.read_level_shapes(shapes, start)
    assert len(reads) == 1


# ------------------------------------------------------------------------------------------------ installed extensions
def install(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.joinpath(*name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".py").write_text(source)
    monkeypatch.syspath_prepend(folder)


def test_an_installed_extension_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, EXTENSION, "other = 1\ndef ms_deform_attn_forward(*args): return 'compiled'", monkeypatch
    )
    with pytest.raises(ImportError, match=f"{EXTENSION} is installed: pass replace=True"):
        install_shims()
    extension = importlib.import_module(EXTENSION)
    assert extension.ms_deform_attn_forward() == "compiled"
    with pytest.raises(ImportError, match="is installed"):
        install_shims(EXTENSION)
    assert install_shims("groundingdino._C") == ("groundingdino._C",)
    for _ in range(2):
        install_shims(EXTENSION, replace=True)
    assert EXTENSION in install_shims()  # what is there is this operator
    assert (
        extension.ms_deform_attn_forward is shims.ms_deform_attn_forward
    )  # also where it was imported before
    assert extension.other == 1


def test_an_extension_that_cannot_be_loaded_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, EXTENSION, "raise ImportError('undefined symbol')", monkeypatch)
    with pytest.raises(ImportError, match="is installed"):
        install_shims()
    install_shims(replace=True)
    assert importlib.import_module(EXTENSION).ms_deform_attn_forward is shims.ms_deform_attn_forward


def test_an_extension_in_a_package_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "groundingdino.__init__", "raise AssertionError('imported')", monkeypatch)
    install(tmp_path, "groundingdino._C", "", monkeypatch)
    with pytest.raises(ImportError, match=r"groundingdino\._C is installed"):
        install_shims()


def test_a_package_without_its_extension_finds_the_shim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "groundingdino.__init__", "", monkeypatch)
    install(tmp_path, "groundingdino.attention", "from groundingdino import _C", monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install_shims()
        install_shims()  # no error: what is there is the shim
    attention = importlib.import_module("groundingdino.attention")
    sys.modules.pop("groundingdino.attention")
    assert attention._C.ms_deform_attn_backward is shims.ms_deform_attn_backward


def test_a_project_that_was_imported_before_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "groundingdino.__init__", "", monkeypatch)
    importlib.import_module("groundingdino")
    with pytest.warns(
        UserWarning, match=r"groundingdino was imported before install_shims: .* groundingdino\._C"
    ):
        install_shims()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no shim for mmcv: must be among MultiScaleDeformableAttention"):
        install_shims("mmcv")
