"""A training step makes two device-to-host transfers and no other synchronisation."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ats_detr.training import trainer
from tests.training.small import random_batch, small_run

_READS_DEVICE = {
    torch.ops.aten._local_scalar_dense.default,  # item, int, float, bool, indexing with a tensor
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.is_nonzero.default,
}
_STANDS_IN_FOR_A_KERNEL = "kernels/reference.py"
"""On a GPU, a kernel computes this operator without synchronisation; the CPU definition splits by image."""


class Transfers:
    """Counts operations that would synchronise on a GPU, by the line of the package that calls them.

    Two modes: operators that read the values of a tensor, and methods that copy a tensor to the host (which on the CPU
    copy nothing and call no operator).
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/ats_detr/" in f.filename]
        own = [f for f in frames if "/tests/" not in f.filename]
        if not own or any(
            f.filename.endswith(_STANDS_IN_FOR_A_KERNEL) and f.name == "sample_packed" for f in own
        ):
            return
        place = own[-1]
        self.places[f"{Path(place.filename).name}:{place.name}: {what}"] += 1

    def __enter__(self) -> Transfers:
        transfers = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                by_mask = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
                    index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
                )
                if func in _READS_DEVICE or by_mask:
                    transfers.note(str(func))
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                to_host = func is Tensor.to and (
                    args[1:2] == ("cpu",) or (kwargs or {}).get("device") == "cpu"
                )
                if func in (Tensor.cpu, Tensor.tolist) or to_host:
                    transfers.note(func.__name__)
                return func(*args, **(kwargs or {}))

        self._modes = Operators(), Methods()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_makes_two_transfers(tmp_path: Path, recompute: bool) -> None:
    run = small_run(tmp_path, train={"recompute": recompute})
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    trainer.train_step(run, 0, [batch], metrics=False)  # creates the optimiser state
    with Transfers() as transfers:
        trainer.train_step(run, 0, [batch], metrics=False)
    allowed = {
        "selection.py:select_tokens: tolist": 1,  # number of kept rows per image
        "matcher.py:__init__: to": 1,  # the costs
    }
    assert transfers.places == allowed


def test_logging_makes_one_further_transfer(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    trainer.train_step(run, 0, [batch], metrics=True)
    with Transfers() as transfers:
        trainer.mean_on_host(trainer.train_step(run, 0, [batch], metrics=True))
    assert transfers.places.total() == 3


def test_the_counter_counts_transfers() -> None:
    x = torch.arange(3.0)
    with Transfers() as transfers:
        transfers.note = lambda what: transfers.places.update([what])  # type: ignore[method-assign]
        x[x > 1], x.tolist(), x.sum().item(), x.to("cpu"), x.cpu(), bool(x[0] > 2), x.nonzero()
    assert transfers.places.total() >= 7


@pytest.mark.gpu
def test_a_step_synchronises_with_the_gpu_only_where_allowed(tmp_path: Path) -> None:
    run = small_run(tmp_path, device="cuda")
    batch = random_batch(0, [3, 0, 2, 1], size=64)
    for _ in range(3):
        trainer.train_step(run, 0, [batch], metrics=False)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            trainer.train_step(run, 0, [batch], metrics=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 2, waits
