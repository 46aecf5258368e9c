"""The records of COCO instances files of any exporter, repaired where the intended value is certain."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ats_detr.data.findings import Findings
from ats_detr.text import shortened

PLACE = "ats_detr_place"
"""Key of an annotation that was converted from another format: the file and line that messages name."""
_MAX_NAME_BYTES = 4096
_MAX_SIDE = 2**31
_INTEGER_TEXT = re.compile(r"(-?[0-9]{1,19})(?:\.0+)?", re.ASCII)
_INT64 = range(-(2**63), 2**63)


# ---------------------------------------------------------------------------------------------------- single values
def _number(value: Any) -> float | None:
    """A finite number, also of a string; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: Any) -> int | None:
    """An integer, also of an integral float or a string; None for everything else. Exact at any size."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            number = _number(value)
            return None if number is None else _integer(number)
    return None


def image_key(value: Any) -> int | str | None:
    """What identifies an image: an integer, or a string that is none."""
    if not isinstance(value, str):
        return _integer(value)
    # Other texts that Python reads as numbers are names: 12345e67 is hexadecimal, 2024_01 a date.
    number = _INTEGER_TEXT.fullmatch(value.strip())
    if number and int(number[1]) in _INT64:
        return int(number[1])
    return value or None


def _crowd(value: Any) -> bool | None:
    """Whether `iscrowd` means a crowd; None where it is unclear."""
    if value is None or value is False or value == "" or (isinstance(value, float) and math.isnan(value)):
        return False
    if value is True:
        return True
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    integer = _integer(value)
    return bool(integer) if integer in (0, 1) else None


def is_listed_crowd(record: Any) -> bool:
    """Whether an annotation, usable or not, is marked as a crowd."""
    return isinstance(record, dict) and bool(_crowd(record.get("iscrowd")))


# --------------------------------------------------------------------------------------------------------- categories
def read_categories(records: Sequence[Any], findings: Findings) -> dict[int, str]:
    """Names by id, ascending."""
    categories: dict[int, str] = {}
    repeated: set[int] = set()
    for i, record in enumerate(records):
        where = f"categories[{i}]"
        if not isinstance(record, dict):
            findings.bad("entries of 'categories' that cannot be used", f"{where} is not an object")
            continue
        category_id, name = _integer(record.get("id")), record.get("name")
        if category_id is None or category_id not in _INT64:
            fault = f"{where} has id {shortened(record.get('id'))}; it must be an integer of at most 64 bits"
            findings.bad("entries of 'categories' that cannot be used", fault)
            continue
        if not isinstance(record["id"], int):
            findings.warn("category ids that are not integers (converted)", f"{where}: {record['id']!r}")
        if not isinstance(name, str) or not name:
            has_name = isinstance(name, (int, float)) and not isinstance(name, bool)
            findings.warn("category names that are no text (replaced)", f"{where}: {shortened(name)}")
            name = shortened(name) if has_name else f"category {category_id}"
        name = name.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # lone surrogates are no text
        if category_id not in categories:
            categories[category_id] = name
        elif categories[category_id] == name:
            findings.warn("categories that are listed twice", f"{where}: {name}")
        else:
            repeated.add(category_id)
            fault = f"{where} ({name}) repeats id {category_id} of {categories[category_id]}"
            findings.bad("ids that occur twice under 'categories'", fault)
    omitted = repeated if findings.skip_bad else ()
    return {key: name for key, name in sorted(categories.items()) if key not in omitted}


# ------------------------------------------------------------------------------------------------------------- images
@dataclass(frozen=True)
class Images:
    """The columns of CocoAnnotations that have an entry per image."""

    ids: np.ndarray
    result_ids: np.ndarray | None
    sizes: np.ndarray
    file_names: np.ndarray
    index_of: dict[int | str, int]
    """Position by what identifies an image in the file."""


def read_images(records: Sequence[Any], findings: Findings) -> Images:
    """Images by ascending id; where an id is not an integer, in the order of the file."""
    found: dict[int | str, tuple[str, int, int, Any]] = {}
    repeated: set[int | str] = set()
    for i, record in enumerate(records):
        fault = _read_image(i, record, found, repeated, findings)
        if fault is not None:
            findings.bad("entries of 'images' that cannot be used", f"images[{i}] {fault}")
    if findings.skip_bad:
        for key in repeated:  # their annotations may belong to either image
            del found[key]
    is_numbered = all(isinstance(key, int) for key in found)
    order = sorted(found) if is_numbered else list(found)
    if not is_numbered:
        first = next(key for key in found if isinstance(key, str))
        findings.warn("image ids that are not integers (numbered from 1; results have the ids)", first)
    values = [found[key] for key in order]
    exact = all(type(value[3]) is int for value in values)
    names = [value[0].encode("utf-8", "surrogatepass") for value in values]
    twice = np.unique(np.array(names, np.bytes_), return_counts=True)
    findings.add(
        "warning",
        "files that are listed under two ids (each is used with its own objects only)",
        (name.decode("utf-8", "replace") for name in twice[0][twice[1] > 1]),
    )
    return Images(
        ids=np.array(order if is_numbered else range(1, len(order) + 1), np.int64),
        result_ids=None
        if exact
        else np.array([json.dumps(value[3]).encode() for value in values], np.bytes_),
        sizes=np.array([value[1:3] for value in values], np.int64).reshape(-1, 2),
        file_names=np.array(names, np.bytes_),
        index_of={key: index for index, key in enumerate(order)},
    )


def _read_image(
    i: int,
    record: Any,
    found: dict[int | str, tuple[str, int, int, Any]],
    repeated: set[int | str],
    findings: Findings,
) -> str | None:
    """Add an image as (file name, height, width, id as in the file); returns what makes it unusable."""
    if not isinstance(record, dict):
        return "is not an object"
    key = image_key(record.get("id"))
    if key is None:
        return f"has id {shortened(record.get('id'))}; it must be an integer"
    if isinstance(key, int) and key not in _INT64:
        return f"has id {shortened(key)}, which does not fit into 64 bits; renumber the ids"
    if isinstance(key, int) and not isinstance(record["id"], int):
        findings.warn("image ids that are not integers (converted)", f"images[{i}]: {record['id']!r}")
    name = _file_name(record)
    if name is None:
        return f"has file_name {shortened(record.get('file_name'))}; it must be the name of a file"
    if record.get("file_name") != name:
        findings.warn("file names that are taken from the URL", f"images[{i}]: {name}")
    height, width = (_side(record.get(side)) for side in ("height", "width"))
    where = f"images[{i}]: width {shortened(record.get('width'))}, height {shortened(record.get('height'))}"
    if height == 0 or width == 0:
        height = width = 0
        findings.warn("images without a size (read from the file)", where)
    elif not (isinstance(record["height"], int) and isinstance(record["width"], int)):
        findings.warn("image sizes that are not integers (converted)", where)
    entry = (name, height, width, record["id"])
    if key in found and found[key] != entry:
        repeated.add(key)
        return f"repeats id {key} of {found[key][0]}; ids must be unique"
    if key in found:
        findings.warn("images that are listed twice", f"images[{i}]: {name}")
    found[key] = entry
    return None


def _file_name(record: Mapping[str, Any]) -> str | None:
    """The file name of an image; LVIS gives a URL instead, of which the last folder and the name count."""
    name = record.get("file_name")
    if name in (None, "") and isinstance(record.get("coco_url"), str):
        name = "/".join(record["coco_url"].split("/")[-2:])
    is_name = isinstance(name, str) and 0 < len(name) <= _MAX_NAME_BYTES // 4 and "\0" not in name
    return name if is_name else None


def _side(value: Any) -> int:
    """A height or width in pixels; 0 where it is missing or cannot be one."""
    number = _number(value)
    is_side = number is not None and number.is_integer() and 0 < number < _MAX_SIDE
    return int(number) if is_side and number is not None else 0


# -------------------------------------------------------------------------------------------------------- annotations
def read_annotations(
    records: Sequence[Any], images: Images, categories: Mapping[int, str], findings: Findings
) -> dict[str, np.ndarray]:
    """The arrays of CocoAnnotations that have an entry per annotation, and `starts`."""
    image_index, boxes, areas, category_ids, crowd, ids = [], [], [], [], [], []
    codes: dict[str, int] = {}
    for i, record in enumerate(records):
        place = record.get(PLACE) if isinstance(record, dict) else None
        where = place if isinstance(place, str) else f"annotations[{i}]"
        read = _read_annotation(where, record, images, categories, findings)
        if read is None:
            continue
        index, category_id, box, area, is_crowd = read
        image_index.append(index)
        category_ids.append(category_id)
        boxes.append(box)
        areas.append(area)
        crowd.append(is_crowd)
        given = record.get("id")
        ids.append(-1 if given is None else codes.setdefault(shortened(given), len(codes)))
    table = {
        "boxes_xywh": np.array(boxes, np.float64).reshape(-1, 4),
        "areas": np.array(areas, np.float64),
        "category_ids": np.array(category_ids, np.int64),
        "crowd": np.array(crowd, bool),
    }
    index_column = np.array(image_index, np.int64)
    kept = _without_copies(index_column, np.array(ids, np.int64), table, images, findings)
    index_column = index_column[kept]
    order = kept[np.argsort(index_column, kind="stable")]
    counts = np.bincount(index_column, minlength=len(images.ids))
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return {"starts": starts, **{key: column[order] for key, column in table.items()}}


def _without_copies(
    image_index: np.ndarray,
    ids: np.ndarray,
    table: Mapping[str, np.ndarray],
    images: Images,
    findings: Findings,
) -> np.ndarray:
    """Ascending rows without copies: annotations that agree in everything, the id included."""
    if not len(ids):
        return np.zeros(0, np.int64)
    content = [image_index, table["category_ids"], *table["boxes_xywh"].T, table["crowd"]]
    order = np.lexsort([ids, *content])  # stable: of copies the first row comes first
    alike = np.concatenate(
        [[False], np.all([column[order[1:]] == column[order[:-1]] for column in content], 0)]
    )
    same_id = np.concatenate([[False], ids[order[1:]] == ids[order[:-1]]])

    def places(rows: np.ndarray) -> Iterable[str]:
        for row in rows:
            name = images.file_names[image_index[row]].decode("utf-8", "replace")
            yield f"{table['boxes_xywh'][row].tolist()} of {name}"

    findings.add(
        "warning", "annotations that are listed twice (one copy is used)", places(order[alike & same_id])
    )
    findings.add("warning", "objects that are annotated twice", places(order[alike & ~same_id]))
    kept = np.sort(order[~(alike & same_id)])
    given = ids[kept][ids[kept] >= 0]
    num_repeated = len(given) - len(np.unique(given))
    if num_repeated:
        places_of_ids = [f"{num_repeated} of {len(given)} ids"]
        findings.add(
            "warning", "annotation files with ids that occur twice (they are not used)", places_of_ids
        )
    return kept


def _read_annotation(
    where: str, record: Any, images: Images, categories: Mapping[int, str], findings: Findings
) -> tuple[int, int, Sequence[float], float, bool] | None:
    """Image index, category id, box, area and crowd of an annotation; None where it cannot be used."""
    if not isinstance(record, dict):
        findings.bad("annotations that cannot be used", f"{where} is not an object")
        return None
    image_id, category_id = record.get("image_id"), record.get("category_id")
    key = image_id if type(image_id) is int else image_key(image_id)
    index = None if key is None else images.index_of.get(key)
    if index is None:
        findings.bad(
            "annotations of unknown images",
            f"{where} has image_id {shortened(image_id)}, which is not under 'images'",
        )
        return None
    category = category_id if type(category_id) is int else _integer(category_id)
    if category is None or category not in categories:
        known = f"{min(categories)}..{max(categories)}" if categories else "none"
        findings.bad(
            "annotations of unknown categories",
            f"{where} has category_id {shortened(category_id)}, which is not under 'categories' (ids {known})",
        )
        return None
    if type(image_id) is not int and isinstance(key, int):
        findings.warn("ids in annotations that are not integers (converted)", f"{where}: {image_id!r}")
    elif type(category_id) is not int:
        findings.warn("ids in annotations that are not integers (converted)", f"{where}: {category_id!r}")
    is_crowd = _read_crowd(where, record, findings)
    box = _read_box(where, record, images, index, findings)
    if is_crowd is None or box is None:
        return None
    return index, category, box, _read_area(where, record, box, findings), is_crowd


def _read_crowd(where: str, record: Mapping[str, Any], findings: Findings) -> bool | None:
    value = record.get("iscrowd", 0)
    if value == 0 and type(value) is int:
        return False
    is_crowd = _crowd(value)
    if is_crowd is None:
        findings.bad(
            "annotations that cannot be used", f"{where} has iscrowd {shortened(value)}; it must be 0 or 1"
        )
    elif type(value) is not int:
        text = f"{where}: {shortened(value)} is read as {int(is_crowd)}"
        findings.warn("values of iscrowd that are not integers (converted)", text)
    return is_crowd


def _read_box(
    where: str, record: Mapping[str, Any], images: Images, index: int, findings: Findings
) -> Sequence[float] | None:
    """[x, y, width, height] in pixels."""
    given = record.get("bbox")
    name = images.file_names[index].decode("utf-8", "replace")
    if isinstance(given, list) and len(given) == 4:
        box = [_number(value) for value in given]
    else:
        box = [None]
    if None in box:
        segment = _segment_box(record.get("segmentation"))
        if segment is None:
            hint = "; a rotated box is not supported" if isinstance(given, list) and len(given) == 5 else ""
            findings.bad(
                "annotations that cannot be used",
                f"{where} of {name} needs bbox [x, y, width, height] in pixels, found {shortened(given)}{hint}",
            )
            return None
        findings.warn("boxes that are taken from the segmentation", f"{where}: bbox {shortened(given)}")
        box = list(segment)
    elif not all(type(value) is float or type(value) is int for value in given):
        findings.warn("boxes whose values are text (converted)", f"{where}: {shortened(given)}")
    if box[2] < 0 or box[3] < 0:  # type: ignore[operator]
        findings.bad(
            "boxes of negative width or height", f"{where} of {name}: bbox {shortened(given)} is negative"
        )
        return None
    attributes = record.get("attributes")
    angle = _number(attributes.get("rotation")) if isinstance(attributes, Mapping) else None
    if angle is not None and angle % 180:
        findings.warn(
            "rotated boxes (of CVAT), replaced by the boxes that enclose them",
            f"{where} of {name}: {angle:g}°",
        )
        return _enclosing_box(box, angle)  # type: ignore[arg-type]
    return box  # type: ignore[return-value]


def _enclosing_box(box: Sequence[float], angle: float) -> list[float]:
    """The box around [x, y, width, height] that is turned about its centre by `angle` degrees."""
    x, y, width, height = box
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    around = width * cosine + height * sine, width * sine + height * cosine
    turned = [x + (width - around[0]) / 2, y + (height - around[1]) / 2, *around]
    return [round(value, 6) for value in turned]


def _segment_box(segmentation: Any) -> Sequence[float] | None:
    """Bounding box [x, y, width, height] of polygons or of a run-length encoded mask."""
    if isinstance(segmentation, list) and segmentation:
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
            return None
        points = [_number(value) for polygon in polygons for value in polygon]
        if None in points:
            return None
        corners = np.array(points, np.float64).reshape(-1, 2)
        low, high = corners.min(0), corners.max(0)
        return [*low.tolist(), *(high - low).tolist()] if np.abs(corners).max() < 1e9 else None
    if isinstance(segmentation, dict):
        try:
            encoded = segmentation
            if isinstance(segmentation["counts"], list):
                encoded = coco_mask.frPyObjects(segmentation, *segmentation["size"])
            return coco_mask.toBbox(encoded).tolist()
        except Exception:  # pycocotools raises errors of any type
            return None
    return None


def _read_area(where: str, record: Mapping[str, Any], box: Sequence[float], findings: Findings) -> float:
    given = record.get("area")
    area = _number(given)
    if area is not None and area >= 0:
        if type(given) is str:
            findings.warn("areas that are text (converted)", f"{where}: {given!r}")
        return area
    findings.warn("annotations without an area (that of the box is used)", f"{where}: {shortened(given)}")
    return box[2] * box[3]
