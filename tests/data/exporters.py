"""Tiny COCO-format datasets with the peculiarities of real exporters, and what a correct reader makes of each.

Written from the formats that CVAT, Label Studio, Roboflow, FiftyOne, VIA, LVIS, MediaPipe and labelme2coco write, and
from the mistakes that bug reports of detectors describe.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Content = dict[str, Any]


@dataclass
class Case:
    """A dataset and its verdict."""

    files: dict[str, Content | str | bytes]
    """Content of each annotation file by path."""
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of `save_picture` by path."""
    accepted: bool = True
    objects: int = 2
    """Objects that training and evaluation use, over all splits."""
    says: str = ""
    """Words that an error or a warning contains."""


def save_picture(
    path: Path, *, size: tuple[int, int] = (64, 48), orientation: int = 1, seed: int = 0, **options: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(path, **options)


def content(first: int = 1, folder: str = "") -> Content:
    """Two images of 64 x 48 with one object each."""
    ids = (first, first + 1)
    return {
        "images": [{"id": i, "file_name": f"{folder}p{i}.jpg", "width": 64, "height": 48} for i in ids],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0}
            for i in ids
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def changed(change: Callable[[Content], object]) -> Content:
    result = content()
    change(result)
    return result


def each(key: str, **fields: Any) -> Content:
    """Every record of `key` with these fields; `...` removes one."""
    result = content()
    for record in result[key]:
        record.update(copy.deepcopy(fields))
        for name in [name for name, value in record.items() if value is ...]:
            del record[name]
    return result


def first(key: str, **fields: Any) -> Content:
    """The same of the first record only."""
    result = content()
    result[key][0].update(fields)
    for name in [name for name, value in result[key][0].items() if value is ...]:
        del result[key][0][name]
    return result


BOTH: dict[str, dict[str, Any]] = {"p1.jpg": {}, "p2.jpg": {}}


def flat(data: Content | str | bytes, **expected: Any) -> Case:
    """Annotation file and images in one folder."""
    return Case({"data.json": data}, BOTH, **expected)


def placed(file: str, folder: str, prefix: str = "", **expected: Any) -> Case:
    """Annotation file and images in other places."""
    return Case({file: content(folder=prefix)}, {f"{folder}p1.jpg": {}, f"{folder}p2.jpg": {}}, **expected)


def two_splits(train: Content, val: Content, **expected: Any) -> Case:
    files = {"train/_annotations.coco.json": train, "valid/_annotations.coco.json": val}
    pictures = {
        f"{split}/{image['file_name']}": {"seed": seed}
        for seed, (split, data) in enumerate((("train", train), ("valid", val)))
        for image in data["images"]
    }
    return Case(files, pictures, **({"objects": 4} | expected))  # type: ignore[arg-type]


def _swap_categories(data: Content) -> Content:
    for annotation in data["annotations"]:
        annotation["category_id"] = 3 - annotation["category_id"]
    for category in data["categories"]:
        category["id"] = 3 - category["id"]
    return data


TWO_CLASSES = changed(lambda d: d["categories"].append({"id": 2, "name": "other"}))
RLE = {"counts": [100, 500, 2472], "size": [48, 64]}
POLYGON = [[5, 6, 25, 6, 25, 36]]

CASES: dict[str, Case] = {
    # Layouts.
    "coco": Case(
        {"annotations/instances_train2017.json": content(), "annotations/instances_val2017.json": content(3),
         "annotations/captions_train2017.json": {"images": [], "annotations": []},
         "annotations/image_info_test2017.json": {"images": [], "categories": []}},
        {"train2017/p1.jpg": {}, "train2017/p2.jpg": {}, "val2017/p3.jpg": {}, "val2017/p4.jpg": {}}, objects=4,
    ),
    "images/train": Case(
        {"annotations/train.json": content(), "annotations/val.json": content()},
        {f"images/{split}/p{i}.jpg": {"seed": seed} for seed, split in enumerate(("train", "val")) for i in (1, 2)},
        objects=4,
    ),
    "labels/train": Case({"labels/train/coco.json": content()}, {f"images/train/p{i}.jpg": {} for i in (1, 2)}),
    "fiftyone": placed("labels.json", "data/"),
    "labelme2coco": placed("dataset.json", "JPEGImages/", "JPEGImages/"),
    "split_folder_with_images": placed("train/annotations.json", "train/images/"),
    "any_folder": placed("labels.json", "photos/"),
    "names_from_above": placed("annotations/train.json", "train/", "my_data/train/"),
    "names_absolute": placed("labels.json", "images/", "/home/someone/project/images/"),
    "names_of_windows": placed("labels.json", "images/", "C:\\Users\\someone\\images\\"),
    "names_with_dot": placed("labels.json", "images/", "./images/"),
    "names_encoded": Case({"a.json": content(folder="my%20images/")}, {f"my images/p{i}.jpg": {} for i in (1, 2)}),
    "names_are_urls": placed("labels.json", "images/", "http://localhost:8080/data/upload/1/"),
    "names_are_local_files": placed("labels.json", "images/", "/data/local-files/?d=images/"),
    "names_in_subfolders": placed("labels.json", "images/a/b/", "a/b/"),
    "upper_case_suffix": Case({"a.json": content()}, {"p1.JPG": {"format": "JPEG"}, "P2.jpg": {}}, says="spelled"),
    "no_suffix": flat(changed(lambda d: [r.update(file_name=r["file_name"][:-4]) for r in d["images"]])),
    "subfolders_with_bare_names": Case(
        {"annotations/instances_default.json": content()}, {"images/a/b/p1.jpg": {}, "images/c/p2.jpg": {}},
        says="spelled otherwise",
    ),
    "bare_name_in_two_subfolders": Case(
        {"annotations/instances_default.json": content()},
        {"images/a/b/p1.jpg": {}, "images/c/p2.jpg": {}, "images/d/e/p2.jpg": {"seed": 1}},
        accepted=False, says="missing",
    ),
    "supervisely": placed("ds/ann/train.json", "ds/img/"),
    "images_in_an_archive": Case({"a.json": content(), "images.zip": b"PK\x03\x04"}, {}, accepted=False,
                                 says="unpack images.zip"),
    "lvis": Case(
        {"lvis_v1_train.json": changed(lambda d: [
            r.update(coco_url=f"http://images.cocodataset.org/train2017/p{r['id']}.jpg") or r.pop("file_name")
            for r in d["images"]])},
        {f"train2017/p{i}.jpg": {} for i in (1, 2)}, says="URL",
    ),
    "other_json_beside": Case({"a.json": content(), "package.json": {"name": "x"}, "p1.json": {"shapes": []}}, BOTH),
    "same_name_in_two_folders": Case(
        {"a.json": changed(lambda d: [r.update(file_name=f"{r['id']}/p.jpg") for r in d["images"]])},
        {"1/p.jpg": {}, "2/p.jpg": {"seed": 1}},
    ),
    "two_names_for_one_file": Case(
        {"a.json": changed(lambda d: [r.update(file_name=f"x{r['id']}/p.jpg") for r in d["images"]])},
        {"p.jpg": {}, "q.jpg": {}}, accepted=False, says="two listed names",
    ),
    "decomposed_on_disk": Case({"a.json": first("images", file_name="é/é.jpg")},
                               {"e\u0301/e\u0301.jpg": {}, "p2.jpg": {}}),
    "composed_on_disk": Case({"a.json": first("images", file_name="e\u0301.jpg")}, {"é.jpg": {}, "p2.jpg": {}}),
    "any_script": Case({"ann.json": first("images", file_name="写真/снимок 1.jpg")},
                       {"写真/снимок 1.jpg": {}, "p2.jpg": {}}),
    "missing_image": Case({"a.json": content()}, {"p1.jpg": {}}, accepted=False, says="missing"),
    "all_images_missing": Case({"a.json": content()}, {}, accepted=False, says="none of its 2 images"),
    "listed_twice": flat(changed(lambda d: d["images"].append({**d["images"][0], "id": 9})), says="two ids"),

    # Values of another type.
    "image_ids_float": flat(changed(lambda d: [r.update(id=float(r["id"])) for r in d["images"]]), says="converted"),
    "image_ids_text": flat(changed(lambda d: [r.update(id=str(r["id"])) for r in d["images"]]), says="converted"),
    "image_ids_names": flat(changed(lambda d: [
        r.update({"id" if "file_name" in r else "image_id": f"0001ee{r['id']}"})
        for r in d["images"] + d["annotations"]]), says="numbered"),
    "image_ids_negative": flat(changed(lambda d: [
        r.update({"id" if "file_name" in r else "image_id": -r["id"]}) for r in d["images"] + d["annotations"]])),
    "image_id_bool": flat(first("images", id=True), accepted=False, says="True"),
    "image_id_fraction": flat(first("images", id=1.5), accepted=False, says="1.5"),
    "image_id_missing": flat(first("images", id=...), accepted=False, says="None"),
    "image_id_of_400_digits": flat(first("images", id=10**400), accepted=False, says="64 bits"),
    "image_id_of_5000_digits": flat(json.dumps(content()).replace('"id": 1,', f'"id": {"1" * 5000},', 1),
                                    accepted=False, says="JSON"),
    "image_repeated_alike": flat(changed(lambda d: d["images"].append(dict(d["images"][0]))), says="twice"),
    "image_repeated_otherwise": flat(changed(lambda d: d["images"].append({**d["images"][0], "file_name": "p2.jpg"})),
                                     accepted=False, says="repeats id 1"),
    "sizes_zero": flat(each("images", width=0, height=0), says="without a size"),
    "sizes_minus_one": flat(each("images", width=-1, height=-1), says="without a size"),
    "sizes_null": flat(each("images", width=None, height=None), says="without a size"),
    "sizes_swapped": flat(each("images", width=48, height=64), accepted=False, says="swapped"),
    "sizes_of_another_image": flat(each("images", width=640, height=480), accepted=False, says="another size"),
    "category_id_zero": flat(changed(lambda d: [
        r.update({"category_id" if "bbox" in r else "id": 0}) for r in d["annotations"] + d["categories"]])),
    "category_ids_sparse": flat(changed(lambda d: [
        r.update({"category_id" if "bbox" in r else "id": 2**40}) for r in d["annotations"] + d["categories"]])),
    "category_ids_text": flat(changed(lambda d: [
        r.update({"category_id" if "bbox" in r else "id": "1"}) for r in d["annotations"] + d["categories"]]),
        says="converted"),
    "category_id_word": flat(each("categories", id="thing"), accepted=False, says="must be an integer"),
    "category_of_supercategory": flat(changed(lambda d: d["categories"].insert(
        0, {"id": 0, "name": "things", "supercategory": None})), says="without any object"),
    "category_name_number": flat(each("categories", name=5), says="replaced"),
    "category_name_null": flat(each("categories", name=None), says="replaced"),
    "category_twice_otherwise": flat(changed(lambda d: d["categories"].append({"id": 1, "name": "other"})),
                                     accepted=False, says="repeats id 1"),
    "categories_absent": flat(changed(lambda d: d.pop("categories")), accepted=False, says="'categories'"),
    "categories_empty": flat(changed(lambda d: d["categories"].clear()), accepted=False, says="categories"),
    "category_unknown": flat(first("annotations", category_id=7), accepted=False, says="category_id 7"),
    "annotation_ids_text": flat(each("annotations", id="a"), says="occur twice"),
    "annotations_twice": flat(changed(lambda d: d["annotations"].extend(copy.deepcopy(d["annotations"]))),
                              says="listed twice"),
    "object_twice": flat(changed(lambda d: d["annotations"].append({**d["annotations"][0], "id": 9})), objects=3,
                         says="annotated twice"),
    "iscrowd_text": flat(each("annotations", iscrowd="0"), says="read as 0"),
    "iscrowd_text_float": flat(each("annotations", iscrowd="0.0"), says="read as 0"),
    "iscrowd_word": flat(each("annotations", iscrowd="False"), says="read as 0"),
    "iscrowd_null": flat(each("annotations", iscrowd=None), says="read as 0"),
    "iscrowd_nan": flat(json.dumps(each("annotations", iscrowd=float("nan"))), says="read as 0"),
    "iscrowd_one_text": flat(first("annotations", iscrowd="1"), objects=1, says="read as 1"),
    "iscrowd_true": flat(first("annotations", iscrowd=True), objects=1, says="read as 1"),
    "iscrowd_two": flat(first("annotations", iscrowd=2), accepted=False, says="iscrowd 2"),
    "all_crowds": flat(each("annotations", iscrowd=1), accepted=False, objects=0, says="2 crowds"),
    "area_text": flat(each("annotations", area="600.0"), says="text"),
    "area_nan": flat(json.dumps(each("annotations", area=float("nan"))), says="area"),
    "area_negative": flat(each("annotations", area=-1), says="area"),
    "area_zero": flat(each("annotations", area=0), says="small"),
    "bbox_missing_with_polygon": flat(first("annotations", bbox=..., segmentation=POLYGON), says="segmentation"),
    "bbox_missing_with_flat_polygon": flat(first("annotations", bbox=[], segmentation=POLYGON[0]), says="segmentation"),
    "bbox_missing_with_rle": flat(first("annotations", bbox=None, segmentation=RLE), says="segmentation"),
    "bbox_missing_with_nothing": flat(first("annotations", bbox=None, segmentation=[]), accepted=False, says="bbox"),
    "bbox_missing_with_bad_rle": flat(first("annotations", bbox=None, segmentation={"counts": "?"}), accepted=False,
                                      says="bbox"),
    "bbox_nan": flat(json.dumps(first("annotations", bbox=[5, 6, float("nan"), 30])), accepted=False, says="bbox"),
    "bbox_infinite": flat(json.dumps(first("annotations", bbox=[5, 6, float("inf"), 30])), accepted=False, says="bbox"),
    "bbox_words": flat(first("annotations", bbox=[5, 6, "wide", 30]), accepted=False, says="bbox"),
    "bbox_of_bools": flat(first("annotations", bbox=[True, True, True, True]), accepted=False, says="bbox"),
    "bbox_of_400_digits": flat(first("annotations", bbox=[5, 6, 10**400, 30]), accepted=False, says="bbox"),
    "bbox_object": flat(first("annotations", bbox={"x": 5, "y": 6}), accepted=False, says="bbox"),
    "bbox_rotated": flat(first("annotations", bbox=[15, 20, 20, 30, 0.1]), accepted=False, says="rotated"),
    "bbox_flat": flat(first("annotations", bbox=[5, 6, 0, 30]), objects=1, says="without area"),
    "all_boxes_flat": flat(each("annotations", bbox=[5, 6, 0, 30]), accepted=False, objects=0, says="2 boxes without"),
    "bbox_outside": flat(first("annotations", bbox=[70, 6, 20, 30]), accepted=False, says="outside"),
    "bbox_slightly_beyond": flat(first("annotations", bbox=[-2, 6, 20, 30]), says="clipped"),
    "bbox_far_beyond": flat(first("annotations", bbox=[5, 6, 80, 30]), accepted=False, says="beyond"),
    "all_boxes_beyond": flat(each("annotations", bbox=[60, 40, 20, 30]), accepted=False, says="beyond"),
    "bbox_tiny": flat(each("annotations", bbox=[5, 6, 0.5, 0.3]), accepted=False, says="one pixel"),
    "bbox_one_normalised": flat(changed(lambda d: d["annotations"][0].update(bbox=[0.1, 0.1, 0.5, 0.5])),
                                accepted=False, says="normalised"),

    # Whole files.
    "not_json": flat("{", accepted=False, objects=0, says="JSON"),
    "deeply_nested": flat("[" * 200_000, accepted=False, objects=0, says="nested"),
    "a_list": flat([1, 2], accepted=False, objects=0, says="not a COCO instances file"),  # type: ignore[arg-type]
    "latin_1": flat(json.dumps(each("categories", name="pièce"), ensure_ascii=False).encode("latin-1"),
                    accepted=False, objects=0, says="UTF-8"),
    "utf_16": flat(json.dumps(content()).encode("utf-16")),
    "records_of_null": flat(changed(lambda d: d["annotations"].append(None)), accepted=False, says="not an object"),
    "images_absent": flat(changed(lambda d: d["images"].clear()), accepted=False, says="lists no images"),
    "annotations_absent": flat(changed(lambda d: d.pop("annotations")), accepted=False, says="'annotations'"),
    "extra_keys": flat(changed(lambda d: d.update(info=None, licenses=None, videos=[]))),

    # EXIF: pixels are stored as 64 x 48.
    "exif_half_turn": Case({"a.json": content()}, {"p1.jpg": {"orientation": 3}, "p2.jpg": {}}, says="orientation"),
    "exif_half_turn_among_upright": Case(
        {"a.json": changed(lambda d: d["images"][0].update(width=48, height=64))},
        {"p1.jpg": {"orientation": 8}, "p2.jpg": {"orientation": 3}}, says="like the others",
    ),
    "exif_without_sizes": Case({"a.json": each("images", width=..., height=...)},
                               {"p1.jpg": {"orientation": 6}, "p2.jpg": {}}, says="as stored"),

    # Splits.
    "train_and_another": Case(
        {"train.json": content(), "holdout.json": content(3)}, {f"images/p{i}.jpg": {} for i in range(1, 5)}, objects=4
    ),
    "test_split_without_annotations": Case(
        {"train/_annotations.coco.json": content(), "test/_annotations.coco.json": content() | {"annotations": []}},
        {f"{split}/p{i}.jpg": {"seed": seed} for seed, split in enumerate(("train", "test")) for i in (1, 2)},
        says="without any object to evaluate",
    ),
    "val_with_other_ids": two_splits(copy.deepcopy(TWO_CLASSES), _swap_categories(copy.deepcopy(TWO_CLASSES)),
                                     says="matched by name"),
    "val_with_other_class": two_splits(content(), each("categories", name="other"), accepted=False, says="categor"),
    "images_in_both_splits": Case(
        {"train/a.json": content(), "valid/a.json": content()},
        {f"{split}/p{i}.jpg": {} for split in ("train", "valid") for i in (1, 2)}, objects=4, says="also in",
    ),
}  # fmt: skip


def write(case: Case, folder: Path) -> Path:
    for name, data in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            path.write_text(text, encoding="utf-8")
    for name, options in case.pictures.items():
        save_picture(folder / name, **options)
    return folder
