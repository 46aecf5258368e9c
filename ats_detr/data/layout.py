"""Where the files of a dataset are: annotation files under a folder, and the image files that they list.

Exporters place images beside the annotation file, in `images/`, in a folder per split, ...; and write file names
relative to any of these, with backslashes, URL-encoded, or absolute on the machine of the annotator. Candidates are
tried until the files exist.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import numpy as np

from ats_detr.data.images import IMAGE_SUFFIXES
from ats_detr.errors import UserError

_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")
"""Prefixes of COCO's files without boxes, or with the boxes of instances_*.json."""
_ANNOTATION_FOLDERS = ("annotations", "annotation", "ann", "labels")
_IMAGE_FOLDERS = ("images", "data", "imgs", "img", "JPEGImages")
_SPLIT = re.compile(
    r"(?:^|[^a-z])(train|val|test)(?:ing|val|id|idation|[-_]?dev)?(?:[^a-z]|$)", re.IGNORECASE
)
_NUM_SAMPLED = 20
_MAX_FOLDERS = 100_000
"""Bound on a search of all subfolders."""


# ------------------------------------------------------------------------------------------------- annotation files
@dataclass(frozen=True)
class SplitFiles:
    """One annotation file of a dataset."""

    name: str
    annotations: Path
    role: str | None
    """`train`, `val` or `test`, as file and folder are named; None where they say nothing."""
    images: Path | None = None
    """The folder of the images. None: the folders that exporters use are tried."""


def find_annotation_files(path: Path, *, any_json: bool = False) -> list[SplitFiles]:
    """The annotation files in COCO's format under `path`, which is such a file or a folder.

    Searched are the folder and two levels of subfolders; a JSON file there counts if it has lists of images
    and categories, or if its name or place says that it should.

    Args:
        any_json: where no file counts, the only JSON file does; the reader reports what is wrong with it.
    """
    if path.is_dir():
        patterns = ("annotations/*.json", "*.json", "*/*.json", "*/*/*.json")
        found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
        files = [file for file in dict.fromkeys(found) if _is_instances_file(file)]
        if any_json and not files and len(found) == 1:
            files = found
    else:
        files = [path]
    names = [_split_name(file) for file in files]
    return [
        SplitFiles(name if names.count(name) == 1 else file.relative_to(path).as_posix(), file, _role(file))
        for name, file in zip(names, files, strict=True)
    ]


Role = Literal["train", "val", "test"]


def choose_split(splits: Sequence[SplitFiles], role: Role) -> SplitFiles:
    """The split to train on, to evaluate on, or to test on: the only one of its role, otherwise the only one without a
    role. A dataset without any split to evaluate on is evaluated on the one to train on; a test needs a test split.

    Raises UserError where several splits could be meant, or none.
    """
    by_role = {
        name: [split for split in splits if split.role == name] for name in ("train", "val", "test", None)
    }
    if role == "test":
        found = by_role["test"]
    elif len(splits) == 1:
        found = list(splits)
    elif role == "train":
        found = by_role["train"]
    else:
        only_other = by_role[None] if len(by_role[None]) == 1 else []
        found = by_role["val"] or by_role["test"] or only_other or by_role["train"]
    if len(found) != 1:
        names = ", ".join(split.annotations.name for split in splits)
        use = {"train": "train on", "val": "evaluate on", "test": "test on"}[role]
        raise UserError(f"which file to {use} is unclear ({names}); set data.{role}_annotations")
    return found[0]


def _is_instances_file(file: Path) -> bool:
    if not file.is_file() or file.name.startswith((".", *_OTHER_TASKS)):
        return False
    is_named_so = file.name == "_annotations.coco.json" or file.name.startswith("instances_")
    if is_named_so or file.parent.name.lower() in _ANNOTATION_FOLDERS:
        return True
    try:
        content = file.read_bytes()
    except OSError:
        return True  # the reader reports it
    return b'"images"' in content and (b'"annotations"' in content or b'"categories"' in content)


def _split_name(file: Path) -> str:
    """Of annotations/instances_train2017.json `train2017`, of train/_annotations.coco.json `train`."""
    stem = file.stem.removeprefix("instances_")
    generic = stem.lower() in (
        "_annotations.coco",
        "labels",
        "annotations",
        "default",
        "coco",
        "result",
        "data",
    )
    folder = _root(file)
    return folder.name if generic and _role_of(folder.name) and not _role_of(stem) else stem


