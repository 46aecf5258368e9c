"""`frozen_stages` freezes the stem and the first stages of every family of timm, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ats_detr.errors import UserError
from ats_detr.model.backbone import Backbone

# Modules that hold the stem and the first stage, then those that the second stage adds, by timm's model. The smallest
# model of each family with strides 4, 8, 16 and 32, one of each way to hold stages.
FAMILIES = {
    "convnext_atto": ("stem_0 stem_1 stages_0", "stages_1"),
    "densenet121": (
        "features_conv0 features_norm0 features_denseblock1",
        "features_transition1 features_denseblock2",
    ),
    "dla46x_c": ("base_layer level0 level1 level2", "level3"),
    "hiera_tiny_224": ("model.pos_embed model.patch_embed model.blocks.0", "model.blocks.1 model.blocks.2"),
    "legacy_xception": ("body.conv1 body.bn1 body.conv2 body.bn2 body.block1", "body.block2"),
    "lcnet_035": ("conv_stem bn1 blocks.0 blocks.1", "blocks.2"),
    "mvitv2_tiny": ("model.patch_embed model.stages.0", "model.stages.1"),
    "swin_tiny_patch4_window7_224": (
        "patch_embed layers_0 layers_1.downsample",
        "layers_1 layers_2.downsample",
    ),
    "test_resnet": ("conv1 bn1 layer1", "layer2"),
    "tf_efficientnet_lite0": ("conv_stem bn1 blocks.0 blocks.1", "blocks.2"),
    "twins_svt_small": (
        "model.patch_embeds.0 model.blocks.0 model.pos_block.0",
        "model.patch_embeds.1 model.blocks.1 model.pos_block.1",
    ),
    "vgg11": ("features_0 features_3 features_6 features_8", "features_11 features_13"),
}
MORE_FAMILIES = {
    "cpubone_nano": ("stem_0 stages_0", "stages_1"),
    "cs3darknet_focus_s": ("stem_conv1 stages_0", "stages_1"),
    "cspnext_tiny": ("model.stem model.stages.0", "model.stages.1"),
    "davit_tiny": ("stem stages_0", "stages_1"),
    "edgenext_xx_small": ("stem_0 stem_1 stages_0", "stages_1"),
    "efficientformer_l1": ("model.stem model.stages.0", "model.stages.1"),
    "efficientformerv2_s0": ("stem_conv1 stem_conv2 stages_0", "stages_1"),
    "efficientvit_b0": ("stem_in_conv stem_res0 stages_0", "stages_1"),
    "ese_vovnet19b_slim_dw": ("stem_0 stem_1 stem_2 stages_0", "stages_1"),
    "fasternet_t0": ("patch_embed stages_0", "stages_1"),
    "fastvit_t8": ("stem_0 stem_1 stem_2 stages_0", "stages_1"),
    "focalnet_tiny_srf": ("stem layers_0", "layers_1"),
    "gcvit_xxtiny": ("stem stages_0", "stages_1"),
    "ghostnet_050": ("conv_stem bn1 blocks_0 blocks_1", "blocks_2 blocks_3"),
    "halonet_h1": ("stem_conv1 stages_0", "stages_1"),
    "hardcorenas_b": ("conv_stem bn1 blocks.0 blocks.1", "blocks.2"),
    "hgnetv2_b0": ("stem stages_0", "stages_1"),
    "inception_next_atto": ("stem_0 stem_1 stages_0", "stages_1"),
    "inception_v4": (
        "features_0 features_1 features_2 features_3",
        "features_4 features_5 features_6 features_7 features_8 features_9",
    ),
    "legacy_seresnet18": ("layer0 layer1", "layer2"),
    "mobilenetv5_base": ("model.conv_stem model.blocks.0", "model.blocks.1"),
    "mobilevit_xxs": ("stem stages_0 stages_1", "stages_2"),
    "nextvit_small": ("stem_0 stem_1 stem_2 stem_3 stages_0", "stages_1"),
    "poolformerv2_s12": ("stem stages_0", "stages_1"),
    "pvt_v2_b0": ("patch_embed stages_0", "stages_1"),
    "rdnet_tiny": ("stem_0 stem_1 dense_stages_0", "dense_stages_1"),
    "regnetx_002": ("stem s1", "s2"),
    "repghostnet_050": ("conv_stem bn1 blocks_0 blocks_1", "blocks_2 blocks_3"),
    "repvit_m1": ("stem stages_0", "stages_1"),
    "res2next50": ("conv1 bn1 layer1", "layer2"),
    "resnest14d": ("conv1 bn1 layer1", "layer2"),
    "resnetv2_18": ("stem_conv stages_0", "stages_1"),
    "rexnet_100": ("stem features_0 features_1 features_2", "features_3 features_4"),
    "sam2_hiera_tiny": (
        "model.pos_embed model.pos_embed_window model.patch_embed model.blocks.0",
        "model.blocks.1 model.blocks.2",
    ),
    "selecsls42": ("stem_0 stem_1 stem_2 features_0 features_1", "features_2 features_3"),
    "skresnet18": ("conv1 bn1 layer1", "layer2"),
    "starnet_s050": ("stem_0 stages_0", "stages_1"),
    "swiftformer_xs": ("stem_0 stem_1 stem_2 stem_3 stem_4 stages_0", "stages_1"),
    "swinv2_cr_tiny_224": ("patch_embed stages_0", "stages_1"),
    "swinv2_tiny_window8_256": ("patch_embed layers_0", "layers_1"),
    "test_byobnet": ("stem stages_0", "stages_1"),
    "test_coatnet": ("stem stages_0", "stages_1"),
    "test_mambaout": ("stem stages_0", "stages_1"),
    "test_nfnet": ("stem_conv1 stem_conv2 stem_conv3 stem_conv4 stages_0", "stages_1"),
    "tiny_vit_5m_224": ("patch_embed stages_0", "stages_1"),
    "tresnet_m": ("body_conv1 body_layer1", "body_layer2"),
    "xception41p": (
        "stem_0 stem_1 blocks_0 blocks_1.norm blocks_1.stack.conv1 blocks_1.stack.conv2",
        "blocks_1 blocks_2.norm blocks_2.stack.conv1 blocks_2.stack.conv2",
    ),
}


def on_meta(name: str, num_stages: int) -> Backbone:
    with torch.device("meta"):
        return Backbone(name, pretrained=False, frozen_stages=num_stages, frozen_norm=False)


def share_of(names: set[str], backbone: Backbone) -> float:
    sizes = {name: parameter.numel() for name, parameter in backbone.body.named_parameters()}
    return sum(sizes[name] for name in names) / sum(sizes.values())


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)]
)
def test_the_stages_asked_for_are_frozen_and_no_others(name: str) -> None:
    modules: list[str] = []
    for num_stages, added in enumerate((FAMILIES | MORE_FAMILIES)[name], start=1):
        modules += added.split()
        backbone = on_meta(name, num_stages)
        named = dict(backbone.body.named_parameters())
        expected = {
            parameter
            for parameter in named
            if any(parameter == module or parameter.startswith(f"{module}.") for module in modules)
        }
        frozen = {parameter for parameter in named if not named[parameter].requires_grad}
        assert frozen == expected
        assert 0 < share_of(frozen, backbone) < 0.7


def test_all_four_stages_are_the_whole_network_and_none_is_nothing() -> None:
    assert not any(p.requires_grad for p in on_meta("lcnet_035", 4).body.parameters())
    assert all(p.requires_grad for p in on_meta("lcnet_035", 0).body.parameters())


@pytest.mark.parametrize(
    ("name", "num_stages", "reason"),
    [
        ("hrnet_w18_small", 1, "exchange features"),
        ("coat_tiny", 2, "exchange features"),
        ("pit_ti_224", 1, "no stage at stride 4, only at strides"),
    ],
)
def test_stages_that_cannot_be_frozen_separately_are_an_error(
    name: str, num_stages: int, reason: str
) -> None:
    with pytest.raises(UserError, match=rf"frozen_stages = {num_stages}: .*{name}.*{reason}.*set it to 0"):
        on_meta(name, num_stages)
    assert on_meta(name, 0).frozen_stages() == []


def test_a_frozen_stage_computes_the_same_in_training_as_in_evaluation() -> None:
    """Neither its statistics nor its dropout move; those of later stages do."""
    torch.manual_seed(0)
    backbone = Backbone("test_resnet", pretrained=False, frozen_stages=1, frozen_norm=False).train()
    norms = {name: m for name, m in backbone.body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {name for name, norm in norms.items() if not torch.equal(norm.running_mean, before[name])}
    assert moved == {name for name in norms if not name.startswith(("conv1", "bn1", "layer1"))}


def test_the_leading_frozen_modules_are_those_that_run_in_order() -> None:
    assert on_meta("test_resnet", 1).frozen_stages() == ["conv1", "bn1", "act1", "maxpool", "layer1"]
    assert on_meta("swin_tiny_patch4_window7_224", 1).frozen_stages() == ["patch_embed", "layers_0"]
    assert on_meta("tf_efficientnet_lite0", 1).frozen_stages() == []  # its stages share one module
