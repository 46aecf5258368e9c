"""YOLO datasets: an image has a text file with a line per object, `class x y width height`, relative to its size.

The class names and the splits are in `data.yaml` (Ultralytics, Roboflow, CVAT, FiftyOne), in `obj.data` and
`obj.names` (Darknet, CVAT), or the class names alone in `classes.txt` (Label Studio, LabelImg) or `_darknet.labels`
(Roboflow). `supervision` parses the lines.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from ats_detr.data.conversion import (
    Definition,
    Foreign,
    Objects,
    Part,
    Reader,
    read_label,
    relative_name,
    supervision_formats,
)
from ats_detr.data.images import IMAGE_SUFFIXES, ImageFileError, read_header
from ats_detr.data.layout import (
    ANNOTATION_FOLDERS,
    IMAGE_FOLDERS,
    MAX_DEPTH,
    Role,
    base_folder,
    images_below,
    role_of,
    visible_names,
    walk,
)
from ats_detr.data.locate import Finder, any_case, locate
from ats_detr.data.records import PLACE
from ats_detr.errors import UserError
from ats_detr.text import first_line

_LABEL_FOLDERS = sorted(ANNOTATION_FOLDERS, key=lambda name: not name.startswith("label"))
"""`labels/` first: XML or older files may be in the others."""
_NAME_FILES = ("classes.txt", "_darknet.labels")
_NO_LABELS = ("classes.txt", "labels.txt", "notes.txt")
_NO_PLACES = ("", "null", "~", "None")
_SPLIT_SUFFIXES = (".yaml", ".yml", ".data")
_INDEX = re.compile(r"[0-9]{1,9}", re.ASCII)
_MAX_CLASSES = 100_000
_POSE_TOLERANCE = 0.05
"""Distance by which keypoints may be outside of their box, and boxes outside of the image, relative to its size."""
_POSE_SHARE = 0.95
"""Share of the polygons of a dataset that must look like poses."""
_ROLES: tuple[Role, ...] = ("train", "val", "test")


# ----------------------------------------------------------------------------------------------------------- search
def is_definition(name: str) -> bool:
    """Whether a file is named like one with class names."""
    return name.lower().endswith((*_SPLIT_SUFFIXES, ".names")) or name in _NAME_FILES


def find(path: Path) -> list[Definition]:
    """The YOLO datasets in a folder and its subfolders, or that of a file with class names."""
    if not path.is_dir():
        return [_definition(path, path.parent)] if is_definition(path.name) else []
    visited = walk(path, MAX_DEPTH)
    files = [folder / name for folder, names in visited for name in names if is_definition(name)]
    found = [_definition(file, path) for file in files if _has_splits(file)]
    roots = [definition.root for definition in found]
    lists: dict[tuple[Path, tuple[str, ...]], Definition] = {}
    for file in files:
        definition = _definition(file, path)
        root = definition.root
        # Lists of class names are often repeated among the labels.
        is_part = any(root in (other, *other.parents) or other in root.parents for other in roots)
        if file.suffix.lower() not in _SPLIT_SUFFIXES and not is_part and _has_labels(root):
            lists.setdefault((root, tuple(_names_in(file))), definition)
    return [*found, *lists.values()]


def _definition(file: Path, path: Path) -> Definition:
    """The dataset of a file with class names that was found below `path`."""
    has_splits = file.suffix.lower() in _SPLIT_SUFFIXES
    return Definition("YOLO", file, file.parent if has_splits else base_folder(file.parent, path))


def _has_splits(file: Path) -> bool:
    """Whether a file has class names and the places of images, or is a damaged data.yaml."""
    if file.suffix.lower() not in _SPLIT_SUFFIXES:
        return False
    try:
        content = _read(file)
    except UserError:
        return file.stem in ("data", "dataset")
    return "names" in content and any(role_of(key) or key in ("nc", "path") for key in content)


def _has_labels(root: Path) -> bool:
    labels = _Labels(root)
    return any(labels.of(image) is not None for image in images_below(root))


def _read(file: Path) -> dict[str, Any]:
    """The content of data.yaml or obj.data, all of it as text: a class may be called `no`, `1.0` or `2024-01-01`.

    Raises UserError where it is something else.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".data":
            pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
            return {key.strip().lower(): value.strip() for key, value in pairs}
        content = yaml.load(text, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{file}, line {line}: not YAML ({error.problem}); correct it") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a data file of YOLO; must have `names:` and the folders of the splits")
    return {str(key).lower(): value for key, value in content.items()}


