"""Small datasets that several tests read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ats_detr.data.coco import CocoDetection
from ats_detr.data.synthetic import synthetic_dataset

COCO_TINY = Path(__file__).parents[3] / "shared" / "data" / "coco_tiny"


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """50 real COCO images; present only where the checkout has them beside it."""
    if not COCO_TINY.is_dir():
        pytest.skip("no COCO images beside the checkout")
    return COCO_TINY


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """31 synthetic images of many aspect ratios, some without objects."""
    root = synthetic_dataset(
        tmp_path_factory.mktemp("synthetic"),
        num_train=31,
        num_val=1,
        image_size=64,
        max_aspect_ratio=2.5,
        min_objects=0,
        max_objects=5,
    )
    return CocoDetection(root / "train2017", root / "annotations/instances_train2017.json")


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., CocoDetection]:
    """Writes two 40x30 images and an annotation file, `content` overriding parts of it, and opens the
    dataset.
    """

    def make(
        *, modes: tuple[str, str] = ("RGB", "RGB"), class_map=None, content=None, **options
    ) -> CocoDetection:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for name, mode in zip(("a.jpg", "b.jpg"), modes, strict=True):
            Image.new(mode, (40, 30)).save(folder / name)
        annotations = tmp_path / "annotations.json"
        annotations.write_text(json.dumps(annotation_content() | (content or {})))
        return CocoDetection(folder, annotations, class_map=class_map, **options)

    return make


def annotation_content() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 30, "width": 40},
            {"id": 3, "file_name": "a.jpg", "height": 30, "width": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 20, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [4, 4, 0, 9], "area": 0, "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 5, "bbox": [30, 20, 12, 10.5], "area": 90, "iscrowd": 0},
        ],
        "categories": [{"id": 20, "name": "cup"}, {"id": 5, "name": "cat"}],
    }
