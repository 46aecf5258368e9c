"""The splits of a dataset folder in any supported layout, found in the same way by every command."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ats_detr.config import DataConfig
from ats_detr.data import voc, yolo
from ats_detr.data.conversion import Foreign, convert
from ats_detr.data.layout import Role, SplitFiles, choose_split, find_annotation_files, walk
from ats_detr.data.splitting import split_file
from ats_detr.errors import UserError
from ats_detr.files import cache_folder

logger = logging.getLogger(__name__)

_MAX_SPLITS = 50
_MAX_FILES = 5000
"""Files that are looked at for a hint."""
_OTHER_FILES = {
    ".zip": "unpack {}",
    ".tar": "unpack {}",
    ".tfrecord": "{} is TFRecord, export as COCO instead",
    ".csv": "{} is a table, export as COCO instead",
    ".json": "{} is JSON without the lists of a COCO file, export as COCO instead",
    ".jsonl": "{} is JSON in lines, export as COCO instead",
    ".ndjson": "{} is JSON in lines, export as COCO instead",
    ".xml": "{} is XML of another format than Pascal VOC, export as COCO instead",
    ".txt": "YOLO labels ({}) need their images, and data.yaml or classes.txt with the class names",
}
"""What a file in a folder without a dataset may be, by suffix."""


@dataclass(frozen=True)
class Layout:
    """The splits of a dataset."""

    title: str
    """The format and how it was recognised."""
    splits: list[SplitFiles]


def find_layout(path: Path) -> Layout:
    """The dataset in a folder, or of one file (COCO's .json, YOLO's data.yaml).

    Datasets of other formats are converted into COCO files in the cache folder, once. Raises UserError where there is
    no dataset or more than one.
    """
    found = find_dataset(path)
    return convert_to_cache(found) if isinstance(found, Foreign) else found


def find_dataset(path: Path) -> Layout | Foreign:
    """The same; a dataset of another format is not converted."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder{_nearby(path)}")
    if path.is_file() and not yolo.is_definition(path.name):
        return Layout("one COCO annotation file", find_annotation_files(path))
    coco = find_annotation_files(path) if path.is_dir() else []
    others = [(module, definition) for module in (yolo, voc) for definition in module.find(_real(path))]
    if len(others) + bool(coco) > 1:
        listed = [f"COCO ({_some(relative(split.annotations, path) for split in coco)})"] * bool(coco)
        listed += [f"{found.format} ({relative(found.path, _real(path))})" for _, found in others]
        raise UserError(
            f"{path}: it contains several datasets: {_some(listed, '; ')}. Set data.root to the folder or the"
            " annotation file of one, or data.train_annotations and data.val_annotations to COCO files"
        )
    for module, definition in others:
        return module.open_dataset(definition)
    if len(coco) > _MAX_SPLITS:
        raise UserError(
            f"{path}: {len(coco)} COCO annotation files ({_some(relative(split.annotations, path) for split in coco)});"
            f" must be at most {_MAX_SPLITS}, one for each split. Export one file for all images"
        )
    coco = coco or find_annotation_files(path, any_json=True)
    if not coco:
        raise UserError(
            f"{path}: it contains no annotation file (COCO .json, YOLO data.yaml, Pascal VOC .xml){_other_files(path)}"
        )
    return Layout(_title(coco), coco)


def convert_to_cache(found: Foreign) -> Layout:
    """The converted files of a YOLO or VOC dataset, in the cache folder."""
    definition = found.definition
    folder = cached(definition.path)
    splits = [
        SplitFiles(part.name, folder / f"{part.name}.json", part.role, definition.root)
        for part in found.parts
    ]
    convert(found, [split.annotations for split in splits])
    return Layout(f"{definition.format} ({definition.path.name}), as COCO files in {folder}", splits)


def cached(path: Path) -> Path:
    """The cache folder for what is made from a file or folder, the same for every path to it."""
    path = _real(path)
    folder = path if path.is_dir() else path.parent
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return cache_folder() / "datasets" / f"{folder.name or 'root'}-{digest}"


