"""Reading and writing video files with PyAV (`pip install 'ats_detr[video]'`)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ats_detr.data.images import ImageFileError

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"))
_FALLBACK_RATE = 25.0


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise ImageFileError(f"video {path} needs PyAV: pip install 'ats_detr[video]'") from None
    return av


class read_video:
    """Context manager that iterates over the frames of a video: RGB arrays, uint8 [h, w, 3].

    Raises ImageFileError, on opening or during iteration, if the video cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self._av, self.path = _av(path), path
        if not path.is_file():  # FFmpeg would wait for the writer of a FIFO
            raise ImageFileError(f"video {path} is not a regular file")
        try:
            self._container = self._av.open(str(path))
        except (self._av.FFmpegError, OSError) as error:
            raise self._error(error) from None
        if not self._container.streams.video:
            self._container.close()
            raise ImageFileError(f"video {path} cannot be read: it contains no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.frames_per_second = float(self._stream.average_rate or _FALLBACK_RATE)
        self.num_frames: int | None = self._stream.frames or None
        """Number of frames according to the file; None if it does not state it."""

    def __enter__(self) -> read_video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for frame in self._container.decode(self._stream):
                yield frame.to_ndarray(format="rgb24")
        except (self._av.FFmpegError, OSError) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> ImageFileError:
        return ImageFileError(
            f"video {self.path} cannot be read: {getattr(error, 'strerror', None) or error}"
        )


class VideoWriter:
    """Context manager that writes pictures of equal size to an MP4 file, which is created on success only."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self._av, self._path = _av(path), path
        self._temporary = path.with_name(f".ats-detr-{secrets.token_hex(8)}.tmp")
        self._container = self._av.open(str(self._temporary), "w", format="mp4")
        self._rate = Fraction(frames_per_second).limit_denominator(1001)
        self._stream: Any = None

    def add(self, picture: Image.Image) -> None:
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            # Both codecs need even sides.
            self._stream.width, self._stream.height = picture.width // 2 * 2, picture.height // 2 * 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.bit_rate = 8_000_000
        picture = picture.convert("RGB").crop((0, 0, self._stream.width, self._stream.height))
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(picture)))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if kind is None and self._stream is not None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)
