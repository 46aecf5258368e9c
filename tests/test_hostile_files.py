"""Checkpoints of unknown origin: nothing is executed, fetched or allocated for them, and each gets one line."""

from __future__ import annotations

import argparse
import copy
import os
import re
import signal
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ats_detr.checkpoint import (
    load_checkpoint,
    load_model,
    resolve_checkpoint,
    save_checkpoint,
    save_folder,
)
from ats_detr.cli import main
from ats_detr.config import BackboneConfig, ModelConfig, SelectorConfig, load_config
from ats_detr.convert import from_official, is_official, official_names
from ats_detr.data.images import fetch_image
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.model import build_model
from tests.small_detector import SMALL, small_detector


@pytest.fixture(scope="module")
def honest() -> dict[str, Any]:
    detector = small_detector()
    return {**detector.facts, "model": detector.model.state_dict()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"opened a connection: {arguments[1:]}")

    for name in ("__init__", "connect"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(checkpoint: dict[str, Any], folder: Path, kind: str) -> Path:
    path = folder / f"model{kind}"
    save_folder(checkpoint, path) if not kind else save_checkpoint(checkpoint, path)
    return path


def changed(checkpoint: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy in which the entry `key.sub.sub` is replaced."""
    *parents, leaf = key.split(".")
    result = {name: entry if name == "model" else copy.deepcopy(entry) for name, entry in checkpoint.items()}
    if parents == ["model"]:  # names of tensors have dots
        return {**result, "model": {**result["model"], leaf: value}}
    tree = result
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = value
    return result


def rejected(path: Path) -> str:
    """The message of all commands that read a checkpoint; equal for all, one line, and short."""
    messages = set()
    commands: list[Callable[[], Any]] = [
        lambda: Detector.from_checkpoint(path, device="cpu"),
        lambda: main(["info", str(path)]),
        lambda: main(["convert", str(path), str(path.parent / "out.pth")]),
    ]
    for command in commands:
        with pytest.raises(UserError) as raised:
            command()
        messages.add(str(raised.value))
    assert not (path.parent / "out.pth").exists()
    (message,) = messages
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_loading_and_predicting_open_no_connection(
    honest: dict[str, Any], no_network: None, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="opened a connection"):
        fetch_image("http://localhost:1")
    backbone = honest["config"]["model"]["backbone"]
    wanting = {**backbone, "pretrained": True, "weights": "hf-hub:timm/resnet18.a1_in1k"}
    path = write(changed(honest, "config.model.backbone", wanting), tmp_path, ".pt")
    (result,) = Detector.from_checkpoint(path, device="cpu").predict(Image.new("RGB", (64, 64)))
    assert result.size == (64, 64)
    main(["info", str(path)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("options.checkpoint_path", "evil.pth"),
        ("options.pretrained_cfg_overlay", {"url": "http://localhost:1/evil.pth"}),
        ("options.pretrained_cfg", {"url": "http://localhost:1/evil.pth", "file": "evil.pth"}),
        ("options.pretrained", True),
        ("options.cache_dir", "/tmp"),
        ("options.features_only", False),
        ("options.norm_layer", "os.system"),
        ("options.channels", [10**9] * 4),
        ("options.layers", [200, 200, 200, 200]),
        ("options.block_args", [[[[[1]]]]]),
        ("name", "hf-hub:timm/resnet18"),
        ("name", "hf_hub:timm/resnet18"),
        ("name", "local-dir:/tmp"),
        ("name", "resnet18.tv_in1k/../x"),
        ("name", "../resnet18"),
    ],
)
def test_a_backbone_of_a_file_reads_and_fetches_nothing(
    honest: dict[str, Any], no_network: None, tmp_path: Path, key: str, value: Any
) -> None:
    checkpoint = changed(honest, f"config.model.backbone.{key}", value)
    for kind in (".pt", ".safetensors", ""):
        with pytest.raises(UserError, match=r"model\.backbone"):
            load_model(write(checkpoint, tmp_path, kind))
    assert "model.backbone" in rejected(tmp_path / "model.pt")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


REPEATED = torch.ones(1).expand(100_000, 8192)
HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config.model.num_encoder_layers", 10**6, "num_encoder_layers"),
        ("config.model.num_decoder_layers", HUGE, "num_decoder_layers"),
        ("config.model.num_encoder_layers", 9, "another architecture"),
        ("config.model.width", 8192, "another architecture"),
        ("config.model.num_points", 10**9, "num_points"),
        ("config.model.num_heads", 10**9, "num_heads"),
        ("config.model.num_levels", 10**9, "num_levels"),
        ("config.model.num_queries", 10**12, "num_queries"),
        ("config.model.feedforward_width", 65_536, "another architecture"),
        ("config.model.selector.num_budgets", 10**9, "num_budgets"),
        ("config.model.num_points", float("nan"), "num_points"),
        ("config.data.short_side", 10**9, "short_side"),
        ("config.data.train_short_sides", [640] * 10**5, "train_short_sides"),
        ("config.name", "..", "name"),
        ("config.name", "a/../../b", "name"),
        ("config", [], "config"),
        ("config", {"model": nested(600)}, "nested"),
        ("config.data", nested(600), "nested"),
        ("num_classes", 10**9, "num_classes"),
        ("num_classes", "3", "num_classes"),
        ("classes", {}, "classes"),
        ("classes.num_rows", HUGE, "num_rows"),
        ("classes.categories", [{"row": 10**6, "id": 1, "name": "a"}], "row"),
        ("classes.categories", [{"row": 0, "id": HUGE, "name": "a"}], "id"),
        ("classes.categories", [{"row": 0, "id": 1, "name": ["a"]}], "name"),
        ("classes.categories", [{"row": 0, "id": i, "name": "a"} for i in range(2)], "row"),
        ("epoch", "many", "epoch"),
        ("metrics", ["AP"], "metrics"),
        ("model", [1, 2], "model"),
        ("model.level_embed", "text", "model.level_embed"),
        ("model.level_embed", REPEATED, "model.level_embed"),
        ("model.level_embed", torch.eye(3).to_sparse(), "model.level_embed"),
        ("model.level_embed", torch.ones(3, 32, dtype=torch.complex64), "model.level_embed"),
        (
            "model.level_embed",
            torch.full((3, 32), torch.nan),
            "model.level_embed holds values that are not finite",
        ),
        (
            "model.level_embed",
            torch.full((3, 32), 1e300, dtype=torch.float64),
            "model.level_embed holds values",
        ),
        ("model.further", torch.ones(1), "unknown, such as further"),
    ],
)
def test_sizes_and_types_are_checked_before_anything_is_built(
    honest: dict[str, Any], tmp_path: Path, key: str, value: Any, words: str
) -> None:
    path = write(changed(honest, key, value), tmp_path, "" if words == "nested" else ".pt")
    assert words in rejected(path)


def test_integers_in_place_of_real_numbers_are_rejected(honest: dict[str, Any], tmp_path: Path) -> None:
    quantised = changed(honest, "model.level_embed", honest["model"]["level_embed"].char())
    assert "model.level_embed has dtype torch.int8" in rejected(write(quantised, tmp_path, ".pt"))


def test_compressed_files_are_rejected_before_they_are_unpacked(
    honest: dict[str, Any], tmp_path: Path
) -> None:
    path = write(honest, tmp_path, ".pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(2**20))
    assert "compressed" in rejected(path)


def published(**arguments: Any) -> dict[str, Any]:
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False),
        selector=SelectorConfig(keep_ratio=0.1),
        width=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        two_stage=True,
    )
    with torch.device("meta"):
        model = build_model(config, 3)
    state = {name: torch.zeros(model.state_dict()[own].shape) for name, own in official_names(model).items()}
    return {"model": state, "args": argparse.Namespace(**{"rho": [0.1], **arguments})}


@pytest.mark.parametrize(
    "arguments",
    [
        {"nheads": 0}, {"nheads": HUGE}, {"nheads": "8 heads"}, {"num_queries": 10**12}, {"num_queries": None},
        {"rho": ["a"]}, {"rho": [float("nan")]}, {"rho": 10**9}, {"dropout": "none"}, {"dropout": []},
    ],
)  # fmt: skip
def test_the_command_line_in_a_published_file_is_not_trusted(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "published.pth"
    torch.save(published(**arguments), path)
    for command in (
        lambda: load_checkpoint(path),
        lambda: main(["convert", str(path), str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match=r"published\.pth: not a model of this family"):
            command()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["layers", "0-d", "classes", "epoch"])
def test_sizes_of_a_published_file_are_those_of_its_tensors(damage: str, tmp_path: Path) -> None:
    content = published()
    state, path = content["model"], tmp_path / "published.pth"
    if damage == "layers":
        state[f"transformer.encoder.layers.{HUGE}.linear1.bias"] = torch.zeros(1)
    elif damage == "0-d":
        state["transformer.level_embed"] = torch.tensor(1.0)
    elif damage == "classes":
        state["class_embed.0.bias"] = torch.ones(1).expand(10**9)
    else:
        content["epoch"] = [1]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"published\.pth: "):
        load_checkpoint(path)


WRAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "DistributedDataParallel": lambda c: {**c, "model": {f"module.{k}": v for k, v in c["model"].items()}},
    "Lightning": lambda c: {"state_dict": {f"model.{k}": v for k, v in c["model"].items()}, "epoch": 3},
    "compiled": lambda c: {"state_dict": {f"module._orig_mod.{k}": v for k, v in c["model"].items()}},
    "average": lambda c: {"ema": {"module": c["model"], "updates": 7}},
    "timm": lambda c: {"model_ema": {"n_averaged": torch.tensor(1), **c["model"]}, "args": c["args"]},
    "state dict": lambda c: c["model"],
}


def test_weights_are_found_in_the_usual_layouts() -> None:
    content = published()
    expected = from_official(content)
    for wrapping, wrap in WRAPPINGS.items():
        assert is_official(wrap(content)), wrapping
        found = from_official(wrap(content))
        assert found["model"].keys() == expected["model"].keys(), wrapping
        assert found["config"]["model"] == expected["config"]["model"], wrapping


def test_weights_come_before_their_average_with_a_note(tmp_path: Path) -> None:
    content = published()
    average = {name: tensor + 1 for name, tensor in content["model"].items()}
    torch.save({**content, "ema": average}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")
    assert not found["model"]["level_embed"].any()
    assert any("ema" in note for note in found["notes"])


@pytest.mark.parametrize(
    "content", [{}, [1], {"weights": torch.ones(2)}, {"state_dict": {"fc.weight": torch.ones(2)}}, 7]
)
def test_an_unknown_file_is_described(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "unknown.pt")
    message = rejected(tmp_path / "unknown.pt")
    assert "not a checkpoint of this package, of the published code or of" in message
    assert "is a checkpoint of this package" not in message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21461\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "a pointer of Git LFS; fetch the file itself with `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "a web page; download the file itself"),
        (b'{"model_type": "detr"}', "a JSON file; give the folder that holds it"),
        (b"hello", "neither written by torch.save nor a .safetensors file"),
        (b"", "neither written by torch.save nor a .safetensors file"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"file{suffix}: not a checkpoint ({message})")):
        load_checkpoint(path)


def test_the_content_of_a_file_decides_not_its_suffix(honest: dict[str, Any], tmp_path: Path) -> None:
    for suffix, other in ((".pt", ".safetensors"), (".safetensors", ".pt"), (".safetensors", ".bin")):
        path = write(honest, tmp_path, suffix).rename(tmp_path / f"renamed{other}")
        assert load_checkpoint(path)["classes"] == honest["classes"]
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(UserError, match="a TorchScript program, not weights"):
        load_checkpoint(tmp_path / "program.pt")


def test_a_file_of_a_model_folder_stands_for_the_folder(honest: dict[str, Any], tmp_path: Path) -> None:
    save_folder(honest, tmp_path)
    found, expected = (load_checkpoint(path) for path in (tmp_path / "model.safetensors", tmp_path))
    assert found["config"] == expected["config"]


def test_parts_of_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text('{"model_type": "deformable_detr"}')
    for listed, message in (
        (None, r"has a config\.json but no weights \(model\.safetensors or pytorch_model\.bin\)"),
        ("{", r"index\.json: not a readable JSON file"),
        ("{}", r"index\.json: must have a weight_map"),
        ('{"weight_map": {"a": 1}}', r"index\.json: must have a weight_map"),
        ('{"weight_map": {}}', r"index\.json: names no files"),
        (
            '{"weight_map": {"a": "../1.safetensors", "b": "2.safetensors"}}',
            "2 of the 2 files .* missing, such as 1",
        ),
    ):
        if listed is not None:
            index.write_text(listed)
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path)


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "https://huggingface.co/a/b", "", str(tmp_path)):
        with pytest.raises(UserError, match="no checkpoint; must be a file"):
            resolve_checkpoint(name)
    with pytest.raises(UserError, match="such as deformable-detr$"):
        resolve_checkpoint("deformable-der")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_fifos_and_devices_are_rejected_without_waiting(honest: dict[str, Any], tmp_path: Path) -> None:
    fifo, folder, data = tmp_path / "fifo", tmp_path / "folder", tmp_path / "data"
    save_folder(honest, folder)
    (folder / "model.safetensors").unlink()
    data.mkdir()
    for path in (
        fifo,
        tmp_path / "fifo.safetensors",
        tmp_path / "fifo.yaml",
        folder / "model.safetensors",
        data / "a.json",
    ):
        os.mkfifo(path)
    write(honest, tmp_path, ".pt")
    commands: list[list[str]] = [
        *(["convert", str(path), str(tmp_path / "out")] for path in (fifo, f"{fifo}.safetensors", "/dev/zero", folder)),
        *(["info", path] for path in (str(fifo), "/dev/zero", f"{fifo}.yaml", str(folder))),
        *(["train", "--config", path] for path in (str(fifo), f"{fifo}.yaml", "/dev/zero")),
        ["train", "--config", "quickstart", f"model.backbone.weights={fifo}", f"output_dir={tmp_path}",
         f"data.root={tmp_path}/s", *SMALL, "model.backbone.frozen_stages=1"],
        ["datasets", "check", str(data / "a.json")],
        ["datasets", "check", str(data)],
        ["eval", "--checkpoint", str(tmp_path / "model.pt"), f"data.val_annotations={data / 'a.json'}"],
        ["predict", str(fifo), "--checkpoint", str(fifo)],
    ]  # fmt: skip

    def too_late(*_: object) -> None:
        raise AssertionError("waits")

    before = signal.signal(signal.SIGALRM, too_late)
    try:
        for command in commands:
            signal.alarm(20)
            with pytest.raises((UserError, SystemExit)):
                main(command)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_names_of_runs_stay_in_their_folder() -> None:
    for name in ("..", ".", "a/b", "/tmp/x", "a\0b", "~\n"):
        with pytest.raises(UserError, match="name"):
            load_config("quickstart", [f"name={name!r}"])


def test_a_converted_file_of_any_name_gets_a_usable_run_name(tmp_path: Path) -> None:
    content = published()
    for name in ("...pth", "é" * 120 + ".pth"):
        torch.save(content, tmp_path / name)
        assert load_checkpoint(tmp_path / name)["config"]["name"].strip(".")
