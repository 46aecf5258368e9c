"""The detectors that the package contains: they work without data, network or training, and as well as a card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr.checkpoint import SHIPPED
from ats_detr.cli import main
from ats_detr.cli.predict import NUM_SAMPLES
from ats_detr.data.coco import CocoDetection
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from tests.small_detector import save_small_detector


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sample_images_are_drawn_and_their_objects_found(place: Path) -> None:
    main(["predict", "--checkpoint", "shapes", "--sample", "--out", "predictions", "--device", "cpu"])
    content = json.loads((place / "predictions" / "predictions.json").read_text())
    assert len(content["images"]) == NUM_SAMPLES
    assert (place / "predictions" / "gallery.html").stat().st_size > 10_000
    (file,) = place.glob("predictions/sample/*/annotations/instances_val2017.json")
    annotations = json.loads(file.read_text())["annotations"]
    num_found = sum(len(image["objects"]) for image in content["images"])
    assert 0.7 * len(annotations) < num_found < 1.2 * len(annotations)
    assert len({image["budget"] for image in content["images"]}) > 4, "budgets by the image"


def test_the_shipped_detector_has_the_accuracy_of_its_card(place: Path) -> None:
    """On 60 images that it has never seen; its card states AP 0.661 and AP50 0.957 on 300 images."""
    data = {"root": "drawn", "synthetic.num_train": 1, "synthetic.num_val": 60, "synthetic.seed": 1}
    overrides = [f"data.{key}={value}" for key, value in data.items()]
    main(["eval", "--checkpoint", "shapes", *overrides, "num_pictures=0", "device=cpu"])
    metrics = json.loads((place / "evaluation" / "metrics.json").read_text())  # not in the package
    facts = Detector.from_checkpoint("shapes").facts["metrics"]
    assert metrics["num_images"] == 60
    assert metrics["AP"] == pytest.approx(facts["AP"], abs=0.04)
    assert metrics["AP50"] == pytest.approx(facts["AP50"], abs=0.03)
    assert metrics["budget_object_spearman"] > 0.85
    assert not (SHIPPED / "evaluation").exists()


def test_the_tree_detector_needs_no_other_file(place: Path) -> None:
    """Its accuracy is tested where its photographs are: tests/data/test_trees.py."""
    detector = Detector.from_checkpoint("trees", device="cpu")
    assert detector.classes.names == ("tree",)
    assert sum(file.stat().st_size for file in (SHIPPED / "trees").iterdir()) < 12e6
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    (result,) = detector.predict(pixels)
    assert min(abs(result.budget.keep_ratio - ratio) for ratio in (0.1, 0.4)) < 0.01


def test_a_saved_detector_in_bfloat16_has_half_the_size_and_the_same_files(tmp_path: Path) -> None:
    detector = Detector.from_checkpoint("shapes", device="cpu")
    detector.save(tmp_path / "whole")
    detector.save(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.52 * sizes[0]
    assert sizes[1] == (SHIPPED / "shapes" / "model.safetensors").stat().st_size
    again = Detector.from_checkpoint(tmp_path / "half", device="cpu").model.state_dict()
    for name, tensor in detector.model.state_dict().items():  # which come from bfloat16
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name


def test_sample_needs_a_detector_of_drawn_images_and_no_paths(place: Path) -> None:
    save_small_detector(place / "own.pt")
    with pytest.raises(UserError, match="--sample: small was not trained on drawn images"):
        main(["predict", "--checkpoint", "own.pt", "--sample"])
    for paths in ([], ["--sample", "own.pt"]):
        with pytest.raises(UserError, match="needs either paths or --sample"):
            main(["predict", "--checkpoint", "shapes", *paths])


def test_a_run_of_the_same_name_is_used_instead(place: Path) -> None:
    save_small_detector(place / "runs" / "shapes" / "final.pt")
    assert Detector.from_checkpoint("shapes").config.name == "small"


def test_slices_of_a_large_image_have_the_objects_that_the_whole_image_loses(place: Path) -> None:
    """As docs/detector.md shows, on a picture of 12 drawn images."""
    supervision = pytest.importorskip("supervision")
    folder = synthetic_dataset("drawn", num_train=1, num_val=12, seed=1)
    drawn = CocoDetection(folder / "val2017", folder / "annotations" / "instances_val2017.json")
    mosaic, corners = Image.new("RGB", (4 * 128, 3 * 128)), []
    for index in range(len(drawn)):
        left, top = 128 * (index % 4), 128 * (index // 4)
        image, boxes, _ = drawn[index]
        mosaic.paste(image, (left, top))
        corners.append(boxes + torch.tensor([left, top, left, top]))
    objects = torch.cat(corners).numpy()
    detector = Detector.from_checkpoint("shapes", device="cpu")

    def detect(tile: np.ndarray) -> Any:
        found = detector.predict(tile)[0].to_supervision()
        found.xyxy = supervision.clip_boxes(found.xyxy, tile.shape[1::-1])
        return found

    def recall(found: Any) -> float:
        return (supervision.box_iou_batch(objects, found.xyxy) > 0.5).any(1).mean()

    slicer = supervision.InferenceSlicer(detect, slice_wh=128, overlap_wh=64)
    recalls = [recall(find(np.asarray(mosaic))) for find in (detect, slicer)]
    assert recalls[0] < 0.3 and recalls[1] > 0.75, recalls
