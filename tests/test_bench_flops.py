"""python -m bench.flops on a folder of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats_detr.config import load_config
from ats_detr.errors import UserError
from bench.flops import agrees, read_folder
from bench.measure import read_rows

ROOT = Path(__file__).parents[1]


def test_images_of_a_folder_are_counted_with_their_own_budgets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 120), (150, 100)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    command = [sys.executable, "-m", "bench.flops", "--config", "configs/quickstart.yaml",
               "--images", str(tmp_path), "--json", str(tmp_path / "rows.jsonl")]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "mean over 2 images" in result.stdout
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["golden_gflops"] is None
    assert 0 < row["keep_ratio"] < 1
    assert 0 < row["encoder_gflops"] < row["gflops"]


def test_rows_far_from_the_published_counter_fail() -> None:
    row = {"gflops": 110.0, "encoder_gflops": 15.0, "params": 7}
    golden = {"golden_gflops": 110.5, "golden_encoder_gflops": 15.0, "golden_params": 7}
    assert agrees({**row, **golden})
    assert agrees({**row, **dict.fromkeys(golden)})
    for key, value in (("gflops", 111.1), ("encoder_gflops", 14.9), ("params", 8)):
        assert not agrees({**row, **golden, key: value}), key


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no images in it"):
        read_folder(tmp_path, 2, load_config(ROOT / "configs/quickstart.yaml"))
