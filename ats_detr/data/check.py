"""`ats-detr datasets check PATH`: every problem of a COCO-format dataset in one report.

A split is opened by `CocoDetection`, as in training and evaluation, so that both accept the same data; the check also
decodes every image.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from ats_detr.config import DataConfig, EvaluationConfig, ModelConfig
from ats_detr.data.annotations import parse_annotations
from ats_detr.data.classes import ClassMap
from ats_detr.data.coco import CocoDetection, ExifRule
from ats_detr.data.findings import Finding, Findings
from ats_detr.data.images import IMAGE_SUFFIXES, ImageFileError, decode_image, read_file
from ats_detr.data.layout import Role, SplitFiles, choose_split
from ats_detr.data.sources import find_layout
from ats_detr.errors import UserError
from ats_detr.fonts import legible

_MOST_BARS = 40
_SMALL, _LARGE = 32, 96
"""COCO's limits of small, medium and large: square roots of areas in pixels."""
_MIN_CONTRAST = 16
"""Smallest range of pixel values (of 255) of an image that shows something."""


@dataclass
class Split:
    """One annotation file with its images."""

    name: str
    annotations: Path
    images: Path | None
    """The folder of the images; None until it is found."""
    is_training: bool
    """It is trained on, so it needs objects."""
    role: Role | None = None
    """`train`, `val` or `test`, as file and folder are named."""
    findings: Findings = field(default_factory=lambda: Findings(""))
    dataset: CocoDetection | None = None
    """None where the split cannot be opened at all."""
    num_images: int = 0
    """Images that training or evaluation use; of a rejected split, images that are listed."""
    num_objects: int = 0
    """Objects in these images, without crowds and boxes without area; of a rejected split, those listed."""
    categories: dict[int, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) in pixels of each image."""
    objects_per_image: list[int] = field(default_factory=list)
    objects_per_category: Counter[int] = field(default_factory=Counter)
    box_sides: list[float] = field(default_factory=list)
    """Square root of the area in pixels of each object."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """File name by content, of the files that can be read."""

    @property
    def num_errors(self) -> int:
        return len(self.findings.of("error"))


def find_splits(path: Path, images: Path | None = None) -> list[Split]:
    """The splits of the dataset in a folder, or of one annotation file, as in training; see `sources.find_layout`.

    Args:
        images: folder of the images, where it cannot be found.

    Raises UserError where there is none.
    """
    files = find_layout(path).splits
    has_training = any(file.role == "train" for file in files)
    return [
        Split(
            file.name,
            file.annotations,
            images or file.images,
            is_training=file.role == "train" or (not has_training and file.role is None),
            role=file.role,
        )
        for file in files
    ]


def check_dataset(
    splits: Sequence[Split],
    *,
    exif: ExifRule = "auto",
    on_bad_image: Literal["error", "skip"] = "error",
    on_bad_annotation: Literal["error", "skip"] = "error",
    track: Callable[[Iterable[Any], str, int], Iterable[Any]] | None = None,
) -> None:
    """Read every record and decode every image of the splits; the results are in the splits.

    Args:
        exif, on_bad_image, on_bad_annotation: as in the `data` section of a run.
        track: (items, description, number) -> the items; a progress bar.
    """
    class_map: ClassMap | None = None
    for split in sorted(splits, key=lambda split: not split.is_training):
        split.findings = Findings(split.annotations, skip_bad=on_bad_annotation == "skip")
        try:
            split.dataset = CocoDetection(
                split.images,
                split.annotations,
                class_map=class_map,
                on_bad_image=on_bad_image,
                exif=exif,
                need_objects=split.is_training,
                findings=split.findings,
            )
        except UserError as error:
            split.findings.add("error", "dataset that cannot be opened", [error])
            _count_listed(split)
            continue
        if split.is_training and class_map is None and not split.num_errors:
            class_map = split.dataset.class_map
        split.images = split.dataset.image_folder
        bad = _check_files(split, split.dataset, track)
        _describe(split, split.dataset, bad)
    _compare(splits)
    files = [SplitFiles(split.name, split.annotations, split.role) for split in splits]
    for role in ("train", "val"):
        try:
            choose_split(files, role)
        except UserError as error:
            splits[0].findings.add("error", "dataset without a clear split", [error])


def report(splits: Sequence[Split]) -> dict[str, Any]:
    """The result of a check, ready for JSON. Accepted: training and evaluation start with these splits."""
    return {
        "accepted": bool(splits) and not any(split.num_errors for split in splits),
        "splits": [
            {
                "name": split.name,
                "images": None if split.images is None else str(split.images.absolute()),
                "annotations": str(split.annotations.absolute()),
                "num_images": split.num_images,
                "num_objects": split.num_objects,
                "errors": [str(finding) for finding in split.findings.of("error")],
                "warnings": [str(finding) for finding in split.findings.of("warning")],
            }
            for split in splits
        ],
    }


def _count_listed(split: Split) -> None:
    """Images and objects of a file whose images cannot be found."""
    try:
        content = parse_annotations(split.annotations, need_annotations=False)
    except UserError:
        return
    split.num_images, split.num_objects = len(content["images"]), len(content["annotations"])


def _describe(split: Split, dataset: CocoDetection, bad: set[int]) -> None:
    """Statistics of the split, and what they show."""
    annotations, counts = dataset.annotations, dataset.num_objects
    split.categories = annotations.categories
    split.sizes = [(height, width) for height, width in annotations.sizes.tolist()]
    split.objects_per_image = counts.tolist()
    split.objects_per_category = Counter(annotations.category_ids[dataset.is_object].tolist())
    width, height = annotations.boxes_xywh[dataset.is_object][:, 2:].T
    split.box_sides = np.sqrt(width * height).tolist()
    add, names = split.findings.add, [Path(annotations.file_name(i)).name for i in range(len(annotations))]
    by_name = Counter(split.categories.values())
    add(
        "warning",
        "categories of one name and different ids",
        (n for n, count in by_name.items() if count > 1),
    )
    unused = (name for i, name in split.categories.items() if not split.objects_per_category[i])
    add("warning", "categories without any object", unused)
    if split.is_training and len(annotations) < DataConfig().batch_size:
        what = f"training set of fewer images than data.batch_size = {DataConfig().batch_size} by default"
        add("error", what, [f"{len(annotations)} images"])
    for setting, limit in (
        ("model.num_queries", ModelConfig().num_queries),
        ("evaluation.max_detections", EvaluationConfig().max_detections),
    ):
        crowded = (f"{names[i]} ({counts[i]})" for i in np.flatnonzero(counts > limit))
        add("warning", f"images with more objects than {setting} = {limit} by default", crowded)
    use = "trained on as" if split.is_training else "evaluated as"
    add("note", f"images without objects ({use} background)", (names[i] for i in np.flatnonzero(counts == 0)))
    crowds = annotations.image_of_annotation()[annotations.crowd]
    add("note", "crowd regions (not trained on, not counted as misses)", (names[i] for i in crowds))
    if split.num_errors:
        split.num_images, split.num_objects = annotations.num_listed
    else:
        split.num_images = len(annotations) - len(bad)
        split.num_objects = int(counts.sum()) - sum(int(counts[i]) for i in bad)


# ---------------------------------------------------------------------------------------------------- the image files
def _check_files(
    split: Split, dataset: CocoDetection, track: Callable[..., Iterable[Any]] | None
) -> set[int]:
    """Decode every image; the result is the images that cannot be used."""
    bad = set(np.flatnonzero(dataset.unusable).tolist())
    indices = [i for i in range(len(dataset)) if i not in bad]
    undecodable, same, flat = [], [], []
    with ThreadPoolExecutor(8) as pool:
        results: Iterable[Any] = zip(
            indices, pool.map(lambda i: _look_at(dataset.path(i)), indices), strict=True
        )
        if track is not None:
            results = track(results, str(split.images), len(indices))
        for index, (fault, digest, contrast) in results:
            name = dataset.path(index).name
            if fault is not None:
                undecodable.append(fault)
                bad.add(index)
                continue
            if contrast < _MIN_CONTRAST:
                flat.append(f"{name}: values differ by {contrast} of 255")
            if split.digests.get(digest, name) != name:
                same.append(f"{name} and {split.digests[digest]}")
            split.digests[digest] = name
    dataset.report_bad_images("images that cannot be decoded", undecodable)
    split.findings.add("warning", "images of (almost) one colour", flat)
    split.findings.add("warning", "files of equal content", same)
    listed = {dataset.path(i).name for i in range(len(dataset))}
    files = (file for file in dataset.image_folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    unlisted = sorted(file.name for file in files if file.name not in listed)
    split.findings.add("note", "image files that are not listed", unlisted)
    return bad


def _look_at(path: Path) -> tuple[str | None, bytes, int]:
    """What is wrong with a file, a digest of its content, and the range of its pixel values."""
    try:
        encoded = read_file(path)
        image = decode_image(encoded, path.name)
    except ImageFileError as error:
        return str(error).removeprefix("image "), b"", 0
    pixels = np.asarray(image)
    contrast = int((pixels.max((0, 1)).astype(int) - pixels.min((0, 1))).max())
    return None, hashlib.blake2b(encoded, digest_size=16).digest(), contrast


def _compare(splits: Sequence[Split]) -> None:
    """Images that two splits share."""
    for one, other in itertools.combinations(splits, 2):
        digests = one.digests.keys() & other.digests.keys()
        shared = sorted(f"{one.digests[digest]} and {other.digests[digest]}" for digest in digests)
        other.findings.add("warning", f"images that are also in {one.name}", shared)


# --------------------------------------------------------------------------------------------------------- the picture
def crowded_share(split: Split, num_queries: int) -> float:
    """Share of the images with more objects than a model of `num_queries` can detect, 0..1."""
    counts = split.objects_per_image
    return sum(count > num_queries for count in counts) / max(1, len(counts))


def plot_dataset(splits: Sequence[Split], *, num_queries: int = ModelConfig().num_queries) -> Figure:
    """Sizes of images, objects per class and per image, and sizes of boxes, split beside split.

    Args:
        num_queries: `model.num_queries`; the share of images with more objects is stated.
    """
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
        colour, label = colours[number % len(colours)], split.name
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
    if any(count > num_queries for split in splits for count in split.objects_per_image):
        per_image.axvline(num_queries + 0.5, color="#5d6975", linewidth=0.8, linestyle=":")
    share_lines = [
        f"{legible(split.name)}: {crowded_share(split, num_queries):.1%} of {len(split.objects_per_image)} images"
        for split in splits
    ]
    text = "\n".join([f"more than {num_queries} objects (num_queries)", *share_lines])
    per_image.text(
        0.98, 0.94, text, transform=per_image.transAxes, ha="right", va="top", fontsize=8, parse_math=False
    )
    sides.set(title="Box sizes", xlabel="square root of the area (pixels)", ylabel="% of boxes", xscale="log")
    for limit in (_SMALL, _LARGE):
        sides.axvline(limit, color="#5d6975", linewidth=0.8, linestyle=":")
    sides.set_xticks([4, 16, 32, 96, 256, 1024], ["4", "16", "32", "96", "256", "1024"], minor=False)
    sides.minorticks_off()
    more = f" (the {_MOST_BARS} commonest of {len(names)})" if num_left_out else ""
    bars.set(title=f"Objects per class{more}", xlabel="objects")
    bars.set_yticks(
        np.arange(len(classes)), [legible(names[i]) for i in classes], fontsize=9, parse_math=False
    )
    bars.set_ylim(len(classes) - 0.4, -0.6)
    if total and max(total.values()) > 50 * max(1, min(total.values())):
        bars.set(xscale="log", xlim=(0.7, None))
        bars.xaxis.set_major_formatter("{x:g}")
    bars.legend(frameon=False, loc="lower right")
    for axis in (sizes, per_image, sides, bars):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def lines(findings: Iterable[Finding], *, most: int = 5) -> Iterator[str]:
    """Findings as lines of text, the worst first, at most `most` places of each."""
    for finding in findings:
        yield f"{finding.level}: {finding.count} {finding.what}" + (
            f" ({finding.fix})" if finding.fix else ""
        )
        yield from (f"    {place}" for place in finding.places[:most])
        if finding.count > most:
            yield f"    ... and {finding.count - most} more"
