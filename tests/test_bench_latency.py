"""python -m bench.latency: the results of its modes, its rows and its error messages."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.latency
import bench.sweep
from ats_detr.batch import ImageBatch
from ats_detr.console import run_cli
from bench.latency import forced_budgets, generated_images
from bench.measure import Stopwatch, take_turns, timed
from bench.padded import encode_padded
from bench.peers import Peer, load_peer
from tests.small_detector import small_detector

ROOT = Path(__file__).parents[1]
BUDGETS = (0.6, 0.1, 0.3)


@pytest.fixture
def batch() -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    return ImageBatch.collate(
        [torch.randn(3, *size, generator=generator) for size in ((64, 96), (60, 90), (50, 96))]
    )


@pytest.mark.parametrize("budgets", [BUDGETS, (0.3,), None])
def test_padded_and_packed_encoder_agree(batch: ImageBatch, budgets: Any) -> None:
    model = small_detector().model
    with torch.inference_mode(), forced_budgets(model, budgets):
        tokens = model.tokenize(batch.images_B3HW, batch.sizes_B2)
        selection = model.select(tokens)
        assert selection is not None
        packed, _ = model.encoder(tokens, selection.plan)
        padded = encode_padded(model.encoder, tokens, selection)
        dense, _ = model.encoder(tokens, None)
    torch.testing.assert_close(padded, packed, atol=1e-5, rtol=1e-5)  # float32, sums in another order
    assert not torch.allclose(dense, packed, atol=1e-2)


def test_forced_budgets_apply_inside_the_context_only(batch: ImageBatch) -> None:
    model = small_detector().model
    with torch.inference_mode():
        tokens = model.tokenize(batch.images_B3HW, batch.sizes_B2)
        before = model.select(tokens)
        with forced_budgets(model, (0.6, 0.1)):
            forced = model.select(tokens)
        after = model.select(tokens)
    assert before is not None and forced is not None and after is not None
    valid = forced.num_valid_B.tolist()
    assert forced.num_kept_B.tolist() == [int(n * r) + 1 for n, r in zip(valid, (0.6, 0.1, 0.6), strict=True)]
    assert before.num_kept_B.tolist() == after.num_kept_B.tolist() != forced.num_kept_B.tolist()


def test_passes_take_turns_and_each_is_first_once() -> None:
    order: list[str] = []

    def marking(name: str) -> Any:
        def run(watch: Stopwatch) -> None:
            order.append(name)
            watch.mark("first")
            watch.mark("second")
            watch.mark("first")

        return run

    samples = take_turns({name: marking(name) for name in "abc"}, torch.device("cpu"), rounds=3)
    assert "".join(order) == "abc" + "bca" + "cab"
    for stages in samples.values():
        assert set(stages) == {"first", "second", "total"}
        assert all(len(times) == 3 for times in stages.values())
        for first, second, total in zip(stages["first"], stages["second"], stages["total"], strict=True):
            assert total == pytest.approx(first + second)


def test_short_passes_are_repeated_within_their_turn() -> None:
    calls = []

    def wait() -> None:
        calls.append(time.sleep(0.002))

    samples = take_turns({"short": timed(wait)}, torch.device("cpu"), rounds=2, least_ms=10)
    assert 4 <= len(calls) <= 12
    assert len(samples["short"]["total"]) == 2 and all(2 <= ms < 10 for ms in samples["short"]["total"])


def test_mixed_images_differ_in_size_and_are_evaluated_together() -> None:
    batch = generated_images(4, "mixed")
    assert len(set(batch.sizes)) == 4
    assert {(-(-height // 64), -(-width // 64)) for height, width in batch.sizes} == {
        (13, 17)
    }  # one size bucket
    same = generated_images(2, "same", (64, 96)).images_B3HW
    assert torch.equal(same[0], same[1])


def test_rows_have_every_stage_of_every_mode(tmp_path: Path) -> None:
    result = run_latency(
        "--config", "configs/quickstart.yaml", "--quick", "--device", "cpu", "--batch", "1,2",
        "--budgets", "0.5,0.1", "--modes", "packed,padded,dense,captured,captured-stages,captured-dense",
        "--json", str(tmp_path / "rows.jsonl"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    stages = {"backbone", "select", "encoder", "decoder", "total"}
    for batch, kind in ((1, "same"), (2, "same"), (2, "mixed")):
        for mode in ("packed", "padded", "dense", "captured-stages", "captured-dense"):
            mine = [row for row in rows if (row["batch"], row["images"], row["mode"]) == (batch, kind, mode)]
            assert {row["stage"] for row in mine} == (stages - {"select"} if "dense" in mode else stages)
            assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in mine)
        whole = [row for row in rows if (row["batch"], row["images"], row["stage"]) == (batch, kind, "total")]
        kept = {row["mode"]: row["kept"] for row in whole}
        assert kept["packed"] == kept["padded"] == kept["captured"] == kept["captured-stages"]
        assert kept["dense"] is kept["captured-dense"] is None
    facts = {"config", "device", "dtype", "keep_ratio", "machine", "torch", "date", "commit", "rounds"}
    assert all(facts <= set(row) for row in rows)
    assert {row["keep_ratio"] == 1 for row in rows if row["mode"] == "dense"} == {True}
    assert "images/s" in result.stdout and "padded" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modes", "packd"], "--modes packd: must be of packed, padded,"),
        (["--modes", "peer:yolo"], "--modes peer:yolo: must be of packed"),
        (["--ratios", "0.1", "--budgets", "0.1"], "exclude each other"),
        (["--images", "some"], "--images some: must be same, mixed, or same,mixed"),
    ],
)
def test_invalid_choices_are_errors(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--config", "configs/quickstart.yaml", *arguments])
    with pytest.raises(SystemExit) as end:
        run_cli(bench.latency.main)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["deformable-detr", "rt-detr"])
def test_a_peer_runs_on_our_batches(name: str, batch: ImageBatch) -> None:
    pytest.importorskip("transformers")
    peer = load_peer(name)
    assert isinstance(peer, Peer)
    with torch.inference_mode():
        output: Any = peer.run(generated_images(2, "mixed", (160, 192)))
    assert output.logits.shape[0] == 2 and output.pred_boxes.shape[-1] == 4


def test_a_missing_library_is_a_message_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "bench.peers.hugging_face", raising=False)
    assert load_peer("rt-detr") == "peer rt-detr skipped: transformers is not installed"


def run_latency(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.latency", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,0"], "--batch: '0': must be an integer > 0"),
        (["--ratios", "a tenth"], "--ratios: 'a tenth': must be numbers in (0, 1]"),
        (["--rounds", "-1"], "--rounds: '-1': must be an integer > 0"),
        (["--image-size", "800"], "--image-size: '800': must be HEIGHTxWIDTH"),
    ],
)
@pytest.mark.parametrize("command", [bench.latency, bench.sweep])
def test_invalid_arguments_are_errors(
    command: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as end:
        command.parse_arguments()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_unwritable_files_fail_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "file" / "rows.jsonl")])
    with pytest.raises(SystemExit):
        bench.latency.parse_arguments()
    assert "rows.jsonl: cannot write this file" in capsys.readouterr().err
