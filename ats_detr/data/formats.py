"""YOLO and Pascal VOC datasets, converted once to COCO files. `supervision` parses the labels.

YOLO: `data.yaml` (Ultralytics, Roboflow, CVAT), `classes.txt` (Label Studio, LabelImg) or `obj.names` (Darknet). VOC:
`Annotations/`, `JPEGImages/` and `ImageSets/Main/`, or XML files beside their images. Records that cannot be used are
converted unchanged: opening the COCO file reports all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

from ats_detr.data.annotations import CONVERTED, PLACE
from ats_detr.data.images import IMAGE_SUFFIXES, ImageFileError, read_header
from ats_detr.errors import UserError
from ats_detr.files import replaced_file

logger = logging.getLogger(__name__)

Format = Literal["YOLO", "Pascal VOC"]
VERSION = 1
"""Part of the digest of a converted file; must be raised when the same data is converted differently."""
ROLES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Role of a split by its usual names."""
_IMAGE_FOLDERS = ("JPEGImages", "images", "imgs", "img", "data")
_LABEL_FOLDERS = ("annotations", "labels", "xml")
_NAME_FILES = ("classes.txt", "obj.names")
_NO_LABELS = ("classes.txt", "labels.txt", "notes.txt")
_MAX_DEPTH = 3
"""Levels of subfolders in which a dataset may start."""
_MAX_FOLDERS = 10_000
_MAX_CLASSES = 100_000


@dataclass
class Part:
    """One split in a format other than COCO."""

    name: str
    role: str | None
    """`train`, `val` or `test`; None where nothing says which."""
    images: list[Path] = field(default_factory=list)
    """Image files; a path without suffix is that of a missing image."""
    labels: list[Path | None] = field(default_factory=list)
    """The label file of each image; None where it has none."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What is probably not intended, with the places."""

    def add(self, image: Path, label: Path | None) -> None:
        self.images.append(image)
        self.labels.append(label)


@dataclass
class Foreign:
    """A dataset in a format other than COCO."""

    format: Format
    root: Path
    """Folder that the listed images are relative to."""
    definition: Path
    """YOLO: the file with the class names; VOC: the folder of the dataset."""
    parts: list[Part]
    classes: list[str] = field(default_factory=list)
    """YOLO: names by class index."""
    num_keypoint_values: int = 0
    """YOLO: values after the box in a line of a pose dataset."""


# ----------------------------------------------------------------------------------------------------------- search
def find_definitions(path: Path) -> list[tuple[Format, Path]]:
    """(format, definition) of each YOLO or VOC dataset in a folder and its subfolders, or of a data.yaml."""
    if not path.is_dir():
        return [("YOLO", path)] if path.suffix.lower() in (".yaml", ".yml") else []
    folders = list(itertools.islice(_folders(path), _MAX_FOLDERS))
    yolo = [file for folder in folders for file in sorted(folder.glob("*.y*ml")) if _is_data_yaml(file)]
    if not yolo:
        named = [folder / name for folder in folders for name in _NAME_FILES if _names_labels(folder / name)]
        # Label Studio writes classes.txt above the labels, LabelImg among them, some tools do both.
        yolo = [file for file in named if not any(other.parent in file.parent.parents for other in named)]
    voc = dict.fromkeys(_voc_base(folder, path) for folder in folders if _holds_voc(folder))
    voc_roots = [base for base in voc if not any(other in base.parents for other in voc)]
    found: list[tuple[Format, Path]] = [("YOLO", file) for file in yolo]
    return [*found, *(("Pascal VOC", base) for base in voc_roots)]


def _folders(path: Path, depth: int = 0) -> Iterator[Path]:
    yield path
    if depth < _MAX_DEPTH:
        try:
            below = sorted(
                Path(e.path) for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".")
            )
        except OSError:
            return
        for folder in below:
            yield from _folders(folder, depth + 1)


def _is_data_yaml(file: Path) -> bool:
    content = _read_yaml(file)
    has_names = isinstance(content, dict) and "names" in content
    return has_names and any(key in content for key in (*ROLES, "nc", "path"))


def _names_labels(file: Path) -> bool:
    """Whether a list of class names belongs to YOLO labels."""
    if not file.is_file():
        return False
    return any(label is not None for part in _default_parts(_labels_root(file)) for label in part.labels)


def _labels_root(file: Path) -> Path:
    """The folder of the dataset of a list of class names, which LabelImg writes among the labels."""
    return file.parent.parent if file.parent.name == "labels" else file.parent


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None


