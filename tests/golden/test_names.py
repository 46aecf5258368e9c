"""Published names and names of this package correspond one to one, for every manifest."""

from __future__ import annotations

import json

import pytest
import torch

from ats_detr.convert import official_names
from ats_detr.model import build_model

from .cases import model_config
from .conftest import golden_folder


def pytest_generate_tests(metafunc):
    folder = golden_folder(metafunc.config)
    paths = sorted(folder.glob("manifest_*.json")) if folder else []
    if not paths:
        paths = [
            pytest.param(
                None, marks=pytest.mark.skip(reason="no golden cases: give their folder with --golden")
            )
        ]
    metafunc.parametrize("manifest_path", paths, ids=lambda path: path.stem if path else "none")


def test_published_and_own_names_correspond(manifest_path):
    manifest = json.loads(manifest_path.read_text())
    with torch.device("meta"):
        model = build_model(model_config(manifest["argv"], manifest["repo"]), num_classes=91)
    ours = official_names(model)
    own = model.state_dict()
    # Swin stores an index that depends on the window size only; timm computes it.
    entries = [e for e in manifest["entries"] if not e["name"].endswith("relative_position_index")]
    published = {e["name"]: e for e in entries}
    assert set(published) == set(ours)
    assert set(ours.values()) == set(own)
    for name, entry in published.items():
        assert list(own[ours[name]].shape) == entry["shape"], name
        assert ours[entry["alias_of"] or name] == ours[name], f"{name} and its alias differ"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {ours[name] for name, entry in published.items() if entry["requires_grad"]} == trainable
