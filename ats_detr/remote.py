"""Checkpoints by name: `hf://owner/repo[@revision][/file]` of the Hugging Face Hub, and published files by short name.

Files are fetched when they are asked for, with a progress bar, into the cache of huggingface_hub; its rules and
environment variables apply (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). An interrupted transfer is resumed or
discarded.
"""

from __future__ import annotations

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from ats_detr.console import say, track
from ats_detr.errors import UserError
from ats_detr.files import cache_folder, replaced_file
from ats_detr.text import first_line

_HUB = "hf://"
_SOURCE = re.compile(
    r"hf://?(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>[^@]+))?"
)
"""With one slash too: `Path` removes the second one. As in huggingface_hub, only the names of references have slashes;
other revisions with slashes are written with %2F."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
_CONFIGS = ("config.json", "preprocessor_config.json")
_CHUNK = 2**20
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    source: str
    """`hf://...` or a URL."""
    config: str
    """The shipped configuration that belongs to it."""
    about: str


_SPARSE = "https://arena.kakaocdn.net/brainrepo/sparse_detr/sparse_detr_"
PUBLISHED = {
    "ats-detr": Published(
        "hf://MuyaoYuan/ATS-DETR",
        "ats_r50_0.1_0.2",
        "ATS-DETR, R50; the repository has several files, name one",
    ),
    "deformable-detr": Published(
        "hf://SenseTime/deformable-detr", "deformable_detr_r50", "Deformable DETR, R50"
    ),
    "deformable-detr-refine": Published(
        "hf://SenseTime/deformable-detr-with-box-refine",
        "deformable_detr_r50_refine",
        "Deformable DETR, R50, box refinement",
    ),
    "deformable-detr-two-stage": Published(
        "hf://SenseTime/deformable-detr-with-box-refine-two-stage",
        "deformable_detr_r50_two_stage",
        "Deformable DETR, R50, box refinement, two-stage",
    ),
    **{
        f"sparse-detr-{name}-{share}": Published(
            f"{_SPARSE}{file}_{share}.pth",
            f"sparse_detr_{config}_{share / 100}",
            f"Sparse DETR, {title}, {share} % of the tokens",
        )
        for name, file, config, title in (
            ("r50", "r50", "r50", "R50"),
            ("swin-t", "swint", "swin_t", "Swin-T"),
        )
        for share in (10, 20, 30)
    },
}
"""By short name."""


def is_remote(source: object) -> bool:
    """Whether a checkpoint is named by `hf://` or by a short name that is no file, folder or run here."""
    text = str(source)
    is_here = os.path.exists(text) or os.path.exists(os.path.join("runs", text))
    return text.startswith("hf:/") or (text in PUBLISHED and not is_here)


def fetch(source: object) -> Path:
    """The file or the model folder in the cache, fetched if it is not there yet.

    Raises UserError where the name is wrong, or where the file is neither cached nor can be fetched.
    """
    text = str(source)
    if text in PUBLISHED:
        text = PUBLISHED[text].source
    if not text.startswith("hf:/"):
        return _fetch_url(text)
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise UserError(
            f"{source}: must be hf://owner/repo, hf://owner/repo/file or hf://owner/repo@revision/file"
        )
    name = f"{_HUB}{match['repo']}" + (f"@{match['revision']}" if match["revision"] else "")
    with _errors(name, match["file"]):
        return _fetch_file(match, name) if match["file"] else _fetch_repository(match, name)


def _revision(match: re.Match[str]) -> str | None:
    return unquote(match["revision"]) if match["revision"] else None


def _options(match: re.Match[str]) -> dict[str, Any]:
    return {
        "repo_id": match["repo"],
        "revision": _revision(match),
        "endpoint": os.environ.get("HF_ENDPOINT"),
    }


def _fetch_file(match: re.Match[str], name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(filename=match["file"], **_options(match)))
    except LocalEntryNotFoundError:  # no network, or offline mode
        raise
    except EntryNotFoundError:
        files = [file for file in _list_files(match) if file.endswith(_WEIGHTS)]
        near = difflib.get_close_matches(match["file"], files, n=5, cutoff=0)
        found = f"; its checkpoints are {', '.join(near)}" if near else ""
        raise UserError(f"{name}: has no file {match['file']}{found}") from None
    folder = f"{match['file']}".rpartition("/")[0]
    for config in _CONFIGS:  # of transformers, beside its weights
        try:
            hf_hub_download(filename=f"{folder}/{config}".lstrip("/"), **_options(match))
        except EntryNotFoundError:
            continue
    return path


def _fetch_repository(match: re.Match[str], name: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = _list_files(match)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # no network, or offline mode
        folder = _cached_folder(match)
        if folder is None:
            raise
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return folder if "config.json" in found else folder / _only_checkpoint(found, name)
    if "config.json" in files:
        safe = any(file.startswith("model") and file.endswith(".safetensors") for file in files)
        weights = ["model*.safetensors", "model.safetensors.index.json"] if safe else ["pytorch_model*"]
        return Path(snapshot_download(allow_patterns=[*_CONFIGS, *weights], **_options(match)))
    return Path(hf_hub_download(filename=_only_checkpoint(files, name), **_options(match)))


def _only_checkpoint(files: Iterable[str], name: str) -> str:
    found = [file for file in files if file.endswith(_WEIGHTS)]
    if len(found) != 1:
        listed = (
            f"has {len(found)} checkpoints, name one: {', '.join(f'{name}/{file}' for file in found[:20])}"
        )
        raise UserError(f"{name}: {listed if found else 'has no checkpoint'}")
    return found[0]


def _cached_folder(match: re.Match[str]) -> Path | None:
    """The files of a revision in the cache of huggingface_hub; None if there are none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=match["repo"], repo_type="model")
    revision = _revision(match) or constants.DEFAULT_REVISION
    reference = root / "refs" / revision
    folder = root / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return folder if folder.is_dir() else None