def _holds_voc(folder: Path) -> bool:
    """Whether the first XML file in a folder is an annotation."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".xml")]
    except OSError:
        return False
    return bool(names) and _is_voc(folder / min(names))


def _is_voc(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b"<annotation" in stream.read(2000)
    except OSError:
        return False


def _voc_base(folder: Path, path: Path) -> Path:
    """The dataset that a folder of XML files belongs to."""
    while folder != path and folder.name.lower() in (*_LABEL_FOLDERS, *ROLES):
        folder = folder.parent
    return folder


def open_foreign(kind: Format, definition: Path) -> Foreign:
    """The files of a dataset that `find_definitions` has found. Raises UserError where there is nothing to train on."""
    found = _open_yolo(definition) if kind == "YOLO" else _open_voc(definition)
    if not any(part.images for part in found.parts):
        raise UserError(f"{definition}: no images of this {kind} dataset were found")
    for part in found.parts:
        pairs = zip(part.images, part.labels, strict=True)
        unlabelled = [relative_name(image, found.root) for image, label in pairs if label is None]
        if part.role != "test" and len(unlabelled) == len(part.images):
            raise UserError(
                f"{definition}: none of the {len(part.images)} images of the split {part.name!r} has a label file,"
                f" first {unlabelled[0]}"
            )
        if unlabelled:
            part.notes["images without a label file (used as background)"] = unlabelled
    return found


def relative_name(path: Path, root: Path) -> str:
    """A path relative to a folder, with slashes; absolute on another drive."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:
        return path.as_posix()


# ------------------------------------------------------------------------------------------------------------- YOLO
def _open_yolo(file: Path) -> Foreign:
    root = file.parent
    if file.name in _NAME_FILES:
        try:
            classes = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: the class names cannot be read ({error})") from None
        root = _labels_root(file)
        return Foreign("YOLO", root, file, _default_parts(root), [name.strip() for name in classes])
    content = _read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a data file of YOLO; must have `names:` and the folders of the splits")
    bases = [root / content["path"], root] if isinstance(content.get("path"), str) else [root]
    parts: dict[str, Part] = {}
    absent = []
    for key, role in ROLES.items():
        values = content.get(key) or []
        images: list[Path] = []
        for value in values if isinstance(values, list) else [values]:
            place = _locate(str(value), bases)
            if place is None:
                absent.append(f"{key}: {value}")
            elif place.is_dir():
                images += _images_below(place)
            else:
                images += _listed_in(place, bases)
        if images and role not in parts:
            parts[role] = _yolo_part(key, role, images)
    if absent and "train" not in parts:
        raise UserError(
            f"{file}: the training images do not exist ({', '.join(absent)}); correct the paths in it"
        )
    found = list(parts.values()) or _default_parts(root)
    if absent:
        found[0].notes["splits of the data file that do not exist"] = absent
    return Foreign(
        "YOLO", root, file, found, _class_names(content, file), _num_keypoint_values(content, file)
    )


def _class_names(content: dict[str, Any], file: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        try:
            by_index = {int(key): name for key, name in names.items() if not isinstance(key, bool)}
        except (TypeError, ValueError):
            by_index = {}
        if (
            not by_index
            or len(by_index) < len(names)
            or not 0 <= min(by_index) <= max(by_index) < _MAX_CLASSES
        ):
            raise UserError(f"{file}: the keys of `names:` must be class indices 0, 1, 2, ...")
        # A gap keeps its index: the labels refer to it.
        names = [by_index.get(i, f"class {i}") for i in range(max(by_index) + 1)]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: `names:` must list the class names")
    number = content.get("nc", len(names))
    if number != len(names):
        raise UserError(f"{file}: nc = {number!r}: must be {len(names)}, the number of names")
    return [str(name) for name in names]


def _num_keypoint_values(content: dict[str, Any], file: Path) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"{file}: kpt_shape = {shape!r}: must be [number of keypoints, 2 or 3]")
    return shape[0] * shape[1]


def _locate(value: str, bases: Sequence[Path]) -> Path | None:
    """The folder or the list of a split. Places inside the dataset come first: Roboflow writes `../train/images` for
    `train/images`, which beside other datasets would be the images of another one."""
    value = value.replace("\\", "/")
    inside = re.sub(r"^(\.\.?/)+", "", value)
    places = (Path(os.path.normpath(base / text)) for text in (inside, value) for base in reversed(bases))
    return next(filter(os.path.exists, places), None)


