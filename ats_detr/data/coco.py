"""COCO-format detection data from any folder and annotation file: validated, packed, decoded on demand.

Nothing here depends on the model: `ClassMap` says which row of the classification head stands for which
category.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ats_detr.data.images import ImageFileError, decode_image
from ats_detr.errors import UserError

log = logging.getLogger(__name__)

COCO_2017_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""The 80 category ids of COCO 2017. Published models have 91 rows, row = category id; ten rows and row 0 are
unused.
"""


class AnnotationError(UserError):
    """The annotation file cannot be used. The message names the file, what is wrong and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """Rows of the classification head <-> category ids <-> names. Stored in every checkpoint."""

    num_rows: int
    """Rows of the classification head; rows that no category uses stay untrained."""
    rows: tuple[int, ...]
    """Row of each category, ascending."""
    category_ids: tuple[int, ...]
    """Id of each category in annotation files."""
    names: tuple[str, ...]
    """Name of each category."""

    @staticmethod
    def from_categories(categories: Mapping[int, str]) -> ClassMap:
        """COCO 2017's 80 ids keep the published 91 rows; any other set of ids is numbered 0..n-1 in ascending
        order.
        """
        ids = tuple(sorted(categories))
        is_coco = frozenset(ids) == COCO_2017_IDS
        return ClassMap(
            num_rows=91 if is_coco else len(ids),
            rows=ids if is_coco else tuple(range(len(ids))),
            category_ids=ids,
            names=tuple(categories[i] for i in ids),
        )

    def name_of_row(self, row: int) -> str:
        """Category name for pictures and tables; rows without a category are shown by number."""
        return self._name_by_row.get(row, f"row {row}")

    def rows_of(self, category_ids: np.ndarray) -> np.ndarray:
        """int64 rows of an array of category ids, -1 where the id is not in the map."""
        return _look_up(category_ids, self.category_ids, self.rows)

    def category_ids_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 category ids of an array of rows, -1 where no category uses the row."""
        return _look_up(rows, self.rows, self.category_ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for checkpoints."""
        categories = [
            {"row": row, "id": category_id, "name": name}
            for row, category_id, name in zip(self.rows, self.category_ids, self.names, strict=True)
        ]
        return {"num_rows": self.num_rows, "categories": categories}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> ClassMap:
        """Inverse of `to_dict`."""
        categories = state["categories"]
        return ClassMap(
            num_rows=state["num_rows"],
            rows=tuple(c["row"] for c in categories),
            category_ids=tuple(c["id"] for c in categories),
            names=tuple(c["name"] for c in categories),
        )

    @cached_property
    def _name_by_row(self) -> dict[int, str]:
        return dict(zip(self.rows, self.names, strict=True))


def _look_up(values: np.ndarray, keys: Sequence[int], results: Sequence[int]) -> np.ndarray:
    """results[keys.index(v)] of each value, -1 for values that are not among the ascending keys."""
    keys_array, results_array = np.asarray(keys, np.int64), np.asarray(results, np.int64)
    if not len(keys_array):
        return np.full(len(values), -1, np.int64)
    place = np.searchsorted(keys_array, values).clip(max=len(keys_array) - 1)
    return np.where(keys_array[place] == values, results_array[place], -1)


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO instances file in a handful of numpy arrays, images by ascending id, annotations grouped by
    image.

    Packed, because Python objects that loader processes touch are copied page by page (their reference counts
    change): with lists and dicts the host memory of a training run grows by the size of the annotations times
    the workers.
    """

    file: Path
    categories: dict[int, str]
    image_ids: np.ndarray
    """int64 [images]"""
    sizes: np.ndarray
    """int64 [images, 2] height, width"""
    file_names: np.ndarray
    """bytes [images], UTF-8"""
    starts: np.ndarray
    """int64 [images + 1] first annotation of each image"""
    boxes_xywh: np.ndarray
    """float64 [annotations, 4] in pixels, as in the file"""
    areas: np.ndarray
    """float64 [annotations] area of the object's mask (of its box where the file gives none)"""
    category_ids: np.ndarray
    """int64 [annotations]"""
    crowd: np.ndarray
    """bool [annotations]"""

    @staticmethod
    def read(file: str | Path) -> CocoAnnotations:
        """Parse and validate; raises AnnotationError, which says what is wrong where."""
        file = Path(file)
        content = parse_annotations(file)
        categories = _unique_ids(file, content, "categories")
        images = _unique_ids(file, content, "images")
        images = dict(sorted(images.items()))
        index_of_image = {image_id: i for i, image_id in enumerate(images)}
        sizes = np.array([(r["height"], r["width"]) for r in images.values()], np.int64).reshape(-1, 2)
        if (sizes <= 0).any():
            bad = list(images.values())[int((sizes <= 0).any(1).argmax())]
            raise AnnotationError(
                f"{file}: image {bad['id']} has height {bad['height']}, width {bad['width']}"
            )

        records = content["annotations"]
        for i, record in enumerate(records):
            fault = annotation_fault(record, index_of_image, categories)
            if fault is not None:
                raise AnnotationError(f"{file}: annotations[{i}] {fault}")
        image_index = np.array([index_of_image[r["image_id"]] for r in records], np.int64)
        order = np.argsort(image_index, kind="stable")
        boxes = np.array([r["bbox"] for r in records], np.float64).reshape(-1, 4)
        areas = np.array([r.get("area", r["bbox"][2] * r["bbox"][3]) for r in records], np.float64)
        return CocoAnnotations(
            file=file,
            categories={i: str(r["name"]) for i, r in categories.items()},
            image_ids=np.fromiter(images, np.int64, len(images)),
            sizes=sizes,
            file_names=np.array([r["file_name"].encode() for r in images.values()], np.bytes_),
            starts=np.concatenate([[0], np.bincount(image_index, minlength=len(images)).cumsum()]).astype(
                np.int64
            ),
            boxes_xywh=boxes[order],
            areas=areas[order],
            category_ids=np.array([r["category_id"] for r in records], np.int64)[order],
            crowd=np.array([bool(r.get("iscrowd", 0)) for r in records], bool)[order],
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        return self.file_names[index].decode()

    def indices_of(self, image_ids: Sequence[int]) -> list[int]:
        """Positions of images that are in the dataset."""
        return np.searchsorted(self.image_ids, np.array(image_ids, np.int64)).tolist()

    def by_position(self, indices: Iterable[int]) -> dict[str, Any]:
        """The ground truth of some images in COCO's layout for an evaluator: every annotation, crowds included.

        Ids are positions: of an image in this dataset, of a category among the ascending category ids. Annotations
        are numbered from 1: pycocotools reads an annotation id of 0 as "unmatched".
        """
        place_of = {category_id: place for place, category_id in enumerate(sorted(self.categories))}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in indices:
            height, width = self.sizes[index].tolist()
            images.append({"id": index, "height": height, "width": width})
            for row in range(self.starts[index], self.starts[index + 1]):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": place_of[int(self.category_ids[row])],
                        "bbox": self.boxes_xywh[row].tolist(),
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowd[row]),
                    }
                )
        categories = [{"id": place, "name": self.categories[i]} for i, place in place_of.items()]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def parse_annotations(file: Path) -> dict[str, Any]:
    """The JSON of an instances file, its three lists being there. Raises AnnotationError."""
    if not file.is_file():
        raise AnnotationError(f"annotation file {file} does not exist")
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{file} is not JSON ({error}); give a COCO instances file") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        missing = [k for k in lists if not (isinstance(content, dict) and isinstance(content.get(k), list))]
        raise AnnotationError(
            f"{file} is JSON but not a COCO instances file: no list under {', '.join(map(repr, missing))}"
        )
    return content


