"""The annotation files and the splits of a dataset folder."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ats_detr.data.images import IMAGE_SUFFIXES
from ats_detr.errors import UserError

Role = Literal["train", "val", "test"]

ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "label", "ann", "xml", "xmls")
"""Lower-case names of folders that hold annotations."""
IMAGE_FOLDERS = ("images", "data", "imgs", "img", "jpegimages")
"""Of folders that hold images."""
MAX_DEPTH = 3
"""Levels of subfolders in which annotation files are searched for."""

_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")
"""Prefixes of COCO's files without boxes, or with the boxes of instances_*.json."""
_SPLIT = r"(train|val|test)(?:ing|val|id|idation|[-_]?dev)?"
_IN_NAME = re.compile(rf"(?:^|[^a-z]){_SPLIT}(?:set)?(?:[^a-z]|$)", re.IGNORECASE)
_WHOLE_NAME = re.compile(
    rf"(?:(?:obj|images?|data)[-_])?{_SPLIT}[-_\d]*(?:set|split|data|images?)?", re.IGNORECASE
)
_NO_FOLDERS = ("__MACOSX", "@eaDir")
"""Copies and thumbnails that archives and file servers add."""
_MAX_FOLDERS = 100_000
_START_BYTES = 1000


def walk(root: Path, max_depth: int = 50) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of a folder and its subfolders, sorted.

    Hidden files and folders are skipped. Symbolic links are followed; a folder that is reached twice is visited once.
    """
    seen: set[str] = set()
    pending = [(root, 0)]
    while pending and len(seen) < _MAX_FOLDERS:
        folder, depth = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                visible = sorted(
                    (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")
                )
        except OSError:
            continue
        yield folder, [name for name, is_folder in visible if not is_folder]
        if depth < max_depth:
            below = [name for name, is_folder in visible if is_folder and name not in _NO_FOLDERS]
            pending += [(folder / name, depth + 1) for name in reversed(below)]


def visible_names(folder: Path) -> list[str]:
    """The sorted names in a folder, without hidden ones; none where it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------------- splits
def role_in(name: str) -> Role | None:
    """The split that a part of the name of a file or folder says: `instances_train2017` is `train`."""
    return _role(_IN_NAME.search(re.sub(r"\d+", " ", name)))


def role_of(name: str) -> Role | None:
    """The split that the whole name says: `Train`, `val2017` and `obj_train_data`, but not `test_of_lamps`."""
    return _role(_WHOLE_NAME.fullmatch(name))


def _role(found: re.Match[str] | None) -> Role | None:
    return None if found is None else found[1].lower()  # type: ignore[return-value]


@dataclass(frozen=True)
class SplitFiles:
    """One annotation file of a dataset."""

    name: str
    annotations: Path
    role: Role | None
    """As file and folders are named; None where they say nothing."""
    images: Path | None = None
    """The folder of the images. None: the folders that exporters use are tried."""


def choose_split(splits: Sequence[SplitFiles], role: Role) -> SplitFiles:
    """The split to train on, to evaluate on, or to test on: the only one of its role, otherwise the only one without a
    role. A dataset without any split to evaluate on is evaluated on the one to test or to train on; a dataset is never
    trained on its validation or test split, and a test needs a test split.

    Raises UserError where several splits could be meant, or none.
    """
    order: dict[Role, tuple[Role | None, ...]] = {
        "train": ("train", None),
        "val": ("val", "test", None, "train"),
        "test": ("test",),
    }
    by_role = [[split for split in splits if split.role == wanted] for wanted in order[role]]
    found = next(filter(None, by_role), [])
    if len(found) == 1:
        return found[0]
    listed = found or splits
    names = ", ".join(_short_name(split, listed) for split in listed)
    use = {"train": "train on", "val": "evaluate on", "test": "test on"}[role]
    fault = f"which file to {use} is unclear ({names})" if found else f"no file to {use}, only {names}"
    fix = f"set data.{role}_annotations"
    if len(splits) == 1:
        fix = f"to {use} it, set data.{role}_annotations={splits[0].annotations.absolute()}"
        fix += f" data.{role}_images={splits[0].images}" if splits[0].images else ""
    raise UserError(f"{fault}; {fix}")


