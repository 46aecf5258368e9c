"""Where the images are that an annotation file lists.

Exporters place images beside the annotation file, in `images/`, in a folder per split, ...; and write file names
relative to any of these, with backslashes, URL-encoded, or absolute on the machine of the annotator. Candidates are
tried until the files exist. Upper and lower case, and Unicode normal forms, are equal where only one file can be meant.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from ats_detr.data.images import IMAGE_SUFFIXES
from ats_detr.data.layout import ANNOTATION_FOLDERS, IMAGE_FOLDERS, dataset_folder, role_in, role_of, walk

_NUM_SAMPLED = 20


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
    if folder is not None:  # or its parent: names may start with the folder itself
        return locate(names, [folder, *(folder / name for name in IMAGE_FOLDERS), folder.parent])
    root = dataset_folder(annotation_file)
    role = role_in(annotation_file.stem) or role_of(root.name)
    return _resolve(names, _best_finder(names, _candidates(annotation_file)) or _TreeFinder(root, role))


def locate(names: Sequence[str], candidates: Sequence[Path]) -> ImageFiles:
    """Find listed images below that folder which has most of them, otherwise in the first one."""
    return _resolve(names, _best_finder(names, candidates) or Finder(candidates[0]))


def _best_finder(names: Sequence[str], candidates: Iterable[Path]) -> Finder | None:
    """The finder of the folder that has most of the files; None where no folder has any of them."""
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), _NUM_SAMPLED)).astype(int)]
    best, most, seen = None, 0, set()
    for candidate in map(any_case, candidates):
        if candidate in seen or not candidate.is_dir():
            continue
        seen.add(candidate)
        finder = Finder(candidate)
        spellings = [finder.find(name)[1] for name in sample]
        score = 3 * spellings.count(True) + 2 * spellings.count(False)  # of equals, the literal spelling wins
        if score > most:
            best, most = finder, score
        if most == 3 * len(sample):
            break
    return best


def any_case(path: Path) -> Path:
    """The file or folder that the path means, in upper or lower case; the path itself where there is none."""
    if path.exists():
        return path
    found, _ = Finder(Path()).find_spelling(path.as_posix())
    return Path(os.fsdecode(found)) if found else path


def _resolve(names: Sequence[str], finder: Finder) -> ImageFiles:
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


def _candidates(file: Path) -> Iterator[Path]:
    """Folders that may hold the images of an annotation file, the most likely first."""
    beside, root = file.parent, dataset_folder(file)
    name = file.stem.removeprefix("instances_")
    role = role_in(name)
    splits = [name]
    if role is not None:
        splits += {"val": ["val", "valid", "validation"]}.get(role, [role])
    for split in splits:
        yield root / split
        yield from (root / images / split for images in IMAGE_FOLDERS)
        yield from (root / split / images for images in IMAGE_FOLDERS)
    yield from (root / images for images in IMAGE_FOLDERS)
    yield from (root, beside)
    yield from (beside / images for images in IMAGE_FOLDERS)
    if root.parent.name.lower() in ANNOTATION_FOLDERS:  # labels/train/coco.json with images/train/
        above = root.parent.parent
        yield above / root.name
    else:
        above = root.parent
    if role_in(root.name) is not None:  # train/coco.json with images/train/ or images/
        yield from (above / images / root.name for images in IMAGE_FOLDERS)
        yield from (above / images for images in IMAGE_FOLDERS)
        yield above


class Finder:
    """Finds listed names below one folder, listing every directory once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listings: dict[str, _Listing] = {}

    def find(self, name: str) -> tuple[bytes, bool | None]:
        """Path relative to the folder, and whether it is spelled as listed; (b"", None) where it is missing."""
        for spelling in _spellings(name):
            path, exact = self.find_spelling(spelling)
            if path:
                return path, exact and spelling == name
        for stem in _stems(name):
            paths = {self.find_spelling(stem + suffix)[0] for suffix in IMAGE_SUFFIXES} - {b""}
            if len(paths) == 1:
                return paths.pop(), False
        return b"", None

    def find_spelling(self, spelling: str) -> tuple[bytes, bool]:
        """The same of a name that is relative to the folder, or absolute; missing files are (b"", False)."""
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
                found, _ = self.find_spelling(directory)  # another spelling of the directory
                listing = _Listing(self.folder, found, is_exact=False) if found else listing
            self._listings[directory] = listing
        return self._listings[directory]


class _TreeFinder(Finder):
    """Finds names that only one file in a folder and its subfolders can mean; those of other splits do not count."""

    def __init__(self, folder: Path, role: str | None) -> None:
        super().__init__(folder)
        self._paths: dict[str, list[tuple[bytes, list[str]]]] = defaultdict(list)
        others = {"train", "val", "test"} - {role} if role else set()
        for directory, names in walk(folder):
            below = directory.relative_to(folder)
            if others.intersection(map(role_in, below.parts)):
                continue
            for path in (below / name for name in names):
                parts = [_key(part) for part in path.parts]
                self._paths[parts[-1]].append((os.fsencode(path), parts))

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
