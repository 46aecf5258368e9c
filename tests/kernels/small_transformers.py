"""Small random models of transformers: one or more of every architecture that has deformable attention."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

Inputs = dict[str, Tensor]


def architectures() -> set[str]:
    """Names of the installed architectures whose source has a deformable attention."""
    folder = Path(transformers.__file__).parent / "models"
    return {
        name
        for _, name, _ in pkgutil.iter_modules([str(folder)])
        for path in (folder / name).glob("modeling_*.py")
        if "class MultiScaleDeformableAttention(" in (text := path.read_text(encoding="utf-8"))
        or "def multi_scale_deformable_attention" in text
    }


def images(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def with_text(size: int) -> Callable[[], Inputs]:
    tokens = torch.tensor([[101, 50, 60, 102]] * 2)
    return lambda: {**images(size)(), "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def with_task(size: int) -> Callable[[], Inputs]:
    return lambda: {**images(size)(), "task_inputs": torch.randint(0, 90, (2, 16)).float()}


def with_classes(size: int) -> Callable[[], Inputs]:
    classes, tasks = torch.randint(1, 90, (4, 8)), torch.randint(1, 90, (2, 8))
    return lambda: {
        **images(size)(),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def make(model: str, config: str, **settings: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


# ------------------------------------------------------------------------------------------------------------ backbones
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DEPTHS = [1, 1, 1, 1]


def resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=DEPTHS, out_features=STAGES[1:]
    )


def rt_resnet() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=DEPTHS, layer_type="basic", out_indices=[2, 3, 4]
    )  # fmt: skip


def hgnet(out_features: list[str]) -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 16], stage_in_channels=[16, 16, 32, 64], stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 64, 128], stage_num_blocks=DEPTHS, stage_numb_of_layers=DEPTHS,
        stage_downsample=[False, True, True, True], stage_light_block=[False] * 4, stage_kernel_size=[3] * 4,
        depths=DEPTHS, hidden_sizes=[16, 32, 64, 128], embedding_size=16, out_features=out_features,
    )  # fmt: skip


def swin(**settings: Any) -> Any:
    return transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=DEPTHS, num_heads=[1, 2, 4, 8], window_size=2, **settings
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- models
DETR = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    encoder_attention_heads=4, decoder_attention_heads=4, num_queries=12,
)  # fmt: skip
RT_DETR = dict(
    encoder_in_channels=[32, 64, 128], encoder_hidden_dim=32, encoder_ffn_dim=64, encoder_attention_heads=4,
    decoder_in_channels=[32, 32, 32], d_model=32, decoder_ffn_dim=64, decoder_attention_heads=4, decoder_layers=2,
    num_queries=10, num_labels=3, num_denoising=0,
)  # fmt: skip
SEGMENTATION = dict(
    encoder_feedforward_dim=64, encoder_layers=2, decoder_layers=3, num_attention_heads=4, dim_feedforward=64,
    num_queries=8, num_labels=4, hidden_dim=32,
)  # fmt: skip
VIT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
GROUPS = dict(
    d_model=32, decoder_ffn_dim=64, decoder_self_attention_heads=2, decoder_cross_attention_heads=4, decoder_layers=2,
    num_queries=8, group_detr=2, num_labels=5, c2f_num_blocks=1,
)  # fmt: skip


def deformable_detr(**settings: Any) -> nn.Module:
    settings = {**DETR, "two_stage_num_proposals": 12, "num_labels": 5, **settings}
    return make(
        "DeformableDetrForObjectDetection", "DeformableDetrConfig", backbone_config=resnet(), **settings
    )


def grounding(prefix: str) -> nn.Module:
    text = dict(
        model_type="bert", vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    backbone = swin(out_features=STAGES[1:])
    return make(
        f"{prefix}ForObjectDetection", f"{prefix}Config", backbone_config=backbone, text_config=text, **DETR
    )


def rt_like(prefix: str, backbone: Any, **settings: Any) -> nn.Module:
    settings = {**RT_DETR, **settings}
    return make(f"{prefix}ForObjectDetection", f"{prefix}Config", backbone_config=backbone, **settings)


def oneformer() -> nn.Module:
    return make(
        "OneFormerModel", "OneFormerConfig", backbone_config=swin(out_features=STAGES), conv_dim=32, mask_dim=32,
        text_encoder_vocab_size=100, text_encoder_context_length=16, text_encoder_width=32, text_encoder_num_layers=1,
        task_seq_len=16, **SEGMENTATION,
    )  # fmt: skip


def mask2former() -> nn.Module:
    return make(
        "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", backbone_config=swin(out_features=STAGES),
        feature_size=32, mask_feature_size=32, **SEGMENTATION,
    )  # fmt: skip


def omdet_turbo() -> nn.Module:
    text = dict(
        model_type="clip_text_model", vocab_size=100, hidden_size=48, projection_dim=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=99,
    )  # fmt: skip
    return make(
        "OmDetTurboForObjectDetection", "OmDetTurboConfig", use_timm_backbone=False,
        backbone_config=swin(out_indices=[2, 3, 4]), text_config=text, image_size=64,
        apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=48, text_projection_out_dim=48, task_encoder_hidden_dim=64, class_embed_dim=48,
        num_queries=10, vision_features_channels=[32, 32, 32], encoder_in_channels=[32, 64, 128],
        encoder_hidden_dim=32, encoder_attention_heads=4, encoder_dim_feedforward=64, decoder_hidden_dim=32,
        decoder_num_heads=4, decoder_num_layers=2, decoder_dim_feedforward=64,
    )  # fmt: skip


def rf_detr() -> nn.Module:
    backbone = transformers.RfDetrDinov2Config(
        **VIT, image_size=56, patch_size=14, num_windows=2, out_features=["stage2", "stage4"], num_register_tokens=0,
    )  # fmt: skip
    return make("RfDetrForObjectDetection", "RfDetrConfig", backbone_config=backbone, **GROUPS)


def lw_detr() -> nn.Module:
    backbone = transformers.LwDetrViTConfig(
        **VIT, image_size=64, pretrain_image_size=64, num_windows=4, window_block_indices=[0, 2], out_indices=[1, 3]
    )  # fmt: skip
    return make(
        "LwDetrForObjectDetection", "LwDetrConfig", backbone_config=backbone, projector_scale_factors=[2.0, 0.5],
        **GROUPS,
    )  # fmt: skip


def layout_v2() -> nn.Module:
    reading = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1,
                   coordinate_size=6, shape_size=4)  # fmt: skip
    classes = dict(class_thresholds=[0.0] * 3, class_order=[0, 1, 2])
    return rt_like("PPDocLayoutV2", hgnet(STAGES[1:]), reading_order_config=reading, **classes)


MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "Deformable DETR": ("deformable_detr", deformable_detr, images(128)),
    "Deformable DETR, two-stage": (
        "deformable_detr", lambda: deformable_detr(with_box_refine=True, two_stage=True), images(128)
    ),
    "RT-DETR": ("rt_detr", lambda: rt_like("RTDetr", rt_resnet()), images(96)),
    "RT-DETRv2": ("rt_detr_v2", lambda: rt_like("RTDetrV2", rt_resnet()), images(96)),
    "D-FINE": ("d_fine", lambda: rt_like("DFine", hgnet(STAGES[1:])), images(96)),
    "D-FINE, 3, 6, 3 points": (
        "d_fine", lambda: rt_like("DFine", hgnet(STAGES[1:]), decoder_n_points=[3, 6, 3]), images(96)
    ),
    "DEIMv2": ("deimv2", lambda: rt_like("Deimv2", hgnet(STAGES[1:])), images(96)),
    "RF-DETR": ("rf_detr", rf_detr, images(56)),
    "LW-DETR": ("lw_detr", lw_detr, images(64)),
    "Mask2Former": ("mask2former", mask2former, images(64)),
    "OneFormer": ("oneformer", oneformer, with_task(64)),
    "Grounding DINO": ("grounding_dino", lambda: grounding("GroundingDino"), with_text(128)),
    "MM Grounding DINO": ("mm_grounding_dino", lambda: grounding("MMGroundingDino"), with_text(128)),
    "OmDet-Turbo": ("omdet_turbo", omdet_turbo, with_classes(64)),
    "PP-DocLayoutV2": ("pp_doclayout_v2", layout_v2, images(96)),
    "PP-DocLayoutV3": ("pp_doclayout_v3", lambda: rt_like("PPDocLayoutV3", hgnet(STAGES), x4_feat_dim=16), images(96)),
    "PP-DocLayoutV4": ("pp_doclayout_v4", lambda: rt_like("PPDocLayoutV4", hgnet(STAGES[1:])), images(96)),
}  # fmt: skip
"""By title: architecture, model, inputs."""