def _short_name(split: SplitFiles, splits: Sequence[SplitFiles]) -> str:
    """The name of the annotation file, with its folder where others have the same name."""
    file = split.annotations
    is_unique = sum(other.annotations.name == file.name for other in splits) == 1
    return file.name if is_unique else f"{file.parent.name}/{file.name}"


# --------------------------------------------------------------------------------------------------- annotation files
def find_annotation_files(path: Path, *, any_json: bool = False) -> list[SplitFiles]:
    """The annotation files in COCO's format under `path`, which is such a file or a folder.

    Searched are the folder and three levels of subfolders. A JSON file counts if it has lists of images and
    categories, or the name of COCO's or Roboflow's files. A file that is given itself has no role.

    Args:
        any_json: the only JSON file counts regardless of its content; the reader reports what is wrong with it.
    """
    if not path.is_dir():
        return [SplitFiles(_split_name(path), path, None)]
    found = [
        (folder, name)
        for folder, names in walk(path, MAX_DEPTH)
        for name in names
        if name.lower().endswith(".json") and name != "notes.json"  # of Label Studio, beside YOLO labels
    ]
    if any_json:
        found = found if len(found) == 1 else []
    else:
        found = [(folder, name) for folder, name in found if _is_instances_file(folder, name)]
    files = [folder / name for folder, name in found]
    split_names = [_split_name(file) for file in files]
    counts = Counter(split_names)
    common = Path(os.path.commonpath([file.parent for file in files])) if files else path
    return [
        SplitFiles(
            name if counts[name] == 1 else file.relative_to(path).as_posix(),
            file,
            _role_below(file, path, common),
        )
        for name, file in zip(split_names, files, strict=True)
    ]


def _is_instances_file(folder: Path, name: str) -> bool:
    if name.startswith(_OTHER_TASKS):
        return False
    if name == "_annotations.coco.json" or name.startswith("instances_"):
        return True
    try:
        content = _read_json(os.path.join(folder, name))
    except OSError:
        return True  # the reader reports it
    if b'"images"' in content and (b'"annotations"' in content or b'"categories"' in content):
        return True
    # Among annotations a damaged file counts, but not the JSON of one image.
    return folder.name.lower() in ANNOTATION_FOLDERS and not _is_json(content)


def _read_json(file: str) -> bytes:
    """The content of a file; of labelme's files, which may contain their image, nothing."""
    if not os.path.isfile(file):
        return b"{}"
    with open(file, "rb") as stream:
        start = stream.read(_START_BYTES)
        return b"{}" if b'"shapes":' in start else start + stream.read()


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _split_name(file: Path) -> str:
    """Of annotations/instances_train2017.json `train2017`, of train/_annotations.coco.json `train`."""
    stem = file.stem.removeprefix("instances_")
    generic = ("_annotations.coco", "labels", "annotations", "default", "coco", "result", "data")
    folder = dataset_folder(file)
    return folder.name if stem.lower() in generic and role_in(folder.name) else stem


def _role_below(file: Path, root: Path, common: Path) -> Role | None:
    """The role that the file or the nearest of its folders below the root says.

    A folder that contains all files (`common` or above) is a split only if that is its whole name: it may be that of
    the dataset (`my test project`).
    """
    folders = [folder for folder in file.parents if root in folder.parents]
    says = [role_in(folder.name) if common in folder.parents else role_of(folder.name) for folder in folders]
    return next(filter(None, [role_in(file.stem), *says]), None)


def dataset_folder(file: Path) -> Path:
    """The folder of the dataset, or of the split, that an annotation file belongs to."""
    return file.parent.parent if file.parent.name.lower() in ANNOTATION_FOLDERS else file.parent


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, by their suffix."""
    for directory, names in walk(folder):
        yield from (directory / name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def base_folder(labels: Path, root: Path) -> Path:
    """The folder of the dataset that a folder of labels belongs to.

    It is above the first `labels/` or `train/` below the root that is searched; where the root is such a folder itself
    and has no images, it is above the root.
    """
    if root.name.lower() in ANNOTATION_FOLDERS and next(images_below(root), None) is None:
        return root.parent
    folder = root
    for name in labels.relative_to(root).parts:
        if name.lower() in ANNOTATION_FOLDERS or role_of(name):
            break
        folder /= name
    return folder
