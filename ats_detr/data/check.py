"""Check a COCO-format data set and report all problems at once: `ats-detr datasets check PATH`."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from ats_detr.data.coco import (
    REQUIRED_FIELDS,
    AnnotationError,
    annotation_fault,
    parse_annotations,
    record_fault,
)
from ats_detr.data.images import IMAGE_SUFFIXES, ImageFileError, decode_image
from ats_detr.errors import UserError

Level = Literal["error", "warning", "note"]
_TOLERANCE = 1.0
"""Pixels by which boxes may stick out of their image: rounding of annotation tools."""
_MOST_BARS = 40
_SMALL, _LARGE = 32, 96
"""COCO's limits of small, medium and large: square roots of areas in pixels."""


@dataclass
class Finding:
    """One kind of problem, with everything it was found at."""

    level: Level
    """error: training stops at it or learns something wrong; warning: probably not meant; note: worth knowing."""
    what: str
    places: list[str] = field(default_factory=list)


@dataclass
class Split:
    """One annotation file with its images."""

    annotations: Path
    images: Path
    findings: list[Finding] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of each image that is listed, as the annotation file says."""
    objects_per_image: list[int] = field(default_factory=list)
    objects_per_category: Counter[int] = field(default_factory=Counter)
    box_sides: list[float] = field(default_factory=list)
    """Square root of the area in pixels of each usable box."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """File name by content, of the files that can be read."""

    def add(self, level: Level, what: str, places: Iterable[str] = ()) -> None:
        places = list(places)
        if places:
            self.findings.append(Finding(level, what, places))

    @property
    def num_errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)


def find_splits(path: Path, images: Path | None = None) -> list[Split]:
    """The annotation files under `path` and the folders of their images.

    Args:
        path: an annotation file, or a folder with `annotations/*.json` (COCO: instances_train2017.json goes with
            train2017/) or with `*/_annotations.coco.json` beside the images (Roboflow).
        images: folder of the images, where it cannot be guessed.

    Raises UserError where there is none.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(
            [*path.glob("annotations/*.json"), *path.glob("*.json"), *path.glob("*/_annotations.coco.json")]
        )
        files = [
            file
            for file in files
            if not file.name.startswith(("captions_", "person_keypoints_", "image_info_"))
        ]
    else:
        raise UserError(f"{path}: there is no such file or folder")
    if not files:
        raise UserError(f"{path}: no annotation file in it; give one, or a folder with annotations/*.json")
    return [Split(file, images or _folder_of(file)) for file in files]


def _folder_of(file: Path) -> Path:
    """Where the images of an annotation file most likely are."""
    name = file.stem.removeprefix("instances_")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    for folder in (root / name, root / "images" / name, root / "images"):
        if folder.is_dir():
            return folder
    return root / name if file.parent.name == "annotations" else file.parent


def check_dataset(
    splits: Sequence[Split], *, track: Callable[[Iterable[Any], str, int], Iterable[Any]] | None = None
) -> list[Finding]:
    """Look at every record and decode every image of the splits; their findings are in `Split.findings`, those about
    several splits are returned.

    Args:
        track: (items, description, number) -> the items; a progress bar.
    """
    for split in splits:
        try:
            content = parse_annotations(split.annotations)
        except AnnotationError as error:
            split.add("error", "the annotation file cannot be used", [str(error)])
            continue
        images = _check_records(split, content)
        _check_objects(split, content, images)
        _check_files(split, images, track)
    return _compare(splits)


# ------------------------------------------------------------------------------------------------- the annotation file
def _check_records(split: Split, content: Mapping[str, Any]) -> dict[int, Any]:
    """Images by id, those that can be used; fills `categories` and `sizes`."""
    by_id: dict[str, dict[int, Any]] = {}
    for key, required in REQUIRED_FIELDS.items():
        records: dict[int, Any] = {}
        faults, repeated = [], []
        for i, record in enumerate(content[key]):
            fault = record_fault(record, required)
            if fault is not None:
                faults.append(f"{key}[{i}] {fault}")
            elif record["id"] in records:
                repeated.append(f"{key}[{i}] repeats id {record['id']}")
            else:
                records[record["id"]] = record
        split.add("error", f"entries of '{key}' that cannot be used", faults)
        split.add("error", f"ids that occur twice under '{key}'", repeated)
        if not records:
            split.add("error", f"no usable entries under '{key}'", [str(split.annotations)])
        by_id[key] = records
    images = by_id["images"]
    flat = [image for image in images.values() if min(image["height"], image["width"]) <= 0]
    where = (f"image {image['id']}: {image['width']} x {image['height']}" for image in flat)
    split.add("error", "images of no height or width", where)
    names = Counter(image["file_name"] for image in images.values())
    split.add("warning", "files that are listed twice", (name for name, count in names.items() if count > 1))
    split.categories = {i: category["name"] for i, category in sorted(by_id["categories"].items())}
    twice = [name for name, count in Counter(split.categories.values()).items() if count > 1]
    split.add("warning", "categories of one name and different ids", twice)
    split.sizes = [(image["height"], image["width"]) for image in images.values()]
    return images


