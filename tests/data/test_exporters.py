"""Every peculiarity of real exporters gets the right verdict, from the check and from training alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ats_detr.config import DataConfig
from ats_detr.data.check import check_dataset, find_splits, report
from ats_detr.errors import UserError
from ats_detr.training.datasets import open_dataset
from tests.data.exporters import CASES, write


def checked(root: Path, **options: Any) -> dict[str, Any]:
    splits = find_splits(root)
    check_dataset(splits, **options)
    return report(splits)


def opened(root: Path, **settings: Any) -> tuple[int, int]:
    """Images and objects with which training and evaluation start. Raises UserError."""
    config = DataConfig(root=str(root), **settings)
    train = open_dataset(config, "train")
    val = open_dataset(config, "val", train.class_map)
    sets = [train] if val.annotations.file == train.annotations.file else [train, val]
    return sum(map(len, sets)), sum(int(dataset.num_objects.sum()) for dataset in sets)


@pytest.mark.parametrize("name", CASES)
def test_check_and_training_agree_on_the_expected_verdict(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    root = write(case, tmp_path)
    if not all(picture.split("/")[0] in os.listdir(root) for picture in case.pictures):
        pytest.skip("the file system changes the normal form of names")
    result = checked(root)
    messages = [text for split in result["splits"] for text in split["errors"] + split["warnings"]]
    assert result["accepted"] == case.accepted, messages
    assert not case.says or any(case.says in text for text in messages), messages
    assert all("\n" not in text and len(text) < 600 for text in messages)
    if not case.accepted:
        with pytest.raises(UserError) as raised:
            opened(root)
        assert "\n" not in str(raised.value)
        return
    numbers = [sum(split[key] for split in result["splits"]) for key in ("num_images", "num_objects")]
    assert numbers[1] == case.objects
    if "test" not in [split["name"] for split in result["splits"]]:
        assert opened(root) == tuple(numbers)
