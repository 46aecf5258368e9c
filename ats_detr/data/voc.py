"""Pascal VOC datasets: an image has an XML file with an element per object. `supervision` parses the objects.

The files are in `Annotations/`, `JPEGImages/` and `ImageSets/Main/`, as in the devkit, or XML files are beside their
images, as Roboflow and LabelImg write them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

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
from ats_detr.data.images import IMAGE_SUFFIXES
from ats_detr.data.layout import (
    ANNOTATION_FOLDERS,
    IMAGE_FOLDERS,
    MAX_DEPTH,
    Role,
    base_folder,
    role_of,
    visible_names,
    walk,
)
from ats_detr.data.locate import any_case
from ats_detr.data.records import PLACE
from ats_detr.errors import UserError

_ROOT_ELEMENT = re.compile(rb"<annotation[\s>]")
_FILE_NAME = re.compile(rb"<filename>\s*(.*?)\s*</filename>")
_FLAG = re.compile(r"\s+-?[01]$")
"""Of lists of one class, whether an image shows it."""


# ----------------------------------------------------------------------------------------------------------- search
def find(path: Path) -> list[Definition]:
    """The VOC datasets in a folder and its subfolders."""
    bases = dict.fromkeys(
        base_folder(folder, path)
        for folder, names in walk(path, MAX_DEPTH)
        if any(_is_voc(folder / name) for name in names if name.lower().endswith(".xml"))
    )
    roots = [base for base in bases if not any(other in base.parents for other in bases)]
    return [Definition("Pascal VOC", root, root) for root in roots]


def _is_voc(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return _ROOT_ELEMENT.search(stream.read(2000)) is not None
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------- opening
def open_dataset(definition: Definition) -> Foreign:
    """The images and labels of a dataset that `find` has found. Raises UserError."""
    root = definition.root
    files = [folder / name for folder, names in walk(root) for name in names if name.lower().endswith(".xml")]
    images = _Images()
    label_of: dict[Path, Path | None] = {}
    for file in filter(_is_voc, files):
        image = images.of(file)
        if other := label_of.get(image):
            raise UserError(f"{other} and {file} describe the same image, {image}; remove one of them")
        label_of[image] = file
    for image in images.beside():
        label_of.setdefault(image, None)
    parts = _parts_of_lists(root, label_of) or _parts_by_folder(root, label_of)
    for file in images.contradictory:
        what = "XML files whose <filename> is another image than that of their stem (the stem counts)"
        parts[0].note(what, relative_name(file, root))
    return Foreign(definition, parts, VocReader())


def _parts_by_folder(root: Path, label_of: dict[Path, Path | None]) -> list[Part]:
    parts: dict[Role | None, Part] = {}
    for image in sorted(label_of):
        folders = relative_name(image.parent, root).split("/")
        role: Role | None = next(filter(None, map(role_of, folders)), None)
        parts.setdefault(role, Part(role or "all", role)).add(image, label_of[image])
    return list(parts.values())


def _parts_of_lists(root: Path, label_of: dict[Path, Path | None]) -> list[Part]:
    """The splits that the lists of the devkit name; none where there are no lists of splits."""
    folder = any_case(root / "ImageSets" / "Main")
    lists = {
        file.stem.lower(): file
        for file in sorted(folder.glob("*.txt"))
        if role_of(file.stem) and file.is_file() and file.stat().st_size
    }
    if any(role_of(name) == "train" for name in lists if name != "trainval"):
        lists.pop("trainval", None)
    elif "trainval" in lists:  # it contains the validation images
        lists = {name: file for name, file in lists.items() if role_of(name) != "val"}
    by_stem: dict[str, list[Path]] = {}
    for image in sorted(label_of):
        by_stem.setdefault(image.stem, []).append(image)
    images_of: dict[Role | None, dict[Path, None]] = {}
    for name, file in lists.items():
        images = images_of.setdefault(role_of(name), {})
        lines = read_label(file).decode("utf-8-sig", "surrogateescape").splitlines()
        for line in filter(None, map(str.strip, lines)):
            entry = line if _meant(line, by_stem) else _FLAG.sub("", line)
            images.update(dict.fromkeys(_meant(entry, by_stem) or [root / "JPEGImages" / entry]))
    parts = [Part(str(role), role) for role in images_of]
    for part in parts:
        for image in images_of[part.role]:
            part.add(image, label_of.get(image))
    used = {image for part in parts for image in part.images}
    for image, label in label_of.items() if parts else ():
        if image not in used and label is not None:
            parts[0].note(
                "annotated images that no list in ImageSets has (not used)", relative_name(image, root)
            )
    return parts


def _meant(entry: str, by_stem: dict[str, list[Path]]) -> list[Path]:
    """The images that an entry of a list means: a stem or a file name, below any folder."""
    path = PurePosixPath(entry)
    alike = by_stem.get(path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name, [])
    exact = [image for image in alike if image.parts[-len(path.parts) : -1] == path.parts[:-1]]
    return exact or (alike if len(alike) == 1 else [])


class _Images:
    """Finds the images of XML files: those of the same stem, otherwise those of the listed name, beside the file or in
    a folder of images beside its folder."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[Path]] = {}
        self._listings: dict[Path, dict[str, list[Path]]] = {}
        self._used: dict[Path, None] = {}
        self.contradictory: list[Path] = []
        """XML files whose stem and listed name are those of two images."""

    def of(self, label: Path) -> Path:
        """The image of an XML file; a path without suffix where it is missing."""
        if label.parent not in self._folders:
            self._folders[label.parent] = list(dict.fromkeys(map(any_case, _image_folders(label.parent))))
        folders = self._folders[label.parent]
        alike = next(filter(None, (self._listing(folder).get(label.stem) for folder in folders)), [])
        listed = _FILE_NAME.search(read_label(label))
        name = PurePosixPath(listed[1].decode("utf-8", "replace").replace("\\", "/") if listed else "")
        named = [self._listing(folder).get(stem, []) for stem in (name.stem, name.name) for folder in folders]
        if not alike:
            alike = next(filter(None, named), [])
        elif name.stem != label.stem and any(image.name == name.name for found in named for image in found):
            self.contradictory.append(label)
        alike = [image for image in alike if image.name == name.name] or alike
        if not alike:
            return label.with_suffix("")
        self._used[alike[0].parent] = None
        return alike[0]

    def beside(self) -> Iterator[Path]:
        """All images in the folders of those that were found."""
        for folder in self._used:
            for images in self._listing(folder).values():
                yield from images

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listings:
            self._listings[folder] = {}
            for name in visible_names(folder):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES:
                    self._listings[folder].setdefault(stem, []).append(folder / name)
        return self._listings[folder]