def _check_objects(split: Split, content: Mapping[str, Any], images: Mapping[int, Any]) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    ids: set[Any] = set()
    boxes: set[tuple[Any, ...]] = set()
    objects: Counter[int] = Counter()
    for i, record in enumerate(content["annotations"]):
        where = f"annotations[{i}]"
        fault = annotation_fault(record, images, split.categories)
        if isinstance(record, dict) and "id" in record:
            if str(record["id"]) in ids:
                found["repeated"].append(f"{where} repeats id {record['id']}")
            ids.add(str(record["id"]))
        if fault is not None:
            found[
                "category" if "category_id" in fault else "image" if "image_id" in fault else "fault"
            ].append(f"{where} {fault}")
            continue
        image = images[record["image_id"]]
        where += f" of {image['file_name']}"
        x, y, width, height = box = record["bbox"]
        if width <= 0 or height <= 0:
            found["flat"].append(f"{where}: {width:g} x {height:g}")
            continue
        sticks_out = max(-x, -y, x + width - image["width"], y + height - image["height"])
        if min(x + width, y + height, image["width"] - x, image["height"] - y) <= 0:
            found["outside"].append(f"{where}: {box} in {image['width']} x {image['height']}")
            continue
        if sticks_out > _TOLERANCE:
            found["sticks out"].append(f"{where}: by {sticks_out:.0f} of {width:.0f} x {height:.0f} pixels")
        key = (record["image_id"], record["category_id"], *box)
        if key in boxes:
            found["same"].append(f"{where}: {box}")
        boxes.add(key)
        if record.get("iscrowd", 0):
            found["crowd"].append(where)
            continue
        objects[record["image_id"]] += 1
        split.objects_per_category[record["category_id"]] += 1
        split.box_sides.append(float(width * height) ** 0.5)
    split.add("error", "annotations of unknown images", found["image"])
    split.add("error", "annotations of unknown categories", found["category"])
    split.add("error", "annotations that cannot be used", found["fault"])
    split.add("error", "boxes outside their image", found["outside"])
    split.add("warning", "boxes that stick out of their image (they are cut off)", found["sticks out"])
    split.add("warning", "boxes without area (they are left out)", found["flat"])
    split.add("warning", "objects that are annotated twice", found["same"])
    split.add("warning", "annotation ids that occur twice", found["repeated"])
    unused = [name for i, name in split.categories.items() if not split.objects_per_category[i]]
    split.add("warning", "categories without any object", unused)
    split.objects_per_image = [objects[image_id] for image_id in images]
    empty = [image["file_name"] for image_id, image in images.items() if not objects[image_id]]
    split.add("note", "images without objects (they are trained on, as background)", empty)
    split.add("note", "crowd regions (not trained on, not counted as misses)", found["crowd"])


