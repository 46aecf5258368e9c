"""Image files of any format and pixel mode that Pillow reads, decoded to RGB; errors name the file."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import stat
import struct
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ats_detr.errors import UserError
from ats_detr.text import printable

# All formats are loaded now. Pillow would load them at the first file that needs one, and a thread that reads a WebP
# meanwhile could fail with "cannot identify image file".
Image.init()

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
"""Suffixes that a folder is searched for. A file that is named explicitly may have any suffix."""

ImageSource = str | Path | Image.Image | np.ndarray | Tensor
"""One image: a file, a PIL image, an array [h, w], [h, w, 3] or [h, w, 4], or a tensor [3, h, w]; arrays and tensors
are RGB, uint8 or floating point in 0..1. A string may be a URL where URLs are allowed."""

_DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""Raised by Pillow on damaged files: truncated data, broken PNG chunks, unknown formats, too many pixels."""
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_MOST_BYTES = 64 * 2**20
_TIMEOUT_SECONDS = 30


class ImageFileError(UserError):
    """An image is missing, damaged or not the one the annotations describe. The message names the file."""


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about its image without decoding it."""

    size: tuple[int, int]
    """(height, width) in pixels as stored."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) in pixels as viewers show the image."""
        return self.size[::-1] if self.orientation >= 5 else self.size


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Context in which the errors of reading an image become ImageFileError."""
    try:
        yield
    except ImageFileError:
        raise
    except FileNotFoundError:
        raise ImageFileError(f"image {name} does not exist") from None
    except _DECODING_ERRORS as error:  # ValueError: a path with a null character
        raise ImageFileError(f"image {printable(name)} cannot be read: {_reason(error)}") from None


def read_file(path: str | bytes | Path) -> bytes:
    """Content of a regular file. A FIFO or a device, which could block forever, raises ImageFileError."""
    name = os.fsdecode(path)
    with _reading(name):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ImageFileError(f"image {name} is not a regular file")
            return file.read()


def read_header(path: str | bytes | Path) -> ImageHeader:
    """Size and orientation of an image file. Raises ImageFileError where it is not an image."""
    name = os.fsdecode(path)
    with _reading(name):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageFileError(f"image {name} is not a regular file")
        with open(path, "rb") as file, Image.open(file) as image:
            return _header(image)


def _header(image: Image.Image) -> ImageHeader:
    orientation = _orientation(image)
    if orientation != 1 and image.format == "TIFF":
        image.load()  # Pillow turns TIFF images upright when it decodes them
        orientation = 1
    return ImageHeader((image.height, image.width), orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODING_ERRORS:
        return 1
    return orientation if orientation in range(1, 9) else 1


def decode_image(encoded: bytes, name: object, *, upright: bool = False) -> Image.Image:
    """The pixels of an encoded image as RGB; of an animation its first frame.

    Args:
        name: what errors call the image.
        upright: turn the pixels as the file's EXIF orientation says, as viewers show a photograph. False: pixels as
            stored. Pillow turns TIFF images in both cases.

    Raises ImageFileError when it cannot be decoded.
    """
    with _reading(str(name)), Image.open(io.BytesIO(encoded)) as file:
        turned = upright and _orientation(file) != 1
        return to_rgb(ImageOps.exif_transpose(file) if turned else file)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} Raise data.max_image_pixels (PIL.Image.MAX_IMAGE_PIXELS) if you trust the file"
    return getattr(error, "strerror", None) or str(error)


def allow_pixels(max_image_pixels: int | None) -> None:
    """Raise Pillow's limit on the pixels of an image, PIL.Image.MAX_IMAGE_PIXELS, for this process."""
    limit = Image.MAX_IMAGE_PIXELS
    if max_image_pixels is not None and limit is not None:
        Image.MAX_IMAGE_PIXELS = max(limit, max_image_pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, 8 bits per channel; alpha is dropped.

    Gray integers of more than 8 bits are scaled by the bit depth that holds their maximum: 8, 10, 12, 14 or 16 (files
    store the pixels of a 12-bit camera as 16 bits). Floating-point pixels count as 0..1 where none exceeds 1, otherwise
    like integers. Raises UserError for other ranges: Pillow would clip them to black or white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    return image.convert("RGB")


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    is_float = np.issubdtype(pixels.dtype, np.floating)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high < 2**16):  # also where a pixel is not a number
        kind = "floating-point" if is_float else f"{8 * pixels.itemsize}-bit integer"
        raise UserError(f"{kind} pixels of {low:g} to {high:g}; convert them to 8 or 16 bits, or to 0..1")
    if is_float and high <= 1:
        return (pixels * 255).round().astype(np.uint8)
    depth = next(bits for bits in _BIT_DEPTHS if high < 2**bits)
    return (pixels / 2 ** (depth - 8)).astype(np.uint8)


def fetch_image(url: str) -> bytes:
    """The bytes behind an http(s) URL. Raises ImageFileError for no answer in 30 s, and for more than 64 MiB."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ats_detr"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            encoded = response.read(_MOST_BYTES + 1)
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise ImageFileError(f"image {url} cannot be fetched: {getattr(error, 'reason', error)}") from None
    if len(encoded) > _MOST_BYTES:
        raise ImageFileError(f"image {url} cannot be fetched: it is larger than {_MOST_BYTES >> 20} MiB")
    return encoded


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder by their suffix, in order of their names; no hidden files."""
    return [path for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder in order of their names, without hidden ones (thumbnails, `._photo.jpg` of a Mac)."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def image_sources(images: ImageSource | Iterable[ImageSource]) -> Iterator[ImageSource]:
    """Yield single images: of a folder its files, of a stack of images its members."""
    if isinstance(images, (str, Path)):
        folder = Path(images)
        if is_url(images) or not folder.is_dir():
            yield images
            return
        found = images_in(folder)
        if not found:
            raise UserError(
                f"folder {folder}: there are no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        yield from found
    elif isinstance(images, Image.Image) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4):
        yield images
    elif isinstance(images, Iterable):
        for image in images:
            yield from image_sources(image)
    else:
        yield images  # read_image rejects it by name


def is_url(source: object) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_image(source: ImageSource, name: str, *, upright: bool, allow_urls: bool) -> Image.Image:
    """One image as RGB. Raises UserError."""
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] != 3:
            raise UserError(f"{name}: a tensor of shape {tuple(source.shape)}; must be [3, height, width]")
        return _from_array(source.detach().cpu().permute(1, 2, 0).numpy(), name)
    if is_url(source):
        if not allow_urls:
            raise UserError(f"{source}: URLs are fetched only where that is asked for (allow_urls=True)")
        return decode_image(fetch_image(str(source)), name, upright=upright)
    if not isinstance(source, (str, Path)):
        raise UserError(
            f"{name}: a {type(source).__name__}; must be a file, a PIL image, an array or a tensor"
        )
    return decode_image(read_file(source), name, upright=upright)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    is_gray = array.ndim == 2
    if not (is_gray or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise UserError(
            f"{name}: an array of shape {array.shape}; must be [height, width] or [height, width, 3]"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also where it is not a number
            raise UserError(f"{name}: floating-point pixels must be in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name}: pixels of type {array.dtype}; must be uint8, or floating point in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
