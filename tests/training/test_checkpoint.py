"""Checkpoints are written completely or not at all, and rejected in one line if they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ats_detr.checkpoint import (
    build_without_fetching,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
    save_config,
)
from ats_detr.config import config_to_dict
from ats_detr.errors import UserError
from tests.training.small import files_of_at_most, small_config


def checkpoint_of(folder: Path, **changes: Any) -> dict[str, Any]:
    config = small_config(folder, **changes)
    model = build_without_fetching(config, 3)
    return {
        "model": model.state_dict(),
        "config": config_to_dict(config),
        "num_classes": 3,
        "classes": {"num_rows": 3, "categories": []},
        "epoch": 1,
        "finished": True,
    }


def test_a_saved_model_is_loaded_equal(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    save_checkpoint(checkpoint, tmp_path / "a.pt")
    model, loaded = load_model(tmp_path / "a.pt")
    assert not model.training
    assert loaded["config"] == checkpoint["config"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name]), name


def test_a_full_disk_keeps_the_old_checkpoint_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(checkpoint_of(tmp_path), path)
    before = path.read_bytes()
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=r"a\.pt: cannot write .* the previous checkpoint is intact") as raised,
    ):
        save_checkpoint(checkpoint_of(tmp_path, seed=1), path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.pt: cannot write .* nothing was written"):
        save_checkpoint({"model": {}}, tmp_path / "file" / "a.pt")


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "foreign"])
def test_other_files_are_rejected_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.pt"
    if damage == "truncated":
        save_checkpoint(checkpoint_of(tmp_path), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"a\.pt: ") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_architecture_is_rejected_with_the_difference(tmp_path: Path) -> None:
    state = checkpoint_of(tmp_path, model={"num_decoder_layers": 3, "feedforward_width": 16})["model"]
    model = build_without_fetching(small_config(tmp_path), 3)
    with pytest.raises(UserError, match=r"another architecture .*unknown.*of another shape") as raised:
        load_weights(model, state, "a.pt")
    assert "\n" not in str(raised.value)


def test_an_error_in_writing_has_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*/config\.yaml'$") as raised:
        save_config(small_config(tmp_path), tmp_path / "config.yaml")
    assert raised.value.filename == str(tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