REQUIRED_FIELDS = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}


def _unique_ids(file: Path, content: dict[str, Any], key: str) -> dict[int, Any]:
    """The records of content[key] by id."""
    records: dict[int, Any] = {}
    for i, record in enumerate(content[key]):
        where = f"{file} is not a COCO instances file: {key}[{i}]"
        fault = record_fault(record, REQUIRED_FIELDS[key])
        if fault is not None:
            raise AnnotationError(f"{where} {fault}")
        if record["id"] in records:
            raise AnnotationError(f"{where} repeats id {record['id']}; ids must be unique")
        records[record["id"]] = record
    return records


def record_fault(record: Any, required: Sequence[str]) -> str | None:
    """What an image or a category lacks; names are text, all other fields integers."""
    if not isinstance(record, dict):
        return "is not an object"
    for field in required:
        kind = str if field in ("name", "file_name") else int
        if not isinstance(record.get(field), kind):
            return f"needs {field!r} of type {kind.__name__}, found {record.get(field)!r}"
        if kind is int and not -(2**63) <= record[field] < 2**63:
            return f"has {field!r} {record[field]}, which does not fit into 64 bits; renumber the ids"
    return None


def annotation_fault(record: Any, images: Mapping[int, Any], categories: Mapping[int, Any]) -> str | None:
    """What makes an annotation unusable, given images and categories by id."""
    if not isinstance(record, dict):
        return "is not an object"
    if not isinstance(record.get("image_id"), int) or record["image_id"] not in images:
        return f"names image_id {record.get('image_id')!r}, which is not under 'images'"
    if not isinstance(record.get("category_id"), int) or record["category_id"] not in categories:
        known = f"{min(categories)}..{max(categories)}" if categories else "none"
        return f"has category_id {record.get('category_id')!r}, which is not under 'categories' (ids {known})"
    box = record.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(value) for value in box)):
        return f"needs 'bbox' [x, y, width, height] in pixels, found {box!r}"
    if not _is_finite(record.get("area", 0)):
        return f"needs a number as 'area', found {record['area']!r}"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")  # False for NaN


