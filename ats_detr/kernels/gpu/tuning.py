"""Launch configurations of the kernels, chosen per GPU, operator and size bucket (the bit length of the size).

A configuration is looked up in this order: the choices of this process; the user's cache (`ATS_DETR_CACHE`, default
~/.cache/ats_detr); the rows shipped in `winners/` for this GPU. If a row lacks the bucket, its nearest bucket is used.
If nothing is known about an operator on this GPU, its few configurations are timed once (a few seconds each, mostly
compilation) and the result is written to the user's cache. Set `ATS_DETR_TUNING=off` to never time, or `force` to time
every bucket on first use in this process.

A row of the user's cache holds the versions of Triton and of the kernels that it was measured with. Rows of other
versions are ignored, as are unreadable files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from ats_detr.kernels import dispatch
from ats_detr.kernels.gpu.common import INTERPRETING

logger = logging.getLogger(__name__)

Key = tuple
Config = dict[str, int | bool | float]
Result = TypeVar("Result")

_DOES_NOT_FIT = (OutOfResources, torch.OutOfMemoryError)
"""More shared memory than this GPU has, or scratch memory that another candidate does not need."""

# Every one compiles without spills on sm_80, sm_90, sm_100 and sm_120 with triton 3.6 and 3.8
# (tests/kernels/test_offline.py).
CONFIGS: dict[str, list[Config]] = {
    "msda_forward": [
        {"num_warps": 2, "unroll": 4},
        {"num_warps": 1, "unroll": 4},
        {"num_warps": 4, "unroll": 4},
    ],
    # Unrolled by 4 it runs no faster (1.946 against 1.949 ms, dense, 4 images, H200) and compiles ten times as long.
    "msda_backward": [{"num_warps": 1, "unroll": 1}],
    # At most 128 samples: counters of eight bits. 64 would need more instructions and 1.6 times the increments.
    "value_tiles": [
        {"samples_per_program": 128, "num_warps": 1, "reduce_warps": 2, "owned": False},
        {"samples_per_program": 128, "num_warps": 1, "reduce_warps": 2, "owned": True},
    ],
    # The first of each needs less than 99 KB of shared memory, what consumer GPUs have. Smaller tiles are for few rows,
    # with which large ones would leave most of the GPU idle. Tiles of 64 x 128 and of 128 whole rows spill.
    "linear": [
        {"rows": 128, "columns": 128, "depth": 32, "num_warps": 8, "num_stages": 3},
        {"rows": 32, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 3},
    ],
    "pointwise": [
        {"rows": 64, "columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3},
        {"rows": 128, "columns": 128, "depth": 32, "num_warps": 8, "num_stages": 3},
        {"rows": 128, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 3},
        {"rows": 32, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 3},
    ],
    "linear_norm": [
        {"rows": 64, "depth": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 32, "depth": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 16, "depth": 64, "num_warps": 4, "num_stages": 2},
    ],
    "feedforward": [
        {"rows": 64, "chunk": 32, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "chunk": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 32, "chunk": 32, "num_warps": 8, "num_stages": 2},
    ],
}
# Exact products have no tensor cores: smaller tiles, or the factors do not fit the registers.
FLOAT32_CONFIGS: dict[str, list[Config]] = {
    "linear": [
        {"rows": 64, "columns": 128, "depth": 16, "num_warps": 8, "num_stages": 3},
        {"rows": 32, "columns": 64, "depth": 32, "num_warps": 4, "num_stages": 2},
    ],
    "pointwise": [
        {"rows": 64, "columns": 128, "depth": 16, "num_warps": 8, "num_stages": 3},
        {"rows": 32, "columns": 64, "depth": 32, "num_warps": 4, "num_stages": 2},
    ],
    "linear_norm": [
        {"rows": 32, "depth": 16, "num_warps": 8, "num_stages": 2},
        {"rows": 16, "depth": 32, "num_warps": 4, "num_stages": 2},
    ],
}
# float32 only: eight lanes a row instead of four
WHOLE_ROWS: Config = {"num_warps": 4, "unroll": 4, "whole_rows": True}
INTERPRETED: dict[str, Config] = {  # few large programs
    "msda_forward": {"num_warps": 1, "unroll": 1, "multiple": 8},
    "msda_backward": {"num_warps": 1, "unroll": 1, "multiple": 8},
    "value_tiles": {"samples_per_program": 128, "num_warps": 1, "reduce_warps": 2, "owned": False},
    "linear": {"rows": 64, "columns": 64, "depth": 64, "num_warps": 1, "num_stages": 1},
    "pointwise": {"rows": 128, "columns": 128, "depth": 64, "num_warps": 1, "num_stages": 1},
    "linear_norm": {"rows": 64, "depth": 64, "num_warps": 1, "num_stages": 1},
    "feedforward": {"rows": 64, "chunk": 256, "num_warps": 1, "num_stages": 1},
}
TILES_FROM = 4096
"""Queries from which the value's gradient is summed tile by tile rather than sample by sample; of float32, twice as
many: three products for one."""
FEW_SAMPLES, MOST_SAMPLES = 8, 4 << 20
"""Tiles that own their pixels are tried below this many samples per pixel of a head (a dense encoder has 16, 30 % of
its tokens 5) and in all: they need 80 bytes for each, four times as many as others."""

_chosen: dict[tuple, Config] = {}
_reasons: dict[tuple, str] = {}


def value_gradient(key: Key, num_queries: int) -> str:
    """How the value's gradient is summed: 'tiles' or 'atomic'."""
    dtype, _, head_dim, *_ = key
    tiles_from = TILES_FROM * (2 if dtype == "float32" else 1)
    return "tiles" if num_queries >= tiles_from and head_dim <= 128 else "atomic"