def _listed_in(file: Path, bases: Sequence[Path]) -> list[Path]:
    """The images of a list of paths; a path that does not exist as written."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: this list of images cannot be read ({error})") from None
    images = []
    for text in (line.strip().replace("\\", "/") for line in lines):
        if text:
            texts = (text, text.split("/", 1)[-1])  # CVAT: data/images/train/a.jpg
            tried = [Path(os.path.normpath(base / part)) for part in texts for base in (file.parent, *bases)]
            images.append(next(filter(os.path.exists, tried), tried[0]))
    return images


def _images_below(folder: Path) -> list[Path]:
    found = sorted(
        os.path.join(directory, name)
        for directory, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    )
    return [Path(path) for path in found]


def _default_parts(root: Path) -> list[Part]:
    """Splits by the names of folders: `images/train/`, `train/images/`, or everything in one."""
    parts: dict[str, Part] = {}
    for name, role in ROLES.items():
        images = _images_below(root / "images" / name) or _images_below(root / name)
        if images and role not in parts:
            parts[role] = _yolo_part(name, role, images)
    return list(parts.values()) or [_yolo_part("all", None, _images_below(root))]


def _yolo_part(name: str, role: str | None, images: Iterable[Path]) -> Part:
    """The split of these images, and of the label files beside theirs whose image is missing."""
    part = Part(name, role)
    folders: dict[Path, Path] = {}
    for image in dict.fromkeys(images):
        label = next((file for file in _label_files(image) if file.is_file()), None)
        part.add(image, label)
        if label is not None and label.parent != image.parent:  # beside images are text files of other kinds
            folders[label.parent] = image.parent
    for labels, folder in folders.items():
        present = _images_by_stem(folder)
        for name in sorted(os.listdir(labels)):
            stem, suffix = os.path.splitext(name)
            if suffix == ".txt" and stem not in present and name not in _NO_LABELS:
                part.add(folder / stem, labels / name)
    return part


def _label_files(image: Path) -> Iterator[Path]:
    """Where the labels of an image may be."""
    parts, name = image.parts, f"{image.stem}.txt"
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            yield Path(*parts[:i], "labels", *parts[i + 1 : -1], name)
    yield image.with_name(name)
    yield image.parent / "labels" / name
    yield image.parent.parent / "labels" / name


# ------------------------------------------------------------------------------------------------------- Pascal VOC
def _open_voc(root: Path) -> Foreign:
    files = [
        Path(directory, name)
        for directory, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(".xml") and not name.startswith(".")
    ]
    listings: dict[Path, dict[str, Path]] = {}
    used: dict[Path, dict[str, Path]] = {}
    label_of: dict[Path, Path | None] = {}
    for file in sorted(filter(_is_voc, files)):
        image = _image_of(file, listings, used)
        if other := label_of.get(image):
            raise UserError(f"{other} and {file} describe the same image, {image}; remove one of them")
        label_of[image] = file
    for images in used.values():
        for image in images.values():
            label_of.setdefault(image, None)
    lists = {name: _image_set(root, name) for name in ("train", "val", "trainval", "test")}
    chosen = [name for name in ("train", "val", "test") if lists[name]]
    if lists["trainval"] and "train" not in chosen:
        chosen = ["trainval", *(name for name in chosen if name == "test")]
    if not chosen:
        return Foreign("Pascal VOC", root, root, _voc_parts_by_folder(root, label_of))
    by_stem: dict[str, list[Path]] = {}
    for image in sorted(label_of):
        by_stem.setdefault(image.stem, []).append(image)
    parts = [Part(name, "train" if name == "trainval" else name) for name in chosen]
    for part in parts:
        for stem in lists[part.name]:
            for image in by_stem.get(stem, [root / "JPEGImages" / stem]):
                part.add(image, label_of.get(image))
    return Foreign("Pascal VOC", root, root, parts)


def _voc_parts_by_folder(root: Path, label_of: dict[Path, Path | None]) -> list[Part]:
    parts: dict[str, Part] = {}
    for image in sorted(label_of):
        folders = [part.lower() for part in image.relative_to(root).parts[:-1]]
        name = next((folder for folder in folders if folder in ROLES), "all")
        parts.setdefault(name, Part(name, ROLES.get(name))).add(image, label_of[image])
    return list(parts.values())


def _image_of(label: Path, listings: dict[Path, dict[str, Path]], used: dict[Path, dict[str, Path]]) -> Path:
    """The image of an XML file: that of the same stem, otherwise that of the listed name, beside it or in a folder of
    images beside its folder. The folder is added to `used`."""
    folders = [label.parent, *(label.parent / name for name in _IMAGE_FOLDERS)]
    parts = label.parts
    for i in reversed(range(len(parts) - 1)):
        if parts[i].lower() in _LABEL_FOLDERS:
            rest = parts[i + 1 : -1]
            folders += [Path(*parts[:i], name, *rest) for name in _IMAGE_FOLDERS]
            folders.append(Path(*parts[:i], *rest))
            break
    for folder in folders:
        if folder not in listings:
            listings[folder] = _images_by_stem(folder)
    listed = re.search(rb"<filename>\s*(.*?)\s*</filename>", _read_label(label))
    name = Path(listed[1].decode("utf-8", "replace").replace("\\", "/")).stem if listed else ""
    for stem in (label.stem, name):  # the name is often that of another file
        for folder in folders:
            if stem in listings[folder]:
                used[folder] = listings[folder]
                return listings[folder][stem]
    return label.with_suffix("")


def _images_by_stem(folder: Path) -> dict[str, Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    parts = ((name, *os.path.splitext(name)) for name in names)
    return {stem: folder / name for name, stem, suffix in parts if suffix.lower() in IMAGE_SUFFIXES}


def _image_set(root: Path, name: str) -> list[str]:
    """The stems in a list of VOC's devkit."""
    try:
        lines = (root / "ImageSets" / "Main" / f"{name}.txt").read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


