"""Checkpoints of the published code: safe loading, detection of the architecture, and direct use."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.checkpoint import (
    config_of,
    load_checkpoint,
    load_detector,
    load_model,
    read_file,
    save_checkpoint,
)
from ats_detr.cli import main
from ats_detr.config import (
    BackboneConfig,
    Config,
    ModelConfig,
    SelectorConfig,
    config_from_dict,
    config_to_dict,
)
from ats_detr.convert import COCO_CLASSES, from_official, is_official, official_names, to_official
from ats_detr.data.classes import COCO_2017_IDS, ClassMap
from ats_detr.errors import UserError
from ats_detr.model import build_model

ADAPTIVE = SelectorConfig(min_ratio=0.1, max_ratio=0.2, masked_mean=False)


def small_config(**changes: Any) -> ModelConfig:
    """A small model whose settings follow from names and shapes. Its backbone must be a published one."""
    base: dict[str, Any] = {
        "backbone": BackboneConfig(name="resnet18.tv_in1k", pretrained=False),
        "selector": SelectorConfig(keep_ratio=0.1, masked_mean=False),
        "width": 64,
        "num_norm_groups": 32,
        "num_levels": 4,
        "num_points": 2,
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "feedforward_width": 48,
        "two_stage": True,
        "box_refine": True,
        "queries_from_memory": True,
        "class_specific_proposals": True,
        "encoder_auxiliary": True,
    }
    return ModelConfig(**{**base, **changes})


def official_state(config: ModelConfig, num_classes: int = 7) -> dict[str, Tensor]:
    """The tensors of a model under their published names."""
    torch.manual_seed(0)
    model = build_model(config, num_classes)
    state = model.state_dict()
    return {name: state[own] for name, own in official_names(model).items()}


# ------------------------------------------------------------------------------------------------------- architecture
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selector": SelectorConfig(scores="proposals", keep_ratio=0.1, masked_mean=False)},
        {"selector": ADAPTIVE},
        {"selector": None, "encoder_auxiliary": False},
        {
            "selector": None,
            "encoder_auxiliary": False,
            "queries_from_memory": False,
            "class_specific_proposals": False,
        },
        {
            "selector": None,
            "encoder_auxiliary": False,
            "queries_from_memory": False,
            "class_specific_proposals": False,
            "two_stage": False,
            "num_queries": 12,
        },
        {
            "selector": None,
            "encoder_auxiliary": False,
            "queries_from_memory": False,
            "class_specific_proposals": False,
            "two_stage": False,
            "box_refine": False,
            "num_decoder_points": 3,
        },
    ],
    ids=["teacher", "sparse", "adaptive", "efficient", "two-stage", "one-stage refined", "plain"],
)
def test_the_architecture_is_inferred_from_names_and_shapes(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    state = official_state(config)
    checkpoint = from_official(state)
    assert config_from_dict(checkpoint["config"]).model == config
    assert checkpoint["num_classes"] == 7
    back = to_official(checkpoint)["model"]
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_other_settings_come_from_the_stored_command_line() -> None:
    arguments = argparse.Namespace(nheads=4, num_queries=25, rho=[0.3], eff_specific_head=False, dropout=0.0)
    content = {
        "model": official_state(small_config(num_heads=4, num_points=4)),
        "args": arguments,
        "epoch": 49,
    }
    checkpoint = from_official(content)
    model = config_from_dict(checkpoint["config"]).model
    assert (model.num_heads, model.num_points, model.num_queries, model.dropout) == (4, 4, 25, 0.0)
    assert model.selector.keep_ratio == 0.3
    assert not model.class_specific_proposals
    assert checkpoint["epoch"] == 50
    assert checkpoint["notes"] == []


def test_assumed_settings_and_omitted_content_are_noted() -> None:
    state = official_state(small_config(selector=ADAPTIVE, adaption=True))
    checkpoint = from_official({"model": state, "optimizer": {}})
    assert not config_from_dict(checkpoint["config"]).model.adaption
    assert "adaption.weight" not in checkpoint["model"]
    notes = "\n".join(checkpoint["notes"])
    assert "omitted: the adaption layer" in notes
    assert "omitted: the state of optimizer" in notes
    assert "does not contain its budgets; 0.1 and 0.2 are assumed" in notes
    assert "does not contain --nheads; 8 is assumed (model.num_heads overrides it)" in notes
    assert "does not contain --num_queries; 300 is assumed" in notes
    kept = from_official({"model": state}, keep_adaption=True)
    assert torch.equal(kept["model"]["adaption.weight"], state["adaption_layer.weight"])


@pytest.mark.parametrize(("key", "value"), [("dilation", True), ("position_embedding", "learned")])
def test_architectures_of_other_options_are_errors(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"file.pth: trained with {key} = {value}"):
        from_official({"model": official_state(small_config()), "args": {key: value}}, source="file.pth")


def test_the_91_rows_of_a_published_head_are_the_coco_categories() -> None:
    assert frozenset(COCO_CLASSES) == COCO_2017_IDS
    checkpoint = from_official(official_state(small_config(), num_classes=91))
    classes = ClassMap.from_dict(checkpoint["classes"])
    assert classes.name_of_row(18) == "dog"
    assert classes.num_rows == 91


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: s.pop("transformer.decoder.layers.1.norm3.bias"),
            "1 missing, such as transformer.decoder.layers.1",
        ),
        (lambda s: s.update(surprise=torch.zeros(1)), "1 unknown, such as surprise"),
        (
            lambda s: s.update({"class_embed.1.bias": torch.zeros(3)}),
            "1 of another shape, such as class_embed.1.bias",
        ),
        (lambda s: s.pop("transformer.level_embed"), "no tensor 'transformer.level_embed'"),
        (lambda s: s.pop("backbone.0.body.layer4.1.conv1.weight"), "1 missing"),
        (
            lambda s: s.update({"class_embed.0.bias": torch.ones(7)}),
            "differs from its copy under another name",
        ),
    ],
)
def test_a_file_that_does_not_match_a_model_exactly_is_rejected(damage: Any, message: str) -> None:
    state = official_state(small_config())
    damage(state)
    with pytest.raises(UserError, match=message):
        from_official(state, source="x.pth")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"num_norm_groups": None}, r"model\.num_norm_groups = 8"),
        ({"num_norm_groups": 16}, r"model\.num_norm_groups = 16"),
        ({"selector": dataclasses.replace(ADAPTIVE, num_budgets=3)}, r"rate\.2\.weight"),
        ({"selector": dataclasses.replace(ADAPTIVE, min_tokens=100)}, "'min_tokens': 100"),
        (
            {"backbone": BackboneConfig(name="resnet18", options={"act_layer": "silu"})},
            r"model\.backbone = \('resnet18', \{'act_layer': 'silu'\}\)",
        ),
        (
            {"backbone": BackboneConfig(name="resnet18d")},
            "in the published format: not a model of this family",
        ),
        ({"backbone": BackboneConfig(name="resnet26")}, "in the published format: .*backbone"),
    ],
)
def test_a_model_that_the_published_code_lacks_is_not_written_in_its_format(
    changes: dict[str, Any], lost: str
) -> None:
    config = small_config(**changes)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, pretrained=False))
    checkpoint = {"model": build_model(config, 7).state_dict(), "num_classes": 7}
    with pytest.raises(UserError, match=lost):
        to_official({**checkpoint, "config": config_to_dict(Config(model=config))})


def test_settings_that_tensors_do_not_determine_survive_both_directions() -> None:
    """Heads, queries, budgets and the kind of head were those of the defaults before."""
    for changes in (
        {"num_heads": 4, "num_points": 4, "num_queries": 25, "dropout": 0.0},
        {"selector": SelectorConfig(keep_ratio=0.35, masked_mean=False), "class_specific_proposals": False},
        {"selector": SelectorConfig(min_ratio=0.3, max_ratio=0.6, masked_mean=False)},
    ):
        config = small_config(**changes)
        checkpoint = {"model": build_model(config, 7).state_dict(), "num_classes": 7}
        back = from_official(to_official({**checkpoint, "config": config_to_dict(Config(model=config))}))
        assert config_from_dict(back["config"]).model == config and back["notes"] == []


# -------------------------------------------------------------------------------------------------------- safe loading
class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def hostile_file(place: str, marker: Path, path: Path) -> None:
    """A file that creates the folder `marker` when it is unpickled without restrictions."""
    content: dict[str, Any] = {"model": official_state(small_config())}
    if place == "model":
        torch.save({**content, "extra": Hostile(marker)}, path)
    elif place == "arguments":
        torch.save({**content, "args": argparse.Namespace(rho=[0.1], innocent=Hostile(marker))}, path)
    elif place == "old format":
        torch.save({**content, "extra": Hostile(marker)}, path, _use_new_zipfile_serialization=False)
    elif place == "bare pickle":
        path.write_bytes(pickle.dumps({"model": Hostile(marker)}, protocol=2))
    else:  # eval, in a hand-written pickle behind a header of torch.save
        header = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        command = f"__import__('os').mkdir({str(marker)!r})"
        payload = b"cbuiltins\neval\n(V" + command.encode() + b"\ntR."
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in header) + payload)


@pytest.mark.parametrize("place", ["model", "arguments", "old format", "bare pickle", "eval"])
def test_a_hostile_file_is_rejected_without_executing_it(place: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "was-here", tmp_path / "hostile.pth"
    hostile_file(place, marker, path)
    message = "not a checkpoint" if place == "bare pickle" else r"rejected .*nothing was executed"
    for read in (read_file, load_checkpoint, lambda p: main(["convert", str(p), str(tmp_path / "out.pt")])):
        with pytest.raises(UserError, match=rf"hostile\.pth: {message}"):
            read(path)
    assert not marker.exists()
    assert not (tmp_path / "out.pt").exists()
    if place == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        with contextlib.suppress(EOFError):  # the hand-written file ends after its command
            torch.load(path, weights_only=False)
    assert marker.exists(), "the file is not hostile"


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped", "missing"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_reported_in_one_line(damage: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    save_checkpoint(from_official(official_state(small_config())), path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(content[:30] + bytes(byte ^ 0xFF for byte in content[30:3000]) + content[3000:])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"damaged\{suffix}: (not a checkpoint|cannot read)") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------- use
def test_converted_files_give_equal_predictions(tmp_path: Path) -> None:
    source = tmp_path / "official.pth"
    torch.save({"model": official_state(small_config(selector=ADAPTIVE, adaption=True))}, source)
    for name in ("ours.safetensors", "ours.pt"):
        main(["convert", str(source), str(tmp_path / name), "model.selector.max_ratio=0.5"])
    batch = ImageBatch.collate([torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(0))])
    with torch.no_grad():
        results = [load_model(tmp_path / name)[0](batch) for name in ("ours.safetensors", "ours.pt")]
        checkpoint = load_checkpoint(source)  # without converting it first
        config = config_from_dict(checkpoint["config"])
        direct = load_detector(config, checkpoint, source)(batch)
    assert config.model.selector.max_ratio == 0.2
    assert torch.equal(results[0].last.logits, results[1].last.logits)
    assert direct.last.logits.shape == results[0].last.logits.shape
    main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth")])
    back, state = read_file(tmp_path / "back.pth")["model"], read_file(source)["model"]
    assert set(state) - set(back) == {"adaption_layer.weight", "adaption_layer.bias"}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_published_weights_average_over_padding_regardless_of_the_config() -> None:
    checkpoint = from_official(official_state(small_config()))
    config = config_from_dict(checkpoint["config"])
    tree = {**checkpoint["config"], "model": {**checkpoint["config"]["model"]}}
    tree["model"]["selector"] = {**tree["model"]["selector"], "masked_mean": True}
    model = load_detector(config_from_dict(tree), checkpoint, "x")
    assert model.selector.masked_mean is config.model.selector.masked_mean is False


def test_convert_reports_errors_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    run = subprocess.run(
        [sys.executable, "-m", "ats_detr", "convert", "text.pth", "out.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: text.pth: not a checkpoint")
    assert run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.pth"]


def test_published_checkpoints_are_recognised() -> None:
    state = official_state(small_config())
    assert is_official(state)
    assert is_official({"model": state})
    assert not is_official(from_official(state))
    assert not is_official([1, 2])


def test_checkpoints_that_differ_only_in_the_input_of_the_scorer_are_distinguished() -> None:
    """The scorer of Sparse DETR has the names and shapes of ATS-DETR's, but reads the embedded proposals."""
    sparse = SelectorConfig(scores="proposals", keep_ratio=0.1, masked_mean=False)
    sparse_checkpoint = from_official(official_state(small_config(selector=sparse)))
    teacher = config_from_dict(from_official(official_state(small_config()))["config"])
    assert set(sparse_checkpoint["model"]) == set(build_model(teacher.model, 7).state_dict())
    with pytest.raises(
        UserError, match=r"x\.pt: .* model\.selector\.scores is 'proposals' there, 'features' here"
    ):
        load_detector(teacher, sparse_checkpoint, "x.pt")


def test_the_configuration_of_a_checkpoint_takes_overrides() -> None:
    checkpoint = from_official(official_state(small_config()))
    assert config_of(checkpoint, "x.pt", ["data.short_side=300"]).data.short_side == 300
    assert config_of(checkpoint, "x.pt").data.short_side == 800
    with pytest.raises(UserError, match="short_sied"):
        config_of(checkpoint, "x.pt", ["data.short_sied=300"])
