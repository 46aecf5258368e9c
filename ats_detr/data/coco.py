"""COCO-format detection data from any folder and annotation file: validated, packed, decoded on demand."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ats_detr.data.annotations import CocoAnnotations
from ats_detr.data.classes import ClassMap
from ats_detr.data.findings import Findings
from ats_detr.data.images import (
    ImageFileError,
    ImageHeader,
    allow_pixels,
    decode_image,
    read_file,
    read_header,
)
from ats_detr.data.locate import locate_images
from ats_detr.data.plausibility import check_boxes
from ats_detr.errors import UserError

log = logging.getLogger(__name__)

ExifRule = Literal["auto", "stored", "upright"]
T = TypeVar("T")
_NUM_READERS = 16
_NUM_TIMED = 256
_SLOW_SECONDS = 1e-3
"""Time of reading one header from which threads pay off."""
_MANY_IMAGES = 20_000


class CocoDetection(Dataset):
    """Images and objects of a COCO-format dataset, not yet transformed. Images without objects are members like any
    other.

    `datasets check` opens a dataset by this class too, so that both accept the same data. Boxes are clipped to the
    image; crowd regions and boxes without area are not objects to train on, but stay in the ground truth of the
    evaluation.

    Args:
        image_folder: holds the files that the annotation file names; None: the folders that exporters use are tried.
        class_map: that of the model (from its checkpoint, or of the training set for the validation set). None: made
            from the file.
        cache_images: read all encoded files into memory once, in one block that forked loader workers share (each
            process of a multi-GPU run has its own).
        on_bad_image: "error" stops at an image that is missing or cannot be read; "skip" leaves it to the loaders to
            omit and count such images.
        on_bad_annotation: "error" stops at a record that cannot be used; "skip" omits it with a warning.
        exif: which pixels the boxes refer to. "stored": as stored; "upright": turned as the EXIF orientation says;
            "auto": as the listed sizes prove, image by image, otherwise stored. Where all proofs of a file are for
            upright, or the file states it (`CocoAnnotations.upright`), its images without proof (half turns, square
            images) are upright too. "auto" reads the header of every image.
        need_objects: the dataset is trained on, so one without objects is an error. False: the list of annotations
            may be absent, and there is no AP then.
        max_image_pixels: raises Pillow's limit, see `allow_pixels`.
        findings: gets all problems, errors included, instead of their being raised and logged.

    Raises AnnotationError or ImageFileError.
    """

    def __init__(
        self,
        image_folder: str | Path | None,
        annotation_file: str | Path,
        *,
        class_map: ClassMap | None = None,
        cache_images: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
        on_bad_annotation: Literal["error", "skip"] = "error",
        exif: ExifRule = "auto",
        need_objects: bool = False,
        max_image_pixels: int | None = None,
        findings: Findings | None = None,
    ) -> None:
        self.on_bad_image, self.exif, self.max_image_pixels = on_bad_image, exif, max_image_pixels
        self.findings = findings or Findings(annotation_file, skip_bad=on_bad_annotation == "skip")
        allow_pixels(max_image_pixels)
        if image_folder is not None and not Path(image_folder).is_dir():
            raise ImageFileError(f"image folder {image_folder} does not exist")
        annotations = CocoAnnotations.read(annotation_file, self.findings, need_annotations=need_objects)
        names = [annotations.file_name(index) for index in range(len(annotations))]
        located = locate_images(
            names, Path(annotation_file), None if image_folder is None else Path(image_folder)
        )
        self.image_folder, self.paths = located.folder, located.paths
        self._report_files(names, located.respelled, located.ambiguous)
        self.unusable = self.paths == b""
        """bool [images] what opening the dataset found missing, unreadable or of another size than listed."""
        self.upright = np.full(len(names), exif == "upright")
        """bool [images] whether the pixels are turned as the EXIF orientation says."""
        if exif == "auto" or findings is not None or not annotations.sizes.all():
            self.upright = self._read_headers(annotations)
        self.annotations = check_boxes(annotations, self.findings, need_objects=need_objects)
        self.class_map = self._map_classes(class_map)
        if findings is None:
            self.findings.settle(log)

        annotations = self.annotations
        self.label_rows = self.class_map.rows_of(annotations.category_ids)
        sizes_hw = annotations.sizes[annotations.image_of_annotation()]
        boxes = annotations.boxes_xywh.copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, sizes_hw[:, [1, 0, 1, 0]])
        self.boxes_xyxy = boxes.astype(np.float32)
        """float32 [annotations, 4] pixels, clipped to the image."""
        self.is_object = ~annotations.crowd & (self.boxes_xyxy[:, 2:] > self.boxes_xyxy[:, :2]).all(1)
        """bool [annotations] objects for training and matching: neither crowds nor boxes without area."""
        self._cache = _FileCache(self.path(index) for index in range(len(self))) if cache_images else None

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor, Tensor]:
        """RGB image, boxes_xyxy_N4 float32 in pixels, labels_N int64 class indices."""
        return self.read_image(index), *self.objects(index)

    def path(self, index: int) -> Path:
        """The image file; where it is missing, where it is expected."""
        found = os.fsdecode(self.paths[index])
        return self.image_folder / (found or self.annotations.file_name(index))

    def image_id(self, index: int) -> int:
        return int(self.annotations.image_ids[index])

    @property
    def num_objects(self) -> np.ndarray:
        """int64 [images] objects of each image: no crowds, no empty boxes."""
        counts = np.concatenate([[0], self.is_object.cumsum()])[self.annotations.starts]
        return np.diff(counts).astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of the image that the boxes refer to."""
        height, width = self.annotations.sizes[index].tolist()
        return height, width

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """boxes_xyxy_N4 float32 in pixels, labels_N int64 class indices; no crowds, no empty boxes."""
        rows = slice(self.annotations.starts[index], self.annotations.starts[index + 1])
        keep = self.is_object[rows]
        boxes, labels = self.boxes_xyxy[rows][keep], self.label_rows[rows][keep]
        return torch.from_numpy(boxes), torch.from_numpy(labels)

    def read_image(self, index: int) -> Image.Image:
        """The decoded image as RGB, turned as `upright` says.

        Raises ImageFileError when the file is missing, cannot be decoded or has another size than listed.
        """
        path = self.path(index)
        encoded = read_file(path) if self._cache is None else self._cache.read(index, path)
        allow_pixels(self.max_image_pixels)  # loader workers may not inherit Pillow's limit
        image = decode_image(encoded, path, upright=bool(self.upright[index]))
        if (image.height, image.width) != self.size(index):
            raise ImageFileError(f"image {path} {_other_size((image.height, image.width), self.size(index))}")
        return image

    # ------------------------------------------------------------------------------------------------ on opening
    def _report_files(self, names: Sequence[str], respelled: Sequence[str], ambiguous: Sequence[str]) -> None:
        missing = [name for name, path in zip(names, self.paths, strict=True) if not path]
        self.findings.add("warning", "file names that are spelled otherwise on the disk", respelled)
        self.report_bad_images("files that two listed names could mean", ambiguous)
        missing = sorted(set(missing) - set(ambiguous))
        if len(missing) == len(names):
            # An error for on_bad_image=skip, too: nothing would be left.
            archives = sorted(self.image_folder.glob("*.zip"))
            fix = (
                f"unpack {archives[0].name}"
                if archives
                else "set data.train_images, data.val_images or --images"
            )
            raise ImageFileError(
                f"{self.findings.source}: none of its {len(names)} images is in {self.image_folder}, first"
                f" {missing[0]!r}; {fix}"
            )
        self.report_bad_images(f"images that are missing from {self.image_folder}", missing)

    def report_bad_images(self, what: str, places: Sequence[str]) -> None:
        """Add images that cannot be used to the findings, as `on_bad_image` says."""
        if self.on_bad_image == "error":
            self.findings.add("error", what, places, "data.on_bad_image=skip omits them")
        else:
            self.findings.add("warning", f"{what} (omitted)", places)

    def _read_headers(self, annotations: CocoAnnotations) -> np.ndarray:
        """Fill in missing sizes; bool [images] which images are turned upright."""
        present = np.flatnonzero(self.paths != b"").tolist()
        if len(present) > _MANY_IMAGES:
            log.info(
                "reading the headers of %d images (data.exif=stored or upright omits this)", len(present)
            )
        headers: list[ImageHeader | None] = [None] * len(annotations)
        faults = []
        for index, found in zip(present, _read_many(self._header_or_error, present), strict=True):
            if isinstance(found, ImageHeader):
                headers[index] = found
            else:
                faults.append(str(found).removeprefix("image "))
                self.unusable[index] = True
        self.report_bad_images("images that cannot be read", faults)
        if faults and len(faults) == len(present):
            raise ImageFileError(f"{self.findings.source}: none of its images can be read, first {faults[0]}")
        return self._orient(annotations, headers)

    def _header_or_error(self, index: int) -> ImageHeader | ImageFileError:
        try:
            return read_header(self.path(index))
        except ImageFileError as error:
            return error

    def _orient(self, annotations: CocoAnnotations, headers: Sequence[ImageHeader | None]) -> np.ndarray:
        sizes = annotations.sizes
        unread = np.array([header is None for header in headers])
        stored = np.array([(0, 0) if header is None else header.size for header in headers], np.int64)
        shown = np.array([(0, 0) if header is None else header.upright_size for header in headers], np.int64)
        turned = np.array([header is not None and header.orientation != 1 for header in headers])
        known = (sizes > 0).all(1)
        differs = turned & (stored != shown).any(1)
        proves_upright = differs & known & (sizes == shown).all(1)
        proves_stored = differs & known & (sizes == stored).all(1)
        unproven = turned & ~proves_upright & ~proves_stored
        upright = np.full(len(headers), self.exif == "upright")
        if self.exif == "auto":
            rest = annotations.upright or (proves_upright.any() and not proves_stored.any())
            upright = proves_upright | (unproven & rest)
        actual = np.where(upright[:, None], shown, stored)
        sizes[~known] = np.where(unread[~known, None], 1, actual[~known])
        other = ~unread & known & (sizes != actual).any(1)
        self.unusable |= other
        self.report_bad_images(
            "images of another size than listed",
            [
                f"{self.path(i).name} {_other_size(tuple(actual[i]), tuple(sizes[i]))}"
                for i in np.flatnonzero(other).tolist()
            ],
        )
        cause = "as this file states" if annotations.upright else "like the others of this file"
        reasons = [
            (proves_upright, "turned upright, as the listed size is that of the upright image"),
            (unproven & upright, f"turned upright, {cause}"),
            (proves_stored, "read as stored, as the listed size is that of the stored pixels"),
            (unproven & ~upright, "read as stored, though viewers turn them: see data.exif"),
        ]
        if self.exif != "auto":
            reasons = [(turned, f"read {'upright' if self.exif == 'upright' else 'as stored'} (data.exif)")]
        for chosen, what in reasons:
            names = [self.path(i).name for i in np.flatnonzero(chosen & ~other).tolist()]
            self.findings.add("warning", f"images with an EXIF orientation other than 1, {what}", names)
        return upright

    def _map_classes(self, class_map: ClassMap | None) -> ClassMap:
        annotations = self.annotations
        own = ClassMap.from_categories(annotations.categories)
        if class_map is None:
            return own
        try:
            mapped = class_map.for_file(annotations.categories, np.unique(annotations.category_ids).tolist())
        except UserError as error:
            self.findings.add("error", "annotation file with other categories than the model", [error])
            return own
        if mapped is not class_map:
            self.findings.warn(
                "annotation file whose category ids are not those of the model (matched by name)",
                annotations.file.name,
            )
        return mapped