# ------------------------------------------------------------------------------------------------------- conversion
def convert(found: Foreign, paths: Sequence[Path], *, images_from: Path | None = None) -> None:
    """Write the COCO file of each split, unless it is there already for the same data.

    YOLO's class indices are the category ids; VOC's names, in alphabetical order, are numbered from 1. Boxes are
    rounded to 1/100 pixel, as in COCO's files.

    Args:
        paths: the file of each split.
        images_from: the folder that file names are relative to. None: `found.root`.

    Raises UserError where supervision is not installed, or where a file cannot be read or written.
    """
    images_from = images_from or found.root
    digest = _digest(found, images_from)
    if all(is_current(path, digest) for path in paths):
        return
    num_images = sum(len(part.images) for part in found.parts)
    logger.info("converting the %d images of %s from %s to COCO files", num_images, found.root, found.format)
    read = _yolo_reader(found) if found.format == "YOLO" else _voc_reader()
    contents = [_read_part(part, read, found.root, images_from) for part in found.parts]
    if found.format == "Pascal VOC":
        _count_from_one(found.parts, contents)
        annotations = [annotation for content in contents for annotation in content["annotations"]]
        names = sorted({annotation["category_id"] for annotation in annotations} - {""})
        ids = {name: number for number, name in enumerate(names, start=1)}
        for annotation in annotations:
            annotation["category_id"] = ids.get(annotation["category_id"])
        categories = [{"id": number, "name": name} for name, number in ids.items()]
    else:
        categories = [{"id": index, "name": name} for index, name in enumerate(found.classes)]
    for part, path, content in zip(found.parts, paths, contents, strict=True):
        about = {"digest": digest, "format": found.format, "folder": str(found.root), "notes": part.notes}
        write_coco({"info": {CONVERTED: about}, **content, "categories": categories}, path)


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
    about = [VERSION, found.format, found.classes, found.num_keypoint_values, str(images_from.absolute())]
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
            sha.update(b"" if label is None else hashlib.sha256(_read_label(label)).digest())
    return sha.hexdigest()[:32]


def _read_label(label: Path) -> bytes:
    try:
        return label.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: this label file cannot be read ({error.strerror})") from None


Reader = Callable[[Path, "Path | None", Part, str], tuple[tuple[int, int], list[dict[str, Any]]]]
"""(image, label file, split, name of the label file in messages) -> (height, width), annotations without ids. A size
of 0 is unknown; the bbox of an annotation that cannot be used is a string."""


def _read_part(part: Part, read: Reader, root: Path, images_from: Path) -> dict[str, list[dict[str, Any]]]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True), start=1):
        (height, width), objects = read(
            image, label, part, relative_name(label, root) if label is not None else ""
        )
        name = relative_name(image, images_from)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for entry in objects:
            box = entry["bbox"]
            if not isinstance(box, str):
                box = [
                    round(box[0], 2),
                    round(box[1], 2),
                    round(box[2] - box[0], 2),
                    round(box[3] - box[1], 2),
                ]
                entry["area"] = round(box[2] * box[3], 4)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **entry, "bbox": box}
            )
    return {"images": images, "annotations": annotations}


def _supervision() -> tuple[ModuleType, ModuleType]:
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