class CocoDetection(Dataset):
    """Images and objects of a COCO-format dataset, not yet transformed. Images without objects are members
    like any other.

    `image_folder` holds the files that the annotation file names. `class_map`: that of the model (from its
    checkpoint, or of the training set for the validation set); None makes one from the file. Boxes are
    clipped to the image; crowd regions and boxes without area are not objects to train on, but stay in the
    ground truth of the evaluation.

    `cache_images` reads all encoded files into memory once, in one block that forked loader workers share
    (each process of a multi-GPU run has its own). `on_bad_image`: "error" stops with the file's name, already
    here if a file is missing; "skip" leaves it to the loaders to pass over such images and to count them.

    Raises AnnotationError or ImageFileError.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        *,
        class_map: ClassMap | None = None,
        cache_images: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        self.image_folder = Path(image_folder)
        if not self.image_folder.is_dir():
            raise ImageFileError(f"image folder {self.image_folder} does not exist")
        self.annotations = CocoAnnotations.read(annotation_file)
        if not len(self.annotations):
            raise AnnotationError(f"{annotation_file} lists no images")
        if not self.annotations.categories:
            raise AnnotationError(f"{annotation_file} lists no categories")
        self.on_bad_image = on_bad_image
        self._check_files_exist()
        self.class_map = class_map or ClassMap.from_categories(self.annotations.categories)
        self._check_classes()
        self.label_rows = self.class_map.rows_of(self.annotations.category_ids)

        annotations = self.annotations
        sizes_hw = np.repeat(annotations.sizes, np.diff(annotations.starts), axis=0)
        boxes = annotations.boxes_xywh.copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, sizes_hw[:, [1, 0, 1, 0]])
        self.boxes_xyxy = boxes.astype(np.float32)
        """float32 [annotations, 4] pixels, clipped to the image."""
        self.is_object = ~annotations.crowd & (self.boxes_xyxy[:, 2:] > self.boxes_xyxy[:, :2]).all(1)
        """bool [annotations] what training and matching look at: neither a crowd nor without area."""
        self._cache = _FileCache(map(self.path, range(len(self)))) if cache_images else None

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor, Tensor]:
        """RGB image, boxes_xyxy_N4 float32 in pixels, labels_N int64 class rows."""
        return self.read_image(index), *self.objects(index)

    def path(self, index: int) -> Path:
        return self.image_folder / self.annotations.file_name(index)

    def image_id(self, index: int) -> int:
        return int(self.annotations.image_ids[index])

    @property
    def num_objects(self) -> np.ndarray:
        """int64 [images] objects of each image: no crowds, no empty boxes."""
        counts = np.concatenate([[0], self.is_object.cumsum()])[self.annotations.starts]
        return np.diff(counts).astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the annotation file."""
        height, width = self.annotations.sizes[index].tolist()
        return height, width

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """boxes_xyxy_N4 float32 in pixels, labels_N int64 class rows; no crowds, no empty boxes."""
        rows = slice(self.annotations.starts[index], self.annotations.starts[index + 1])
        keep = self.is_object[rows]
        boxes, labels = self.boxes_xyxy[rows][keep], self.label_rows[rows][keep]
        return torch.from_numpy(boxes), torch.from_numpy(labels)

    def read_image(self, index: int) -> Image.Image:
        """The decoded image as RGB, whatever its mode. Pixels as stored: boxes do not know about EXIF
        rotation.

        Raises ImageFileError when the file is missing, cannot be decoded or has another size than the
        annotations say.
        """
        path = self.path(index)
        try:
            encoded = path.read_bytes() if self._cache is None else self._cache[index]
        except FileNotFoundError:
            raise ImageFileError(f"image {path} does not exist") from None
        except OSError as error:
            raise ImageFileError(f"image {path} cannot be read: {error.strerror}") from None
        image = decode_image(encoded, path)
        if (image.height, image.width) != self.size(index):
            height, width = self.size(index)
            raise ImageFileError(
                f"image {path} is {image.width}x{image.height} pixels but {self.annotations.file} says"
                f" {width}x{height} (boxes must refer to the pixels as stored, before any EXIF rotation)"
            )
        return image

    def _check_files_exist(self) -> None:
        """One directory listing instead of a stat per image; `data.on_bad_image: skip` passes over what is
        missing.
        """
        listed = set(os.listdir(self.image_folder))
        names = map(self.annotations.file_name, range(len(self)))
        missing = [name for name in names if name not in listed and not (self.image_folder / name).is_file()]
        if not missing:
            return
        which = f"{len(missing)} of {len(self)} images of {self.annotations.file} are missing"
        if self.on_bad_image == "error" or len(missing) == len(self):
            raise ImageFileError(
                f"{which}, first {self.image_folder / missing[0]} (on_bad_image=skip passes over them)"
            )
        log.warning("%s from %s and will be skipped, first %s", which, self.image_folder, missing[0])

    def _check_classes(self) -> None:
        annotations, class_map = self.annotations, self.class_map
        used = np.unique(annotations.category_ids)
        outside = used[class_map.rows_of(used) < 0].tolist()
        if outside:
            listed = ", ".join(f"{i} ({annotations.categories[i]})" for i in outside[:5])
            raise AnnotationError(
                f"{annotations.file} has category ids outside the model's {len(class_map.names)} classes:"
                f" {listed}{', ...' if len(outside) > 5 else ''}; use the categories it was trained with"
            )
        for category_id, name in zip(class_map.category_ids, class_map.names, strict=True):
            if annotations.categories.get(category_id, name) != name:
                raise AnnotationError(
                    f"{annotations.file} calls category {category_id}"
                    f" {annotations.categories[category_id]!r}, the model calls it {name!r};"
                    " ids and names must agree"
                )


