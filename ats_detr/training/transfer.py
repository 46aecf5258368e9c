"""Initial weights from another model (`train.init_from`): tensors that fit are copied, class heads class by class.

Unlike resuming, which is strict (`checkpoint.load_weights`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ats_detr.checkpoint import interpret, is_checkpoint, read_file, resolve_checkpoint
from ats_detr.data.coco import ClassMap
from ats_detr.errors import UserError
from ats_detr.model import Detr
from ats_detr.model.backbone import load_weights as load_backbone_weights

_CLASS_HEAD = re.compile(r"(?P<group>decoder_heads|proposal_head|encoder_heads)\b.*\.classify\.(weight|bias)")


@dataclass
class Transfer:
    """The result of a transfer: names of tensors."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Copied."""
    remade: list[str] = field(default_factory=list)
    """Tensors of the model without a counterpart of equal shape in the source. They keep their initial values, except
    for the rows of `copied_classes`."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the source without a counterpart of equal shape in the model."""
    copied_classes: list[str] = field(default_factory=list)
    """Classes of both models, whose rows were copied in re-made heads."""
    num_copied: int = 0
    """Numbers in the copied tensors ..."""
    num_all: int = 0
    """... and in all tensors of the model."""

    @property
    def lacks_backbone(self) -> bool:
        """Whether some weights or statistics of the backbone keep their initial values."""
        own = (name for name in self.remade if not name.endswith("num_batches_tracked"))
        return any(name.startswith("backbone.body.") for name in own)

    def table(self) -> Table:
        """Numbers of loaded, re-made and unused tensors of each part of the model."""
        table = Table(title=f"initial weights from {self.source}")
        table.add_column("part")
        counts = {
            title: Counter(map(_part, getattr(self, title))) for title in ("loaded", "remade", "unused")
        }
        for title in ("loaded", "re-made", "unused"):
            table.add_column(title, justify="right")
        for part in dict.fromkeys(part for counter in counts.values() for part in counter):
            table.add_row(part, *(str(counter[part] or "") for counter in counts.values()))
        table.add_section()
        table.add_row("all", *(str(counter.total()) for counter in counts.values()))
        share = self.num_copied / max(1, self.num_all)
        table.add_row("share of the model's weights", f"{share:.1%}", f"{1 - share:.1%}", "")
        if any(_CLASS_HEAD.fullmatch(name) for name in self.remade):
            names = ", ".join(self.copied_classes[:10]) + (", ..." if len(self.copied_classes) > 10 else "")
            table.caption = f"classes copied by name: {len(self.copied_classes)}" + (
                f" ({names})" if names else ""
            )
        return table


@torch.no_grad()
def transfer_weights(model: Detr, class_map: ClassMap, path: str | Path) -> Transfer:
    """Copy the weights of a checkpoint of any format, or of a backbone, into `model`, as far as they fit.

    Tensors of equal name and shape are copied. Class heads are copied where both models have equal classes in equal
    order; otherwise they keep their initial values except for the rows of classes with equal names. Raises UserError
    where no tensor fits.
    """
    path = resolve_checkpoint(path)
    content = read_file(path)
    if not is_checkpoint(content):
        return _transfer_backbone(model, content, path)
    checkpoint = interpret(content, path)
    state: Mapping[str, Tensor] = checkpoint["model"]
    source_map = ClassMap.from_dict(checkpoint["classes"])
    same_classes = source_map.num_rows == class_map.num_rows and _rows(source_map) == _rows(class_map)
    shared = [name for name in class_map.names if name in _rows(source_map)]
    ours, theirs = ([_rows(classes)[name] for name in shared] for classes in (class_map, source_map))
    result = Transfer(str(path), num_all=_size(model))
    for name, tensor in model.state_dict().items():
        source = state.get(name)
        head = _CLASS_HEAD.fullmatch(name)
        if source is not None and source.shape == tensor.shape and (same_classes or head is None):
            tensor.copy_(source)
            result.loaded.append(name)
            result.num_copied += tensor.numel()
            continue
        result.remade.append(name)
        if source is None or head is None or source.shape[1:] != tensor.shape[1:]:
            continue
        if head["group"] == "proposal_head" and not model.class_specific_proposals:
            tensor[0] = source[0]  # class 0 stands for any object
        else:
            tensor[ours] = source[theirs].to(tensor.dtype)
            result.copied_classes = shared
    result.unused = [name for name in state if name not in set(result.loaded) | set(result.remade)]
    result.unused += [name for name in result.remade if name in state and not _CLASS_HEAD.fullmatch(name)]
    if not result.loaded:
        raise UserError(f"{path}: no tensor of this checkpoint fits the model by name and shape")
    return result


def _transfer_backbone(model: Detr, content: Any, path: str | Path) -> Transfer:
    """Copy the weights of a file that holds a backbone only."""
    try:
        load_backbone_weights(model.backbone, content, str(path))
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: not a detector of this package, of the published code or of transformers, and no weights of this"
            f" backbone ({reason})"
        ) from None
    counted = {f"backbone.body.{name}" for name in model.backbone.body.state_dict()}
    names = list(model.state_dict())
    return Transfer(
        str(path),
        loaded=[name for name in names if name in counted],
        remade=[name for name in names if name not in counted],
        num_copied=_size(model.backbone.body),
        num_all=_size(model),
    )


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _rows(class_map: ClassMap) -> dict[str, int]:
    return dict(zip(class_map.names, class_map.rows, strict=True))


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to, a row of the table."""
    if _CLASS_HEAD.fullmatch(name):
        return f"{name.split('.')[0]}, classes"
    return name.split(".")[0]
