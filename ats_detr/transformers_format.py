"""Deformable DETR of Hugging Face transformers: its folders and files as checkpoints of this package, and back.

The architecture comes from `config.json`, never from the names of the tensors: those of several kinds are the same. The
names of the Hub (transformers 4 and files of 5) and of the modules of transformers 5 are read; those of the Hub are
written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats_detr.config import (
    PUBLISHED_NORM_GROUPS,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    config_from_dict,
    config_to_dict,
)
from ats_detr.data.classes import MAX_ROWS, ClassMap
from ats_detr.data.transforms import IMAGE_MEAN, IMAGE_STD
from ats_detr.errors import UserError
from ats_detr.model import Detr, build_model, build_without_fetching
from ats_detr.model.fusion import activation_of, is_norm
from ats_detr.text import first_line, mismatches, run_name

MODEL_TYPE = "deformable_detr"
PREPROCESSOR = "preprocessor_config.json"
_DEFAULTS: dict[str, Any] = {
    **{"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "num_queries": 300, "dropout": 0.1},
    **{"encoder_attention_heads": 8, "encoder_ffn_dim": 1024, "encoder_n_points": 4},
    **{"decoder_attention_heads": 8, "decoder_ffn_dim": 1024, "decoder_n_points": 4},
    **{"num_feature_levels": 4, "two_stage_num_proposals": 300, "two_stage": False, "with_box_refine": False},
    **{"num_labels": 2, "backbone": "resnet50"},
}
"""Of settings that config.json omits."""
_SETTINGS = {
    **{"d_model": "width", "encoder_layers": "num_encoder_layers", "decoder_layers": "num_decoder_layers"},
    **{"encoder_attention_heads": "num_heads", "encoder_ffn_dim": "feedforward_width"},
    **{"encoder_n_points": "num_points", "num_feature_levels": "num_levels", "dropout": "dropout"},
    **{"two_stage": "two_stage", "with_box_refine": "box_refine"},
}
"""Names in config.json, and in `ModelConfig`, of settings of equal values."""
_PREPROCESSING: dict[str, Any] = {
    **{"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2, "rescale_factor": 1 / 255},
    **{"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)},
}
"""The preprocessing of this package, and transformers' default. `resample` 2 is bilinear."""
_WITHOUT_EFFECT = ("do_pad", "do_convert_rgb", "do_convert_annotations")
"""Steps that do not change a single image."""
_NORM_EPS = 1e-5
_PROCESSORS = re.compile(r"(Deformable|Conditional)?Detr(ImageProcessor|FeatureExtractor)(Fast|Pil)?")
_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
_OUT_INDICES = [2, 3, 4]
_OUTPUTS: dict[str, tuple[Any, ...]] = {
    **{"out_indices": (_OUT_INDICES, [-3, -2, -1]), "output_stride": (32,)},
    **{"in_chans": (3,), "features_only": (True,)},
}
"""Allowed values of settings of a backbone: its feature maps have the strides 8, 16 and 32."""
_BACKBONE = "model.backbone.conv_encoder.model."
# (own name, name on the Hub); {} matches the same part of both names. The first match applies.
_NAMES = (
    ("backbone.body.{}", _BACKBONE + "{}"),
    ("input_proj.{}", "model.input_proj.{}"),
    ("level_embed", "model.level_embed"),
    ("query_embed.{}", "model.query_position_embeddings.{}"),
    ("reference_points.{}", "model.reference_points.{}"),
    ("encoder.layers.{}.attention.{}", "model.encoder.layers.{}.self_attn.{}"),
    ("encoder.layers.{}.attention_norm.{}", "model.encoder.layers.{}.self_attn_layer_norm.{}"),
    ("decoder.layers.{}.self_attention.{}", "model.decoder.layers.{}.self_attn.{}"),
    ("decoder.layers.{}.self_norm.{}", "model.decoder.layers.{}.self_attn_layer_norm.{}"),
    ("decoder.layers.{}.cross_attention.{}", "model.decoder.layers.{}.encoder_attn.{}"),
    ("decoder.layers.{}.cross_norm.{}", "model.decoder.layers.{}.encoder_attn_layer_norm.{}"),
    ("{}.feedforward.norm.{}", "model.{}.final_layer_norm.{}"),
    ("{}.feedforward.linear{}", "model.{}.fc{}"),
    ("proposal_proj.{}", "model.enc_output.{}"),
    ("proposal_norm.{}", "model.enc_output_norm.{}"),
    ("query_proj.{}", "model.pos_trans.{}"),
    ("query_norm.{}", "model.pos_trans_norm.{}"),
    ("decoder_heads.{}.classify.{}", "class_embed.{}.{}"),
    ("decoder_heads.{}.box.{}", "bbox_embed.{}.layers.{}"),
)
# (name in transformers 5, name on the Hub)
_MODULE_NAMES = (
    (r"^model\.backbone\.model\.", _BACKBONE),
    (r"\.mlp\.fc", ".fc"),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
# (name in transformers' ResNet, name in timm); {+} is one more than the number.
_RESNET_NAMES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"embedder\.embedder\.convolution\.(.+)", lambda m: f"conv1.{m[1]}"),
    (r"embedder\.embedder\.normalization\.(.+)", lambda m: f"bn1.{m[1]}"),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.(.+)",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.{m[4]}",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.(convolution|normalization)\.(.+)",
        lambda m: (
            f"layer{int(m[1]) + 1}.{m[2]}.{'conv' if m[4] == 'convolution' else 'bn'}{int(m[3]) + 1}.{m[5]}"
        ),
    ),
)
_LAYER = re.compile(r"(?:model\.)?(?:encoder|decoder)\.layers\.\d+\.(?:mlp\.)?fc1\.weight")
_HEAD = re.compile(r"(class|bbox)_embed\.(\d+)\.(.+)")
_RESNETS = {"basic": ("resnet18", "resnet34"), "bottleneck": ("resnet50", "resnet101")}
_DEPTHS = {
    "resnet18": [2, 2, 2, 2],
    "resnet34": [3, 4, 6, 3],
    "resnet50": [3, 4, 6, 3],
    "resnet101": [3, 4, 23, 3],
}
_WIDTHS = [64, 128, 256, 512]


