"""Creation and exclusive use of folders, and atomic replacement of files."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ats_detr.errors import UserError

logger = logging.getLogger(__name__)

_TEMPORARY = ".ats-detr-{}.tmp"
_LOCK = ".ats-detr.lock"
_POLL_SECONDS = 0.1
_WAIT_MINUTES = 30.0


def cache_folder() -> Path:
    """The folder of files that are made once: the environment variable ATS_DETR_CACHE, or ~/.cache/ats_detr."""
    if folder := os.environ.get("ATS_DETR_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "ats_detr"
    except RuntimeError:
        raise UserError("there is no home folder; set ATS_DETR_CACHE to a folder for cached files") from None


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot create this folder ({error.strerror}); choose another one"
        ) from error


@contextmanager
def replaced_file(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that replaces `path` atomically, flushed to disk, where the context ends without an error.

    Its temporary name, in the same folder, is unpredictable and never that of an existing file or link. An OSError has
    the name of `path`.

    Args:
        previous: new name of the file that is replaced. A crash between the two renames leaves only `previous`.
    """
    temporary = path.with_name(_TEMPORARY.format(secrets.token_hex(8)))
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # flushes the renames
    finally:
        os.close(descriptor)


def delete_temporary_files(folder: Path) -> None:
    """Delete what killed processes left of `replaced_file`. Needs the exclusive use of the folder."""
    for path in folder.glob(_TEMPORARY.format("*")):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive_use(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Within the context no other process has the exclusive use of the folder. A process that ends loses it.

    Args:
        wait: wait for another process, at most 30 minutes. False: raise UserError.

    Raises UserError where another process keeps the folder, or where the folder is not writable.
    """
    deadline = time.monotonic() + _WAIT_MINUTES * 60 * wait
    try:
        while (descriptor := _lock(folder / _LOCK)) is None:
            if time.monotonic() >= deadline:
                waited = f" (waited {_WAIT_MINUTES:g} minutes)" if wait else ""
                fix = "wait for it, stop it, or choose another folder"
                raise UserError(f"{folder}: another run is using this folder{waited}; {fix}")
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        raise UserError(f"{folder}: cannot write to this folder ({error.strerror})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file; None where another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock_descriptor(descriptor)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process before this one has deleted the file


def _lock_descriptor(descriptor: int) -> None:
    """A POSIX lock, which child processes do not inherit. Without effect where the file system has none."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:
        logger.warning("no locks here, do not start two runs in one folder (%s)", error)
