"""One small dataset in COCO, Roboflow COCO, YOLO and Pascal VOC format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

from ats_detr.data.synthetic import synthetic_dataset


def coco_dataset(root: Path, *, num_train: int = 4, num_val: int = 3) -> Path:
    """COCO's own layout; integer boxes, three classes whose order is not alphabetical, one image without objects."""
    root = synthetic_dataset(
        root, num_train=num_train, num_val=num_val, image_size=64, min_objects=1, max_objects=4, num_classes=3
    )
    for split in ("train2017", "val2017"):
        file = root / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        for category, name in zip(content["categories"], ("zebra & co", "apple", "möwe"), strict=True):
            category["name"] = name
        empty = content["images"][1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
        for annotation in content["annotations"]:
            x, y, width, height = (int(value) for value in annotation["bbox"])
            annotation["bbox"] = [max(1, x), max(1, y), max(4, width - 2), max(4, height - 2)]
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        file.write_text(json.dumps(content))
    return root


def contents(root: Path) -> dict[str, dict[str, Any]]:
    """The annotation files of `coco_dataset` by the name of the split."""
    return {
        split: json.loads((root / f"annotations/instances_{split}2017.json").read_text())
        for split in ("train", "val")
    }


def _objects(content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [
        (image, [a for a in content["annotations"] if a["image_id"] == image["id"]])
        for image in content["images"]
    ]


def as_roboflow(source: Path, root: Path) -> Path:
    for split, content in contents(source).items():
        folder = root / ("valid" if split == "val" else split)
        shutil.copytree(source / f"{split}2017", folder)
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def as_yolo(source: Path, root: Path, *, roboflow: bool = True) -> Path:
    """As Roboflow or Ultralytics write it. The image without objects has an empty label file, or none."""
    names: list[str] = []
    places: dict[str, str] = {}
    for split, content in contents(source).items():
        names = [category["name"] for category in content["categories"]]
        index = {category["id"]: place for place, category in enumerate(content["categories"])}
        folder = "valid" if split == "val" and roboflow else split
        images, labels = (
            f"{folder}/{kind}" if roboflow else f"{kind}/{folder}" for kind in ("images", "labels")
        )
        places[split] = f"../{images}" if roboflow else images
        shutil.copytree(source / f"{split}2017", root / images)
        (root / labels).mkdir(parents=True)
        for image, objects in _objects(content):
            lines = []
            for entry in objects:
                x, y, width, height = entry["bbox"]
                centre = (x + width / 2) / image["width"], (y + height / 2) / image["height"]
                sides = width / image["width"], height / image["height"]
                lines.append(
                    " ".join([str(index[entry["category_id"]]), *(f"{v:.6f}" for v in (*centre, *sides))])
                )
            if lines or roboflow:
                (root / labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    about: dict[str, Any] = (
        {**places, "test": "../test/images"} if roboflow else {"path": "../datasets/x", **places}
    )
    about |= {"nc": len(names), "names": names if roboflow else dict(enumerate(names))}
    (root / "data.yaml").write_text(yaml.safe_dump(about, allow_unicode=True))
    return root


def as_voc(source: Path, root: Path, *, devkit: bool = True, first_pixel: int = 1) -> Path:
    """As VOC's devkit or Roboflow lay it out."""
    for split, content in contents(source).items():
        names = {category["id"]: category["name"] for category in content["categories"]}
        folder = root / ("JPEGImages" if devkit else "valid" if split == "val" else split)
        labels = root / "Annotations" if devkit else folder
        folder.mkdir(parents=True, exist_ok=True)
        labels.mkdir(exist_ok=True)
        stems = []
        for image, objects in _objects(content):
            stem = f"{split}_{Path(image['file_name']).stem}"
            stems.append(stem)
            shutil.copy(source / f"{split}2017" / image["file_name"], (folder / stem).with_suffix(".jpg"))
            text = f"<annotation><filename>{stem}.jpg</filename><size><width>{image['width']}</width>"
            text += f"<height>{image['height']}</height><depth>3</depth></size>"
            for entry in objects:
                x, y, width, height = entry["bbox"]
                low = (x + first_pixel, y + first_pixel)
                text += f"<object><name>{escape(names[entry['category_id']])}</name><difficult>0</difficult><bndbox>"
                text += f"<xmin>{low[0]}</xmin><ymin>{low[1]}</ymin><xmax>{x + width}</xmax>"
                text += f"<ymax>{y + height}</ymax></bndbox></object>"
            (labels / f"{stem}.xml").write_text(text + "</annotation>", encoding="utf-8")
        if devkit:
            (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
            (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems) + "\n")
    return root
