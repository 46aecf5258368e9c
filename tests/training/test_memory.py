"""Host memory does not grow between epochs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ats_detr.config import load_config
from ats_detr.training import trainer
from ats_detr.training.setup import Run
from ats_detr.training.stages import plan_stages, train_stages
from tests.training.small import small_tree


def mebibytes_in_use() -> float:
    """Proportional set size of this process and its children, which counts shared pages once."""
    children = (Path(f"/proc/self/task/{os.getpid()}") / "children").read_text().split()
    total = 0
    for process in ("self", *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@pytest.mark.slow
def test_three_epochs_of_2000_images_with_two_workers_grow_under_5_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    evaluate_run = trainer.evaluate_run

    def measured(run: Run, is_last: bool) -> Any:
        metrics = evaluate_run(
            run, is_last
        )  # belongs to an epoch: the first one starts the loader's other workers
        used.append(mebibytes_in_use())
        return metrics

    monkeypatch.setattr(trainer, "evaluate_run", measured)
    data = {"num_workers": 2, "batch_size": 20, "synthetic": {"num_train": 2000}}
    tree = small_tree(tmp_path, data=data, train={"epochs": 3, "log_every": 10, "evaluate_every": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    train_stages(plan_stages(load_config(tmp_path / "config.yaml")), "all", torch.device("cpu"))
    print(f"MiB after each epoch: {[round(mib, 1) for mib in used]}")
    assert len(used) == 3
    assert max(used[1:]) < 1.05 * used[0], used
