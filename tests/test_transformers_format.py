"""Deformable DETR of transformers: converted models give the same outputs, and nothing is guessed from names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ats_detr.batch import ImageBatch
from ats_detr.checkpoint import load_checkpoint, load_model
from ats_detr.cli import main
from ats_detr.config import BackboneConfig, Config, ModelConfig, config_from_dict, config_to_dict
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.training.stages import plan_stages
from ats_detr.training.trainer import train
from ats_detr.transformers_format import _DEFAULTS, to_transformers
from tests.training.small import small_config

transformers = pytest.importorskip("transformers", reason="writes the models to convert")

KINDS = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
ALL = [f"{kind}_{backbone}" for kind in KINDS for backbone in ("timm", "resnet")]


def write(kind: str, folder: Path) -> Path:
    """A random small model, saved by transformers."""
    backbones: dict[str, dict[str, Any]] = {
        "timm": {"use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False},
        "resnet": {
            "use_timm_backbone": False,
            "backbone_config": transformers.ResNetConfig(
                layer_type="basic", depths=[1, 2, 1, 1], hidden_sizes=[64, 64, 96, 128],
                out_features=["stage2", "stage3", "stage4"],
            ),
        },
    }  # fmt: skip
    name, backbone = kind.rsplit("_", 1)
    config = transformers.DeformableDetrConfig(
        encoder_layers=1, decoder_layers=2, d_model=64, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=9, two_stage_num_proposals=9, decoder_n_points=2,
        id2label={0: "cat", 1: "N/A", 2: "bird"}, disable_custom_kernels=True, **KINDS[name], **backbones[backbone],
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("_embed", "reference", "norm", "bn")):
                parameter.add_(0.05 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transformers")
    return {kind: write(kind, root / kind) for kind in ALL}


def outputs(folder: Path, batch: ImageBatch) -> Any:
    """Those of transformers, in the dtype of the batch."""
    model = transformers.DeformableDetrForObjectDetection.from_pretrained(folder).eval()
    model.to(batch.images_B3HW.dtype)
    mask = torch.zeros(len(batch), *batch.images_B3HW.shape[-2:], dtype=torch.long)
    for i, (height, width) in enumerate(batch.sizes):
        mask[i, :height, :width] = 1
    with torch.no_grad():
        return model(pixel_values=batch.images_B3HW, pixel_mask=mask)


def two_pictures() -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    return ImageBatch.collate(
        [torch.randn(3, *size, generator=generator) for size in ((96, 128), (128, 64))], 32
    )


QUICK = ("plain_timm", "refine_resnet", "two_stage_timm")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in ALL]
)
def test_outputs_equal_those_of_transformers_in_both_directions(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In float64 the memory differs by 1e-8 (both compute positions in float32); in float32 by rounding, mostly of the
    backbone, whose convolutions and norms are fused here: up to 9e-6 of a standard deviation of 1."""
    batch, folder = two_pictures(), folders[kind]
    expected = outputs(folder, batch)
    model, checkpoint = load_model(folder)
    precise = ImageBatch(batch.images_B3HW.double(), batch.sizes)
    for images, theirs, tolerances in (
        (batch, expected, (1e-5, 1e-5, 2e-5)),
        (precise, outputs(folder, precise), (1e-6, 1e-6, 1e-7)),
    ):
        with torch.inference_mode():
            ours = model.to(images.images_B3HW.dtype)(images, supervision=False)
        valid = ~ours.padding_mask_BS
        pairs = (
            (ours.last.logits, theirs.logits),
            (ours.last.boxes, theirs.pred_boxes),
            (ours.memory_BSC[valid], theirs.encoder_last_hidden_state[valid]),
        )
        for (found, wanted), tolerance in zip(pairs, tolerances, strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance, rtol=0)
    assert [c["name"] for c in checkpoint["classes"]["categories"]] == ["cat", "bird"]
    if kind.endswith("timm"):
        main(["convert", str(folder), str(tmp_path / "back"), "--transformers"])
        again = outputs(tmp_path / "back", batch)
        assert torch.equal(again.logits, expected.logits) and torch.equal(
            again.pred_boxes, expected.pred_boxes
        )
    else:
        with pytest.raises(UserError, match=r"no counterpart of model\.backbone\.options"):
            main(["convert", str(folder), str(tmp_path / "back"), "--transformers"])


