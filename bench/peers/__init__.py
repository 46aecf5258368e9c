"""Other people's detectors, side by side with ours: random weights, which are fine for time.

One module for each library; nothing of a library is imported before one of its peers is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ats_detr.batch import ImageBatch
from ats_detr.errors import UserError


@dataclass(frozen=True)
class Peer:
    """A detector that takes our batches."""

    model: nn.Module
    run: Callable[[ImageBatch], object]
    encoder: nn.Module | None = None
    """What refines the pyramid, if it is one module: where the stage before ends and the one after begins."""


PEERS = {
    "deformable-detr": "bench.peers.hugging_face:deformable_detr",
    "rt-detr": "bench.peers.hugging_face:rt_detr",
    "retinanet": "bench.peers.torchvision_models:retinanet",
    "fcos": "bench.peers.torchvision_models:fcos",
}
"""Name -> module:function that builds it. All have a ResNet-50."""


def load_peer(name: str) -> Peer | str:
    """The peer, in evaluation mode on the CPU; or, where its library is missing, one line that says so."""
    if name not in PEERS:
        raise UserError(f"no peer {name!r}: there are {', '.join(PEERS)}")
    module, _, function = PEERS[name].partition(":")
    try:
        peer: Peer = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        return f"peer {name} skipped: {error.name or error} is not installed"
    peer.model.eval().requires_grad_(False)
    return peer
