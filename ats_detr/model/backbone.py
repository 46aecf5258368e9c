"""Backbones from timm: three feature maps at strides 8, 16 and 32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from ats_detr.errors import UserError
from ats_detr.model import swin

logger = logging.getLogger(__name__)

STRIDES = (8, 16, 32)
_STRIDE_OF_FIRST_STAGE = 4
# Raised by a download without a network, in offline mode, or for an architecture without weights.
_FETCH_ERRORS = (OSError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError)


class Backbone(nn.Module):
    """Feature maps of a timm model at strides 8, 16 and 32.

    Args:
        name: name of a timm model that supports `features_only`, with the tag of its weights (`resnet50.tv_in1k`).
        pretrained: start from timm's ImageNet weights. If they cannot be downloaded, the weights are random and a
            warning is logged.
        frozen_stages: 0 trains all stages; n >= 1 freezes the stem and the first n stages (published: 1).
        frozen_norm: replace batch norms by affine maps with their running statistics (published: True).
        options: further keyword arguments of the timm model.

    Raises:
        UserError: if timm cannot create the model, or it has no feature maps at these strides.
    """

    def __init__(
        self,
        name: str = "resnet50.tv_in1k",
        *,
        pretrained: bool = True,
        frozen_stages: int = 1,
        frozen_norm: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.body = _create(name, pretrained, options or {})
        self._frozen: list[str] = []
        info: Any = self.body.feature_info
        self.num_channels: list[int] = info.channels()
        if info.reduction() != list(STRIDES):
            raise UserError(f"backbone {name!r} has strides {info.reduction()}, expected {list(STRIDES)}")
        self.output_norms: nn.ModuleList | None = None
        if swin.is_swin(name):
            swin.adapt(self.body)
            self.output_norms = swin.output_norms(self.num_channels)
        if frozen_norm:
            self.body = freeze_batch_norm_2d(self.body)
        if frozen_stages:
            self._freeze(frozen_stages)

    def _freeze(self, num_stages: int) -> None:
        """Disable gradients up to and including stage `num_stages` (stage 1 has stride 4)."""
        last_stride = _STRIDE_OF_FIRST_STAGE * 2 ** (num_stages - 1)
        last_module = next(
            info["module"] for info in self.body.feature_info.info if info["reduction"] == last_stride
        ).replace(".", "_")
        for name, module in self.body.named_children():
            module.requires_grad_(False)
            self._frozen.append(name)
            if name == last_module:
                break
        following = getattr(self.body, f"layers_{num_stages}", None)
        if self.output_norms is not None and following is not None:
            # timm assigns Swin's patch merging to the following stage, the published code to the preceding one.
            following.downsample.requires_grad_(False)

    def frozen_stages(self) -> list[str]:
        """Names of the frozen child modules of `body`, in execution order."""
        return self._frozen

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Feature maps [B, C_l, H_l, W_l], one for each stride, of normalised images [B, 3, H, W]."""
        if self.output_norms is None:
            return self.body(images_B3HW)
        maps_BHWC = self.body(swin.pad_to_patches(images_B3HW))
        return [
            norm(map_BHWC).permute(0, 3, 1, 2).contiguous()
            for norm, map_BHWC in zip(self.output_norms, maps_BHWC, strict=True)
        ]


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # timm numbers the maps from stride 2 on for convolutional networks and from stride 4 on for windowed transformers.
    arguments: dict[str, Any] = {"features_only": True, **options}
    if swin.is_swin(name):
        arguments = {**swin.creation_options(), **arguments}
    try:
        stages = timm.create_model(name, **arguments).feature_info.info
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm cannot create backbone {name!r} with options {options}: {error}") from error
    # All stages are listed: some architectures omit the first by default.
    reductions = [stage["reduction"] for stage in stages]
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise UserError(
            f"backbone {name!r} has no feature map at stride {missing[0]}; its strides are {reductions}"
        )
    arguments["out_indices"] = [reductions.index(stride) for stride in STRIDES]
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True, **arguments)
        except _FETCH_ERRORS as error:
            logger.warning(
                "NO PRETRAINED WEIGHTS: backbone %s has random weights because its weights could not be downloaded: %s",
                name,
                str(error).splitlines()[0],
            )
    return timm.create_model(name, pretrained=False, **arguments)


def to_channels_first(features: Tensor, num_channels: int) -> Tensor:
    """Features [B, C, H, W] from [B, H, W, C] (windowed transformers) or [B, C, H, W] (returned unchanged)."""
    return features if features.shape[1] == num_channels else features.permute(0, 3, 1, 2).contiguous()


def load_weights(backbone: Backbone, content: Any, source: str) -> str:
    """Load backbone weights from the file content of a classifier or a self-supervised model (such as SCRL).

    Args:
        content: content of the file: tensors by name, possibly nested (`state_dict`, `model`) and with a common prefix
            (`module.`, `backbone.`). Tensors of other parts, such as a classifier, are ignored.
        source: name of the file in error messages.

    Returns:
        One line that states how many tensors were loaded.

    Raises:
        UserError: if a tensor of the backbone is missing or has another shape.
    """
    own = {
        name: t for name, t in backbone.body.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    tensors = dict(_tensors(content))
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    prefix = max(prefixes, key=lambda p: sum(p + name in tensors for name in own), default="")
    found = {name: tensors[prefix + name] for name in own if prefix + name in tensors}
    missing = [name for name in own if name not in found]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of the {len(own)} backbone tensors are missing, such as {missing[0]}"
        )
    reshaped = [name for name in own if found[name].shape != own[name].shape]
    if reshaped:
        raise UserError(
            f"{source}: weights of another backbone: {reshaped[0]} has shape {tuple(found[reshaped[0]].shape)},"
            f" expected {tuple(own[reshaped[0]].shape)}"
        )
    backbone.body.load_state_dict(found, strict=False)
    return f"backbone weights from {source}: {len(found)} tensors loaded, {len(tensors) - len(found)} others unused"


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of nested dictionaries; nested names are joined with dots."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, f"{prefix}{name}.")