def _yolo_reader(found: Foreign) -> Reader:
    parse = _supervision()[0].yolo_annotations_to_detections
    num_pose_values = 5 + found.num_keypoint_values

    def read(
        image: Path, label: Path | None, part: Part, name: str
    ) -> tuple[tuple[int, int], list[dict[str, Any]]]:
        try:
            height, width = read_header(image).upright_size  # as the tools that draw and read YOLO labels
        except ImageFileError:
            return (0, 0), []
        lines: list[tuple[int, str]] = []
        text = b"" if label is None else _read_label(label)
        for number, line in enumerate(text.decode("utf-8-sig", "replace").splitlines(), start=1):
            values = line.split()
            if found.num_keypoint_values and len(values) == num_pose_values:
                values = values[:5]
            if values:
                lines.append((number, " ".join(values)))

        def objects(texts: list[str]) -> list[dict[str, Any]]:
            boxes = parse(texts, (width, height), with_masks=False)
            rows = zip(boxes.class_id.tolist(), boxes.xyxy.tolist(), strict=True) if texts else ()
            return [{"category_id": index, "bbox": box} for index, box in rows]

        try:
            result = objects([line for _, line in lines])
        except ValueError:
            result = []
            for number, line in lines:
                try:
                    result += objects([line])
                except ValueError:
                    index = line.split()[0]
                    result.append({"category_id": index, "bbox": line[:200], PLACE: f"{name}:{number}"})
            return (height, width), result
        for entry, (number, _) in zip(result, lines, strict=True):
            if not 0 <= entry["category_id"] < len(found.classes):
                entry[PLACE] = f"{name}:{number}"
        return (height, width), result

    return read


def _voc_reader() -> Reader:
    parse = _supervision()[1].detections_from_xml_obj
    from xml.etree.ElementTree import Element, ParseError

    from defusedxml import DefusedXmlException, ElementTree  # a requirement of supervision

    def read(
        image: Path, label: Path | None, part: Part, name: str
    ) -> tuple[tuple[int, int], list[dict[str, Any]]]:
        if label is None:
            return (0, 0), []
        try:
            root = ElementTree.fromstring(_read_label(label))
        except (ParseError, DefusedXmlException, ValueError) as error:
            raise UserError(
                f"{label}: not a Pascal VOC annotation ({error or type(error).__name__})"
            ) from None
        result = []
        for number, found in enumerate(root.findall("object"), start=1):
            for polygon in found.findall("polygon"):
                found.remove(polygon)  # its mask is not needed
            single = Element("annotation")
            single.append(found)
            difficult = (found.findtext("difficult") or "0").strip() not in ("", "0", "false", "False")
            try:
                boxes, (category,) = parse(single, [], (1, 1))
                entry = {"category_id": category.strip(), "bbox": boxes.xyxy[0].tolist()}
            except ValueError as error:
                category = (found.findtext("name") or "").strip()
                entry = {"category_id": category, "bbox": str(error), PLACE: f"{name}, object {number}"}
            if difficult:
                entry["iscrowd"] = 1
                what = "objects marked as difficult (not trained on, not counted as misses, as in VOC's evaluation)"
                part.notes.setdefault(what, []).append(f"{name}, object {number}")
            result.append(entry)
        return (_side(root, "height"), _side(root, "width")), result

    return read


def _side(root: Any, key: str) -> int:
    """A side of the image in pixels as an XML file lists it; 0 where it does not."""
    text = (root.findtext(f"size/{key}") or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else 0


def _count_from_one(parts: Sequence[Part], contents: Sequence[dict[str, list[dict[str, Any]]]]) -> None:
    """Undo the shift of boxes where the files count pixels from 0.

    VOC counts from 1: a box from xmin to xmax covers the pixels xmin - 1 to xmax - 1, counted from 0, and supervision
    converts it so. Some tools write corners in pixels from 0. A corner below 1 proves that.
    """
    boxes = [
        a["bbox"] for content in contents for a in content["annotations"] if not isinstance(a["bbox"], str)
    ]
    if not any(min(box[:2]) < 0 for box in boxes):
        return
    for part, content in zip(parts, contents, strict=True):
        places = []
        for annotation in content["annotations"]:
            box = annotation["bbox"]
            if isinstance(box, str):
                continue
            if min(box[:2]) < 0:
                places.append(f"{content['images'][annotation['image_id'] - 1]['file_name']}")
            box[:] = [box[0] + 1, box[1] + 1, round(box[2] - 1, 2), round(box[3] - 1, 2)]
            annotation["area"] = round(box[2] * box[3], 4)
        if places:
            part.notes[
                "boxes from pixel 0, so that all coordinates are taken to count from 0, not from 1"
            ] = places