def test_convert_info_and_detector_read_a_folder_and_a_file(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders["refine_timm"]
    main(["info", str(folder)])
    assert "converted from transformers (deformable_detr)" in capsys.readouterr().out
    main(["convert", str(folder), str(tmp_path / "own.safetensors")])
    states = [
        load_checkpoint(path)["model"]
        for path in (folder / "model.safetensors", tmp_path / "own.safetensors")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"settings are in config\.json; put that file beside it"):
        load_checkpoint(tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert Detector.from_checkpoint(source, device="cpu").classes.names == ("cat", "bird")


def test_names_of_the_modules_of_version_5_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("two_stage_resnet", "plain_timm"):
        model = transformers.DeformableDetrForObjectDetection.from_pretrained(folders[kind])
        shutil.copy(folders[kind] / "config.json", tmp_path / "config.json")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        found, expected = load_checkpoint(tmp_path / "state.pt"), load_checkpoint(folders[kind])
        assert all(torch.equal(tensor, found["model"][name]) for name, tensor in expected["model"].items())


def changed(folder: Path, target: Path, state: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A copy with other settings or tensors; None removes one."""
    shutil.copytree(folder, target)
    config = {**json.loads((folder / "config.json").read_text()), **settings}
    (target / "config.json").write_text(json.dumps(config))
    tensors = {**load_file(folder / "model.safetensors"), **(state or {})}
    save_file({k: v.clone() for k, v in tensors.items() if v is not None}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "detr"}, "model_type = 'detr' in config.json"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type = 'learned'"),
        ({"decoder_ffn_dim": 96}, "encoder_ffn_dim = 48: must be 96"),
        ({"num_feature_levels": 1}, "num_levels = 1"),
        ({"with_box_refine": 1}, "with_box_refine = 1: must be true or false"),
        ({"two_stage": True, "with_box_refine": True}, "tensors and config.json disagree"),
        ({"encoder_layers": 2}, "tensors and config.json disagree"),
        ({"id2label": {"0": "a", "5": "b"}}, r"id2label = \[0, 5\]: must be an object with the keys 0, 1, 2"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "id2label"),
        ({"id2label": {"cat": 0}}, "id2label"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": {"0": "a", "1": ["b"], "2": "c"}}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b"}}, "tensors and config.json disagree"),
        ({"dilation": True}, "dilation = True"),
        ({"backbone_kwargs": {"out_indices": [1, 2, 3]}}, r"backbone_kwargs.out_indices = \[1, 2, 3\]"),
        ({"backbone_kwargs": {"act_layer": "silu"}}, "backbone_kwargs.act_layer"),
        ({"d_model": "64"}, "config.json: model.width = '64': must be an integer"),
        (
            {"num_labels": 10**12, "id2label": None},
            "num_labels = 1000000000000: must be an integer in 1..100000",
        ),
        ({"backbone": "nonsense", "backbone_config": None}, "config.json: model.backbone.name = 'nonsense'"),
        ({"backbone_config": {"model_type": "resnet", "depths": 3}}, "backbone_config.depths = 3"),
        ({"backbone_config": [1]}, r"backbone_config = \[1\]: must be an object"),
        ({"backbone_config": {"model_type": "swin"}}, "must be a model of timm or a ResNet"),
    ],
)
def test_other_settings_are_refused_in_one_line(
    settings: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(changed(folders["plain_timm"], tmp_path / "m", **settings))
    assert "\n" not in str(raised.value) and "one of ours" not in str(raised.value)


def test_heads_are_read_as_config_says(folders: dict[str, Path], tmp_path: Path) -> None:
    """Copies of a shared head, and different heads in a model without refinement."""
    folder = folders["plain_timm"]
    first = load_file(folder / "model.safetensors")
    copies = {n.replace("embed.0.", "embed.1."): t for n, t in first.items() if "_embed.0." in n}
    same = load_checkpoint(changed(folder, tmp_path / "same", copies))
    assert all(torch.equal(t, same["model"][n]) for n, t in load_checkpoint(folder)["model"].items())
    other = {n: t + 1 for n, t in copies.items() if n == "class_embed.1.weight"}
    with pytest.raises(
        UserError, match=r"class_embed\.1\.weight differs from that of layer 0, but with_box_refine"
    ):
        load_checkpoint(changed(folder, tmp_path / "other", copies | other))
    bare = {n: None for n in first if "_embed.0." in n}
    with pytest.raises(UserError, match="without heads"):
        load_checkpoint(changed(folder, tmp_path / "bare", bare))


@pytest.mark.parametrize("kind", ALL)
def test_a_model_of_transformers_is_fine_tuned(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights but those of other classes are taken over, and four optimiser steps change all that are trained."""
    source = load_checkpoint(folders[kind])
    config = dataclasses.replace(
        small_config(tmp_path, train={"epochs": 1, "init_from": str(folders[kind]), "clip_norm": 10.0}),
        model=config_from_dict(source["config"]).model,
    )
    (stage,) = plan_stages(config).values()
    train(stage, torch.device("cpu"))
    trained = load_checkpoint(tmp_path / "run" / "final.pt")["model"]
    heads = {name for name in trained if ".classify." in name}
    size = sum(tensor.numel() for tensor in trained.values())
    share = 1 - sum(trained[name].numel() for name in heads) / size
    assert 0.99 < share < 1 and f"{share:.1%}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 4 and not any(line["kind"] == "skipped" for line in lines)
    model, _ = load_model(tmp_path / "run" / "final.pt")
    for name, parameter in model.named_parameters():
        if name in heads:
            continue
        difference = (trained[name] - source["model"][name]).abs().max()
        assert (0 < difference < 0.1) if parameter.requires_grad else (difference == 0), name


def changed_preprocessor(folder: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(folder, target)
    transformers.DeformableDetrImageProcessor().save_pretrained(target)
    path = target / "preprocessor_config.json"
    about = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps(about))
    return target


@pytest.mark.parametrize(
    ("settings", "sides"),
    [
        ({}, (800, 1333)),
        ({"size": {"shortest_edge": 480, "longest_edge": 640}}, (480, 640)),
        ({"size": 600, "max_size": 1000, "image_processor_type": None}, (600, 1000)),
        ({"size": 600}, (600, 1333)),
        (
            {"size": None, "do_pad": False, "rescale_factor": 0.00392157, "format": "coco_detection"},
            (800, 1333),
        ),
        ({"image_std": [0.22900000214576721, 0.2240000069141388, 0.22499999403953552]}, (800, 1333)),
    ],
)
def test_the_preprocessing_of_transformers_is_kept(
    settings: dict[str, Any], sides: tuple[int, int], folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(changed_preprocessor(folders["plain_timm"], tmp_path / "m", **settings))
    data = checkpoint["config"]["data"]
    assert (data["short_side"], data["long_side"]) == sides


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": False}, "do_normalize = False: must be True"),
        ({"do_rescale": False}, "do_rescale = False: must be True"),
        ({"do_resize": False}, "do_resize = False: must be True"),
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean = \[0.5, 0.5, 0.5\]: must be \[0.485"),
        ({"image_std": [1, 1]}, r"image_std = \[1, 1\]"),
        ({"image_std": 1.0}, r"image_std = 1\.0"),
        ({"rescale_factor": 1.0}, r"rescale_factor = 1\.0"),
        ({"resample": 3}, "resample = 3: must be 2"),
        ({"size": {"height": 640, "width": 640}}, "size = .*must have shortest_edge and longest_edge"),
        ({"size": {"max_height": 800, "max_width": 1333}}, "size = .*images keep their aspect ratio"),
        ({"size": {"shortest_edge": 800}}, "size = .*must have shortest_edge and longest_edge"),
        ({"size": "800"}, "size = "),
        (
            {"size": {"shortest_edge": 0, "longest_edge": 0}},
            "must have shortest_edge and longest_edge, integers > 0",
        ),
        ({"do_center_crop": True, "crop_size": 224}, "do_center_crop = True: must be omitted"),
        ({"pad_size": {"height": 800, "width": 800}}, "pad_size = "),
        ({"image_processor_type": "RTDetrImageProcessor"}, "image_processor_type = 'RTDetrImageProcessor'"),
    ],
)
def test_another_preprocessing_is_refused_in_one_line(
    settings: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed_preprocessor(folders["plain_timm"], tmp_path / "m", **settings)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=message) as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)


def test_settings_that_config_json_omits_are_the_defaults_of_transformers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["plain_timm"], tmp_path / "m")
    about = json.loads((folder / "config.json").read_text())
    defaults = transformers.DeformableDetrConfig().to_dict()
    names = (
        "d_model",
        "encoder_layers",
        "decoder_n_points",
        "two_stage_num_proposals",
        "dropout",
        "two_stage",
    )
    (folder / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k not in names}))
    with pytest.raises(
        UserError, match=r"tensors and config\.json disagree"
    ):  # the tensors are those of 64 channels
        load_checkpoint(folder)
    omitted = {name: value for name, value in _DEFAULTS.items() if name not in ("num_labels", "backbone")}
    assert all(value == defaults[name] for name, value in omitted.items())
    assert len(defaults["id2label"]) == _DEFAULTS["num_labels"]
    assert defaults["backbone_config"]["backbone"] == _DEFAULTS["backbone"]


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_backbone_that_transformers_computes_otherwise_is_refused(direction: str, tmp_path: Path) -> None:
    """Its norms lose their activations there: the outputs of the same weights differ by a standard deviation."""
    config = transformers.DeformableDetrConfig(
        encoder_layers=1, decoder_layers=2, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, backbone="mobilenetv3_small_050", use_pretrained_backbone=False,
    )  # fmt: skip
    if direction == "read":
        transformers.DeformableDetrForObjectDetection(config).save_pretrained(tmp_path / "m")
        with pytest.raises(UserError, match="transformers omits the activations"):
            load_checkpoint(tmp_path / "m")
        return
    backbone = BackboneConfig(name="mobilenetv3_small_050", pretrained=False)
    for frozen_norm in (True, False):
        model = ModelConfig(
            backbone=dataclasses.replace(backbone, frozen_norm=frozen_norm), width=32, num_norm_groups=32
        )
        with pytest.raises(UserError, match="transformers omits the activations"):
            to_transformers({"config": config_to_dict(Config(model=model)), "model": {}})
