"""Conversion of published checkpoints (Deformable DETR, Sparse DETR, ATS-DETR) to checkpoints of this package and back.

The architecture is inferred from the names and shapes of the tensors. Settings that these do not determine are read
from the command line that the published code stores in the file; otherwise defaults are assumed and noted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ats_detr.config import (
    PUBLISHED_NORM_GROUPS,
    BackboneConfig,
    ConfigError,
    ModelConfig,
    SelectorConfig,
    config_from_dict,
    config_to_dict,
)
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.model import Detr, build_model
from ats_detr.text import mismatches, run_name

COCO_CLASSES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
"""Names of the COCO 2017 categories by id, which are the class indices of a published head with 91 classes."""

ALLOWED_TYPES: list[Any] = [argparse.Namespace]
"""Types in published files other than tensors and plain values: the parsed command line."""
_BODY = "backbone.0.body."
_ADAPTION = "adaption_layer."
_DERIVED = ".relative_position_index"
"""Suffix of Swin buffers that depend on the window size only; stored by the published code, computed by timm."""
_WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "module"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "model_ema_state_dict"),
)
"""Keys under which training codes store a state dict, or a dictionary with one."""
_PREFIXES = ("_orig_mod.", "module.", "model.")
"""Prefixes that they add to the names of all tensors."""
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError)
"""Raised where tensors or settings of a file are not those of a model."""
_RESNETS = {
    (True, (3, 4, 6, 3)): "resnet50.tv_in1k",
    (True, (3, 4, 23, 3)): "resnet101.tv_in1k",
    (False, (2, 2, 2, 2)): "resnet18.tv_in1k",
    (False, (3, 4, 6, 3)): "resnet34.tv_in1k",
}
"""(has bottleneck blocks, blocks per stage) -> name in timm."""
_SWINS = {
    (96, 6): "swin_tiny_patch4_window7_224.ms_in1k",
    (96, 18): "swin_small_patch4_window7_224.ms_in1k",
    (128, 18): "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    (192, 18): "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
}
"""(channels of the first stage, blocks of the third) -> name in timm."""
_OPTIONS_OF_SHAPES = ("channels", "layers", "stem_width")
"""Options of a backbone that differ only where the shapes of its tensors do."""


def is_official(content: Any) -> bool:
    """Whether the content of a file is a checkpoint of the published code, or the state dict of one."""
    return any(name.startswith("transformer.") for name in _state_of(content)[1])


def _state_of(content: Any, depth: int = 3) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The tensors of a checkpoint or a state dict by name, and the keys that lead to them; none if there are none.

    Training codes nest the state dict, and add prefixes (DistributedDataParallel, Lightning, `torch.compile`) to all
    names. The weights come before their moving average.
    """
    if not isinstance(content, Mapping):
        return (), {}
    for key in _WRAPPERS if depth else ():
        path, state = _state_of(content.get(key), depth - 1)
        if state:
            return (key, *path), state
    state = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    state.pop("n_averaged", None)  # of torch.optim.swa_utils
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return (), state


# ------------------------------------------------------------------------------------------ published -> this package
def from_official(
    content: Mapping[str, Any], *, source: str = "checkpoint", keep_adaption: bool = False
) -> dict[str, Any]:
    """A published checkpoint in the format of this package, as `load_checkpoint` returns it.

    Its `notes` list assumed settings and omitted content.

    Args:
        content: content of the published file.
        source: name of the file in error messages.
        keep_adaption: keep the adaption layer, which only distillation uses.

    Raises:
        UserError: if the tensors are not exactly those of a model of this family.
    """
    keys, state = _state_of(content)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_DERIVED)}
    outer = content if keys else {}
    arguments = outer.get("args") or {}
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    for key, supported in {"dilation": False, "position_embedding": "sine"}.items():
        if arguments.get(key, supported) != supported:
            raise UserError(f"{source}: trained with {key} = {arguments[key]}; only {supported} is supported")
    notes: list[str] = []
    if not keep_adaption and any(name.startswith(_ADAPTION) for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_ADAPTION)}
        notes.append("omitted: the adaption layer, which only training uses (--keep-adaption keeps it)")
    if dropped := [key for key in ("optimizer", "lr_scheduler") if key in outer]:
        notes.append(f"omitted: the state of {' and '.join(dropped)}")
    if others := [key for key in _WRAPPERS if key in outer and key != keys[0]]:
        notes.append(f"omitted: {', '.join(others)}; the weights are those under {'.'.join(keys)}")
    try:
        num_classes = len(state["class_embed.0.bias"])
        tree = {"name": run_name(source), "model": config_to_dict(detect_model(state, arguments, notes))}
        config = config_from_dict(tree)  # checks the bounds of all sizes
        epoch = int(outer.get("epoch", -1)) + 1
    except _MALFORMED as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source}: not a model of this family ({reason})") from error
    with torch.device("meta"):
        model = build_model(config.model, num_classes)
    return {
        "model": _rename(state, model, source),
        "config": config_to_dict(config),
        "num_classes": num_classes,
        "classes": _classes(num_classes).to_dict(),
        "epoch": max(epoch, 0),
        "step": 0,
        "train_seconds": 0.0,
        "finished": True,
        "published": True,
        "notes": notes,
    }