def _image_folders(labels: Path) -> Iterator[Path]:
    """Where the images of a folder of XML files may be."""
    yield labels
    yield from (labels / name for name in IMAGE_FOLDERS)
    parts = labels.parts
    for i in reversed(range(len(parts))):
        if parts[i].lower() in ANNOTATION_FOLDERS:
            rest = parts[i + 1 :]
            yield from (Path(*parts[:i], name, *rest) for name in IMAGE_FOLDERS)
            yield Path(*parts[:i], *rest)
            return


# ---------------------------------------------------------------------------------------------------------- reading
class VocReader(Reader):
    """Boxes of XML files; the classes are the names that occur."""

    @cached_property
    def _parse(self) -> Any:
        return supervision_formats()[1].detections_from_xml_obj

    def read(self, image: Path, label: Path | None, part: Part, name: str) -> tuple[tuple[int, int], Objects]:
        """See Reader."""
        from xml.etree.ElementTree import Element, ParseError

        parse = self._parse
        from defusedxml import DefusedXmlException, ElementTree  # a requirement of supervision

        if label is None:
            return (0, 0), []
        try:
            root = ElementTree.fromstring(read_label(label))
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
            try:
                boxes, (category,) = parse(single, [], (1, 1))
                entry = {"category_id": category.strip(), "bbox": boxes.xyxy[0].tolist()}
            except ValueError as error:
                category = (found.findtext("name") or "").strip()
                entry = {"category_id": category, "bbox": str(error), PLACE: f"{name}, object {number}"}
            for attribute in found.iterfind("attributes/attribute"):
                if attribute.findtext("name") == "rotation":
                    entry["attributes"] = {"rotation": attribute.findtext("value")}
            if (found.findtext("difficult") or "0").strip() not in ("", "0", "false", "False"):
                entry["iscrowd"] = 1
                what = "objects marked as difficult (not trained on, not counted as misses, as in VOC's evaluation)"
                part.note(what, f"{name}, object {number}")
            result.append(entry)
        return (_side(root, "height"), _side(root, "width")), result

    def finish(self, parts: Sequence[Part], contents: Sequence[dict[str, Any]]) -> None:
        """Undo the shift of boxes where the files count pixels from 0.

        VOC counts from 1: a box from xmin to xmax covers the pixels xmin - 1 to xmax - 1, counted from 0, and
        supervision converts it so. Some tools write corners in pixels from 0. A corner below 1 proves that.
        """
        boxed = [[a for a in c["annotations"] if not isinstance(a["bbox"], str)] for c in contents]
        if all(min(annotation["bbox"][:2]) >= 0 for objects in boxed for annotation in objects):
            return
        for part, content, objects in zip(parts, contents, boxed, strict=True):
            for annotation in objects:
                x, y, width, height = annotation["bbox"]
                if min(x, y) < 0:
                    what = "boxes from pixel 0, so that all coordinates are taken to count from 0, not from 1"
                    part.note(what, content["images"][annotation["image_id"] - 1]["file_name"])
                annotation["bbox"] = [x + 1, y + 1, round(width - 1, 2), round(height - 1, 2)]
                annotation["area"] = round(annotation["bbox"][2] * annotation["bbox"][3], 4)


def _side(root: Any, key: str) -> int:
    """A side of the image in pixels as an XML file lists it; 0 where it does not."""
    text = (root.findtext(f"size/{key}") or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else 0
