"""Builds the operator as a repository of the `kernels` library, in build/hub.

    python hub/build.py [FOLDER]

The repository holds the sources (torch-ext/) and one variant per backend (build/torch-cpu, build/torch-cuda). All of
them are the files of ats_detr/kernels that deformable attention imports, with relative imports: they can be loaded
from any folder, beside an installed ats_detr, and in several versions at once.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent
KERNELS = HUB.parent / "ats_detr" / "kernels"
NAME, VERSION, LICENSE = "deformable-attention", 1, "Apache-2.0"
"""As in build.toml."""
ROOTS = ("attention", "gpu.attention")
"""Modules of ats_detr.kernels whose imports are followed; the second is imported by name."""
INIT = '''"""Multi-scale deformable attention. The layer is in `layers`."""

from . import layers
from .attention import deformable_attention, multi_scale_deformable_attention

__all__ = ["deformable_attention", "layers", "multi_scale_deformable_attention"]
'''


def modules() -> dict[str, str]:
    """Relative path and text of every module that is needed, with relative imports."""
    found: dict[str, str] = {}
    pending = list(ROOTS)
    while pending:
        name = pending.pop()
        path = f"{name.replace('.', '/')}.py"
        if path in found or not (KERNELS / path).is_file():
            continue
        text = (KERNELS / path).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ats_detr.kernels"):
                package = node.module.removeprefix("ats_detr.kernels").lstrip(".")
                pending += [package, *(f"{package}.{alias.name}".lstrip(".") for alias in node.names)]
        dots = "." * (1 + name.count("."))
        text = re.sub(
            r"^(\s*)from ats_detr\.kernels\.?(\S*) import", rf"\1from {dots}\2 import", text, flags=re.M
        )
        absolute = re.search(r"^\s*(from|import) ats_detr.*", text, flags=re.MULTILINE)
        if absolute:
            raise ValueError(f"{path}: an import outside ats_detr.kernels: {absolute[0].strip()}")
        found[path] = text
    return found


def files() -> dict[str, str]:
    """Relative path and text of every file of the package."""
    package = {"__init__.py": INIT, "gpu/__init__.py": "", **modules()}
    package["layers.py"] = (HUB / "layers.py").read_text(encoding="utf-8")
    for table in (KERNELS / "gpu" / "winners").glob("*.json"):
        package[f"gpu/winners/{table.name}"] = table.read_text(encoding="utf-8")
    return dict(sorted(package.items()))


def write(package: dict[str, str], folder: Path) -> None:
    for name, text in package.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def build(folder: Path) -> None:
    """Writes the repository; `folder` must be new, empty, or an earlier build."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").is_file():
        raise SystemExit(f"{folder} holds other files: must be a new folder or an earlier build")
    shutil.rmtree(folder, ignore_errors=True)
    package = files()
    python_name = NAME.replace("-", "_")
    write(package, folder / "torch-ext" / python_name)
    # Also the name under which the variant is imported, and so the namespace of its operators.
    digest = hashlib.sha256(json.dumps(package).encode()).hexdigest()[:7]
    for backend in ("cpu", "cuda"):
        metadata = {
            "name": NAME,
            "id": f"_{python_name}_{backend}_{digest}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        variant = {**package, "metadata.json": json.dumps(metadata, indent=2) + "\n"}
        write(variant, folder / "build" / f"torch-{backend}")
    for name in ("build.toml", "README.md"):
        shutil.copy(HUB / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HUB.parent / "build" / "hub")
    folder = parser.parse_args().folder
    build(folder)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
