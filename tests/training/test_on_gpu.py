"""Training steps of every shipped configuration on a CUDA device, through the kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ats_detr.config import Config, TeachersConfig, load_config
from ats_detr.model.detr import build_model
from ats_detr.training.criterion import build_criterion, compute_losses
from ats_detr.training.distillation import DualTeacher, SelfTaught
from ats_detr.training.optim import build_optimizer
from ats_detr.training.setup import determinism, self_taught
from tests.training.small import random_batch

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OVERRIDES = ("model.backbone.pretrained=false", "model.backbone.weights=null", "model.dropout=0.0")
DEVICE = "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_training_steps_through_the_kernels(
    path: Path, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss equals the reference, and two steps have finite losses and gradients.

    With deterministic algorithms, PyTorch raises at an operator without one.
    """
    with determinism(deterministic):
        take_steps(load_config(path, OVERRIDES), monkeypatch)


def take_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model(config.model, 7).to(DEVICE).train()
    teachers: DualTeacher | SelfTaught | None = self_taught(config, model)
    if isinstance(config.teachers, TeachersConfig):
        teachers = DualTeacher(copy.deepcopy(model), copy.deepcopy(model))
    batch, targets = random_batch(1, [3, 5], size=256, num_classes=7)
    batch = batch.to(DEVICE)
    criterion = build_criterion(config, 7)
    optimizer = build_optimizer(model, config.train, len(targets))

    def loss_of(some_model: torch.nn.Module) -> torch.Tensor:
        return compute_losses(some_model, criterion, teachers, batch, targets)[1]["loss"]

    first = {}
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        for backend in ("reference", "triton"):
            monkeypatch.setenv("ATS_DETR_BACKEND", backend)
            torch.manual_seed(1)  # seed of stochastic depth in Swin
            # A copy, since every pass updates batch statistics.
            first[backend] = loss_of(copy.deepcopy(model)).item()
    # Differences of 1e-6 may change the choice between equal proposals.
    assert first["triton"] == pytest.approx(first["reference"], rel=1e-2)
    for _ in range(2):
        loss = loss_of(model)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
        for part in ("encoder", "decoder"):
            assert any(
                name.startswith(part) and "sampling_offsets" in name and grads[name].any() for name in grads
            )
        optimizer.step()
        optimizer.zero_grad()