def density(num_samples: int, num_pixels: int) -> int | str:
    """Part of the key of 'value_tiles': which way is faster depends on how many samples a pixel has."""
    if num_samples >= min(MOST_SAMPLES, FEW_SAMPLES * num_pixels):
        return "many"
    return (num_samples // num_pixels).bit_length()


def configurations(operator: str, key: Key) -> list[Config]:
    """The candidates of one operator, the default first."""
    candidates = CONFIGS[operator]
    if operator == "value_tiles":
        return candidates[:1] if key[-1] == "many" else candidates
    if key[0] != "float32":
        return candidates
    if operator == "msda_forward":
        return [*candidates[:2], WHOLE_ROWS]
    return FLOAT32_CONFIGS.get(operator, candidates)


def run(
    operator: str,
    key: Key,
    size: int,
    device: torch.device,
    launch: Callable[..., Result],
    reset: Callable[[], None] | None = None,
) -> Result:
    """The result of `launch` with the best known configuration for `size`. `reset` undoes unfinished launches.

    A configuration that does not fit the GPU is replaced by the first candidate that does.
    """
    name = (operator, key, size.bit_length(), device.index)
    if name not in _chosen:
        _chosen[name], _reasons[name] = _choose(operator, key, size, device, launch, reset)
    config = _chosen[name]
    if dispatch.recorder is not None:
        dispatch.recorder(operator, config, _reasons[name])
    try:
        return launch(**config)
    except _DOES_NOT_FIT as error:
        for other in configurations(operator, key):
            if other == config:
                continue
            if reset is not None:
                reset()
            with contextlib.suppress(*_DOES_NOT_FIT):
                result = launch(**other)
                logger.warning(
                    "%s: configuration %s does not fit this GPU; using %s", operator, config, other
                )
                _chosen[name], _reasons[name] = other, f"{config} does not fit this GPU"
                return result
        raise error


def known_configuration(operator: str, key: Key, size: int, gpu: str) -> tuple[Config, str] | None:
    """The best configuration according to the tables, and why; None if the operator was not timed on this GPU."""
    candidates = configurations(operator, key)
    if len(candidates) == 1:
        return candidates[0], "the only candidate"
    known = _table(gpu).get("|".join(map(str, (operator, *key))), {})
    if not known:
        return None
    nearest = min(known, key=lambda other: (abs(int(other) - size.bit_length()), int(other)))
    config = {name: value for name, value in known[nearest].items() if name not in _NOTES}
    if config not in candidates:
        return None
    return candidates[candidates.index(config)], f"measured on {gpu} for sizes of {nearest} bits"


def _choose(operator, key, size, device, launch, reset) -> tuple[Config, str]:
    """The configuration, and why."""
    candidates = configurations(operator, key)
    if device.type != "cuda":
        return (INTERPRETED[operator] if INTERPRETING else candidates[0]), "Triton's interpreter"
    mode = os.environ.get("ATS_DETR_TUNING") or "auto"
    if mode not in ("auto", "off", "force"):
        raise ValueError(f"ATS_DETR_TUNING must be auto, off or force, got {mode!r}")
    if len(candidates) == 1:
        return candidates[0], "the only candidate"
    gpu = torch.cuda.get_device_name(device)
    bucket = size.bit_length()
    row = "|".join(map(str, (operator, *key)))
    if mode != "force" and (known := known_configuration(operator, key, size, gpu)) is not None:
        return known
    if mode == "off" or torch.cuda.is_current_stream_capturing():
        return candidates[0], f"the default: nothing is known about {gpu}, and nothing is timed now"
    logger.info("compiling and timing %d configurations of %s on this GPU, once", len(candidates), row)
    times = {}
    with dispatch.capture_lock:
        for index, config in enumerate(candidates):
            with contextlib.suppress(*_DOES_NOT_FIT):
                times[index] = triton.testing.do_bench(
                    functools.partial(launch, **config), warmup=5, rep=20, return_mode="median"
                )
    if reset is not None:
        reset()
    if not times:
        return candidates[0], "the default: no candidate fits"  # `run` raises its error
    best = min(times, key=times.get)
    _remember(gpu, row, bucket, {**candidates[best], "ms": round(times[best], 5)})
    return candidates[best], f"the fastest of {len(times)} that were timed now"


# ------------------------------------------------------------------------------------------------------- tables on disk
Table = dict[str, dict[str, Config]]
"""{operator|key: {bucket: configuration with notes}}"""


def cache_folder() -> pathlib.Path | None:
    """The folder of the user's cache; None if there is no home directory to put it in."""
    if folder := os.environ.get("ATS_DETR_CACHE"):
        return pathlib.Path(folder)
    try:
        return pathlib.Path.home() / ".cache" / "ats_detr"
    except RuntimeError:  # this user has neither HOME nor an entry in the password database
        return None


def _user_file(gpu: str) -> pathlib.Path | None:
    folder = cache_folder()
    return None if folder is None else folder / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def versions() -> Config:
    """Versions that a measurement depends on: Triton's, and a hash of the kernels' sources."""
    sources = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return {"triton": triton.__version__, "kernels": digest.hexdigest()[:12]}


_NOTES = ("ms", "triton", "kernels")  # of an entry, beside its configuration


@functools.cache
def _table(gpu: str) -> Table:
    """The rows known for this GPU; those of the user's cache win over the shipped ones. Repairs a malformed cache."""
    table, _ = _read(pathlib.Path(__file__).parent / "winners" / _file_name(gpu))
    user_file = _user_file(gpu)
    if user_file is not None:
        own, malformed = _read(user_file)
        if malformed:
            logger.warning(
                "the tuning cache %s is malformed; rewriting it without the bad entries", user_file
            )
            _write(user_file, own)
        for row, buckets in own.items():
            current = {bucket: entry for bucket, entry in buckets.items() if _is_current(entry)}
            if current:
                table.setdefault(row, {}).update(current)
    return table


def _is_current(entry: Config) -> bool:
    return versions().items() <= entry.items()


def _read(path: pathlib.Path) -> tuple[Table, bool]:
    """The well-formed entries of a table on disk, and whether it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, False
    except OSError as error:
        _warn_once(f"cannot read the tuning cache: {error}")
        return {}, False
    except (ValueError, RecursionError):
        return {}, True
    table = {}
    malformed = not isinstance(content, dict)
    for row, buckets in {} if malformed else content.items():
        entries = {
            bucket: entry
            for bucket, entry in (buckets.items() if isinstance(buckets, dict) else ())
            if re.fullmatch(r"\d{1,3}", bucket, re.ASCII) and isinstance(entry, dict)
        }
        malformed |= not isinstance(buckets, dict) or len(entries) < len(buckets)
        if entries:
            table[row] = entries
    return table, malformed


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _remember(gpu: str, row: str, bucket: int, entry: Config) -> None:
    """Adds a measurement to the known rows and to the user's cache, whose other rows are kept."""
    entry = {**entry, **versions()}
    _table(gpu).setdefault(row, {})[str(bucket)] = entry
    user_file = _user_file(gpu)
    if user_file is not None:
        stored, _ = _read(user_file)
        stored.setdefault(row, {})[str(bucket)] = entry
        _write(user_file, stored)


def known_faults(device: torch.device, key: str) -> dict[str, str] | None:
    """The outcome of an earlier self-check with these versions: what is wrong, by operator. None: not checked yet."""
    if device.type != "cuda":
        return None
    entry = _table(torch.cuda.get_device_name(device)).get(f"self-check|{key}", {}).get("0", {})
    faults = entry.get("faults")
    is_current = entry.get("torch") == torch.__version__ and isinstance(faults, dict)
    return {str(name): str(fault) for name, fault in faults.items()} if is_current else None


def remember_faults(device: torch.device, key: str, faults: dict[str, str]) -> None:
    """Keeps the outcome of a self-check."""
    if device.type == "cuda":
        entry = {"faults": faults, "torch": torch.__version__}
        _remember(torch.cuda.get_device_name(device), f"self-check|{key}", 0, entry)


def _write(path: pathlib.Path, table: Table) -> None:
    """Replaces a file atomically, with the permissions that the user's umask gives."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(table, indent=1, sort_keys=True))
        os.replace(partial, path)
    except OSError as error:  # without a cache, the next process times again
        logger.info("cannot write the tuning cache: %s", error)
        with contextlib.suppress(OSError):
            partial.unlink()
