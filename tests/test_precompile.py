"""Kernels are found and compiled without a GPU, before their first launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ats_detr import precompile
from ats_detr.cli import main
from ats_detr.errors import UserError
from tests.small_detector import SMALL, small_detector

pytest.importorskip("triton")

COMPILED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from ats_detr.config import load_config
from ats_detr.kernels.gpu import compilation, linear, packing, tuning
from ats_detr.precompile import find_variants

def launch():
    index, mask = torch.zeros(64, dtype=torch.int32), torch.zeros(2, 300, dtype=torch.bool)
    x, weight = torch.zeros(65, 32).bfloat16()[1:], torch.zeros(48, 32).bfloat16()
    packing.zero_padding_(torch.zeros(2, 300, 33)[..., 1:], mask)
    linear.packed_linear(x, weight, torch.zeros(48).bfloat16(), index[:1], None, torch.float32, False)

if __name__ == "__main__":
    config = load_config("quickstart", sys.argv[1:])
    found = find_variants(config, ["train"], dtype=torch.bfloat16, gpu="NVIDIA H200")
    print(*sorted({variant.kernel for variant in found}))
    with compilation.recorded("NVIDIA H200") as variants:
        launch()
    for _ in range(2):
        outcomes = list(compilation.compile_variants(variants, 90, 1))
        print(len(variants), sum(is_new for _, is_new, _ in outcomes), [error for *_, error in outcomes if error])
    # The same launches with contents, as far as they can be made without a GPU: what they need is in the cache.
    hits, run = [], JITFunction.run
    JITFunction.run = lambda *args, grid, warmup, **keywords: run(*args, grid=grid, warmup=True, **keywords)
    compilation._use_target(90)
    triton.knobs.compilation.listener = lambda *_, cache_hit, **__: hits.append(cache_hit)
    tuning._choose = lambda operator, key, *_: (tuning.configurations(operator, key)[0], "")
    launch()
    print(len(hits), sum(hits))
"""


def python(script: str | Path, *arguments: str, cache: Path) -> str:
    """The output of a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, *([str(script)] if isinstance(script, Path) else ["-c", script]), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_kernels_are_found_and_compiled_in_advance(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMPILED)
    trained, first, second, launched = python(script, *SMALL, cache=tmp_path / "cache").splitlines()
    common = {"msda_forward", "find_thresholds", "geometry_of_tokens"}
    assert {*common, "msda_backward", "add_attention"} <= set(trained.split())
    assert first == "3 3 []", "one kernel with two configurations, and one without"
    assert second == "3 0 []"
    assert launched == "2 2", "launches with contents need what was compiled"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    command = ["ats_detr", "kernels", "compile", "quickstart", *SMALL, "--arch", "90", "--modes", "predict"]
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module('ats_detr', run_name='__main__')"
    first, second = (python(script, *command, cache=tmp_path).splitlines()[-1] for _ in range(2))
    number = int(first.split(": ")[1].split()[0])
    assert number > 10 and f"{number} kernels compiled, 0 cached" in first
    assert f"0 kernels compiled, {number} cached" in second


LAUNCHED = """
import sys, numpy, torch, triton
from ats_detr.config import load_config
from ats_detr.data.coco import ClassMap
from ats_detr.detector import Detector
from ats_detr.model import build_model
from ats_detr.precompile import compile_kernels

if __name__ == "__main__":
    config = load_config("quickstart", sys.argv[1:])
    device = torch.device("cuda", 0)
    compile_kernels(config, device, ["predict"], num_classes=3)
    hits = []
    triton.knobs.compilation.listener = lambda *_, cache_hit, **__: hits.append(cache_hit)
    classes = ClassMap.from_categories({0: "a", 1: "b", 2: "c"})
    detector = Detector(build_model(config.model, 3).to(device), config, classes)
    for _ in range(3):
        detector.predict(numpy.zeros((48, 64, 3), numpy.uint8))
    print(len(hits), sum(hits))
"""


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_a_pass_on_a_gpu_compiles_nothing_after_it_was_compiled_in_advance(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    overrides = [*SMALL[:-1], "device=cuda"]
    num_launched, num_cached = python(script, *overrides, cache=tmp_path / "cache").splitlines()[-1].split()
    assert num_launched == num_cached and int(num_launched) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_architecture_is_needed() -> None:
    with pytest.raises(UserError, match=r"no CUDA device: pass its compute capability, such as --arch 90"):
        main(["kernels", "compile", "quickstart"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that would compile for an H200."""
    tuning = pytest.importorskip("ats_detr.kernels.gpu.tuning")
    commands: list[list[str]] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(precompile, "_run", lambda command, environment: commands.append(command) or 0)
    return commands


def compile_small(**changes: Any) -> None:
    device = torch.device(changes.pop("device", "cuda:0"))
    options: dict[str, Any] = {"num_classes": 91, **changes}
    precompile.compile_kernels(small_detector().config, device, ["compile"], **options)


def test_a_configuration_is_compiled_once(gpu: list[list[str]]) -> None:
    compile_small()
    compile_small()
    assert len(gpu) == 1
    assert gpu[0][1:5] == ["-m", "ats_detr", "kernels", "compile"]
    assert gpu[0][6:10] == ["--arch", "90", "--gpu", "NVIDIA H200"]
    compile_small(dtype=torch.bfloat16)
    compile_small(num_classes=5)
    assert len(gpu) == 3


def test_a_failure_is_one_warning_and_tried_again(
    gpu: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precompile, "_run", lambda *_: 2)
    compile_small()
    assert ["cannot" in r.message or "could not be compiled" in r.message for r in caplog.records] == [True]
    monkeypatch.setattr(precompile, "_run", lambda command, _: gpu.append(command) or 0)
    compile_small()
    assert len(gpu) == 1


def test_nothing_is_compiled_where_no_kernel_runs(
    gpu: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_small(device="cpu")
    monkeypatch.setenv("ATS_DETR_BACKEND", "reference")
    compile_small()
    assert not gpu
