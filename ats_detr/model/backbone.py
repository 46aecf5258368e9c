"""Backbones from timm: three feature maps at strides 8, 16 and 32."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import FeatureDictNet
from torch import Tensor, fx, nn
from torch.func import functional_call

from ats_detr.errors import UserError
from ats_detr.kernels.dispatch import autocast, runs_inside_graph
from ats_detr.model import swin
from ats_detr.model.fusion import freeze_norms, fuse_convolutions, training_constants
from ats_detr.text import first_line

logger = logging.getLogger(__name__)

STRIDES = (8, 16, 32)
NUM_STAGES = 4
"""Stages that end at strides 4, 8, 16 and 32."""
# Raised by a download without a network, in offline mode, or for an architecture without weights.
_FETCH_ERRORS = (OSError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError)

OPTIONS = frozenset(
    {
        "aa_layer", "act_layer", "always_partition", "attn_drop_rate", "avg_down", "base_width",
        "block_args", "block_reduce_first", "cardinality", "channels", "depth", "depths", "dims",
        "down_kernel_size", "drop_block_rate", "drop_path_rate", "drop_rate", "dynamic_img_size",
        "embed_dim", "embed_dims", "head_dim", "img_size", "init_values", "kernel_size",
        "kernel_sizes", "layer_scale_init_value", "layers", "ls_init_value", "mlp_ratio",
        "mlp_ratios", "norm_eps", "norm_layer", "num_heads", "output_stride", "pad_type",
        "patch_size", "proj_drop_rate", "qk_norm", "qkv_bias", "stem_size", "stem_type",
        "stem_width", "strict_img_size", "use_grn", "width", "window_size", "zero_init_last"
    }
)  # fmt: skip
"""Keyword arguments of timm models that describe an architecture. Others are rejected: options may come from a
checkpoint, and some arguments of timm read files or open connections."""
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_MAX_OPTION = 4096
"""Bound on numbers in options; the largest widths of timm's models are about 3000."""
_MAX_LAYERS = 256
"""Bound on the sum of numbers of layers in options, and on the length of lists."""
_LAYER_COUNTS = ("layers", "depth", "depths")


