"""Datasets of other formats, converted once to COCO files.

Records that cannot be used are converted unchanged: opening the COCO file reports all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ats_detr.data.annotations import CONVERTED
from ats_detr.data.layout import Role
from ats_detr.errors import UserError
from ats_detr.files import replaced_file

logger = logging.getLogger(__name__)

VERSION = 2
"""Part of the digest of a converted file; must be raised when the same data is converted differently."""


@dataclass
class Part:
    """One split in a format other than COCO."""

    name: str
    role: Role | None
    """None where nothing says which."""
    images: list[Path] = field(default_factory=list)
    """Image files; those of labels without an image do not exist."""
    labels: list[Path | None] = field(default_factory=list)
    """The label file of each image; None where it has none."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What is probably not intended, with the places."""

    def add(self, image: Path, label: Path | None) -> None:
        self.images.append(image)
        self.labels.append(label)

    def note(self, what: str, place: str) -> None:
        self.notes.setdefault(what, []).append(place)


Objects = list[dict[str, Any]]
"""Annotations in COCO's layout without ids, `bbox` being [x1, y1, x2, y2] in pixels, or a string where it cannot be
used. `category_id` is the name of the class where the dataset lists no classes."""


class Reader:
    """Reads the labels of one dataset, one image at a time; see `yolo` and `voc`."""

    classes: list[str] | None = None
    """Names by category id. None: the names that occur, in alphabetical order, are numbered from 1."""
    state: Any = None
    """Further settings that the result depends on."""
    upright: bool | None = None
    """True: boxes refer to upright images, as viewers show them. None: the listed sizes tell."""

    def read(self, image: Path, label: Path | None, part: Part, name: str) -> tuple[tuple[int, int], Objects]:
        """(height, width), 0 where it is unknown, and the objects of an image.

        Args:
            name: that of the label file in messages.

        Raises UserError where the file cannot be read, or where supervision is not installed.
        """
        raise NotImplementedError

    def finish(self, parts: Sequence[Part], contents: Sequence[dict[str, Any]]) -> None:
        """Correct the converted splits by what all labels show. Raises UserError."""


@dataclass
class Definition:
    """Where a dataset of another format was found."""

    format: Literal["YOLO", "Pascal VOC"]
    path: Path
    """YOLO: the file with the class names; VOC: the folder of the dataset."""
    root: Path
    """The folder of the dataset."""


@dataclass
class Foreign:
    """A dataset in a format other than COCO."""

    definition: Definition
    parts: list[Part]
    reader: Reader

    def __post_init__(self) -> None:
        """Raises UserError where there is nothing to train on."""
        if not any(part.images for part in self.parts):
            raise UserError(
                f"{self.definition.path}: no images of this {self.definition.format} dataset were found"
            )
        pairs = {pair for part in self.parts for pair in zip(part.images, part.labels, strict=True)}
        num_images = Counter(label for _, label in pairs)
        for part in self.parts:
            unlabelled = []
            for image, label in zip(part.images, part.labels, strict=True):
                name = relative_name(image, self.definition.root)
                if label is None:
                    unlabelled.append(name)
                elif num_images[label] > 1:
                    part.note("images that share a label file with another image", name)
            if part.role != "test" and unlabelled and len(unlabelled) == len(part.images):
                fault = "has a label file" if any(map(os.path.exists, part.images)) else "exists"
                raise UserError(
                    f"{self.definition.path}: none of the {len(part.images)} images of the split {part.name!r} {fault},"
                    f" first {unlabelled[0]}"
                )
            if unlabelled:
                part.notes["images without a label file (used as background)"] = unlabelled


def relative_name(path: Path, root: Path) -> str:
    """A path relative to a folder, with slashes; absolute on another drive."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:
        return path.as_posix()


def read_label(label: Path) -> bytes:
    """The content of a label file. Raises UserError."""
    try:
        return label.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: this label file cannot be read ({error.strerror})") from None


def supervision_formats() -> tuple[ModuleType, ModuleType]:
    """The YOLO and the VOC module of supervision. Raises UserError where they are not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the absence of OpenCV, which is not needed
            from supervision.dataset.formats import pascal_voc, yolo
    except ImportError:
        raise UserError(
            "datasets in YOLO or Pascal VOC format need supervision: pip install 'ats_detr[supervision]'"
        ) from None
    return yolo, pascal_voc


