"""Imports point down, without cycles: the layers of docs/architecture.md, lowest first."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("text", "errors", "boxes", "batch", "console", "files", "fonts", "config", "distributed"),
    ("kernels",),
    ("data", "model"),
    (
        "budgets",
        "convert",
        "transformers_format",
        "remote",
        "checkpoint",
        "evaluation",
        "visualize",
        "flops",
        "charts",
        "curve",
        "model_card",
        "precompile",
    ),
    ("detector", "export"),
    ("training",),
    ("cli", "__main__"),
)
"""Files and packages of ats_detr. Each imports from lower layers, and within a layer from those before it."""


def imports() -> dict[str, set[str]]:
    """Modules of ats_detr -> the modules of ats_detr that they import, also inside functions."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "ats_detr").rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {part if part in files else str(node.module) for part in names}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
    return {
        name: {other for other in others if other in files} - {"ats_detr"} for name, others in found.items()
    }


def unit(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_down() -> None:
    order = [name for layer in LAYERS for name in layer]
    modules = {module: others for module, others in imports().items() if module != "ats_detr"}
    assert {unit(module) for module in modules} == set(order)
    upward = [
        f"{module} imports {other}"
        for module, others in modules.items()
        for other in others
        if order.index(unit(other)) > order.index(unit(module))
    ]
    assert not upward


def test_imports_have_no_cycles() -> None:
    modules = imports()
    modules["ats_detr"] = set()  # it imports the detector lazily
    TopologicalSorter(modules).prepare()  # raises CycleError


def test_inference_does_not_import_training() -> None:
    code = (
        "import sys, ats_detr.detector, ats_detr.export, ats_detr.evaluation; "
        "sys.exit(any(name.startswith('ats_detr.training') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
