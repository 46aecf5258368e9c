"""Golden cases: their files, inputs and models."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.config import BackboneConfig, ModelConfig, SelectorConfig
from ats_detr.convert import official_names
from ats_detr.model import Detr, build_model


@dataclass(frozen=True)
class Case:
    """One golden case: its JSON beside an .npz of arrays."""

    path: Path
    info: dict[str, Any]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz")) as file:
            return dict(file)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.arrays[name]))

    @cached_property
    def recipe(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("golden_recipe", self.path.parent / "recipe.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def manifest(self, key: str = "state_dict_manifest") -> dict[str, Any]:
        return json.loads((self.path.parent / self.info[key]).read_text())

    def model(self) -> Detr:
        """The model of the case with its deterministic weights, in evaluation mode."""
        info, manifest = self.info, self.manifest()
        model = build_model(model_config(info["argv"], info["repo"]), num_classes=91)
        weights = self.recipe.fill(manifest, info["weight_seed"], overrides=info.get("overrides"))
        canonical = [
            e["name"] for e in manifest["entries"] if not e.get("alias_of") and "int" not in e["dtype"]
        ]
        assert self.recipe.fingerprint(weights, canonical) == info["weights_fingerprint"]
        load_official(model, weights)
        return model.eval()

    def batch(self) -> ImageBatch:
        sizes = self.info.get("sizes_hw") or self.info["sizes"]
        images = self.recipe.images(self.info["image_seed"], [tuple(size) for size in sizes])
        return ImageBatch.collate([torch.from_numpy(image) for image in images])


def load_official(model: Detr, weights: dict[str, np.ndarray]) -> None:
    """Load weights with published names, which must include every tensor of the model."""
    ours = official_names(model)
    state = {ours[name]: torch.from_numpy(array) for name, array in weights.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("relative_position_index")], missing


def model_config(argv: list[str], repo: str) -> ModelConfig:
    """The configuration of this package for a published command line."""
    flags = {key.lstrip("-"): value for key, value in zip(argv, [*argv[1:], ""], strict=False)}
    selector = None
    scores = "proposals" if repo == "sparse" else "features"
    if "adaptive" in flags:
        selector = SelectorConfig(
            min_ratio=float(flags["min_ratio"]), max_ratio=float(flags["max_ratio"]), masked_mean=False
        )
    elif "rho" in flags:
        selector = SelectorConfig(scores=scores, keep_ratio=float(flags["rho"]), masked_mean=False)
    name = {"swin-t": "swin_tiny_patch4_window7_224.ms_in1k"}.get(flags.get("backbone"), "resnet50.tv_in1k")
    return ModelConfig(
        backbone=BackboneConfig(name=name, pretrained=False),
        selector=selector,
        two_stage="two_stage" in flags,
        box_refine="with_box_refine" in flags,
        queries_from_memory="eff_query_init" in flags,
        class_specific_proposals="eff_specific_head" in flags,
        encoder_auxiliary="use_enc_aux_loss" in flags,
        adaption="global_distill" in flags,
        dropout=float(flags.get("dropout", 0.1)),
    )