def detect_model(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any] | None = None, notes: list[str] | None = None
) -> ModelConfig:
    """The architecture of a published state dict.

    Args:
        state: tensors by published name.
        arguments: the command line stored in the file, if any.
        notes: a list to which assumed settings are appended.

    Raises:
        KeyError: if a tensor that all models of this family have is missing.
    """
    arguments, notes = arguments or {}, [] if notes is None else notes
    width = len(state["transformer.level_embed"][0])
    num_levels = len(state["transformer.level_embed"])
    num_heads = _argument(arguments, "nheads", 8, "model.num_heads", notes)
    two_stage = "transformer.enc_output.weight" in state
    queries_from_memory = two_stage and len(state["transformer.pos_trans.bias"]) == width
    num_encoder_layers = _count(state, r"transformer\.encoder\.layers\.(\d+)\.")
    num_decoder_layers = _count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    if two_stage:
        num_queries = _argument(arguments, "num_queries", 300, "model.num_queries", notes)
    else:
        num_queries = len(state["query_embed.weight"])
    num_points, num_decoder_points = (
        len(state[f"transformer.{layer}.attention_weights.bias"]) // (num_heads * num_levels)
        for layer in ("encoder.layers.0.self_attn", "decoder.layers.0.cross_attn")
    )
    return ModelConfig(
        backbone=BackboneConfig(name=_detect_backbone(state), pretrained=False),
        selector=_detect_selector(state, arguments, notes),
        width=width,
        num_norm_groups=None if width == 256 else PUBLISHED_NORM_GROUPS,
        num_heads=num_heads,
        num_levels=num_levels,
        num_points=num_points,
        num_decoder_points=None if num_decoder_points == num_points else num_decoder_points,
        num_encoder_layers=num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        feedforward_width=len(state["transformer.encoder.layers.0.linear1.bias"]),
        dropout=float(arguments.get("dropout", 0.1)),
        num_queries=num_queries,
        two_stage=two_stage,
        box_refine="transformer.decoder.bbox_embed.0.layers.0.weight" in state,
        queries_from_memory=queries_from_memory,
        class_specific_proposals=two_stage and bool(arguments.get("eff_specific_head", queries_from_memory)),
        encoder_auxiliary=_count(state, r"class_embed\.(\d+)\.") > num_decoder_layers + two_stage,
        adaption=any(name.startswith(_ADAPTION) for name in state),
    )


def _argument(arguments: Mapping[str, Any], name: str, assumed: int, key: str, notes: list[str]) -> int:
    """An argument that tensors do not show. `key` is the setting that overrides an assumed value."""
    if name not in arguments:
        notes.append(f"the file does not contain --{name}; {assumed} is assumed ({key} overrides it)")
    return int(arguments.get(name, assumed))


def _detect_selector(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], notes: list[str]
) -> SelectorConfig | None:
    by_features = any(name.startswith("transformer.encoder.enc_mask_predicotor.") for name in state)
    if not by_features and not any(name.startswith("transformer.enc_mask_predictor.") for name in state):
        return None
    scores: Literal["features", "proposals"] = "features" if by_features else "proposals"
    if any(".enc_mask_predicotor.0.rate." in name for name in state):
        given = [arguments.get(key) for key in ("min_ratio", "max_ratio")]
        if None in given:
            notes.append(
                "the file does not contain its budgets; 0.1 and 0.2 are assumed"
                " (model.selector.min_ratio and max_ratio override them)"
            )
        low, high = (float(value or fallback) for value, fallback in zip(given, (0.1, 0.2), strict=True))
        return SelectorConfig(min_ratio=low, max_ratio=high, masked_mean=False)
    rho = arguments.get("rho")
    rho = rho[0] if isinstance(rho, (list, tuple)) and rho else rho
    if not rho:
        notes.append(
            "the file does not contain its keep ratio; 0.1 is assumed (model.selector.keep_ratio overrides it)"
        )
    return SelectorConfig(scores=scores, keep_ratio=float(rho or 0.1), masked_mean=False)


