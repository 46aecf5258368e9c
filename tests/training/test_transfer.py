"""Starting from another model: matching tensors are copied, classes by name, and a table reports the others."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from ats_detr.checkpoint import build_without_fetching, save_checkpoint
from ats_detr.config import BackboneConfig, Config
from ats_detr.convert import official_names
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.model import Detr, build_model
from ats_detr.training import setup, trainer
from ats_detr.training.transfer import Transfer, transfer_weights
from tests.training.small import small_config
from tests.training.test_checkpoint import checkpoint_of

ANIMALS = ClassMap(num_rows=4, rows=(0, 1, 3), category_ids=(5, 6, 8), names=("cat", "dog", "cow"))
PETS = ClassMap(num_rows=3, rows=(0, 1, 2), category_ids=(1, 2, 3), names=("dog", "hamster", "cat"))


def saved_model(folder: Path, classes: ClassMap, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    checkpoint = checkpoint_of(folder, **changes)
    model = build_without_fetching(small_config(folder, **changes), classes.num_rows)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
        checkpoint["model"][name] = tensor
    checkpoint |= {"num_classes": classes.num_rows, "classes": classes.to_dict()}
    save_checkpoint(checkpoint, folder / "source.pt")
    return folder / "source.pt", checkpoint["model"]


def rendered(transfer: Transfer) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(transfer.table())
    return capture.get()


def test_classes_of_equal_name_are_copied_and_others_reinitialised(tmp_path: Path) -> None:
    path, source = saved_model(tmp_path, ANIMALS)
    torch.manual_seed(2)
    model = build_without_fetching(small_config(tmp_path), PETS.num_rows)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = transfer_weights(model, PETS, path)
    heads = [name for name in initial if ".classify." in name]
    assert heads
    assert set(result.remade) == set(heads)
    assert set(result.loaded) == set(initial) - set(heads)
    assert result.unused == []
    assert result.copied_classes == ["dog", "cat"]
    for name, tensor in model.state_dict().items():
        if name in heads:
            assert torch.equal(tensor[0], source[name][1]), name  # dog
            assert torch.equal(tensor[2], source[name][0]), name  # cat
            assert torch.equal(tensor[1], initial[name][1]), name  # hamster
        else:
            assert torch.equal(tensor, source[name]), name
    assert "classes copied by name: 2 (dog, cat)" in rendered(result)


def test_equal_numbers_of_classes_do_not_hide_other_names(tmp_path: Path) -> None:
    renamed = ClassMap(num_rows=3, rows=(0, 1, 2), category_ids=(1, 2, 3), names=("cat", "dog", "horse"))
    path, source = saved_model(tmp_path, renamed)
    model = build_without_fetching(small_config(tmp_path), PETS.num_rows)
    result = transfer_weights(model, PETS, path)
    name = "decoder_heads.0.classify.weight"
    assert name in result.remade
    assert torch.equal(model.state_dict()[name][0], source[name][1])  # dog


def test_equal_classes_are_copied_completely(tmp_path: Path) -> None:
    path, source = saved_model(tmp_path, PETS)
    model = build_without_fetching(small_config(tmp_path), PETS.num_rows)
    result = transfer_weights(model, PETS, path)
    assert (result.remade, result.unused) == ([], [])
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_class_agnostic_proposal_weights_are_copied(tmp_path: Path) -> None:
    changes = {"model": {"class_specific_proposals": False}}
    path, source = saved_model(tmp_path, ANIMALS, **changes)
    model = build_without_fetching(small_config(tmp_path, **changes), PETS.num_rows)
    transfer_weights(model, PETS, path)
    weight, old = model.state_dict()["proposal_head.classify.weight"], source["proposal_head.classify.weight"]
    assert torch.equal(weight[0], old[0])
    assert not torch.equal(weight[2], old[0])


def test_parts_that_only_one_model_has_are_counted(tmp_path: Path) -> None:
    adaptive = {"selector": {"keep_ratio": None, "min_ratio": 0.3, "max_ratio": 0.6}, "adaption": True}
    path, _ = saved_model(tmp_path, PETS, model={"num_encoder_layers": 3, "feedforward_width": 16})
    model = build_without_fetching(small_config(tmp_path, model=adaptive), PETS.num_rows)
    result = transfer_weights(model, PETS, path)
    assert any(name.startswith("adaption.") for name in result.remade)
    assert any(name.startswith("selector.budget.") for name in result.remade)
    assert any(name.startswith("encoder.layers.2.") for name in result.unused)
    assert "encoder.layers.0.feedforward.linear1.weight" in set(result.remade) & set(result.unused)


def test_a_checkpoint_without_matching_tensors_is_rejected(tmp_path: Path) -> None:
    path, _ = saved_model(tmp_path, PETS)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"] = {f"other.{name}": tensor for name, tensor in checkpoint["model"].items()}
    save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match="no tensor of this checkpoint fits"):
        transfer_weights(build_without_fetching(small_config(tmp_path), 3), PETS, path)


@pytest.mark.parametrize("lacking", [None, "backbone.body.layer4.0.conv1.weight"])
def test_backbone_weights_are_downloaded_only_if_the_checkpoint_lacks_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str | None
) -> None:
    """Without a network, a download retries for half a minute and ends with a warning."""
    path, source = saved_model(tmp_path, PETS)
    if lacking is not None:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["model"][lacking]
        save_checkpoint(checkpoint, path)
    fetched, create = [], timm.create_model

    def create_offline(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            fetched.append(name)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_offline)
    config = small_config(tmp_path, model={"backbone": {"pretrained": True}})
    state = setup.initial_model(config, PETS, path).state_dict()
    assert fetched == ([] if lacking is None else ["resnet10t"])
    assert all(torch.equal(tensor, source[name]) for name, tensor in state.items() if name != lacking)


# --------------------------------------------------------------------------------------------------------- fine-tuning
def fine_tuning_config(folder: Path) -> Config:
    """Three synthetic classes and a small model of the published architecture."""
    config = small_config(
        folder,
        model={"selector": {"masked_mean": False}},
        train={"epochs": 6, "init_from": str(folder / "official.pth"), "evaluate_every": 0},
    )
    backbone = BackboneConfig(name="resnet18.tv_in1k", pretrained=False, frozen_stages=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


def published_file(config: Config, path: Path) -> Detr:
    """A 91-class checkpoint under published names."""
    torch.manual_seed(3)
    model = build_model(config.model, num_classes=91)
    state = model.state_dict()
    arguments = argparse.Namespace(
        nheads=config.model.num_heads, num_queries=config.model.num_queries, rho=[0.3]
    )
    official = {name: state[own] for name, own in official_names(model).items()}
    torch.save({"model": official, "epoch": 49, "args": arguments}, path)
    return model


def test_fine_tuning_a_published_91_class_model_on_3_classes_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fine_tuning_config(tmp_path)
    source = published_file(config, tmp_path / "official.pth")
    model = build_without_fetching(config, PETS.num_rows)
    transfer_weights(model, PETS, tmp_path / "official.pth")
    assert torch.equal(
        model.encoder.layers[0].attention.value_proj.weight,
        source.encoder.layers[0].attention.value_proj.weight,
    )
    assert model.decoder_heads[0].classify.out_features == 3

    init_from = tmp_path / "official.pth"
    trainer.train(setup.Stage("small", config, tmp_path / "run", init_from), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "initial weights from" in printed
    assert "re-made" in printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