def _list_files(match: re.Match[str]) -> list[str]:
    from huggingface_hub import HfApi

    options = _options(match)
    return HfApi(endpoint=options["endpoint"]).list_repo_files(
        options["repo_id"], revision=options["revision"]
    )


@contextmanager
def _errors(name: str, file: str | None) -> Iterator[None]:
    """Errors of huggingface_hub as UserError in one line."""
    from huggingface_hub import constants, errors

    wanted = f"{name}/{file}" if file else name
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"{wanted}: access must be granted by its owner first; then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{wanted}: there is no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{wanted}: there is no such repository on the Hub; if it is private, set HF_TOKEN"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{wanted}: {first_line(error)}") from None
    except Exception as error:  # network errors of several libraries, and full disks
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{wanted}: access denied (HTTP status {status}); set HF_TOKEN to a token that may read it"
            ) from None
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{wanted}: not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set"
            ) from None
        raise UserError(
            f"{wanted}: cannot be fetched ({first_line(cause)}), and it is not in the cache; try again, or download"
            " it and give its path"
        ) from error


def _fetch_url(url: str) -> Path:
    """A file of another server, in the cache folder of this package; an interrupted transfer leaves nothing."""
    path = cache_folder() / "models" / url.rpartition("/")[2]
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{url}: not in the cache ({path.parent}), and HF_HUB_OFFLINE is set")
    say(f"fetching {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, replaced_file(path) as file:
            _copy(response, file, path.name)
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f"{url}: cannot be fetched to {path} ({first_line(error)}); try again, or download it and give its path"
        ) from error
    return path


def _copy(response: Any, file: BinaryIO, name: str) -> None:
    size = int(response.headers.get("Content-Length") or 0)
    total = 0
    chunks = iter(lambda: response.read(_CHUNK), b"")
    for chunk in track(chunks, name, -(-size // _CHUNK) or None):
        total += file.write(chunk)
    if size and total != size:  # http.client reports no error
        raise urllib.error.URLError(f"{total} of {size} bytes arrived")
