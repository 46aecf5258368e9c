"""Which launch configuration a kernel takes: by GPU, operator and bucket of sizes, never by the exact size.

Looked up in this order: what this process found; the user's cache (`ATS_DETR_CACHE`, default
~/.cache/ats_detr); the winners shipped in `winners/` for this GPU, the nearest bucket standing in for a
missing one. Where nothing is known about an operator on this GPU its few configurations are timed once (a few
seconds each, nearly all of it compilation) and cached on disk. `ATS_DETR_TUNING=off` never times, `force` times
every bucket that this process meets for the first time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from ats_detr.kernels.gpu.common import INTERPRETING

logger = logging.getLogger(__name__)

Key = tuple
Config = dict[str, int | bool | float]
Result = TypeVar("Result")

# Every one compiles without spills on sm_80, sm_90 and sm_100 with triton 3.8 (tests/kernels/test_offline.py).
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
    # The first of each needs less than 99 KB of shared memory, what consumer GPUs have. Rows of a tile: 64 for a full
    # GPU, fewer where 64 would leave most of it idle. Tiles of 128 whole rows spill.
    "linear": [
        {"rows": 64, "columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3},
        {"rows": 128, "columns": 128, "depth": 32, "num_warps": 8, "num_stages": 3},
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
        {"rows": 32, "chunk": 32, "num_warps": 4, "num_stages": 2},
    ],
}
# Exact products have no tensor cores: smaller tiles, or the factors do not fit the registers.
FLOAT32_CONFIGS: dict[str, list[Config]] = {
    "linear": [
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
    """What `launch` returns with the best known configuration for `size`; `reset` undoes trial launches."""
    name = (operator, key, size.bit_length(), device.index)
    config = _chosen.get(name)
    if config is None:
        config = _chosen[name] = _choose(operator, key, size, device, launch, reset)
    return launch(**config)


def _choose(operator, key, size, device, launch, reset) -> Config:
    candidates = configurations(operator, key)
    if device.type != "cuda":
        return INTERPRETED[operator] if INTERPRETING else candidates[0]
    mode = os.environ.get("ATS_DETR_TUNING", "auto")
    if mode not in ("auto", "off", "force"):
        raise ValueError(f"ATS_DETR_TUNING={mode}: use auto, off or force")
    if len(candidates) == 1:
        return candidates[0]
    gpu = torch.cuda.get_device_name(device)
    bucket = size.bit_length()
    row = "|".join(map(str, (operator, *key)))
    known = _table(gpu).get(row, {})
    if known and mode != "force":
        nearest = min(known, key=lambda other: (abs(int(other) - bucket), other))
        config = {name: value for name, value in known[nearest].items() if name != "ms"}
        if config in candidates:
            return config
    if mode == "off" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    logger.info("compiling and timing %d configurations of %s on this GPU, once", len(candidates), row)
    times = {}
    for index, config in enumerate(candidates):
        # shared memory of a larger GPU of the family; memory that another candidate does not need
        with contextlib.suppress(OutOfResources, torch.OutOfMemoryError):
            times[index] = triton.testing.do_bench(
                functools.partial(launch, **config), warmup=5, rep=20, return_mode="median"
            )
    if reset is not None:
        reset()
    if not times:
        return candidates[0]  # whose error the caller is about to see
    best = min(times, key=times.get)
    _remember(gpu, row, bucket, {**candidates[best], "ms": round(times[best], 5)})
    return candidates[best]


# ------------------------------------------------------------------------------------------------------- tables on disk
def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("ATS_DETR_CACHE", pathlib.Path.home() / ".cache" / "ats_detr"))


@functools.cache
def _table(gpu: str) -> dict[str, dict[str, Config]]:
    """{operator|key: {bucket: configuration}}; the user's cache wins over what is shipped."""
    table: dict[str, dict[str, Config]] = {}
    for folder in (pathlib.Path(__file__).parent / "winners", cache_folder()):
        path = folder / _file_name(gpu)
        if path.exists():
            for row, buckets in json.loads(path.read_text()).items():
                table.setdefault(row, {}).update(buckets)
    return table


def _remember(gpu: str, row: str, bucket: int, entry: Config) -> None:
    _table(gpu).setdefault(row, {})[str(bucket)] = entry
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(_table(gpu), file, indent=1, sort_keys=True)
        os.replace(file.name, folder / _file_name(gpu))
    except OSError:
        pass  # a read-only home costs the next process another second of timing, nothing else