def is_transformers(content: Any) -> bool:
    """Whether the content of a file or a folder is a model of transformers, of any type."""
    has_type = isinstance(content, Mapping) and isinstance(content.get("model_type"), str)
    return has_type or any(map(_LAYER.fullmatch, tensors_of(content)))


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, alone or under the key of a training code, without the prefixes of wrappers.

    Empty for content of another kind.
    """
    if not isinstance(content, Mapping):
        return {}
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    state = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}


# ----------------------------------------------------------------------------------------------- transformers -> own
def from_transformers(content: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A model of transformers in the format of this package, as `load_checkpoint` returns it.

    Args:
        content: tensors (see `tensors_of`) and the entries of config.json; `preprocessor` those of
            preprocessor_config.json, where there is such a file.
        source: name of the file in error messages.

    Raises UserError where the model is not a Deformable DETR for object detection, or has settings that this package
    has not.
    """
    kind = content.get("model_type")
    if kind is None:
        raise UserError(
            f"{source}: a model of transformers, whose settings are in config.json; put that file beside it, or give"
            " the folder"
        )
    if kind != MODEL_TYPE:
        raise UserError(
            f"{source}: model_type = {kind!r} in config.json: of transformers only {MODEL_TYPE} is read"
        )
    try:
        data = _data_config(content.get("preprocessor") or {})
    except ConfigError as error:
        raise UserError(f"{source}: {PREPROCESSOR}: {error}") from error
    about = {**_DEFAULTS, **{key: value for key, value in content.items() if value is not None}}
    try:
        classes = _classes(about)
        config = config_from_dict({"name": run_name(source), "model": _model_config(about), "data": data})
        with torch.device("meta"):
            model = build_model(config.model, classes.num_rows).eval()
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{source}: config.json: {error}") from error
    if reason := _difference_of_backbone(model):
        raise UserError(f"{source}: backbone {config.model.backbone.name}: {reason}")
    return {
        "model": _rename(
            tensors_of(content),
            model.state_dict(),
            config.model,
            source,
            tied=content.get("tie_word_embeddings") is not False,
        ),
        "config": config_to_dict(config),
        "num_classes": classes.num_rows,
        "classes": classes.to_dict(),
        "epoch": 0,
        "step": 0,
        "train_seconds": 0.0,
        "finished": True,
        "converted_from": f"transformers ({kind})",
        "notes": [],
    }


