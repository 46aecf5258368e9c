"""Published checkpoints convert to this package and back without loss, and give the published outputs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ats_detr.checkpoint import load_model
from ats_detr.cli import main
from ats_detr.config import config_from_dict
from ats_detr.convert import detect_model, to_official

from .cases import Case, model_config
from .conftest import golden_folder
from .test_model import compare

FAMILIES = (
    "manifest_ats_adaptive_0.1_0.2",
    "manifest_deform_plain",
    "manifest_sparse_rho0.1",
    "manifest_sparse_swint_rho0.1",
)
"""One manifest of each family and backbone is converted. The others are slow: of all manifests the architecture is
detected below, test_names.py compares the names, and test_model.py the outputs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"manifest_path", "every_manifest"} & set(metafunc.fixturenames):
        return
    folder = golden_folder(metafunc.config)
    files = sorted(folder.glob("manifest_*.json")) if folder else []
    fixture = "manifest_path" if "manifest_path" in metafunc.fixturenames else "every_manifest"
    paths = [
        path
        if path.stem in FAMILIES or fixture == "every_manifest"
        else pytest.param(path, marks=pytest.mark.slow)
        for path in files
    ]
    if not paths:
        skip = pytest.mark.skip(reason="no golden cases: give their folder with --golden")
        paths = [pytest.param(None, marks=skip)]
    metafunc.parametrize(fixture, paths, ids=lambda path: path.stem if path else "none")


def official_file(case: Case, manifest: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """The content of a checkpoint of the published code, including its command line."""
    weights = case.recipe.fill(
        manifest, case.info.get("weight_seed", 7), overrides=case.info.get("overrides")
    )
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    for entry in manifest["entries"]:  # Swin's index buffers are recomputed, so their content is arbitrary
        if "int" in entry["dtype"]:
            state[entry["name"]] = torch.zeros(entry["shape"], dtype=torch.int64)
    known = stored_arguments(argv)
    return {"model": state, "epoch": 49, "optimizer": {}, "args": argparse.Namespace(**known)}


def stored_arguments(argv: list[str]) -> dict[str, Any]:
    """The parsed command line in such a checkpoint, as far as it is read."""
    flags = {
        key.lstrip("-"): value
        for key, value in zip(argv, [*argv[1:], ""], strict=False)
        if key.startswith("--")
    }
    known: dict[str, Any] = {
        "nheads": 8,
        "num_queries": 300,
        "eff_specific_head": "eff_specific_head" in flags,
    }
    known |= {key: float(flags[key]) for key in ("min_ratio", "max_ratio") if key in flags}
    if "rho" in flags:
        known["rho"] = [float(flags["rho"])]
    return known


def test_the_architecture_of_every_manifest_is_detected(every_manifest: Path) -> None:
    manifest = json.loads(every_manifest.read_text())
    argv = first_model_case(every_manifest).info.get("argv", manifest["argv"])
    floats = [entry for entry in manifest["entries"] if "int" not in entry["dtype"]]
    state = {entry["name"]: torch.empty(entry["shape"], device="meta") for entry in floats}
    assert detect_model(state, stored_arguments(argv)) == model_config(argv, manifest["repo"])


@torch.no_grad()
def test_a_published_file_converts_both_ways_and_gives_the_golden_outputs(
    manifest_path: Path, tmp_path: Path
) -> None:
    manifest = json.loads(manifest_path.read_text())
    case = first_model_case(manifest_path)
    argv = case.info.get("argv", manifest["argv"])
    content = official_file(case, manifest, argv)
    source, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    torch.save(content, source)
    main(["convert", str(source), str(ours), "--keep-adaption"])
    source.unlink()
    model, checkpoint = load_model(ours)  # strict
    assert config_from_dict(checkpoint["config"]).model == model_config(argv, manifest["repo"])
    if case.info:  # some manifests have no golden outputs
        compare(case, model)

    ours.unlink()
    returned = to_official(checkpoint)["model"]
    assert set(returned) == set(content["model"])
    for name, tensor in content["model"].items():
        if name.endswith("relative_position_index"):
            assert returned[name].shape == tensor.shape
            assert returned[name].unique().numel() == (2 * 7 - 1) ** 2
        else:
            assert torch.equal(returned[name], tensor), name


def first_model_case(manifest_path: Path) -> Case:
    """The first case of a complete model with these names, or a case with the manifest only."""
    for path in sorted(manifest_path.parent.glob("model_*.json")):
        info = json.loads(path.read_text())
        if info.get("state_dict_manifest") == manifest_path.name:
            return Case(path, info)
    return Case(manifest_path, {})
