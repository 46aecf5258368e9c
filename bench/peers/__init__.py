"""Peers: detectors of other libraries as baselines, with random weights.

One module for each library, imported when one of its peers is loaded.
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
    """A detector that runs on our batches."""

    model: nn.Module
    run: Callable[[ImageBatch], object]
    encoder: nn.Module | None = None
    """The module that refines the feature pyramid; its beginning and end divide the stages. None: no stages."""


PEERS = {
    "deformable-detr": "bench.peers.hugging_face:deformable_detr",
    "rt-detr": "bench.peers.hugging_face:rt_detr",
    "retinanet": "bench.peers.torchvision_models:retinanet",
    "fcos": "bench.peers.torchvision_models:fcos",
}
"""Name -> module:function that builds it. All backbones are ResNet-50."""


def load_peer(name: str) -> Peer | str:
    """The peer, in evaluation mode on the CPU; a message if its library is not installed."""
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}: must be of {', '.join(PEERS)}")
    module, _, function = PEERS[name].partition(":")
    try:
        peer: Peer = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        return f"peer {name} skipped: {error.name or error} is not installed"
    peer.model.eval().requires_grad_(False)
    return peer
