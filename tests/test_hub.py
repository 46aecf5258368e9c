"""The repository for the `kernels` library that hub/build.py writes."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ats_detr.kernels import multi_scale_deformable_attention, reference

ROOT = Path(__file__).parents[1]
LAYER = "MultiScaleDeformableAttention"
SHAPES = [(6, 8), (3, 4)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "deformable-attention"
    subprocess.run([sys.executable, ROOT / "hub" / "build.py", folder], check=True, cwd=folder.parent)
    return folder


def load(variant: Path) -> ModuleType:
    """As the library imports a variant: under its id, which is no name on a path."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights: two images, five queries, four heads, two levels, three points."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 60, 4, 8), (2, 5, 4, 2, 3, 2), (2, 5, 4, 2, 3))
    return tuple(torch.rand(shape, generator=generator).to(DEVICE) for shape in shapes)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_variant_runs_beside_the_installed_package(repository: Path, backend: str) -> None:
    kernel = load(repository / "build" / f"torch-{backend}")
    arguments = samples()
    expected = multi_scale_deformable_attention(arguments[0], SHAPES, *arguments[1:], backend="triton")
    result = kernel.multi_scale_deformable_attention(arguments[0], SHAPES, *arguments[1:], backend="triton")
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    own = kernel.attention._msda.packet
    assert str(own) == f"{kernel.__name__}.msda"
    assert own is not torch.ops.ats_detr.msda
    imported = {name for name in sys.modules if name.startswith(f"{kernel.__name__}.")}
    assert f"{kernel.__name__}.gpu.attention" in imported


def test_a_build_is_reproducible_and_overwrites_only_its_own(repository: Path, tmp_path: Path) -> None:
    build = [sys.executable, ROOT / "hub" / "build.py"]
    for _ in range(2):
        subprocess.run([*build, tmp_path / "again"], check=True)
    files = [
        path.relative_to(repository) for path in repository.rglob("*") if path.suffix in (".py", ".json")
    ]
    assert all((tmp_path / "again" / name).read_bytes() == (repository / name).read_bytes() for name in files)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    done = subprocess.run([*build, tmp_path / "other"], check=False, capture_output=True, text=True)
    assert "holds other files" in done.stderr
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ the `kernels` library
class MultiScaleDeformableAttention(nn.Module):
    """As in transformers."""

    def forward(self, value: Tensor, value_spatial_shapes: Tensor, value_spatial_shapes_list: list, level_start_index:
                Tensor, sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:  # fmt: skip
        return reference.multi_scale_deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(samples())
        self.attention = MultiScaleDeformableAttention()

    def forward(self, scale: Tensor) -> Tensor:
        value, locations, weights = self.parts
        return self.attention(value * scale, None, SHAPES, None, locations, weights, 64)


@pytest.fixture
def kernels() -> Iterator[Any]:
    library = pytest.importorskip("kernels", reason="the library `kernels` is not installed")
    library.replace_kernel_forward_from_hub(MultiScaleDeformableAttention, LAYER)
    return library


def kernelized(library: Any, repository: Path, model: nn.Module, mode: str) -> nn.Module:
    layer = library.LocalLayerRepository(repository, layer_name=LAYER)
    modes = library.Mode.INFERENCE if mode == "INFERENCE" else library.Mode.TRAINING
    modes = modes | library.Mode.TORCH_COMPILE if mode.endswith("TORCH_COMPILE") else modes
    with library.use_kernel_mapping({LAYER: {"cpu": layer, "cuda": layer}}, inherit_mapping=False):
        return library.kernelize(copy.deepcopy(model), mode=modes, device=DEVICE, use_fallback=False)


COMPILED = "TRAINING | TORCH_COMPILE"


@pytest.mark.parametrize(
    ("mode", "compiler"),
    [
        ("INFERENCE", None),
        ("TRAINING", None),
        (COMPILED, lambda graph, inputs: graph),
        pytest.param(COMPILED, torch._inductor.compile, marks=pytest.mark.slow),
    ],
)
def test_kernelize(
    kernels: Any, repository: Path, mode: str, compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model, scale = Model(), torch.full((), 2.0, device=DEVICE)
    ours = kernelized(kernels, repository, model, mode)
    package = sys.modules[ours.attention.forward.__func__.__module__.partition(".")[0]]
    assert package.layers.MultiScaleDeformableAttention.forward is ours.attention.forward.__func__
    monkeypatch.setattr(reference, "multi_scale_deformable_attention", None)
    if mode == "INFERENCE":
        with torch.inference_mode():
            result = ours(scale)
    elif mode == "TRAINING":
        result = ours(scale)
    else:
        graphs = []

        def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph.code)
            return compiler(graph, inputs)

        result = torch.compile(ours, fullgraph=True, backend=record)(scale)
        assert len(graphs) == 1
        assert f"{package.__name__}.msda" in graphs[0]
    monkeypatch.undo()
    expected = model(scale)
    torch.testing.assert_close(result, expected)
    if mode != "INFERENCE":
        gradients = torch.autograd.grad(result.square().sum(), ours.parameters())
        correct = torch.autograd.grad(expected.square().sum(), model.parameters())
        torch.testing.assert_close(gradients, correct, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_models_of_transformers(kernels: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.kernels.test_adapt_transformers import Trial

    for title in ("Deformable DETR", "RT-DETR", "RF-DETR"):
        trial = Trial(title)
        expected = trial.results()
        classes = {type(module) for module in trial.model.modules() if type(module).__name__ == LAYER}
        for cls in classes:  # transformers does this if its version of the library is installed
            monkeypatch.setattr(cls, "kernel_layer_name", LAYER, raising=False)
            monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda module: True), raising=False)
        for mode in ("INFERENCE", "TRAINING", COMPILED):
            trial.model = kernelized(kernels, repository, trial.model, mode)
            trial.check(expected)