def _role(file: Path) -> str | None:
    return _role_of(file.stem) or _role_of(_root(file).name)


def _role_of(name: str) -> str | None:
    found = _SPLIT.search(re.sub(r"\d+", " ", name))
    return None if found is None else found.group(1).lower()


# ------------------------------------------------------------------------------------------------------ image files
@dataclass(frozen=True)
class ImageFiles:
    """The files that an annotation file lists."""

    folder: Path
    paths: np.ndarray
    """bytes [images] path of each image relative to `folder`; empty where it is missing."""
    respelled: list[str]
    """Files that exist under another spelling than listed, as `listed -> file`."""
    ambiguous: list[str]
    """Listed names that could only mean a file that another name means too; their files count as missing."""


def locate_images(names: Sequence[str], annotation_file: Path, folder: Path | None = None) -> ImageFiles:
    """Find the images of an annotation file.

    Args:
        names: as listed.
        folder: where the user says that they are: this folder or one that belongs to it. None: the folders that
            exporters use are tried.
    """
    candidates = _candidates(annotation_file) if folder is None else _below(folder)
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), _NUM_SAMPLED)).astype(int)]
    best, most, seen = _Finder(folder or annotation_file.parent), 0, set()
    for candidate in candidates:
        if candidate in seen or not candidate.is_dir():
            continue
        seen.add(candidate)
        finder = _Finder(candidate)
        spellings = [finder.find(name)[1] for name in sample]
        score = 3 * spellings.count(True) + 2 * spellings.count(False)  # of equals, the literal spelling wins
        if score > most:
            best, most = finder, score
        if most == 3 * len(sample):
            break
    if not most and folder is None:
        best = _TreeFinder(_root(annotation_file), _role(annotation_file))
    return _resolve(names, best)


def _resolve(names: Sequence[str], finder: _Finder) -> ImageFiles:
    paths: list[bytes] = []
    by_path: dict[bytes, set[str]] = defaultdict(set)
    inexact = []
    for name in names:
        path, exact = finder.find(name)
        paths.append(path)
        if path:
            by_path[path].add(name)
        if exact is False:
            inexact.append(len(paths) - 1)
    ambiguous = [i for i in inexact if len(by_path[paths[i]]) > 1]
    for i in ambiguous:
        paths[i] = b""
    respelled = [f"{names[i]} -> {os.fsdecode(paths[i])}" for i in inexact if paths[i]]
    return ImageFiles(finder.folder, np.array(paths, np.bytes_), respelled, [names[i] for i in ambiguous])


def _below(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder / name for name in _IMAGE_FOLDERS)
    yield folder.parent  # names that start with the folder itself


def _candidates(file: Path) -> Iterator[Path]:
    """Folders that may hold the images of an annotation file, the most likely first."""
    beside, root = file.parent, _root(file)
    name = file.stem.removeprefix("instances_")
    role = _role_of(name)
    splits = [name]
    if role is not None:
        splits += {"val": ["val", "valid", "validation"]}.get(role, [role])
    for split in splits:
        yield root / split
        yield from (root / images / split for images in _IMAGE_FOLDERS)
        yield from (root / split / images for images in _IMAGE_FOLDERS)
    yield from (root / images for images in _IMAGE_FOLDERS)
    yield from (root, beside)
    yield from (beside / images for images in _IMAGE_FOLDERS)
    if root.parent.name.lower() in _ANNOTATION_FOLDERS:  # labels/train/coco.json with images/train/
        above = root.parent.parent
        yield above / root.name
    else:
        above = root.parent
    if _role_of(root.name) is not None:  # train/coco.json with images/train/ or images/
        yield from (above / images / root.name for images in _IMAGE_FOLDERS)
        yield from (above / images for images in _IMAGE_FOLDERS)
        yield above


def _root(file: Path) -> Path:
    """The folder of the dataset, or of the split, that an annotation file belongs to."""
    return file.parent.parent if file.parent.name.lower() in _ANNOTATION_FOLDERS else file.parent