def _names_in(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the class names cannot be read ({error})") from None
    return [name.strip() for name in lines]


# ---------------------------------------------------------------------------------------------------------- opening
def open_dataset(definition: Definition) -> Foreign:
    """The images and labels of a dataset that `find` has found. Raises UserError."""
    file, root = definition.path, definition.root
    if file.suffix.lower() not in _SPLIT_SUFFIXES:
        lists = {path.stem: path.name for path in sorted(root.glob("*.txt")) if _is_list_of_images(path)}
        return Foreign(definition, _parts(lists, [root], definition), YoloReader(_names_in(file), file))
    content = _read(file)
    base = content.get("path")
    bases = [root]
    if isinstance(base, str):
        folder = Path(os.path.normpath(root / base.replace("\\", "/")))
        bases.insert(0 if root in folder.parents else 1, folder)  # places inside the dataset come first
    if file.suffix.lower() == ".data":
        place = _locate(str(content.get("names")), bases)
        if place is None:
            raise UserError(f"{file}: the file of class names {content.get('names')} does not exist")
        classes = _names_in(place)
    else:
        classes = _class_names(content, file)
    reader = YoloReader(classes, file, _num_keypoint_values(content, file))
    return Foreign(definition, _parts(content, bases, definition), reader)


def _class_names(content: dict[str, Any], file: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        by_index = {int(key): name for key, name in names.items() if _INDEX.fullmatch(key)}
        if not by_index or len(by_index) < len(names) or max(by_index) >= _MAX_CLASSES:
            raise UserError(f"{file}: the keys of `names:` must be class indices 0, 1, 2, ...")
        # A gap keeps its index: the labels refer to it.
        names = [by_index.get(i, f"class {i}") for i in range(max(by_index) + 1)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: `names:` must list the class names")
    number = content.get("nc", str(len(names)))
    if number != str(len(names)):
        raise UserError(f"{file}: nc = {number}: must be {len(names)}, the number of names")
    return names


def _num_keypoint_values(content: dict[str, Any], file: Path) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    is_pair = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, str) for n in shape)
    if not (is_pair and all(_INDEX.fullmatch(n) and int(n) > 0 for n in shape)):
        raise UserError(f"{file}: kpt_shape = {shape}: must be [number of keypoints, 2 or 3]")
    return int(shape[0]) * int(shape[1])


def _parts(content: dict[str, Any], bases: Sequence[Path], definition: Definition) -> list[Part]:
    """The splits that a data file lists, otherwise those that folders are named after."""
    file, root = definition.path, definition.root
    images: dict[Role | None, list[Path]] = {role: [] for role in _ROLES}
    lists: list[tuple[Role, Path]] = []
    absent: list[tuple[Role, str]] = []
    seen: dict[Path, tuple[Role, str]] = {}
    for key, values in content.items():
        role = role_of(key)
        for value in values if isinstance(values, list) else [values]:
            if role is None or not isinstance(value, str) or value in _NO_PLACES:
                continue
            place = _locate(value, bases)
            if place is None:
                absent.append((role, f"{key}: {value}"))
                continue
            other_role, other = seen.setdefault(place, (role, value))
            if other_role != role and _names(other) != _names(value):
                raise UserError(
                    f"{file}: of the splits {other} and {value} only {place} exists; correct the paths"
                )
            if place.is_dir():
                found = list(images_below(place))
                images[role] += found
                absent += [] if found else [(role, f"{key}: {value}, without images")]
            else:
                lists.append((role, place))
    for role, image in _listed(lists, bases):
        images[role].append(image)
    if not images["train"] and any(role == "train" for role, _ in absent):
        listed = ", ".join(text for _, text in absent)
        raise UserError(f"{file}: the training images do not exist ({listed}); correct the paths in it")
    notes = _separate(images, file)
    labels = _Labels(root)
    if not any(images.values()):
        images = _by_folder(root, labels)
    parts = [Part(role or "all", role) for role in images if images[role]]
    for part in parts:
        for image in dict.fromkeys(images[part.role]):
            part.add(image, labels.of(image))
    _add_labels_without_image(parts)
    for what, image in notes:
        parts[0].note(what, relative_name(image, root))
    if absent and parts:
        parts[0].notes["splits of the data file without images"] = [text for _, text in absent]
    return parts


def _separate(images: dict[Role | None, list[Path]], file: Path) -> list[tuple[str, Path]]:
    """Take the images of the other splits out of the training split; a split that is equal to it is none.

    Returns notes with the images that they are about. Raises UserError where no training image remains.
    """
    notes = []
    train = set(images["train"])
    for role in ("val", "test"):
        if train and set(images[role]) == train:
            what = f"images of the split {role}, which is equal to train (not used; data.val_share divides train)"
            notes += [(what, image) for image in dict.fromkeys(images[role])]
            images[role] = []
    held_out = {*images["val"], *images["test"]}
    if train and train <= held_out:
        raise UserError(f"{file}: all training images are in other splits, too; correct the paths in it")
    what = "images of other splits in the folders of train (not trained on)"
    notes += [(what, image) for image in dict.fromkeys(images["train"]) if image in held_out]
    images["train"] = [image for image in images["train"] if image not in held_out]
    return notes


def _names(place: str) -> list[str]:
    """The folders of a path, without those that lead out of the dataset."""
    return [name for name in place.replace("\\", "/").split("/") if name not in ("", ".", "..")]


def _locate(value: str, bases: Sequence[Path]) -> Path | None:
    """The folder or the list of a split.

    Places inside the dataset come first: Roboflow writes `../train/images` for `train/images`, which beside other
    datasets would be the images of another one. Of a path of another machine, the longest end that exists counts, but
    never one without the name of the split.
    """
    literal = value.replace("\\", "/")
    names = _names(value)
    tried = [Path(literal)] if os.path.isabs(literal) else []
    tried += [base / "/".join(names) for base in bases]
    tried += [Path(os.path.normpath(base / literal)) for base in bases]
    for start, name in enumerate(names[:-1], start=1):
        if role_of(name):
            break
        tried += [base / "/".join(names[start:]) for base in bases]
    return next(filter(os.path.exists, map(any_case, tried)), None)


def _is_list_of_images(file: Path) -> bool:
    """Whether a text file is named after a split and begins with the name of an image."""
    if role_of(file.stem) is None or not file.is_file():
        return False
    with file.open("rb") as stream:
        start = stream.read(4000).decode("utf-8-sig", "replace").split("\n")[0]
    return os.path.splitext(start.strip())[1].lower() in IMAGE_SUFFIXES


def _listed(lists: Iterable[tuple[Role, Path]], bases: Sequence[Path]) -> list[tuple[Role, Path]]:
    """The images of lists of paths, relative to the list, to the dataset, or to a folder of another machine."""
    entries: list[tuple[Role, str]] = []
    folders: list[Path] = []
    for role, file in lists:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: this list of images cannot be read ({error})") from None
        entries += [(role, line.strip().replace("\\", "/")) for line in lines if line.strip()]
        folders.append(file.parent)
    if not entries:
        return []
    found = locate([name for _, name in entries], [*folders, *bases])
    return [
        (role, Path(os.path.normpath(found.folder / (os.fsdecode(path) or name))))
        for (role, name), path in zip(entries, found.paths, strict=True)
    ]


def _by_folder(root: Path, labels: _Labels) -> dict[Role | None, list[Path]]:
    """The images below a folder by the split that a folder is named after. Of the others, folders with labels count."""
    found: dict[Role | None, list[Path]] = {role: [] for role in (*_ROLES, None)}
    for image in images_below(root):
        folders = image.relative_to(root).parts[:-1]
        found[next(filter(None, map(role_of, folders)), None)].append(image)
    labelled = {image.parent for image in found[None] if labels.of(image) is not None}
    found[None] = [image for image in found[None] if image.parent in labelled]
    return found


class _Labels:
    """Finds the label files of images."""

    def __init__(self, root: Path) -> None:
        self._root, self._finder = root, Finder(Path())

    def of(self, image: Path) -> Path | None:
        for candidate in self._candidates(image):
            found, _ = self._finder.find_spelling(candidate.as_posix())
            if found:
                return Path(os.fsdecode(found))
        return None

    def _candidates(self, image: Path) -> Iterator[Path]:
        quoted = quote(image.stem, errors="surrogateescape")  # as Label Studio writes some
        for stem in dict.fromkeys((image.stem, quoted)):
            yield from self._places(image.parent, f"{stem}.txt")

    def _places(self, folder: Path, name: str) -> Iterator[Path]:
        """In `labels/` instead of `images/`, beside the image, or in a folder of labels nearby."""
        parts = folder.parts
        first = len(self._root.parts) if self._root in (folder, *folder.parents) else 0
        for i in reversed(range(first, len(parts))):
            if parts[i].lower() in IMAGE_FOLDERS:
                yield from (Path(*parts[:i], labels, *parts[i + 1 :], name) for labels in _LABEL_FOLDERS)
        yield folder / name
        for labels in _LABEL_FOLDERS:
            yield folder / labels / name
            yield folder.parent / labels / folder.name / name
            yield folder.parent / labels / name


def _add_labels_without_image(parts: Sequence[Part]) -> None:
    """Add the label files beside those of images, with images that do not exist."""
    used = {label for part in parts for label in part.labels}
    stems: dict[Path, set[str]] = {}
    for part in parts:
        for image in part.images:
            stems.setdefault(image.parent, set()).add(image.stem.casefold())
    folders: dict[Path, tuple[Path, Part]] = {}
    for part in parts:
        for image, label in zip(part.images, part.labels, strict=True):
            # Beside images are text files of other kinds.
            if label is not None and label.parent != image.parent:
                folders.setdefault(label.parent, (image.parent, part))
    for labels, (folder, part) in folders.items():
        present = stems[folder] | {os.path.splitext(name)[0].casefold() for name in visible_names(folder)}
        for name in visible_names(labels):
            stem, suffix = os.path.splitext(name)
            is_label = suffix.lower() == ".txt" and name not in _NO_LABELS
            if is_label and stem.casefold() not in present and labels / name not in used:
                part.add(folder / stem, labels / name)


# ---------------------------------------------------------------------------------------------------------- reading
class YoloReader(Reader):
    """Boxes of lines with a box, a polygon, a box with a confidence, or a box with keypoints.

    Args:
        classes: names by class index, which are the category ids.
        file: where they are from, for messages.
        num_keypoint_values: values after the box in a line of a pose dataset; 0: other lines are polygons.
    """

    upright = True  # as all tools that draw and read these labels

    def __init__(self, classes: list[str], file: Path, num_keypoint_values: int = 0) -> None:
        self.classes = classes
        self.state = self._num_keypoint_values = num_keypoint_values
        self._file = file
        self._num_polygons: Counter[int] = Counter()
        """By number of values in a line."""
        self._num_poses: Counter[int] = Counter()
        """Polygons that may be poses of keypoints with 2 or 3 values."""

    @cached_property
    def _parse(self) -> Any:
        return supervision_formats()[0].yolo_annotations_to_detections

    def read(self, image: Path, label: Path | None, part: Part, name: str) -> tuple[tuple[int, int], Objects]:
        """See Reader."""
        try:
            height, width = read_header(image).upright_size
        except ImageFileError:
            return (0, 0), []
        parse = self._parse  # raises UserError, which is no fault of a line
        text = b"" if label is None else read_label(label)
        lines = enumerate(text.decode("utf-8-sig", "replace").splitlines(), start=1)
        used = [(number, line.split()) for number, line in lines if line.strip()]
        try:
            result = self._objects(parse, [values for _, values in used], (width, height))
        except ValueError:
            result = []
            for number, values in used:
                try:
                    result += self._objects(parse, [values], (width, height))
                except ValueError:
                    line = " ".join(values)[:200]
                    result.append({"category_id": values[0], "bbox": line, PLACE: f"{name}:{number}"})
            return (height, width), result
        assert self.classes is not None
        for entry, (number, _) in zip(result, used, strict=True):
            if not 0 <= entry["category_id"] < len(self.classes):
                entry[PLACE] = f"{name}:{number}"
        return (height, width), result

    def _objects(self, parse: Any, lines: Sequence[list[str]], size: tuple[int, int]) -> Objects:
        """Raises ValueError where a line cannot be read."""
        if not lines:
            return []
        texts = [" ".join(self._box_or_polygon(line)) for line in lines]
        boxes = parse(texts, size, with_masks=False)
        rows = zip(boxes.class_id.tolist(), boxes.xyxy.tolist(), strict=True)
        return [{"category_id": index, "bbox": box} for index, box in rows]

    def _box_or_polygon(self, values: list[str]) -> list[str]:
        if len(values) <= 6:
            return values
        if self._num_keypoint_values:
            if len(values) != 5 + self._num_keypoint_values:
                raise ValueError(f"{len(values)} values do not agree with kpt_shape")
            return values[:5]
        numbers = np.array(values[1:], np.float64)
        self._num_polygons[len(values)] += 1
        self._num_poses.update(dims for dims in (2, 3) if _may_be_pose(numbers, dims))
        return values

    def finish(self, parts: Sequence[Part], contents: Sequence[dict[str, Any]]) -> None:
        """Poses that were read as polygons are errors where the visibility shows them, otherwise noted."""
        if len(self._num_polygons) != 1:
            return
        ((length, number),) = self._num_polygons.items()
        if self._num_poses[3] >= _POSE_SHARE * number:
            raise UserError(
                f"{self._file}: the labels of {length} values look like boxes with keypoints; set kpt_shape:"
                f" [{(length - 5) // 3}, 3] in data.yaml"
            )
        if self._num_poses[2] >= _POSE_SHARE * number:
            what = "labels that are read as polygons, but may be boxes with keypoints (then set kpt_shape)"
            parts[0].note(what, f"all of {length} values, such as kpt_shape: [{(length - 5) // 2}, 2]")


def _may_be_pose(values: np.ndarray, dims: int) -> bool:
    """Whether values may be a box in the image, and keypoints (x, y) in the box or (x, y, visibility)."""
    if (len(values) - 4) % dims:
        return False
    centre, size, points = values[:2], values[2:4], values[4:].reshape(-1, dims)
    if not (size > 0).all() or (np.abs(centre - 0.5) + size / 2 > 0.5 + _POSE_TOLERANCE).any():
        return False
    if dims == 3:
        return bool(np.isin(points[:, 2], (0, 1, 2)).all())
    points = points[points.any(1)]  # keypoints that are not labelled are (0, 0)
    return bool((np.abs(points - centre) <= size / 2 + _POSE_TOLERANCE).all())
