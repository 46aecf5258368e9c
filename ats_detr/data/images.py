"""Image files as people have them, as RGB pixels: any format and mode that Pillow reads, damaged ones named."""

from __future__ import annotations

import io
import struct
import urllib.error
import urllib.request

import numpy as np
from PIL import Image, ImageOps

from ats_detr.errors import UserError

# All formats are loaded now. Pillow would load them at the first file that needs one, and a thread that reads a WebP
# meanwhile may be told that there is no such format.
Image.init()

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
"""What a folder is searched for. A file that is named by itself is tried whatever its suffix."""

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
