"""The images that a run trains and evaluates on."""

from __future__ import annotations

from pathlib import Path

import pytest

from ats_detr.errors import UserError
from tests.training.small import small_run


def test_a_run_that_overfits_trains_and_evaluates_on_the_same_few_images(tmp_path: Path) -> None:
    run = small_run(tmp_path, data={"overfit_images": 3, "batch_size": 2})
    trained = [target.image_id for _, targets in run.loaders.train.epoch(0) for target in targets]
    evaluated = [target.image_id for _, targets in run.loaders.val for target in targets]
    assert len(run.loaders.train) == 51  # 3 images, each 34 times: at least 50 batches of 2
    assert len(trained) == 102
    assert set(trained) == set(evaluated)
    assert len(evaluated) == 3
    dataset = run.loaders.val.dataset
    counts = sorted(int(dataset.num_objects[list(dataset.annotations.image_ids).index(i)]) for i in evaluated)
    assert counts[0] == dataset.num_objects[dataset.num_objects > 0].min()
    assert counts[-1] == dataset.num_objects.max()


def test_a_run_cannot_overfit_more_images_than_have_objects(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.overfit_images = 1000: must be <= \d+"):
        small_run(tmp_path, data={"overfit_images": 1000})
