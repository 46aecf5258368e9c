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
# What a fetch raises without a network, with the hub switched off, or for an architecture without weights.
_FETCH_ERRORS = (OSError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError)


class Backbone(nn.Module):
    """Any timm model with `features_only`, its output at strides 8, 16 and 32.

    Args:
        name: timm's name, with the tag of its weights (`resnet50.tv_in1k`).
        pretrained: start from timm's ImageNet weights; from random ones, with a warning, when they cannot be
            fetched.
        frozen_stages: 0 trains everything; n >= 1 freezes the stem and the first n stages (published: 1).
        frozen_norm: batch norms become fixed affine maps by their running statistics (published: yes).
        options: further keyword arguments of the timm model.
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
            raise UserError(f"backbone {name!r} gives strides {info.reduction()}, not {list(STRIDES)}")
        self.output_norms: nn.ModuleList | None = None
        if swin.is_swin(name):
            swin.adapt(self.body)
            self.output_norms = swin.output_norms(self.num_channels)
        if frozen_norm:
            self.body = freeze_batch_norm_2d(self.body)
        if frozen_stages:
            self._freeze(frozen_stages)

    def _freeze(self, num_stages: int) -> None:
        """No gradients up to and including stage `num_stages` (the first stage is the one at stride 4)."""
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
            # timm counts Swin's merging of patches with the stage it leads to, the published code with the one before.
            following.downsample.requires_grad_(False)

    def frozen_stages(self) -> list[str]:
        """Names in `body` of the first modules, none of which is trained, in the order they run."""
        return self._frozen

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> [B, C_l, H_l, W_l] for each stride."""
        if self.output_norms is None:
            return self.body(images_B3HW)
        maps_BHWC = self.body(swin.pad_to_patches(images_B3HW))
        return [
            norm(map_BHWC).permute(0, 3, 1, 2).contiguous()
            for norm, map_BHWC in zip(self.output_norms, maps_BHWC, strict=True)
        ]


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # timm counts the maps from stride 2 on for convolutional networks and from stride 4 on for windowed
    # transformers.
    arguments: dict[str, Any] = {"features_only": True, **options}
    if swin.is_swin(name):
        arguments = {**swin.creation_options(), **arguments}
    try:
        stages = timm.create_model(name, **arguments).feature_info.info
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm cannot make backbone {name!r} with options {options}: {error}") from error
    # Of all stages: some architectures leave out the first by default.
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
                "NO PRETRAINED WEIGHTS: backbone %s starts from random weights, its own could not be fetched: %s",
                name,
                str(error).splitlines()[0],
            )
    return timm.create_model(name, pretrained=False, **arguments)


def to_channels_first(features: Tensor, num_channels: int) -> Tensor:
    """[B, H, W, C] of windowed transformers -> [B, C, H, W]; convolutional features pass through."""
    return features if features.shape[1] == num_channels else features.permute(0, 3, 1, 2).contiguous()


def load_weights(backbone: Backbone, content: Any, source: str) -> str:
    """Load the backbone of a classifier or of a self-supervised model (such as SCRL) under its usual names.

    Args:
        content: what the file holds: tensors by name, possibly nested (`state_dict`, `model`) and with a common prefix
            (`module.`, `backbone.`); tensors of other parts, such as a classifier, are left out.
        source: named in the errors.

    Returns one line that says what was loaded. Raises UserError when a tensor of the backbone is missing.
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
            f"{source}: lacks {len(missing)} of the {len(own)} backbone tensors, such as {missing[0]}"
        )
    reshaped = [name for name in own if found[name].shape != own[name].shape]
    if reshaped:
        raise UserError(
            f"{source}: weights of another backbone, {reshaped[0]} is {tuple(found[reshaped[0]].shape)}"
        )
    backbone.body.load_state_dict(found, strict=False)
    return f"backbone weights from {source}: {len(found)} tensors loaded, {len(tensors) - len(found)} others unused"


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of nested dictionaries; names of inner ones are joined with dots."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, f"{prefix}{name}.")
