"""Names of the published checkpoints (Deformable DETR, Sparse DETR, ATS-DETR) and ours, in one table."""

from __future__ import annotations

import re

from torch import nn

from ats_detr.model import Detr

# (ours, published); {} stands for the same piece of a name on both sides. First match wins.
_TABLE = (
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
# Swin: the published code keeps the merging of patches at the end of a stage, timm at the start of the next one.
_PATCH_MERGING = re.compile(r"backbone\.body\.layers_(\d+)\.downsample\.(.+)")
_OUTPUT_NORM = re.compile(r"backbone\.output_norms\.(\d+)\.(.+)")
_HEAD = re.compile(r"(decoder_heads|proposal_head|encoder_heads)(?:\.(\d+))?\.(classify|box)\.(.+)")


def official_names(model: Detr) -> dict[str, str]:
    """Every name under which the published code stores a tensor of this model -> our name of it.

    The published state dicts hold some tensors under several names (heads that the decoder and the encoder refer to);
    for each of our names the first one listed here is the shortest.
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
    for ours, official in _TABLE:
        match = re.fullmatch(re.escape(ours).replace(r"\{\}", "(.+?)"), name)
        if match:
            template = official.replace("{selector}", _SELECTOR[model.select_by_proposals])
            return [template.format(*match.groups())]
    raise ValueError(f"parameter {name!r} has no published name")


def _official_head(match: re.Match[str], model: Detr) -> list[str]:
    """The published code numbers all heads in one list: decoder layers, then the proposals', then the encoder's."""
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
