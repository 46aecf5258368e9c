"""Swin backbones accept images of any size and pad like published detectors."""

from __future__ import annotations

import pytest
import timm
import torch

from ats_detr.model.backbone import Backbone

NAME = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def small_backbone(**changes: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(NAME, pretrained=False, options=SMALL, **changes).eval()


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (224, 224)])
def test_maps_cover_images_of_any_size(size: tuple[int, int]) -> None:
    height, width = size
    maps = small_backbone()(torch.randn(2, 3, height, width))
    for stride, channels, level_map in zip((8, 16, 32), (48, 96, 192), maps, strict=True):
        assert level_map.shape == (2, channels, -(-height // stride), -(-width // stride))


@torch.no_grad()
def test_without_padding_the_blocks_equal_those_of_timm() -> None:
    """At timm's image size all windows are complete, except in the last stage, which timm does not shift."""
    backbone = small_backbone()
    plain = timm.create_model(
        NAME, features_only=True, out_indices=(1, 2), always_partition=True, **SMALL
    ).eval()
    plain.load_state_dict({k: v for k, v in backbone.body.state_dict().items() if "layers_3" not in k})
    images = torch.randn(1, 3, 224, 224)
    for norm, ours, timms in zip(backbone.output_norms, backbone(images), plain(images), strict=False):
        torch.testing.assert_close(ours, norm(timms).permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_masked_between_tokens_not_adjacent_in_the_image() -> None:
    """A change in the first row of windows cannot reach the last row within one stage of two blocks."""
    block = small_backbone().body.layers_0.blocks[1]
    x = torch.randn(1, 30, 30, 24)  # padded to 35: the windows at both edges contain padding or rolled rows
    changed = x.clone()
    changed[:, :3] += 1.0
    moved = (block(changed) - block(x)).abs().amax((0, 2, 3)) > 0
    assert moved[:3].all()
    assert not moved[7:].any()


def test_freezing_a_stage_freezes_the_patch_merging_after_it() -> None:
    backbone = small_backbone(frozen_stages=1)
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("body.patch_embed", "body.layers_0")) for name in trainable)
    assert "body.layers_1.downsample.reduction.weight" not in trainable
    assert "body.layers_1.blocks.0.attn.qkv.weight" in trainable