class Backbone(nn.Module):
    """Feature maps of a timm model at strides 8, 16 and 32.

    Args:
        name: name of a timm model that supports `features_only`, with the tag of its weights (`resnet50.tv_in1k`).
        pretrained: start from timm's ImageNet weights. If they cannot be downloaded and no stage is frozen, the
            weights are random and a warning is logged.
        frozen_stages: 0 trains all stages; n >= 1 freezes the stem and the first n stages (published: 1), that is all
            parameters that affect the feature map at stride 2 ** (n + 1); 4 freezes the whole network.
        frozen_norm: replace batch norms by affine maps with their running statistics (published: True).
        options: further keyword arguments of the timm model; the keys must be in `OPTIONS`.

    Raises:
        UserError: if timm cannot create the model, it has no feature maps at these strides, an option is not allowed,
            its stages cannot be frozen separately, or weights of frozen stages cannot be downloaded.
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
        arguments = _arguments(name, options or {})
        info = _build_on_meta(name, arguments).feature_info.info
        # The last map of each stride. All stages are listed: some architectures omit the first by default.
        self._levels = {stage["reduction"]: level for level, stage in enumerate(info)}
        missing = [stride for stride in STRIDES if stride not in self._levels]
        if missing:
            raise UserError(
                f"backbone {name!r} has no feature map at stride {missing[0]}; its strides are {list(self._levels)}"
            )
        frozen = self._parameters_of_stages(name, arguments, frozen_stages) if frozen_stages else set()
        arguments["out_indices"] = [self._levels[stride] for stride in STRIDES]
        self.body = _build(name, arguments, pretrained, frozen_stages)
        self.num_channels: list[int] = self.body.feature_info.channels()  # type: ignore[operator]
        self.output_norms: nn.ModuleList | None = None
        if swin.is_swin(name):
            swin.adapt(self.body)
            self.output_norms = swin.output_norms(self.num_channels)
        if frozen_norm:
            self.body = freeze_norms(self.body)
        self._fused: tuple[list[nn.Module], fx.GraphModule | None] | None = None
        """The modules of `body`, and `body` with fused convolutions."""
        self._frozen_children: list[str] = []
        self._frozen_modules: list[nn.Module] = []
        if frozen_stages:
            self._freeze(frozen, frozen_stages)

    def _parameters_of_stages(self, name: str, arguments: dict[str, Any], num_stages: int) -> set[str]:
        """Names of the parameters that affect the output of stage `num_stages` (stage 1 has stride 4).

        Families of timm models store their stages under different names and nesting. Autograd on the meta device finds
        the parameters in all of them, without computing values. Raises UserError if the stage does not exist, or if
        later stages affect its output, as in HRNet.
        """
        if num_stages >= NUM_STAGES:
            return {name for name, _ in _build_on_meta(name, arguments).named_parameters()}
        strides = [2 ** (num_stages + 1), 2 ** (num_stages + 2)]
        fix = f"set it to 0, or to {NUM_STAGES} to freeze the whole backbone"
        if any(stride not in self._levels for stride in strides):
            raise UserError(
                f"model.backbone.frozen_stages = {num_stages}: backbone {name!r} has no stage at stride"
                f" {strides[0]}, only at strides {list(self._levels)}; {fix}"
            )
        arguments = {**arguments, "out_indices": [self._levels[stride] for stride in strides]}
        body = _build_on_meta(name, arguments).eval()
        parameters = dict(body.named_parameters())
        with torch.inference_mode(False), torch.enable_grad():
            own, following = (
                {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
                for gradients in _gradients(body, list(parameters.values()), name, arguments)
            )
        if not own <= following:
            raise UserError(
                f"model.backbone.frozen_stages = {num_stages}: the stages of backbone {name!r} exchange features, so"
                f" its first {num_stages} cannot be frozen separately; {fix}"
            )
        return own

    def _freeze(self, frozen: set[str], num_stages: int) -> None:
        for name, parameter in self.body.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        following = getattr(self.body, f"layers_{num_stages}", None)
        if self.output_norms is not None and following is not None:
            # timm assigns Swin's patch merging to the following stage, the published code to the preceding one.
            following.downsample.requires_grad_(False)
        for module in self.body.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                self._frozen_modules.append(module)
        if not isinstance(self.body, FeatureDictNet):
            return
        children: list[str] = []
        for name, child in self.body.named_children():
            if any(parameter.requires_grad for parameter in child.parameters()):
                break
            children.append(name)
            if any(parameter.startswith(f"{name}.") for parameter in frozen):
                self._frozen_children = children.copy()

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode; frozen stages (batch statistics, dropout) stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

    def frozen_stages(self) -> list[str]:
        """Names of the leading frozen child modules of `body`, in execution order. Empty if the children do not run
        in sequence."""
        return self._frozen_children

    def __getstate__(self) -> dict[str, Any]:
        """The state without the fused network, which a copy makes of its own modules."""
        return {**self.__dict__, "_fused": None}

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Feature maps [B, C_l, H_l, W_l], one for each stride, of normalised images [B, 3, H, W].

        Without gradients, convolutions are fused with the norms, sums and ReLUs that follow, where the architecture
        allows it, and the maps are in channels-last memory.
        """
        if self.output_norms is None:
            return self._maps(images_B3HW)
        maps_BHWC = self.body(swin.pad_to_patches(images_B3HW))
        return [
            norm(map_BHWC).permute(0, 3, 1, 2).contiguous()
            for norm, map_BHWC in zip(self.output_norms, maps_BHWC, strict=True)
        ]

    def _maps(self, images_B3HW: Tensor) -> list[Tensor]:
        # Compilers have their own fusion.
        if runs_inside_graph() or torch.jit.is_tracing():
            return self.body(images_B3HW)
        if torch.is_grad_enabled() and (
            images_B3HW.requires_grad or any(parameter.requires_grad for parameter in self.body.parameters())
        ):
            if not self.training:  # threads may share the model
                return self.body(images_B3HW)
            constants = training_constants(self.body, autocast(images_B3HW).dtype)
            if images_B3HW.device.type == "cpu":
                # Narrow ResNet-10, 16 images of 128 pixels, one thread: 119 instead of 160 ms (2026-11-27).
                images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
            return functional_call(self.body, constants, (images_B3HW,))
        fused = self._fused_body()
        if fused is None:
            return self.body(images_B3HW)
        return fused(images_B3HW.contiguous(memory_format=torch.channels_last))

    def _fused_body(self) -> fx.GraphModule | None:
        """`body` with fused convolutions, made again when a module has been replaced; None: call `body`."""
        modules = list(self.body.modules())
        if any(m.training or m._forward_hooks or m._forward_pre_hooks for m in modules):
            return None
        if self._fused is None or self._fused[0] != modules:
            self._fused = modules, fuse_convolutions(self.body)
        return self._fused[1]