def convert(found: Foreign, paths: Sequence[Path], *, images_from: Path | None = None) -> None:
    """Write the COCO file of each split, unless it is there already for the same data.

    Boxes are rounded to 1/100 pixel, as in COCO's files.

    Args:
        paths: the file of each split.
        images_from: the folder that file names are relative to. None: that of the dataset.

    Raises UserError where supervision is not installed, or where a file cannot be read or written.
    """
    root, reader = found.definition.root, found.reader
    images_from = images_from or root
    digest = _digest(found, images_from)
    if all(is_current(path, digest) for path in paths):
        return
    num_images = sum(len(part.images) for part in found.parts)
    logger.info(
        "converting the %d images of %s from %s to COCO files", num_images, root, found.definition.format
    )
    contents = [_read_part(part, reader, root, images_from) for part in found.parts]
    reader.finish(found.parts, contents)
    categories = _categories(reader.classes, contents)
    for part, path, content in zip(found.parts, paths, contents, strict=True):
        about: dict[str, Any] = {
            "digest": digest,
            "format": found.definition.format,
            "folder": str(root),
            "notes": part.notes,
        }
        if reader.upright is not None:
            about["upright"] = reader.upright
        write_coco({"info": {CONVERTED: about}, **content, "categories": categories}, path)


def _read_part(part: Part, reader: Reader, root: Path, images_from: Path) -> dict[str, list[dict[str, Any]]]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True), start=1):
        name = relative_name(label, root) if label is not None else ""
        (height, width), objects = reader.read(image, label, part, name)
        file_name = relative_name(image, images_from)
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for entry in objects:
            if not isinstance(entry["bbox"], str):
                x1, y1, x2, y2 = entry["bbox"]
                entry["bbox"] = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
                entry["area"] = round(entry["bbox"][2] * entry["bbox"][3], 4)
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **entry})
    return {"images": images, "annotations": annotations}


def _categories(
    classes: Sequence[str] | None, contents: Sequence[dict[str, list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """COCO's categories; names of classes in the annotations are replaced by ids."""
    if classes is not None:
        return [{"id": index, "name": name} for index, name in enumerate(classes)]
    annotations = [annotation for content in contents for annotation in content["annotations"]]
    names = sorted({annotation["category_id"] for annotation in annotations} - {""})
    ids = {name: number for number, name in enumerate(names, start=1)}
    for annotation in annotations:
        annotation["category_id"] = ids.get(annotation["category_id"])
    return [{"id": number, "name": name} for name, number in ids.items()]


def write_coco(content: dict[str, Any], path: Path) -> None:
    """Write an annotation file atomically. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{path}: cannot write this annotation file ({error.strerror}); for files that are made automatically, set"
            " ATS_DETR_CACHE to a folder that can be written"
        ) from None


def is_current(path: Path, digest: str) -> bool:
    """Whether a file was made by this package from the data of this digest."""
    try:
        with path.open("rb") as file:
            start = file.read(1000)  # the digest comes first; files are replaced as a whole
    except OSError:
        return False
    return f'"{CONVERTED}": {{ "digest": "{digest}"' in " ".join(start.decode("utf-8", "replace").split())


def _digest(found: Foreign, images_from: Path) -> str:
    """Of everything that the converted files depend on: contents of labels, sizes and times of images."""
    reader = found.reader
    about = [VERSION, found.definition.format, reader.classes, reader.state, os.path.realpath(images_from)]
    sha = hashlib.sha256(json.dumps(about).encode())
    for part in found.parts:
        sha.update(json.dumps([part.name, part.role, len(part.images), part.notes]).encode())
        for image, label in zip(part.images, part.labels, strict=True):
            try:
                status = os.stat(image)
                state = (status.st_size, status.st_mtime_ns)
            except OSError:
                state = (-1, -1)
            sha.update(json.dumps([os.fspath(image), state]).encode())
            sha.update(b"" if label is None else hashlib.sha256(read_label(label)).digest())
    return sha.hexdigest()[:32]
