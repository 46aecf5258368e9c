"""The installed package works without its checkout: the wheel has every file it needs, and its commands run."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.small_detector import SMALL

ROOT = Path(__file__).parents[1]


def run(command: list[str | Path], folder: Path, variables: dict[str, str] | None = None) -> str:
    """Run a command without access to the checkout and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **(variables or {})}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution like by `python -m build`."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("ats_detr", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hook = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run([sys.executable, "-c", hook, "build_sdist", folder], source)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    run([sys.executable, "-c", hook, "build_wheel", folder], unpacked)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_package_and_the_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "ats_detr").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    configs = {f"ats_detr/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert names == {path.relative_to(ROOT).as_posix() for path in files} | configs


def install(wheel: Path, environment: Path, *only: str) -> Path:
    """A fresh virtual environment with the wheel; returns its folder of scripts.

    A path file makes the dependencies of this environment importable there. Python does not read the path files of
    folders that are added this way, so an editable installation of the checkout is not importable. With `only`, nothing
    but these distributions and what they require is importable.
    """
    venv.create(environment)
    scripts = environment / "bin"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([scripts / "python", "-c", code], environment).strip())
    if only:
        link(set(only), packages)
    else:
        dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "dependencies.pth").write_text("\n".join(dependencies))
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], environment)
    code = "import ats_detr; print(ats_detr.__file__)"
    imported = Path(run([scripts / "python", "-c", code], environment).strip())
    assert imported == packages / "ats_detr" / "__init__.py"
    return scripts


def link(distributions: set[str], packages: Path) -> None:
    """Links the files of distributions, and of those that they require, into a folder of packages."""
    known: set[str] = set()
    while new := distributions - known:
        known |= new
        for name in new:
            distribution = importlib.metadata.distribution(name)
            for line in distribution.requires or ():
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    distributions.add(requirement.name)
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(Path(str(distribution.locate_file(top))))


def test_the_operator_needs_torch_and_triton_only(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path / "environment", "torch", "triton") / "python"
    code = """
import importlib.util
import sys
import torch
from ats_detr.kernels import adapt, install_shims, multi_scale_deformable_attention
assert "torch._dynamo" not in sys.modules  # it takes seven times as long to import as the operators
import ats_detr.kernels.gpu.attention
assert not [name for name in ("yaml", "numpy", "timm", "scipy", "PIL") if importlib.util.find_spec(name)]
value = torch.randn(1, 6, 2, 8, requires_grad=True)
locations, weights = torch.rand(1, 3, 2, 1, 4, 2), torch.rand(1, 3, 2, 1, 4)
multi_scale_deformable_attention(value, [(2, 3)], locations, weights).sum().backward()
print(tuple(value.grad.shape), install_shims()[0])
"""
    environment = {"TRITON_INTERPRET": "0"}
    assert run([python, "-c", code], tmp_path, environment) == "(1, 6, 2, 8) MultiScaleDeformableAttention\n"


def test_train_eval_and_predict_run_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    ats_detr = install(wheel, tmp_path / "environment") / "ats-detr"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    trained = run([ats_detr, "train", "--config", "quickstart", *SMALL], folder)
    assert "written to runs/quickstart" in trained
    data = [setting for setting in SMALL if setting.startswith(("data.", "num_pictures", "device"))]
    evaluated = run([ats_detr, "eval", "--checkpoint", "quickstart", *data], folder)
    assert "keep ratio" in evaluated
    (images,) = folder.glob("data/quickstart/*/val2017")
    predicted = run([ats_detr, "predict", images, "--checkpoint", "quickstart", "--device", "cpu"], folder)
    assert "6 images, 0 failed" in predicted
    assert (folder / "predictions" / "gallery.html").is_file()