def _arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `timm.create_model`. Raises UserError for names and options that are not allowed."""
    if not _NAME.fullmatch(name) or not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"model.backbone.name = {name!r}: timm has no model of this name; timm.list_models() lists them"
            " (for weights from elsewhere set model.backbone.weights to their file)"
        )
    for key, value in options.items():
        if key not in OPTIONS:
            near = difflib.get_close_matches(str(key), OPTIONS, n=1, cutoff=0)[0]
            raise UserError(
                f"model.backbone.options.{key}: not an allowed option of backbone {name!r}; did you mean {near}?"
                " (ats_detr.model.backbone.OPTIONS lists the allowed ones)"
            )
        _check_option(f"model.backbone.options.{key}", value, depth=0)
        counts = value if isinstance(value, (list, tuple)) else [value]
        if key in _LAYER_COUNTS and not (
            all(type(count) is int and count >= 0 for count in counts) and sum(counts) <= _MAX_LAYERS
        ):
            fix = f"must be integers >= 0, at most {_MAX_LAYERS} layers in all"
            raise UserError(f"model.backbone.options.{key} = {value!r}: {fix}")
    arguments: dict[str, Any] = {"features_only": True, **options}
    return {**swin.creation_options(), **arguments} if swin.is_swin(name) else arguments


def _check_option(key: str, value: Any, depth: int) -> None:
    """Raise UserError unless `value` consists of numbers, names, and short lists and dictionaries of them."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        if not -_MAX_OPTION <= value <= _MAX_OPTION:  # also rejects NaN
            raise UserError(f"{key} = {value!r}: must be in [-{_MAX_OPTION}, {_MAX_OPTION}]")
    elif isinstance(value, str):
        if not re.fullmatch(r"\w{0,40}", value):
            raise UserError(f"{key} = {value[:80]!r}: must be a name of letters, digits and underscores")
    elif isinstance(value, (list, tuple, dict)) and depth < 3 and len(value) <= _MAX_LAYERS:
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_option(key, entry, depth + 1)
    else:
        raise UserError(f"{key}: must be numbers, names, or short lists of them")


def _build_on_meta(name: str, arguments: Mapping[str, Any]) -> Any:
    """The timm model on the meta device, without memory for weights."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
        own = {key: arguments[key] for key in arguments.keys() & OPTIONS}
        raise UserError(
            f"timm cannot create backbone {name!r} with options {own}: {first_line(error)}"
        ) from error


def _gradients(
    body: Any, parameters: list[nn.Parameter], name: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Gradients of the sum of each output with respect to `parameters`; None: the parameter does not affect it."""
    side = arguments.get("img_size") or body.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    for output in body(torch.zeros(1, 3, height, width, device="meta")):
        yield torch.autograd.grad(output.sum(), parameters, allow_unused=True, retain_graph=True)


def _build(name: str, arguments: dict[str, Any], pretrained: bool, frozen_stages: int) -> nn.Module:
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True, **arguments)
        except _FETCH_ERRORS as error:
            reason = first_line(error)
            if frozen_stages:
                raise UserError(
                    f"backbone {name}: its pretrained weights cannot be downloaded ({reason}), and"
                    f" model.backbone.frozen_stages = {frozen_stages} would freeze random weights. Set"
                    " model.backbone.weights to a local file; to train from random weights set"
                    " model.backbone.pretrained=false and model.backbone.frozen_stages=0"
                ) from error
            logger.warning(
                "NO PRETRAINED WEIGHTS: backbone %s has random weights because its weights could not be downloaded: %s",
                name,
                reason,
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
