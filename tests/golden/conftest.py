"""Parity with the published implementation. Cases are selected by the `kind` in their JSON files.

`--golden` sets the folder of the cases; the default is $ATS_DETR_GOLDEN, then ../shared/golden beside the checkout. If
there is no folder, the tests are skipped. `--backend triton` runs the operators with the Triton kernels, in Triton's
interpreter if there is no GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_BESIDE_CHECKOUT = Path(__file__).parents[3] / "shared" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", help="folder of golden cases of the published implementation")
    parser.addoption(
        "--backend", choices=["reference", "triton"], default="reference", help="operator backend"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(*kinds): runs once per golden case of these kinds")
    if config.getoption("--backend", "reference") == "triton":
        os.environ["ATS_DETR_BACKEND"] = "triton"
        import torch

        if not torch.cuda.is_available():  # Triton reads it when the kernels are imported by a test module
            os.environ["TRITON_INTERPRET"] = "1"


def golden_folder(config: pytest.Config) -> Path | None:
    """The folder of the cases, or None."""
    named = config.getoption("--golden", None) or os.environ.get("ATS_DETR_GOLDEN")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden {named}: no such folder")
        return folder
    return _BESIDE_CHECKOUT if _BESIDE_CHECKOUT.is_dir() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests with the marker `golden(kind, ...)` by the case files of these kinds."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    folder = golden_folder(metafunc.config)
    if folder is None:
        skip = pytest.mark.skip(reason="no golden cases: give their folder with --golden")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="none")])
        return
    from .cases import Case

    cases = [Case(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    cases = [case for case in cases if isinstance(case.info, dict) and case.info.get("kind") in marker.args]
    metafunc.parametrize("case", cases, ids=[case.path.stem for case in cases])