class _Finder:
    """Finds listed names below one folder, listing every directory once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listings: dict[str, _Listing] = {}

    def find(self, name: str) -> tuple[bytes, bool | None]:
        """Path relative to the folder, and whether it is spelled as listed; (b"", None) where it is missing."""
        for spelling in _spellings(name):
            path, exact = self._find_spelling(spelling)
            if path:
                return path, exact and spelling == name
        for stem in _stems(name):
            paths = {self._find_spelling(stem + suffix)[0] for suffix in IMAGE_SUFFIXES} - {b""}
            if len(paths) == 1:
                return paths.pop(), False
        return b"", None

    def _find_spelling(self, spelling: str) -> tuple[bytes, bool]:
        directory, _, base = spelling.rpartition("/")
        if spelling.startswith("/") and not directory:
            directory = "/"
        listing = self._listing(directory)
        found = listing.find(base)
        if not found:
            return b"", False
        return os.path.join(listing.directory, found), listing.is_exact and found == _encode(base)

    def _listing(self, directory: str) -> _Listing:
        if directory not in self._listings:
            listing = _Listing(self.folder, _encode(directory), is_exact=True)
            if not listing.exists and directory not in ("", "/"):
                found, _ = self._find_spelling(directory)  # another spelling of the directory
                listing = _Listing(self.folder, found, is_exact=False) if found else listing
            self._listings[directory] = listing
        return self._listings[directory]


class _TreeFinder(_Finder):
    """Finds names that only one file in a folder and its subfolders can mean; folders of other splits are skipped."""

    def __init__(self, folder: Path, role: str | None) -> None:
        super().__init__(folder)
        self._paths: dict[str, list[tuple[bytes, list[str]]]] = defaultdict(list)
        root = os.fsencode(folder)
        for directory, subfolders, files in itertools.islice(os.walk(root), _MAX_FOLDERS):
            subfolders[:] = [name for name in subfolders if _role_of(os.fsdecode(name)) in (None, role)]
            for name in files:
                path = os.path.relpath(os.path.join(directory, name), root)
                parts = [_key(part) for part in path.decode("utf-8", "surrogateescape").split(os.sep)]
                self._paths[parts[-1]].append((path, parts))

    def find(self, name: str) -> tuple[bytes, bool | None]:
        parts = [_key(part) for part in _parts(name.replace("\\", "/"))]
        paths = self._paths.get(parts[-1], []) if parts else []
        for start in range(len(parts)):  # the more folders agree, the better
            alike = [path for path, folders in paths if folders[start - len(parts) :] == parts[start:]]
            if alike:
                return (alike[0], False) if len(alike) == 1 else (b"", None)
        return b"", None


class _Listing:
    """The names in one directory, found in any Unicode normal form and case."""

    def __init__(self, folder: Path, directory: bytes, *, is_exact: bool) -> None:
        self.directory, self.is_exact, self.exists = directory, is_exact, True
        try:
            self._names = set(os.listdir(os.path.join(os.fsencode(folder), directory)))
        except (OSError, ValueError):  # ValueError: a null character
            self._names, self.exists = set(), False
        self._by_key: dict[str, list[bytes]] | None = None

    def find(self, base: str) -> bytes:
        """The name as the directory has it; empty where it is missing or two names differ in case only."""
        encoded = _encode(base)
        if encoded in self._names:
            return encoded
        if self._by_key is None:
            self._by_key = defaultdict(list)
            for name in self._names:
                self._by_key[_key(name.decode("utf-8", "surrogateescape"))].append(name)
        alike = self._by_key.get(_key(base), [])
        return alike[0] if len(alike) == 1 else b""


def _encode(name: str) -> bytes:
    """UTF-8; undecodable bytes of a file name, which JSON holds as single surrogates, are themselves."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"\0"  # no file


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _spellings(name: str) -> Iterator[str]:
    """What a listed name may mean as a path relative to some folder, the most literal first."""
    yield name
    path = name
    if "://" in path or "?" in path:  # of Label Studio: /data/local-files/?d=images/a.jpg
        path = path.split("?d=")[-1].split("?")[0].split("://")[-1]
    decoded = unquote(path)
    variants = dict.fromkeys((path, path.replace("\\", "/"), decoded, decoded.replace("\\", "/")))
    yield from (variant for variant in variants if variant != name)
    for variant in variants:
        parts = _parts(variant)
        yield from ("/".join(parts[start:]) for start in range(len(parts)))


def _stems(name: str) -> Iterator[str]:
    """Spellings of a name without suffix."""
    if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
        parts = _parts(name.replace("\\", "/"))
        yield from ("/".join(parts[start:]) for start in range(len(parts)))


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]