def _detect_backbone(state: Mapping[str, Tensor]) -> str:
    names = [name.removeprefix(_BODY) for name in state if name.startswith(_BODY)]
    if any(name.startswith("layer1.") for name in names):
        blocks = tuple(_count(names, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
        kind: tuple[Any, ...] = ("layer1.0.conv3.weight" in names, blocks)
        found = _RESNETS.get(kind)
    else:
        kind = len(state[f"{_BODY}patch_embed.proj.bias"]), _count(names, r"layers\.2\.blocks\.(\d+)\.")
        found = _SWINS.get(kind)
    if found is None:
        raise ConfigError("backbone", kind, "must be ResNet-18, 34, 50, 101 or Swin-T, S, B, L")
    return found


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern matches at the start of a name; 0 without a match."""
    numbers = [int(match[1]) for match in map(re.compile(pattern).match, names) if match]
    return max(numbers, default=-1) + 1


def _rename(state: Mapping[str, Tensor], model: Detr, source: str) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `model`.

    Names and shapes must match exactly, and tensors that are stored several times must be equal.
    """
    ours, own = official_names(model), model.state_dict()
    if found := mismatches({name: own[our_name] for name, our_name in ours.items()}, state):
        raise UserError(f"{source}: not a model of this family ({found})")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        copy = renamed.setdefault(ours[name], tensor)
        if copy is not tensor and not torch.equal(copy, tensor):
            raise UserError(f"{source}: {name} differs from its copy under another name")
    return renamed


def _classes(num_rows: int) -> ClassMap:
    if num_rows == 91:
        return ClassMap.from_categories(COCO_CLASSES)
    rows = tuple(range(num_rows))  # the published code uses category ids as class indices
    names = tuple(f"category {row}" for row in rows)
    return ClassMap(num_rows=num_rows, rows=rows, category_ids=rows, names=names)


# ------------------------------------------------------------------------------------------ this package -> published
def to_official(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of this package in the published format: every tensor under all of its names, and the settings that
    names and shapes do not determine in the form of the command line.

    Raises UserError where the published code has no such model.
    """
    config = config_from_dict(checkpoint["config"]).model
    backbone = dataclasses.replace(config.backbone, pretrained=False)
    model = build_model(dataclasses.replace(config, backbone=backbone), checkpoint["num_classes"])
    state = {name: checkpoint["model"][own] for name, own in official_names(model).items()}
    for name, buffer in model.backbone.body.named_buffers():
        if name.endswith(_DERIVED):
            state[_BODY + name.replace("layers_", "layers.")] = buffer
    content = {"model": state, "args": _arguments(config)}
    wanted = _settings(config)
    back = from_official(content, source="in the published format", keep_adaption=True)
    found = _settings(config_from_dict(back["config"]).model)
    if lost := [f"model.{key} = {value!r}" for key, value in wanted.items() if found[key] != value]:
        raise UserError(f"the published code has no counterpart of {', '.join(lost)}")
    return content


def _arguments(config: ModelConfig) -> argparse.Namespace:
    """The command line of the published code, as far as `from_official` reads it."""
    selector = config.selector
    budgets: dict[str, Any] = {}
    if selector is not None:
        budgets = {"min_ratio": selector.min_ratio, "max_ratio": selector.max_ratio}
        budgets = budgets if selector.adaptive else {"rho": [selector.keep_ratio]}
    return argparse.Namespace(
        nheads=config.num_heads,
        num_queries=config.num_queries,
        dropout=config.dropout,
        eff_specific_head=config.class_specific_proposals,
        **budgets,
    )


def _settings(config: ModelConfig) -> dict[str, Any]:
    """What outputs depend on, beside the weights. Averages over padding (`masked_mean`) are not compared."""
    tree = config_to_dict(config)
    options = {k: v for k, v in config.backbone.options.items() if k not in _OPTIONS_OF_SHAPES}
    changes: dict[str, Any] = {
        "backbone": (config.backbone.name.split(".")[0], options),
        "num_norm_groups": config.norm_groups,
        "num_decoder_points": config.num_decoder_points or config.num_points,
    }
    if config.selector is not None:
        changes["selector"] = {**tree["selector"], "masked_mean": None}
    return {**tree, **changes, "num_classes": None}


# --------------------------------------------------------------------------------------------------- names of tensors
# (own name, published name); {} matches the same part of both names. The first match applies.
_NAMES = (
    ("backbone.body.layers_{}.{}", "backbone.0.body.layers.{}.{}"),  # Swin
    ("backbone.body.{}", "backbone.0.body.{}"),
    ("input_proj.{}", "input_proj.{}"),
    ("level_embed", "transformer.level_embed"),
    ("query_embed.{}", "query_embed.{}"),
    ("reference_points.{}", "transformer.reference_points.{}"),
    ("encoder.layers.{}.attention.{}", "transformer.encoder.layers.{}.self_attn.{}"),
    ("encoder.layers.{}.attention_norm.{}", "transformer.encoder.layers.{}.norm1.{}"),
    ("encoder.layers.{}.feedforward.norm.{}", "transformer.encoder.layers.{}.norm2.{}"),
    ("encoder.layers.{}.feedforward.{}", "transformer.encoder.layers.{}.{}"),
    ("decoder.layers.{}.self_attention.{}", "transformer.decoder.layers.{}.self_attn.{}"),
    ("decoder.layers.{}.self_norm.{}", "transformer.decoder.layers.{}.norm2.{}"),
    ("decoder.layers.{}.cross_attention.{}", "transformer.decoder.layers.{}.cross_attn.{}"),
    ("decoder.layers.{}.cross_norm.{}", "transformer.decoder.layers.{}.norm1.{}"),
    ("decoder.layers.{}.feedforward.norm.{}", "transformer.decoder.layers.{}.norm3.{}"),
    ("decoder.layers.{}.feedforward.{}", "transformer.decoder.layers.{}.{}"),
    ("selector.embed.{}", "{selector}.layer1.{}"),
    ("selector.score.{}", "{selector}.layer2.{}"),
    ("selector.budget.{}", "{selector}.rate.{}"),
    ("proposal_proj.{}", "transformer.enc_output.{}"),
    ("proposal_norm.{}", "transformer.enc_output_norm.{}"),
    ("query_proj.{}", "transformer.pos_trans.{}"),
    ("query_norm.{}", "transformer.pos_trans_norm.{}"),
    ("adaption.{}", "adaption_layer.{}"),
)
_SELECTOR = {True: "transformer.enc_mask_predictor", False: "transformer.encoder.enc_mask_predicotor.0"}
# Swin: patch merging is at the end of a stage in the published code, and at the start of the next stage in timm.
_PATCH_MERGING = re.compile(r"backbone\.body\.layers_(\d+)\.downsample\.(.+)")
_OUTPUT_NORM = re.compile(r"backbone\.output_norms\.(\d+)\.(.+)")
_HEAD = re.compile(r"(decoder_heads|proposal_head|encoder_heads)(?:\.(\d+))?\.(classify|box)\.(.+)")


def official_names(model: Detr) -> dict[str, str]:
    """Mapping of published names to names of this package, for all tensors of a model.

    Published state dicts contain some tensors under several names (heads that decoder and encoder share). The first
    published name of each tensor is the shortest.
    """
    return {official: name for name in model.state_dict() for official in _official(name, model)}


def _official(name: str, model: Detr) -> list[str]:
    head = _HEAD.fullmatch(name)
    if head:
        return _official_head(head, model)
    merging = _PATCH_MERGING.fullmatch(name)
    if merging:
        return [f"backbone.0.body.layers.{int(merging[1]) - 1}.downsample.{merging[2]}"]
    norm = _OUTPUT_NORM.fullmatch(name)
    if norm:
        return [f"backbone.0.body.norm{int(norm[1]) + 1}.{norm[2]}"]
    for ours, official in _NAMES:
        match = re.fullmatch(re.escape(ours).replace(r"\{\}", "(.+?)"), name)
        if match:
            template = official.replace("{selector}", _SELECTOR[model.select_by_proposals])
            return [template.format(*match.groups())]
    raise ValueError(f"parameter {name!r} has no published name")


def _official_head(match: re.Match[str], model: Detr) -> list[str]:
    """Published names of a head. All heads have one numbering: decoder layers, proposals, encoder layers."""
    group, index, kind, rest = match.groups()
    num_decoder_layers = len(model.decoder.layers)
    leaf = f"class_embed.{{}}.{rest}" if kind == "classify" else f"bbox_embed.{{}}.layers.{rest}"
    if group == "decoder_heads":
        shared = len(model.decoder_heads) == 1
        numbers = list(range(num_decoder_layers)) if shared else [int(index)]
    elif group == "proposal_head":
        numbers = [num_decoder_layers]
    else:
        numbers = [num_decoder_layers + _is_two_stage(model) + int(index)]
    names = [leaf.format(number) for number in numbers]
    if _is_two_stage(model) or (model.decoder.box_refine and kind == "box"):
        names += [f"transformer.decoder.{leaf.format(number)}" for number in numbers]
    if group == "encoder_heads":
        names.append(f"transformer.encoder.{leaf.format(int(index))}")
    return names


def _is_two_stage(model: Detr) -> bool:
    return isinstance(model.proposal_head, nn.Module)