def _model_config(about: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model in the form of a configuration file, whose types and bounds are not checked yet."""
    required = {
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dilation": False,
        "encoder_attention_heads": about["decoder_attention_heads"],
        "encoder_ffn_dim": about["decoder_ffn_dim"],
    }
    for key, value in required.items():
        if about.get(key, value) != value:
            raise ConfigError(key, about[key], f"must be {value!r}: this package has no other")
    for key in ("two_stage", "with_box_refine"):
        if type(about[key]) is not bool:
            raise ConfigError(key, about[key], "must be true or false")
    encoder_points, decoder_points = about["encoder_n_points"], about["decoder_n_points"]
    return {
        "backbone": {"pretrained": False, **_backbone_config(about)},
        **{own: about[key] for key, own in _SETTINGS.items()},
        "num_norm_groups": None if about["d_model"] == 256 else PUBLISHED_NORM_GROUPS,
        "num_decoder_points": None if decoder_points == encoder_points else decoder_points,
        "num_queries": about["two_stage_num_proposals" if about["two_stage"] else "num_queries"],
    }


def _backbone_config(about: Mapping[str, Any]) -> dict[str, Any]:
    nested, options = about.get("backbone_config", {}), about.get("backbone_kwargs", {})
    for section, settings in (("backbone_config", nested), ("backbone_kwargs", options)):
        if not isinstance(settings, Mapping):
            raise ConfigError(section, settings, "must be an object")
        for key, value in settings.items():
            allowed = _OUTPUTS.get(key, (value,) if settings is nested else ())
            if value is not None and value not in allowed:
                fix = f"must be {allowed[0]}" if allowed else "this package has no such option"
                raise ConfigError(f"{section}.{key}", value, fix)
    kind = nested.get("model_type")
    if kind == "resnet":
        return _resnet_config({key: value for key, value in nested.items() if value is not None})
    name = nested.get("backbone") if kind == "timm_backbone" else about.get("backbone")
    if (
        kind not in (None, "timm_backbone")
        or not isinstance(name, str)
        or about.get("use_timm_backbone") is False
    ):
        found = kind or name
        raise ConfigError("backbone", found, "must be a model of timm or a ResNet of transformers")
    return {"name": name}


def _resnet_config(about: Mapping[str, Any]) -> dict[str, Any]:
    """The timm model of transformers' ResNet."""
    kind = about.get("layer_type", "bottleneck")
    required: dict[str, Any] = {
        **{"layer_type": kind if kind in _RESNETS else "basic or bottleneck", "hidden_act": "relu"},
        **{"downsample_in_first_stage": False, "downsample_in_bottleneck": False, "embedding_size": 64},
        "out_features": ["stage2", "stage3", "stage4"],
    }
    for key, value in required.items():
        if about.get(key, value) != value:
            raise ConfigError(
                f"backbone_config.{key}", about[key], f"must be {value!r}: this package has no other"
            )
    expansion = 4 if kind == "bottleneck" else 1
    depths, sizes = about.get("depths", [3, 4, 6, 3]), about.get("hidden_sizes", [256, 512, 1024, 2048])
    for key, value in (("depths", depths), ("hidden_sizes", sizes)):
        if not (isinstance(value, list) and all(type(entry) is int for entry in value)):
            raise ConfigError(f"backbone_config.{key}", value, "must be a list of integers")
    widths = [size // expansion for size in sizes]
    name = next((name for name in _RESNETS[kind] if _DEPTHS[name] == depths), _RESNETS[kind][0])
    options = {} if depths == _DEPTHS[name] else {"layers": depths}
    if widths != _WIDTHS:
        options["channels"] = widths
    return {"name": name, "options": options}


def _classes(about: Mapping[str, Any]) -> ClassMap:
    """Rows and names by `id2label`; `N/A`, of COCO's unused ids, is no class."""
    number = about["num_labels"]
    if type(number) is not int or not 0 < number <= MAX_ROWS:
        raise ConfigError("num_labels", number, f"must be an integer in 1..{MAX_ROWS}")
    labels = about.get("id2label", {i: f"LABEL_{i}" for i in range(number)})  # transformers omits its default
    fix = "must be an object with the keys 0, 1, 2, ... without gaps and the names of the classes"
    try:
        by_row = {int(key): name for key, name in labels.items()}
    except (AttributeError, ValueError):
        raise ConfigError("id2label", labels, fix) from None
    if not by_row or sorted(by_row) != list(range(len(labels))):
        raise ConfigError("id2label", sorted(by_row)[:5], fix)
    if wrong := [name for name in by_row.values() if type(name) not in (str, int)]:
        raise ConfigError("id2label", wrong[0], fix)
    rows = tuple(row for row in sorted(by_row) if by_row[row] != "N/A")
    names = tuple(str(by_row[row]) for row in rows)
    return ClassMap(num_rows=len(by_row), rows=rows, category_ids=rows, names=names)


def _data_config(about: Mapping[str, Any]) -> dict[str, Any]:
    """The size of images by preprocessor_config.json. Raises ConfigError for a step that this package has not."""
    kind = about.get("image_processor_type") or about.get("feature_extractor_type")
    if kind is not None and not (isinstance(kind, str) and _PROCESSORS.fullmatch(kind)):
        raise ConfigError("image_processor_type", kind, "must be DeformableDetrImageProcessor")
    for key, value in about.items():
        own = _PREPROCESSING.get(key)
        if value is None or (own is not None and _is_close(value, own)):
            continue
        has_step = key.startswith("do_") and value is not False and key not in _WITHOUT_EFFECT
        if own is not None or has_step or key in ("pad_size", "crop_size"):
            raise ConfigError(key, value, f"must be {'omitted' if own is None else own}")
    size = _SIZE if about.get("size") is None else about["size"]
    if not isinstance(size, Mapping):  # of old files
        size = {"shortest_edge": size, "longest_edge": about.get("max_size") or _SIZE["longest_edge"]}
    size = {key: side for key, side in size.items() if side is not None}
    if set(size) != set(_SIZE) or not all(type(side) is int and side > 0 for side in size.values()):
        fix = "must have shortest_edge and longest_edge, integers > 0: images keep their aspect ratio"
        raise ConfigError("size", size, fix)
    return {"short_side": size["shortest_edge"], "long_side": size["longest_edge"]}


def _is_close(value: Any, own: Any) -> bool:
    """Whether two numbers, or lists of numbers, agree to six digits."""
    if isinstance(own, list):
        return isinstance(value, list) and len(value) == len(own) and all(map(_is_close, value, own))
    return type(value) in (bool, int, float) and math.isclose(value, own, rel_tol=1e-6)


def _difference_of_backbone(model: Detr) -> str:
    """Why transformers computes other feature maps from the same weights; empty if it does not.

    It replaces each batch norm of timm by an affine map with a fixed epsilon and without the activation that some of
    them include, and reads the maps 2, 3 and 4.
    """
    body: Any = model.backbone.body
    if list(body.feature_info.out_indices) != _OUT_INDICES:
        return "its maps 2, 3 and 4, which transformers reads, do not have the strides 8, 16 and 32"
    for norm in filter(is_norm, body.modules()):
        if not isinstance(activation_of(norm), nn.Identity) or norm.eps != _NORM_EPS:
            return "transformers omits the activations of its norms, or changes their epsilon"
    return ""


def _rename(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], config: ModelConfig, source: str, *, tied: bool
) -> dict[str, Tensor]:
    """The tensors under the names of this package. Names and shapes must match exactly.

    Args:
        tied: heads that are missing are that of the first layer, stored once.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in _MODULE_NAMES:
            name = re.sub(pattern, replacement, name)
        name = (
            name.removeprefix("model.decoder.")
            if _HEAD.fullmatch(name.removeprefix("model.decoder."))
            else name
        )
        if name.startswith(_BACKBONE):
            name = _BACKBONE + _timm_name(name.removeprefix(_BACKBONE))
        copy = found.setdefault(name, tensor)
        if copy is not tensor and not torch.equal(copy, tensor):
            raise UserError(f"{source}: {name} differs from its copy under another name")
    expected = {hub: tensor for name, whole in own.items() for hub, tensor in _to_hub(name, whole, config)}
    if not any(map(_HEAD.fullmatch, found)):
        raise UserError(f"{source}: a model without heads; must be a DeformableDetrForObjectDetection")
    for name, tensor in list(found.items()):
        head = _HEAD.fullmatch(name)
        if head and int(head[2]) and name not in expected and not config.box_refine:
            if not torch.equal(tensor, found.get(f"{head[1]}_embed.0.{head[3]}", tensor)):
                raise UserError(
                    f"{source}: {name} differs from that of layer 0, but with_box_refine is false"
                )
            del found[name]  # one head for all layers
    for name in expected:
        head = _HEAD.fullmatch(name)
        if tied and head and name not in found and f"{head[1]}_embed.0.{head[3]}" in found:
            found[name] = found[f"{head[1]}_embed.0.{head[3]}"].clone()
    if problem := mismatches(expected, found):
        raise UserError(f"{source}: tensors and config.json disagree ({problem})")
    return {
        name: torch.cat([found[hub] for hub, _ in parts]) if len(parts) > 1 else found[parts[0][0]]
        for name, whole in own.items()
        if (parts := list(_to_hub(name, whole, config)))
    } | {name: torch.zeros((), dtype=torch.long) for name in own if name.endswith("num_batches_tracked")}


def _timm_name(name: str) -> str:
    for pattern, replacement in _RESNET_NAMES:
        if match := re.fullmatch(pattern, name):
            return replacement(match)
    return name


def _to_hub(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) on the Hub of a tensor of this package: none, one, or the parts of a fused projection."""
    if name.endswith("num_batches_tracked"):
        return
    name = name.replace("proposal_head.", f"decoder_heads.{config.num_decoder_layers}.")
    for ours, theirs in _NAMES:
        if match := re.fullmatch(re.escape(ours).replace(r"\{\}", "(.+?)"), name):
            hub = theirs.format(*match.groups())
            break
    else:
        raise UserError(f"{name} has no counterpart in transformers' Deformable DETR")
    fused = re.fullmatch(r"(.+)\.in_proj_(weight|bias)", hub)
    if fused is None:
        yield hub, tensor
        return
    for part, piece in zip("qkv", tensor.chunk(3), strict=True):
        yield f"{fused[1]}.{part}_proj.{fused[2]}", piece


# ----------------------------------------------------------------------------------------------- own -> transformers
def to_transformers(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and preprocessor_config.json of a checkpoint of this package.

    Raises UserError where transformers has no such model.
    """
    config = config_from_dict(checkpoint["config"])
    model = config.model
    _check_expressible(config)
    state = {
        hub: part.contiguous().clone()
        for name, tensor in checkpoint["model"].items()
        for hub, part in _to_hub(name, tensor, model)
    }
    for name in [name for name in state if _HEAD.fullmatch(name)]:
        kind, _, rest = _HEAD.fullmatch(name).groups()
        if not model.box_refine:
            for layer in range(1, model.num_decoder_layers):
                state[f"{kind}_embed.{layer}.{rest}"] = state[name].clone()
        if model.two_stage or (model.box_refine and kind == "bbox"):
            state[f"model.decoder.{name}"] = state[name].clone()
    return (
        state,
        _hub_config(config, ClassMap.from_dict(checkpoint["classes"])),
        _hub_preprocessor(config.data),
    )


def _check_expressible(config: Config) -> None:
    model = config.model
    groups, theirs = model.norm_groups, PUBLISHED_NORM_GROUPS
    reasons = {
        f"model.num_norm_groups = {groups}, which is {theirs} there": groups != theirs,
        "model.selector": model.selector is not None,
        "model.queries_from_memory": model.queries_from_memory,
        "model.class_specific_proposals": model.class_specific_proposals,
        "model.backbone.options": bool(model.backbone.options),
        "model.two_stage without model.box_refine": model.two_stage and not model.box_refine,
    }
    if found := [key for key, holds in reasons.items() if holds]:
        raise UserError(f"transformers' Deformable DETR has no counterpart of {', '.join(found)}")
    with torch.device("meta"):
        whole = build_without_fetching(config, 1).eval()
    if reason := _difference_of_backbone(whole):
        raise UserError(f"model.backbone.name = {model.backbone.name}: {reason}")


def _hub_config(config: Config, classes: ClassMap) -> dict[str, Any]:
    model = config.model
    labels = {str(row): "N/A" for row in range(classes.num_rows)}
    labels |= {str(row): name for row, name in zip(classes.rows, classes.names, strict=True)}
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": MODEL_TYPE,
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dilation": False,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "backbone": model.backbone.name,
        "backbone_config": None,
        **{key: getattr(model, own) for key, own in _SETTINGS.items()},
        "decoder_attention_heads": model.num_heads,
        "decoder_ffn_dim": model.feedforward_width,
        "decoder_n_points": model.num_decoder_points or model.num_points,
        "num_queries": model.num_queries,
        "two_stage_num_proposals": model.num_queries,
        "tie_word_embeddings": not model.box_refine,
        "id2label": labels,
        "label2id": {name: int(row) for row, name in labels.items() if name != "N/A"},
    }


def _hub_preprocessor(data: DataConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "DeformableDetrImageProcessor",
        "size": {"shortest_edge": data.short_side, "longest_edge": data.long_side},
        "do_pad": True,
        **_PREPROCESSING,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file does not exist. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content
