"""Image files as people have them, as RGB pixels: any format and mode that Pillow reads, damaged ones named."""

from __future__ import annotations

import io
import struct
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ats_detr.errors import UserError

# All formats are loaded now. Pillow would load them at the first file that needs one, and a thread that reads a WebP
# meanwhile may be told that there is no such format.
Image.init()

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
"""What a folder is searched for. A file that is named by itself is tried whatever its suffix."""

ImageSource = str | Path | Image.Image | np.ndarray | Tensor
"""One image: a file, a PIL image, an array [h, w], [h, w, 3] or [h, w, 4], or a tensor [3, h, w]; arrays and tensors
are RGB, uint8 or floating point in 0..1. A string may be a URL where URLs are allowed."""

_DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on damaged files: truncated data, broken PNG chunks, unknown formats, absurd sizes."""
_MOST_BYTES = 64 * 2**20
_TIMEOUT_SECONDS = 30


class ImageFileError(UserError):
    """An image is missing, damaged or not the one the annotations describe. The message names the file."""


def decode_image(encoded: bytes, name: object, *, upright: bool = False) -> Image.Image:
    """The pixels of an encoded image as RGB; of an animation its first frame.

    Args:
        name: what errors call the image.
        upright: turn the pixels as the file's EXIF orientation says, which is how viewers show a photograph. False:
            pixels as stored, to which the boxes of a dataset refer.

    Raises ImageFileError when it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            return to_rgb(ImageOps.exif_transpose(file) if upright else file)
    except _DECODING_ERRORS as error:
        reason = (
            "not an image that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise ImageFileError(f"image {name} cannot be read: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. 16-bit gray (mode I;16, or I in older Pillow) is scaled: Pillow would clip it to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def fetch_image(url: str) -> bytes:
    """The bytes behind an http(s) URL. Raises ImageFileError for no answer in 30 s, and for more than 64 MiB."""
    request = urllib.request.Request(url, headers={"User-Agent": "ats_detr"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            encoded = response.read(_MOST_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ImageFileError(f"image {url} cannot be fetched: {getattr(error, 'reason', error)}") from None
    if len(encoded) > _MOST_BYTES:
        raise ImageFileError(f"image {url} cannot be fetched: it is larger than {_MOST_BYTES >> 20} MiB")
    return encoded


def images_in(folder: Path) -> list[Path]:
    """The files of a folder that look like images by their suffix, by name; no hidden ones."""
    return [path for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder by name, without those that a dot hides (thumbnails, `._photo.jpg` of a Mac)."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def image_sources(images: ImageSource | Iterable[ImageSource]) -> Iterator[ImageSource]:
    """Single images: folders become their files, stacks of images their members."""
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
        yield images  # refused by name where it is read


def is_url(source: object) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_image(source: ImageSource, name: str, *, upright: bool, allow_urls: bool) -> Image.Image:
    """One image as RGB."""
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] != 3:
            raise UserError(f"{name}: a tensor of shape {tuple(source.shape)}; give [3, height, width]")
        return _from_array(source.detach().cpu().permute(1, 2, 0).numpy(), name)
    if is_url(source):
        if not allow_urls:
            raise UserError(f"{source}: URLs are fetched only where that is asked for (allow_urls=True)")
        return decode_image(fetch_image(str(source)), name, upright=upright)
    if not isinstance(source, (str, Path)):
        raise UserError(f"{name}: a {type(source).__name__}; give a file, a PIL image, an array or a tensor")
    try:
        encoded = Path(source).read_bytes()
    except OSError as error:
        raise ImageFileError(f"image {name} cannot be read: {error.strerror}") from None
    return decode_image(encoded, name, upright=upright)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    is_gray = array.ndim == 2
    if not (is_gray or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise UserError(
            f"{name}: an array of shape {array.shape}; give [height, width] or [height, width, 3]"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also where it is not a number
            raise UserError(f"{name}: floating-point pixels outside 0..1; give 0..1, or uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name}: pixels of type {array.dtype}; give uint8, or floating point in 0..1")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
