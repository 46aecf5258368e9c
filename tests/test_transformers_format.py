"""Deformable DETR of transformers: converted models give the same outputs, and nothing is guessed from names."""

from __future__ import annotations

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
from ats_detr.config import config_to_dict
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.training.setup import Stage
from ats_detr.training.trainer import train
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
    """Those of transformers."""
    model = transformers.DeformableDetrForObjectDetection.from_pretrained(folder).eval()
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
    """Tolerance 2e-5: float32 sums in another order; the memory has a standard deviation of 1."""
    batch, folder = two_pictures(), folders[kind]
    expected = outputs(folder, batch)
    model, checkpoint = load_model(folder)
    with torch.inference_mode():
        found = model(batch, supervision=False)
    valid = ~found.padding_mask_BS
    torch.testing.assert_close(found.last.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.last.boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    memory = expected.encoder_last_hidden_state[valid]
    torch.testing.assert_close(found.memory_BSC[valid], memory, atol=2e-5, rtol=0)
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
        ({"id2label": {"0": "a", "5": "b"}}, "id2label"),
        ({"d_model": "64"}, "config.json"),
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


def test_a_model_of_transformers_is_fine_tuned(folders: dict[str, Path], tmp_path: Path) -> None:
    source = load_checkpoint(folders["two_stage_timm"])
    config = small_config(
        tmp_path,
        model={**source["config"]["model"], "encoder_auxiliary": False, "selector": None},
        train={"epochs": 1},
    )
    train(Stage("small", config, tmp_path / "run", folders["two_stage_timm"]), torch.device("cpu"))
    trained = load_checkpoint(tmp_path / "run" / "final.pt")
    assert config_to_dict(config)["model"]["num_norm_groups"] == 32
    name = "encoder.layers.0.attention.value_proj.weight"
    difference = (trained["model"][name] - source["model"][name]).abs().max()
    assert 0 < difference < 0.1
