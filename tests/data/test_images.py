"""Image files: every pixel mode becomes RGB at the right brightness, and no file blocks or escapes its error."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats_detr.data.images import ImageFileError, decode_image, read_file, read_header, to_rgb
from ats_detr.errors import UserError

RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_integer_pixels_are_scaled_by_their_bit_depth(tmp_path: Path, bits: int, suffix: str) -> None:
    pixels = (RAMP * (2**bits - 1)).astype(np.uint16)
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(pixels).save(path)
    decoded = np.asarray(decode_image(path.read_bytes(), path))
    np.testing.assert_allclose(decoded[..., 0], RAMP * 255, atol=1.5)


@pytest.mark.parametrize(("dtype", "high"), [("<u2", 65535), (">u2", 65535), ("<i4", 4095), ("<i4", 65535)])
def test_wider_and_big_endian_integers_are_scaled_too(tmp_path: Path, dtype: str, high: int) -> None:
    pixels = (RAMP * high).astype(dtype)
    mode = {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype]
    image = Image.frombytes(mode, (40, 30), pixels.tobytes())
    np.testing.assert_allclose(np.asarray(to_rgb(image))[..., 0], RAMP * 255, atol=1.5)
    image.save(tmp_path / "ramp.tif")
    decoded = decode_image((tmp_path / "ramp.tif").read_bytes(), "ramp.tif")
    np.testing.assert_allclose(np.asarray(decoded)[..., 0], RAMP * 255, atol=1.5)


@pytest.mark.parametrize("high", [1, 255, 4095, 65535])
def test_floating_point_pixels_are_scaled_by_their_range(tmp_path: Path, high: int) -> None:
    path = tmp_path / "ramp.tif"
    Image.fromarray((RAMP * high).astype(np.float32)).save(path)
    decoded = np.asarray(decode_image(path.read_bytes(), path))
    np.testing.assert_allclose(decoded[..., 0], RAMP * 255, atol=1.5)


@pytest.mark.parametrize("value", [-1.0, 7e4, np.nan, np.inf])
def test_pixels_of_another_range_are_rejected_by_name(tmp_path: Path, value: float) -> None:
    pixels = RAMP.astype(np.float32)
    pixels[3, 5] = value
    path = tmp_path / "odd.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ImageFileError, match=r"image .*odd\.tif cannot be read: floating-point pixels of"):
        decode_image(path.read_bytes(), path)
    with pytest.raises(UserError, match="32-bit integer pixels of -5 to 0"):
        to_rgb(Image.new("I", (2, 1), -5).crop((0, 0, 3, 1)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (4, 3))).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_header_and_pixels_agree_on_size_for_every_orientation(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    header = read_header(path)
    stored, upright = (decode_image(path.read_bytes(), path, upright=upright) for upright in (False, True))
    assert (stored.height, stored.width) == header.size
    assert (upright.height, upright.width) == header.upright_size
    assert upright.size == ((30, 40) if orientation >= 5 else (40, 30))


def test_an_unreadable_orientation_counts_as_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\xff")
    assert read_header(path).orientation == 1
    assert decode_image(path.read_bytes(), path, upright=True).size == (40, 30)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("read", [read_file, read_header])
def test_fifos_devices_and_folders_are_rejected_without_waiting(tmp_path: Path, read) -> None:
    fifo = tmp_path / "fifo.jpg"
    os.mkfifo(fifo)
    found: list[str] = []

    def attempt() -> None:
        for path in (fifo, "/dev/zero", tmp_path):
            with pytest.raises(ImageFileError) as raised:
                read(path)
            found.append(str(raised.value))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "reading a FIFO blocks"
    assert len(found) == 3
    assert found[0] == f"image {fifo} is not a regular file"


def test_a_name_with_a_null_character_is_an_error(tmp_path: Path) -> None:
    for read in (read_file, read_header):
        with pytest.raises(ImageFileError, match="null"):
            read(f"{tmp_path}/a\0.jpg")


def test_too_many_pixels_name_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for attempt in (lambda: decode_image(path.read_bytes(), path), lambda: read_header(path)):
        with pytest.raises(ImageFileError, match=r"2500 pixels.*data\.max_image_pixels"):
            attempt()