class _FileCache:
    """Contents of many files in one shared block of memory; a missing file raises on reading."""

    def __init__(self, paths: map[Path]) -> None:
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(_read_or_none, paths))
        lengths = np.array([0 if c is None else len(c) for c in contents], np.int64)
        self.ends = lengths.cumsum()
        self.starts = self.ends - lengths
        self.missing = np.array([c is None for c in contents], bool)
        self.block = torch.empty(int(lengths.sum()), dtype=torch.uint8).share_memory_()
        view = memoryview(self.block.numpy())
        for i, content in enumerate(contents):
            if content is not None:
                view[self.starts[i] : self.ends[i]] = content
                contents[i] = None  # the peak stays near one copy

    def __getitem__(self, index: int) -> bytes:
        if self.missing[index]:
            raise FileNotFoundError
        return self.block.numpy()[self.starts[index] : self.ends[index]].tobytes()


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def spread_over_difficulty(dataset: CocoDetection, num_images: int) -> list[int]:
    """Dataset indices of `num_images` images (or all, if there are fewer), from the fewest objects to the
    most.
    """
    num_objects = [len(dataset.objects(index)[1]) for index in range(len(dataset))]
    order = np.argsort(num_objects, kind="stable")
    places = np.linspace(0, len(order) - 1, min(num_images, len(order))).round().astype(int)
    return order[places].tolist()