# ------------------------------------------------------------------------------------------------------ the image files
def _check_files(split: Split, images: Mapping[int, Any], track: Callable[..., Iterable[Any]] | None) -> None:
    if not split.images.is_dir():
        split.add(
            "error", "the folder of the images does not exist (--images names another)", [str(split.images)]
        )
        return
    missing, unreadable, sizes, same = [], [], [], []
    with ThreadPoolExecutor(8) as pool:
        records = list(images.values())
        looked = pool.map(lambda image: _look_at(split.images / image["file_name"]), records)
        results: Iterable[Any] = zip(records, looked, strict=True)
        if track is not None:
            results = track(results, str(split.images), len(records))
        for image, (fault, size, digest) in results:
            name = image["file_name"]
            if fault == "missing":
                missing.append(name)
            elif fault is not None:
                unreadable.append(fault)
            else:
                if digest in split.digests and split.digests[digest] != name:
                    same.append(f"{name} and {split.digests[digest]}")
                split.digests[digest] = name
                if size != (image["height"], image["width"]):
                    turned = " (turned by its EXIF data: boxes refer to stored pixels)"
                    told = (image["height"], image["width"])
                    sizes.append(
                        f"{name} is {size[1]} x {size[0]}, listed as {told[1]} x {told[0]}"
                        f"{turned if told == size[::-1] else ''}"
                    )
    split.add("error", "image files that are missing", missing)
    split.add("error", "image files that cannot be read", unreadable)
    split.add("error", "images of another size than listed", sizes)
    split.add("warning", "files of equal content", same)
    listed = {Path(image["file_name"]).name for image in images.values()}
    files = (file for file in split.images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    split.add(
        "note", "image files that are not listed", sorted(f.name for f in files if f.name not in listed)
    )


def _look_at(path: Path) -> tuple[str | None, tuple[int, int], bytes]:
    """What is wrong with the file, its size (height, width), and a digest of its content."""
    try:
        encoded = path.read_bytes()
        image = decode_image(encoded, path.name)
    except FileNotFoundError:
        return "missing", (0, 0), b""
    except OSError as error:
        return f"{path.name}: {error.strerror}", (0, 0), b""
    except ImageFileError as error:
        return str(error).removeprefix("image "), (0, 0), b""
    return None, (image.height, image.width), hashlib.blake2b(encoded, digest_size=16).digest()


def _compare(splits: Sequence[Split]) -> list[Finding]:
    """What is wrong between splits."""
    findings = []
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            names = f"{one.annotations.name} and {other.annotations.name}"
            differing = [
                f"{category}: {one.categories.get(category, 'missing')}, {other.categories.get(category, 'missing')}"
                for category in sorted(one.categories.keys() | other.categories.keys())
                if one.categories.get(category) != other.categories.get(category)
            ]
            if differing and one.categories and other.categories:
                findings.append(Finding("error", f"categories that differ between {names}", differing))
            shared = [
                f"{one.digests[d]} and {other.digests[d]}" for d in one.digests.keys() & other.digests.keys()
            ]
            if shared:
                findings.append(Finding("warning", f"images that are in both {names}", sorted(shared)))
    return findings


# --------------------------------------------------------------------------------------------------------- the picture
def plot_dataset(splits: Sequence[Split]) -> Figure:
    """Sizes of images, objects per class and per image, and sizes of boxes, split beside split."""
    names: dict[int, str] = {}
    for split in splits:
        names.update(split.categories)
    total: Counter[int] = sum((split.objects_per_category for split in splits), Counter())
    classes = sorted(names, key=lambda i: -total[i])
    num_left_out = max(0, len(classes) - _MOST_BARS)
    classes = classes[:_MOST_BARS]
    height = max(6.4, 2.2 + 0.2 * len(classes))
    figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 1.15])
    sizes, per_image, sides = (figure.add_subplot(grid[row, 0]) for row in range(3))
    bars = figure.add_subplot(grid[:, 1])
    colours = ["#3a86c8", "#ff9f1c", "#5aa469", "#8d5a97"]
    thickness = 0.8 / len(splits)
    for number, split in enumerate(splits):
        colour, label = colours[number % len(colours)], split.annotations.stem.removeprefix("instances_")
        if split.sizes:
            heights, widths = zip(*split.sizes, strict=True)
            sizes.scatter(widths, heights, s=16, alpha=0.5, color=colour, linewidths=0, label=label)
        counts = np.bincount(np.array(split.objects_per_image, np.int64))
        shares = 100 * counts / max(1, counts.sum())
        per_image.plot(np.arange(len(shares)), shares, color=colour, drawstyle="steps-mid", label=label)
        if split.box_sides:
            edges = np.geomspace(2, max(1024.0, max(split.box_sides) * 1.01), 31)
            shares, _ = np.histogram(split.box_sides, edges)
            sides.stairs(100 * shares / len(split.box_sides), edges, color=colour)
        places = np.arange(len(classes)) + (number - (len(splits) - 1) / 2) * thickness
        values = [split.objects_per_category[i] for i in classes]
        bars.barh(
            places,
            values,
            thickness,
            color=colour,
            label=f"{label}: {sum(split.objects_per_category.values())} objects",
        )
    sizes.set(title="Image sizes", xlabel="width (pixels)", ylabel="height")
    sizes.set(xlim=(0, None), ylim=(0, None))
    per_image.set(title="Objects per image", xlabel="objects", ylabel="% of images")
    sides.set(title="Box sizes", xlabel="square root of the area (pixels)", ylabel="% of boxes", xscale="log")
    for limit in (_SMALL, _LARGE):
        sides.axvline(limit, color="#5d6975", linewidth=0.8, linestyle=":")
    sides.set_xticks([4, 16, 32, 96, 256, 1024], ["4", "16", "32", "96", "256", "1024"], minor=False)
    sides.minorticks_off()
    more = f" (the {_MOST_BARS} commonest of {len(names)})" if num_left_out else ""
    bars.set(title=f"Objects per class{more}", xlabel="objects")
    bars.set_yticks(np.arange(len(classes)), [names[i] for i in classes], fontsize=9)
    bars.set_ylim(len(classes) - 0.4, -0.6)
    if total and max(total.values()) > 50 * max(1, min(total.values())):
        bars.set(xscale="log", xlim=(0.7, None))
        bars.xaxis.set_major_formatter("{x:g}")
    bars.legend(frameon=False, loc="lower right")
    for axis in (sizes, per_image, sides, bars):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def lines(findings: Sequence[Finding], *, most: int = 5) -> Iterator[str]:
    """Findings as lines of text, the worst first, at most `most` places of each."""
    order: tuple[Level, ...] = ("error", "warning", "note")
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        yield f"{finding.level}: {len(finding.places)} {finding.what}"
        yield from (f"    {place}" for place in finding.places[:most])
        if len(finding.places) > most:
            yield f"    ... and {len(finding.places) - most} more"
