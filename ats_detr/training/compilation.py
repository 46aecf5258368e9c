"""Layers that are compiled for training, and what is raised where they cannot be."""

from __future__ import annotations

from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from ats_detr.model import Detr

CANNOT_COMPILE = (TorchDynamoException, InductorError)
"""Raised when a compiled layer first runs."""


def compile_layers(model: Detr) -> None:
    """Compile the layers of encoder and decoder for any sizes, when they run first."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.compile(dynamic=True)


def uncompile_layers(model: Detr) -> None:
    """Let them run as they are again."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer._compiled_call_impl = None