def _real(path: Path) -> Path:
    """The absolute path without symbolic links, except for a file that is one: others belong to its folder."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def find_split(config: DataConfig, role: Role) -> SplitFiles:
    """The annotation file and the folder of images to train, evaluate or test on. Raises UserError."""
    root = Path(config.root)
    if not root.exists():
        raise UserError(f"data.root = {config.root!r}: there is no such folder{_nearby(root)}")
    given, images = getattr(config, f"{role}_annotations"), getattr(config, f"{role}_images")
    base = root if root.is_dir() else root.parent
    if given is not None:
        folder = None if images is None else base / images
        return SplitFiles(role, _existing(base / given, base, f"data.{role}_annotations"), role, folder)
    if role != "test" and config.val_share is not None:
        split = _divided(config, role, base)
    else:
        layout = find_layout(root)
        split = _choose(layout, role, root)
        _announce(f"{root}: {layout.title}; {_USES[role]} {split.annotations}")
        if role == "val" and split.role in ("train", None) and split == _trained_on(layout):
            logger.warning(
                "%s: no annotation file for validation, so the evaluation uses the training images of %s; set"
                " data.val_share, such as 0.2, or data.val_annotations",
                root,
                split.annotations.name,
            )
    return split if images is None else replace(split, images=base / images)


_USES = {"train": "training on", "val": "evaluating", "test": "testing"}


@functools.cache
def _announce(text: str) -> None:
    """Log once: the same split is opened several times in a run."""
    logger.info("%s", text)


def _choose(layout: Layout, role: Role, root: Path) -> SplitFiles:
    try:
        return choose_split(layout.splits, role)
    except UserError as error:
        raise UserError(f"{root}: {error}") from None


def _trained_on(layout: Layout) -> SplitFiles | None:
    try:
        return choose_split(layout.splits, "train")
    except UserError:
        return None


def _divided(config: DataConfig, role: Role, base: Path) -> SplitFiles:
    """One part of the training images, which `data.val_share` divides."""
    assert config.val_share is not None
    if config.train_annotations is not None:
        whole = replace(find_split(replace(config, val_share=None), "train"), role=None)
    else:
        layout = find_layout(Path(config.root))
        if found := [split for split in layout.splits if split.role == "val"]:
            raise UserError(
                f"data.val_share = {config.val_share}: {config.root} has validation images already"
                f" ({found[0].annotations}); omit it, or set it to null"
            )
        whole = _choose(layout, "train", Path(config.root))
        _announce(f"{config.root}: {layout.title}")
    images = whole.images if config.train_images is None else base / config.train_images
    folder = cached(whole.annotations) / f"val_share_{config.val_share:g}_seed_{config.split_seed}"
    train, val = folder / "train.json", folder / "val.json"
    images = split_file(whole.annotations, images, config.val_share, config.split_seed, train, val)
    chosen = train if role == "train" else val
    _announce(f"data.val_share = {config.val_share:g} of {whole.annotations}; {_USES[role]} {chosen}")
    return SplitFiles(role, chosen, role, images)


# --------------------------------------------------------------------------------------------------- titles and hints
def _title(splits: list[SplitFiles]) -> str:
    if all(split.annotations.name == "_annotations.coco.json" for split in splits):
        return "Roboflow COCO (_annotations.coco.json)"
    if all(split.annotations.match("annotations/instances_*2017.json") for split in splits):
        return "COCO 2017 (annotations/instances_*2017.json)"
    return "one COCO annotation file" if len(splits) == 1 else "COCO annotation files"


def _some(texts: Iterable[str], separator: str = ", ") -> str:
    """The first five, for a message."""
    listed = list(texts)
    more = [f"... and {len(listed) - 5} more"] if len(listed) > 5 else []
    return separator.join(listed[:5] + more)


def relative(path: Path, root: Path) -> str:
    """A path within a folder, for a message."""
    return path.relative_to(root).as_posix() if root in (path, *path.parents) else str(path)


def _existing(file: Path, root: Path, key: str) -> Path:
    """`file`, or an error that lists the annotation files that there are."""
    if os.path.exists(file):
        return file
    try:
        found = [relative(split.annotations, root) for split in find_annotation_files(root)]
    except OSError:
        found = []
    hint = f"; found {_some(found)}" if found else ""
    raise UserError(f"{key}: annotation file {file} does not exist{hint}")


def _nearby(path: Path) -> str:
    """Datasets in the nearest folder that exists, for a message."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(parent) if entry.is_dir())[:100]
    except OSError:
        return ""
    found = [f"{folder} ({what})" for folder in folders if (what := _looks_like(folder))]
    return f"; found {_some(found)}" if found else ""


_MARKS = {
    "COCO": ("annotations/*.json", "_annotations.coco.json", "*/_annotations.coco.json"),
    "YOLO": ("data.yaml",),
    "Pascal VOC": ("Annotations/*.xml",),
}


def _looks_like(folder: Path) -> str:
    """The format of a dataset by its most common files; empty if there is none."""
    for kind, patterns in _MARKS.items():
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return kind
    return ""


def _other_files(path: Path) -> str:
    """What a folder without a dataset holds instead, for a message."""
    visited = (folder / name for folder, names in walk(path) for name in names)
    files = list(itertools.islice(visited, _MAX_FILES))
    for suffix, what in _OTHER_FILES.items():
        first = min((file for file in files if file.name.lower().endswith(suffix)), default=None)
        if first is not None:
            return f"; {what.format(relative(first, path))}"
    return ""