def _read_many(read: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """`read` of each index, in threads where files come slowly, as from a network.

    Where they come fast, threads would wait for the interpreter's lock: 20,000 headers of a local disk took 2.0 s
    without and 5.8 s with 16 threads (2 cores).
    """
    started = time.monotonic()
    first = [read(index) for index in indices[:_NUM_TIMED]]
    yield from first
    rest = indices[_NUM_TIMED:]
    if time.monotonic() - started < _SLOW_SECONDS * len(first):
        yield from map(read, rest)
    else:
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            yield from pool.map(read, rest)


def _other_size(actual: tuple[int, ...], listed: tuple[int, ...]) -> str:
    swapped = "; width and height look swapped" if actual == listed[::-1] else ""
    return f"is {actual[1]} x {actual[0]} pixels but listed as {listed[1]} x {listed[0]}{swapped}"


class _FileCache:
    """Contents of many files in one shared block of memory."""

    def __init__(self, paths: Iterable[Path]) -> None:
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(_read_or_none, paths))
        lengths = np.array([0 if c is None else len(c) for c in contents], np.int64)
        self.ends = lengths.cumsum()
        self.starts = self.ends - lengths
        self.unread = np.array([c is None for c in contents], bool)
        self.block = torch.empty(int(lengths.sum()), dtype=torch.uint8).share_memory_()
        view = memoryview(self.block.numpy())
        for i, content in enumerate(contents):
            if content is not None:
                view[self.starts[i] : self.ends[i]] = content
                contents[i] = None  # the peak stays near one copy

    def read(self, index: int, path: Path) -> bytes:
        """The content; of a file that could not be read it is tried again, for its error."""
        if self.unread[index]:
            return read_file(path)
        return self.block.numpy()[self.starts[index] : self.ends[index]].tobytes()


def _read_or_none(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except ImageFileError:
        return None


def spread_over_difficulty(
    dataset: CocoDetection, num_images: int, among: np.ndarray | None = None
) -> list[int]:
    """Dataset indices of `num_images` images (or all, if there are fewer), from the fewest objects to the most.

    Args:
        among: [N] int64 dataset indices to choose from. None: all.
    """
    indices = np.arange(len(dataset)) if among is None else among
    order = indices[np.argsort(dataset.num_objects[indices], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(num_images, len(order))).round().astype(int)
    return order[places].tolist()
