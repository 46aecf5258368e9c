"""Every peculiarity of real exporters gets the right verdict, from the check and from training alike."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ats_detr.config import DataConfig
from ats_detr.data.check import check_dataset, find_splits, report
from ats_detr.data.coco import CocoDetection
from ats_detr.errors import UserError
from ats_detr.training.datasets import open_dataset
from ats_detr.training.stages import plan_stages, train_stages
from tests.data.exporters import CASES, Case, content, write
from tests.training.small import small_config

SHARED_CASES = Path(__file__).parents[3] / "shared" / "cases" / "make_datasets.py"


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


def test_an_unclear_choice_of_files_is_reported_and_not_guessed(tmp_path: Path) -> None:
    case = Case(
        {f"fold_{i}.json": content(2 * i + 1) for i in range(2)},
        {f"images/p{i}.jpg": {} for i in range(1, 5)},
    )
    root = write(case, tmp_path)
    result = checked(root)
    assert not result["accepted"]
    message = "unclear (fold_0.json, fold_1.json); set data.train_annotations"
    assert message in str(result["splits"][0]["errors"])
    with pytest.raises(UserError, match=re.escape(message)):
        opened(root)
    with pytest.raises(UserError, match=r"set data\.val_annotations"):
        opened(root, train_annotations="fold_0.json")
    assert opened(root, train_annotations="fold_0.json", val_annotations="fold_1.json") == (4, 4)


@pytest.mark.parametrize(
    "ids", [("12345e67", "12346e67"), ("1e5", "10e4"), ("2024_01", "202401"), ("12345678901234567890", "3")]
)
def test_texts_that_python_reads_as_numbers_are_image_ids(ids: tuple[str, str], tmp_path: Path) -> None:
    data = content()
    for i, name in enumerate(ids):
        data["images"][i]["id"] = data["annotations"][i]["image_id"] = name
    root = write(Case({"data.json": data}, {"p1.jpg": {}, "p2.jpg": {}}), tmp_path)
    dataset = CocoDetection(None, root / "data.json")
    assert [len(dataset.objects(i)[1]) for i in range(len(dataset))] == [1, 1]


@pytest.mark.parametrize("key", ["images", "categories"])
def test_objects_of_an_id_with_two_meanings_are_omitted(key: str, tmp_path: Path) -> None:
    """Which of the two records an annotation belongs to is unknown."""
    data = content()
    data["categories"].append({"id": 2, "name": "other"})
    data["annotations"][1]["category_id"] = 2
    data[key].append({**data[key][0], "file_name": "p3.jpg", "name": "another"})
    root = write(Case({"data.json": data}, {f"p{i}.jpg": {} for i in (1, 2, 3)}), tmp_path)
    with pytest.raises(UserError, match="repeats id 1"):
        CocoDetection(None, root / "data.json")
    dataset = CocoDetection(None, root / "data.json", on_bad_annotation="skip")
    labels = [dataset.objects(i)[1].tolist() for i in range(len(dataset))]
    assert [row for rows in labels for row in rows] == [dataset.class_map.rows_of(np.array([2])).item()]


STEP = {"kind": "coco", "batch_size": 2, "eval_batch_size": 2}
TRAINED_BY_DEFAULT = ("images/train", "exif_half_turn_among_upright", "bbox_far_beyond", "all_crowds")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in TRAINED_BY_DEFAULT else [pytest.mark.slow]) for name in CASES],
)
def test_training_does_a_step_or_stops_with_one_line(name: str, tmp_path: Path) -> None:
    root = write(CASES[name], tmp_path / "data")
    config = small_config(tmp_path, data=STEP | {"root": str(root)}, train={"epochs": 1})
    if CASES[name].accepted:
        train_stages(plan_stages(config), "all", torch.device("cpu"))
        assert (tmp_path / "run" / "final.pt").exists()
        return
    with pytest.raises(UserError) as raised:
        train_stages(plan_stages(config), "all", torch.device("cpu"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_the_collected_cases_get_their_verdicts(tmp_path: Path) -> None:
    """Datasets that are kept beside the checkout, with expectations written by others."""
    if not SHARED_CASES.is_file():
        pytest.skip("no collected cases beside the checkout")
    subprocess.run([sys.executable, SHARED_CASES, tmp_path], check=True)
    for name, expected in json.loads((tmp_path / "expect.json").read_text()).items():
        result = checked(tmp_path / name)
        assert result["accepted"] == expected["accept"], name
        if result["accepted"]:
            numbers = [sum(split[key] for split in result["splits"]) for key in ("num_images", "num_objects")]
            assert numbers == [expected["images"], expected["objects"]], name
            assert opened(tmp_path / name) == tuple(numbers), name
        else:
            with pytest.raises(UserError):
                opened(tmp_path / name)
        text = " ".join(str(split["errors"] + split["warnings"]) for split in result["splits"]).lower()
        assert not expected["says"] or any(words.lower() in text for words in expected["says"]), name
