"""Speed relative to the definitions: medians of CPU time, measured alternately."""

from __future__ import annotations

from pathlib import Path

import pytest

from ats_detr.training.criterion import SetCriterion
from bench.training import compare_with_definitions, r50_output, stage_rows
from tests.training.definitions import set_losses


def test_the_losses_equal_their_definition_at_the_shapes_of_r50() -> None:
    output, targets = r50_output()
    own = SetCriterion(91, class_specific_proposals=True)(output, targets, 80.0)
    for key, value in set_losses(output, targets, 80.0).items():
        assert own[key].item() == pytest.approx(value.item(), rel=1e-5), key


@pytest.mark.slow
def test_labels_matching_and_criterion_are_faster_than_their_definitions() -> None:
    times = compare_with_definitions(rounds=9)
    ratios = {name: slow / fast for name, (slow, fast) in times.items()}
    print({name: round(ratio, 1) for name, ratio in ratios.items()})
    assert ratios["labels"] >= 50, "0.8 ms instead of 53 to 63"
    assert ratios["losses"] >= 1.5
    assert ratios["losses and gradients"] >= 1.5


def test_all_stages_of_a_chain_are_timed_on_their_own_images(tmp_path: Path) -> None:
    data = [f"data.root={tmp_path}", "data.synthetic.num_train=8", "data.synthetic.num_val=1"]
    rows = stage_rows("quickstart_chain", [*data, "data.batch_size=2"], rounds=1)
    assert [row["part"] for row in rows] == ["weak", "strong", "student"]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2e3 / row["p50_ms"], rel=0.05)
