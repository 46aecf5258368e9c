"""Backbone weights from local files of classifiers and self-supervised models (SCRL) in their published formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from ats_detr.errors import UserError
from ats_detr.model.backbone import Backbone, load_weights


def classifier() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: tensor + torch.rand_like(tensor.float()) for name, tensor in resnet18().state_dict().items()
    }


def backbone() -> Backbone:
    torch.manual_seed(1)
    return Backbone("resnet18.tv_in1k", pretrained=False)


WRAPPINGS = {
    "torchvision": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "two networks": lambda state: {
        "online_network.encoder": state,
        "target_network": {"encoder": {k: v for k, v in state.items() if "layer4" not in k}},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_nested_dictionaries_and_under_prefixes(wrapping: str) -> None:
    state, model = classifier(), backbone()
    line = load_weights(model, WRAPPINGS[wrapping](state), "scrl.pth")
    assert "tensors loaded" in line
    for name, tensor in model.body.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_a_loaded_backbone_equals_the_classifier() -> None:
    reference = resnet18().eval()
    model = backbone().eval()
    load_weights(model, reference.state_dict(), "x")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
        x = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
        torch.testing.assert_close(model(images)[-1], x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: s.pop("layer3.0.conv1.weight"),
            r"1 of the .* are missing, such as layer3\.0\.conv1\.weight",
        ),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(8, 3, 7, 7)}),
            r"another backbone: conv1\.weight has shape \(8, 3",
        ),
        (lambda s: s.clear(), "are missing"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(damage: Any, message: str) -> None:
    state, model = classifier(), backbone()
    before = model.body.conv1.weight.clone()
    damage(state)
    with pytest.raises(UserError, match=message):
        load_weights(model, state, "scrl.pth")
    assert torch.equal(model.body.conv1.weight, before)


@pytest.mark.parametrize("name", ["dla34", "tresnet_m"])
def test_architectures_that_omit_their_first_stage_by_default(name: str) -> None:
    backbone = Backbone(name, pretrained=False, frozen_stages=0)
    assert [tuple(m.shape[2:]) for m in backbone(torch.zeros(1, 3, 64, 96))] == [(8, 12), (4, 6), (2, 3)]
