"""COCO instances files of any exporter, parsed and packed into arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ats_detr.data.findings import AnnotationError, Findings
from ats_detr.data.records import is_listed_crowd, read_annotations, read_categories, read_images

CONVERTED = "ats_detr"
"""Key under `info` of a file that this package has made: `notes` lists what is probably not intended; `upright` is true
where boxes refer to upright images."""


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO instances file in numpy arrays, images by ascending id, annotations grouped by image.

    Packed, because Python objects that loader processes touch are copied page by page (their reference counts
    change): with lists and dicts the host memory of a training run grows by the size of the annotations times
    the workers.
    """

    file: Path
    categories: dict[int, str]
    image_ids: np.ndarray
    """int64 [images] ids of the file; 1, 2, ... where an id of the file is not an integer."""
    result_ids: np.ndarray | None
    """bytes [images] JSON of the ids for COCO results, where they are not `image_ids`."""
    sizes: np.ndarray
    """int64 [images, 2] height, width in pixels; 0 where the file does not state them."""
    file_names: np.ndarray
    """bytes [images], UTF-8, as in the file"""
    starts: np.ndarray
    """int64 [images + 1] first annotation of each image"""
    boxes_xywh: np.ndarray
    """float64 [annotations, 4] in pixels, as in the file"""
    areas: np.ndarray
    """float64 [annotations] area of the object's mask (of its box where the file gives none)"""
    category_ids: np.ndarray
    """int64 [annotations]"""
    crowd: np.ndarray
    """bool [annotations]"""
    upright: bool
    """The file states that boxes refer to the upright images, as viewers show them."""
    num_listed: tuple[int, int]
    """Images, and annotations that are no crowds, that the file lists, usable or not."""

    @staticmethod
    def read(
        file: str | Path, findings: Findings | None = None, *, need_annotations: bool = True
    ) -> CocoAnnotations:
        """Parse and validate an instances file.

        Args:
            findings: gets every problem of single records; the records with errors are omitted. None: the first error
                is raised.
            need_annotations: False: an absent list of annotations is an empty one (COCO's test images).

        Raises AnnotationError where the file as a whole cannot be used.
        """
        file = Path(file)
        content = parse_annotations(file, need_annotations=need_annotations)
        found = findings if findings is not None else Findings(file)
        about = _converted(content.get("info"))
        _read_notes(about, found)
        categories = read_categories(content["categories"], found)
        images = read_images(content["images"], found)
        annotations = read_annotations(content["annotations"], images, categories, found)
        if findings is None and found.of("error"):
            raise AnnotationError(f"{file}: {found.of('error')[0]}")
        if not len(images.ids):
            raise AnnotationError(f"{file} lists no images" + _first(found))
        if not categories:
            raise AnnotationError(f"{file} lists no categories" + _first(found))
        num_objects = sum(not is_listed_crowd(record) for record in content["annotations"])
        return CocoAnnotations(
            file=file,
            categories=categories,
            image_ids=images.ids,
            result_ids=images.result_ids,
            sizes=images.sizes,
            file_names=images.file_names,
            upright=about.get("upright") is True,
            num_listed=(len(content["images"]), num_objects),
            **annotations,
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        return self.file_names[index].decode("utf-8", "surrogatepass")

    def result_id(self, index: int) -> Any:
        """The id of an image as COCO results state it: that of the file."""
        return int(self.image_ids[index]) if self.result_ids is None else json.loads(self.result_ids[index])

    def image_of_annotation(self) -> np.ndarray:
        """int64 [annotations] position of the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def indices_of(self, image_ids: Sequence[int]) -> list[int]:
        """Positions of images that are in the dataset."""
        return np.searchsorted(self.image_ids, np.array(image_ids, np.int64)).tolist()

    def without(self, omitted: np.ndarray) -> CocoAnnotations:
        """The same without the annotations where bool [annotations] `omitted` is set."""
        kept = np.bincount(self.image_of_annotation()[~omitted], minlength=len(self))
        return replace(
            self,
            starts=np.concatenate([[0], kept.cumsum()]).astype(np.int64),
            boxes_xywh=self.boxes_xywh[~omitted],
            areas=self.areas[~omitted],
            category_ids=self.category_ids[~omitted],
            crowd=self.crowd[~omitted],
        )

    def by_position(self, indices: Iterable[int]) -> dict[str, Any]:
        """The ground truth of some images in COCO's layout for an evaluator: every annotation, crowds included.

        Ids are positions: of an image in this dataset, of a category among the ascending category ids. Annotations
        are numbered from 1: pycocotools reads an annotation id of 0 as "unmatched".
        """
        place_of = {category_id: place for place, category_id in enumerate(sorted(self.categories))}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in indices:
            height, width = self.sizes[index].tolist()
            images.append({"id": index, "height": height, "width": width})
            for row in range(self.starts[index], self.starts[index + 1]):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": place_of[int(self.category_ids[row])],
                        "bbox": self.boxes_xywh[row].tolist(),
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowd[row]),
                    }
                )
        categories = [{"id": place, "name": self.categories[i]} for i, place in place_of.items()]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def parse_annotations(file: Path, *, need_annotations: bool = True) -> dict[str, Any]:
    """The JSON of an instances file with its three lists. Raises AnnotationError."""
    if not file.is_file():
        exists = "is not a regular file" if file.exists() else "does not exist"
        raise AnnotationError(f"annotation file {file} {exists}")
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise AnnotationError(f"annotation file {file} cannot be read ({error.strerror})") from None
    if encoded.startswith(b"PK\x03\x04"):
        raise AnnotationError(f"{file} is a zip archive; unpack it and use the annotation file in it")
    try:
        content = json.loads(encoded)
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise AnnotationError(f"{file} is not JSON ({reason}); must be a COCO instances file") from None
    if isinstance(content, dict) and not need_annotations:
        content.setdefault("annotations", [])
    lists = ("images", "annotations", "categories")
    missing = [k for k in lists if not (isinstance(content, dict) and isinstance(content.get(k), list))]
    if missing:
        raise AnnotationError(
            f"{file} is JSON but not a COCO instances file: no list under {', '.join(map(repr, missing))};"
            " export as COCO"
        )
    return content


def _converted(info: Any) -> dict[str, Any]:
    """What the conversion of a file states about it."""
    about = info.get(CONVERTED) if isinstance(info, dict) else None
    return about if isinstance(about, dict) else {}


def _read_notes(about: dict[str, Any], findings: Findings) -> None:
    """Repeat what the conversion of a file found."""
    notes = about.get("notes")
    for what, places in notes.items() if isinstance(notes, dict) else ():
        findings.add("warning", what, places if isinstance(places, list) else [places])


def _first(findings: Findings) -> str:
    """The first error, which may be the reason why nothing is left."""
    errors = findings.of("error")
    return f" that can be used: {errors[0]}" if errors else ""
