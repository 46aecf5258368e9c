"""Tuning: which configuration is chosen, and what the cache on disk survives. No kernel is launched."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KEY = ("bfloat16", 8, 32, 4, 4, True)
ROW = "msda_forward|bfloat16|8|32|4|4|True"
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def tuning(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module on a GPU of which nothing is known, its cache in `tmp_path`."""
    module = pytest.importorskip("ats_detr.kernels.gpu.tuning")
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9000")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "_chosen", {})
    caches = (module._table, module.versions, module._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield module
    for cache in caches:
        cache.cache_clear()


def test_tuning_takes_the_nearest_bucket_and_remembers_on_disk(
    tuning: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    slow = {"num_warps": 2, "unroll": 4}

    def timed(function, **_) -> float:
        function()
        return 2.0 if launched[-1] == slow else 1.0

    monkeypatch.setattr(tuning.triton.testing, "do_bench", timed)

    def launch(**config) -> None:
        launched.append(config)

    tuning.run("msda_forward", KEY, 7000, DEVICE, launch)
    best = launched[-1]
    assert best in tuning.CONFIGS["msda_forward"] and best != slow
    assert len(launched) == len(tuning.CONFIGS["msda_forward"]) + 1
    (file,) = tmp_path.iterdir()
    assert file.name == "some-gpu-9000.json"
    assert next(iter(json.loads(file.read_text()).values()))["13"]["ms"] == 1.0

    launched.clear()  # another exact size of the same bucket, another bucket, and a new process: nothing is timed again
    tuning.run("msda_forward", KEY, 7500, DEVICE, launch)
    tuning.run("msda_forward", KEY, 300, DEVICE, launch)
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._table.cache_clear()
    tuning.run("msda_forward", KEY, 7000, DEVICE, launch)
    assert launched == [best] * 3


@pytest.mark.parametrize("error", ["OutOfMemoryError", "OutOfResources"])
def test_a_configuration_that_does_not_fit_is_left_out(
    tuning: ModuleType, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {
        "OutOfMemoryError": torch.OutOfMemoryError(),
        "OutOfResources": tuning.OutOfResources(2, 1, "shared memory"),
    }
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda function, **_: function() or 1.0)
    others = tuning.CONFIGS["msda_forward"][1:]
    launched = []

    def launch(**config) -> None:
        if config not in fitting:
            raise errors[error]
        launched.append(config)

    fitting = others[-1:]
    tuning.run("msda_forward", KEY, 7000, DEVICE, launch)
    assert launched[-1] == others[-1]
    fitting = []
    with pytest.raises(type(errors[error])):
        tuning.run("msda_forward", (*KEY[:-1], False), 7000, DEVICE, launch)


def test_shipped_winners_are_configurations_that_are_compiled_in_tests() -> None:
    tuning = pytest.importorskip("ats_detr.kernels.gpu.tuning")
    files = list((Path(tuning.__file__).parent / "winners").glob("*.json"))
    assert files
    for file in files:
        for row, buckets in json.loads(file.read_text()).items():
            operator, *key = row.split("|")
            for config in buckets.values():
                assert {k: v for k, v in config.items() if k != "ms"} in tuning.configurations(
                    operator, tuple(key)
                )


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "some-gpu-9000.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def restart(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what this process knows."""
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._table.cache_clear()


@pytest.fixture
def timed(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Configurations that were timed; the last candidate is the fastest."""
    runs: list[dict] = []

    def do_bench(function, **_) -> float:
        runs.append(function())
        return 1.0 / len(runs)

    monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
    return runs


BAD_FILES = {
    "truncated": '{"msda_forward|bfloat',
    "empty": "",
    "a list": "[1, 2]",
    "null": "null",
    "a number": "7",
    "binary": b"\xff\xfe\x00garbage",
    "deeply nested": "[" * 100_000,
    "row without buckets": json.dumps({ROW: 5}),
    "bucket without a number": json.dumps({ROW: {"x": {"num_warps": 1, "unroll": 4}}}),
    "bucket beyond int": json.dumps({ROW: {"9" * 5000: {"num_warps": 1, "unroll": 4}}}),
    "no configuration": json.dumps({ROW: {"13": 5}}),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_cache_is_ignored_and_rewritten_with_one_warning(
    tuning: ModuleType, timed: list, tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write(tmp_path, content)
    best = tuning.run("msda_forward", KEY, 7000, DEVICE, dict)
    tuning.run("msda_backward", KEY, 7000, DEVICE, dict)
    assert best == tuning.CONFIGS["msda_forward"][-1] and len(timed) == len(tuning.CONFIGS["msda_forward"])
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert list(json.loads(path.read_text())) == [ROW]
    restart(tuning, monkeypatch)
    caplog.clear()
    assert tuning.run("msda_forward", KEY, 7000, DEVICE, dict) == best
    assert not caplog.records and len(timed) == len(tuning.CONFIGS["msda_forward"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([ROW, "13", "unroll", "num_warps"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.one_of(json_values.map(json.dumps), st.text(max_size=20), st.binary(max_size=20)))
def test_no_content_of_the_cache_raises(
    tuning: ModuleType, timed: list, tmp_path: Path, content: str | bytes
) -> None:
    write(tmp_path, content)
    tuning._chosen.clear()
    tuning._table.cache_clear()
    assert tuning.run("msda_forward", KEY, 7000, DEVICE, dict) in tuning.CONFIGS["msda_forward"]


def test_only_own_rows_are_stored_with_their_versions(
    tuning: ModuleType, timed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    shipped = json.loads((Path(tuning.__file__).parent / "winners" / "nvidia-h200.json").read_text())
    assert ROW in shipped
    tuning.run("msda_forward", (*KEY[:-1], False), 7000, DEVICE, dict)  # shipped: nothing is stored
    assert not list(tmp_path.iterdir())
    tuning.run("feedforward", ("bfloat16", "bfloat16", 77, 77), 7000, DEVICE, dict)
    (file,) = tmp_path.iterdir()
    (row,) = json.loads(file.read_text()).items()
    assert row[0] == "feedforward|bfloat16|bfloat16|77|77"
    assert row[1]["13"].keys() >= {"rows", "ms", "triton", "kernels"}


@pytest.mark.parametrize("changed", ["triton", "kernels", "neither"])
def test_rows_of_other_versions_are_ignored(
    tuning: ModuleType, timed: list, tmp_path: Path, changed: str
) -> None:
    slow = tuning.CONFIGS["msda_forward"][0]
    entry = {**slow, "ms": 1.0, **tuning.versions()}
    if changed != "neither":
        entry[changed] = "another"
    path = write(tmp_path, json.dumps({ROW: {"13": entry}, "another row": {"13": entry}}))
    chosen = tuning.run("msda_forward", KEY, 7000, DEVICE, dict)
    assert (chosen == slow) == (changed == "neither")
    assert json.loads(path.read_text())["another row"] == {"13": entry}


def test_rows_without_versions_are_ignored(tuning: ModuleType, timed: list, tmp_path: Path) -> None:
    write(tmp_path, json.dumps({ROW: {"13": {**tuning.CONFIGS["msda_forward"][0], "ms": 1.0}}}))
    assert tuning.run("msda_forward", KEY, 7000, DEVICE, dict) == tuning.CONFIGS["msda_forward"][-1]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_of_the_cache_follow_the_umask(
    tuning: ModuleType, timed: list, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        tuning.run("msda_forward", KEY, 7000, DEVICE, dict)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_home_is_needed_only_without_a_cache_folder(
    tuning: ModuleType, timed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert tuning.cache_folder() == tmp_path
    tuning.run("msda_forward", KEY, 7000, DEVICE, dict)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.delenv("ATS_DETR_CACHE")
    restart(tuning, monkeypatch)
    assert tuning.cache_folder() is None
    assert tuning.run("msda_forward", KEY, 7000, DEVICE, dict) in tuning.CONFIGS["msda_forward"]


def test_a_cache_that_cannot_be_read_or_written_costs_one_warning(
    tuning: ModuleType, timed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path / "file"))  # a file where a folder should be
    for size in (7000, 300):
        tuning.run("msda_forward", KEY, size, DEVICE, dict)
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("error", ["OutOfMemoryError", "OutOfResources"])
def test_a_cached_winner_that_no_longer_fits_is_replaced(
    tuning: ModuleType, timed: list, tmp_path: Path, error: str
) -> None:
    errors = {
        "OutOfMemoryError": torch.OutOfMemoryError(),
        "OutOfResources": tuning.OutOfResources(2, 1, "shared memory"),
    }
    winner, fits = tuning.CONFIGS["feedforward"][1:]
    key = ("bfloat16", "bfloat16", 1024, 256)
    entry = {**winner, **tuning.versions()}
    write(tmp_path, json.dumps({"|".join(map(str, ("feedforward", *key))): {"15": entry}}))
    tried, resets = [], []

    def launch(**config) -> dict:
        tried.append(config)
        if config != fits:
            raise errors[error]
        return config

    for _ in range(2):
        assert tuning.run("feedforward", key, 20000, DEVICE, launch, lambda: resets.append(1)) == fits
    assert tried == [winner, tuning.CONFIGS["feedforward"][0], fits, fits] and len(resets) == 2
    assert not timed
