"""One file that holds everything a run needs to go on, or a user needs to detect objects. Written whole or not at all.

A checkpoint is a dictionary of tensors and plain values (`torch.load(..., weights_only=True)` reads it): `model`,
`config`, `num_classes` (rows of the heads), `classes` (what the rows mean), `num_processes` and `teacher_weights` (what
else it was trained with), `epoch` (completed ones), `epoch_step` (of the next), `step`, `train_seconds`, `best_ap`,
`skipped_steps`, `finished`; then either `optimizer`, `rng` (one state for each process), `average` (of the weights) and
`difficulty` (of the images) where they are kept; or `metrics`. A .safetensors file holds the same but for the optimiser
and what comes with it, plain values as JSON in its metadata. Files of the published code are read too.

A model to give away is a folder: `model.safetensors`, which any safetensors reader opens, and `config.json`, which
people read; together the same as a .safetensors file of ours.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ats_detr.config import Config, ConfigError, apply_override, config_from_dict
from ats_detr.convert import ALLOWED_TYPES, from_official, is_official
from ats_detr.errors import UserError
from ats_detr.model import Detr, build_model

logger = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
_OLD_TORCH_SAVE = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
"""How the files of torch.save begin: since and before its version 1.6."""
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
    SafetensorError,
)
"""What the readers raise on damaged files."""
FINISHED = "final.pt"
"""In the folder of a training: the weights at the end. Its existence says that the training is finished."""
_METADATA = "ats_detr"
"""Key of our entry in the metadata of a .safetensors file."""
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth")
"""Of a checkpoint in one file; a model of another name is a folder."""
MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = "model.safetensors"
_TO_GO_ON = ("optimizer", "rng", "average", "difficulty")
"""Keys of what only the run itself needs."""
_KEYS = ("model", "config", "num_classes", "classes", "epoch", "finished")


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path, *, previous: Path | None = None) -> None:
    """Write to a temporary file beside `path`, then rename: whatever happens, `path` is the old file or the new one.

    The file that `path` was becomes `previous`, if that is given: a crash between the two renames leaves it alone.
    The suffix .safetensors chooses that format. Raises UserError where the file cannot be written (no space, no
    permission); the old file stays whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if path.suffix == ".safetensors":
                file.write(_as_safetensors(checkpoint))
            else:
                torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as either
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) else _first_line(error)
        kept = "the checkpoint before it is whole" if path.exists() else "nothing was written"
        raise UserError(f"{path}: cannot write this checkpoint ({reason}); {kept}") from error


def _flush_folder(folder: Path) -> None:
    """The renames reach the disk, not only the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_folder(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a model's folder. `config.json` comes last: where it lies, the weights beside it are whole.

    Raises UserError where it cannot be written.
    """
    others = {key: value for key, value in checkpoint.items() if key not in ("model", *_TO_GO_ON)}
    (folder / MODEL_CONFIG).unlink(missing_ok=True)
    save_checkpoint({"model": checkpoint["model"]}, folder / _MODEL_WEIGHTS)
    try:
        write_json(others, folder / MODEL_CONFIG)
    except OSError as error:
        raise UserError(f"{folder}: cannot write {MODEL_CONFIG} ({error.strerror})") from error


def make_folder(folder: Path) -> None:
    """Make a folder for results, with those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make this folder ({error.strerror}); choose another one"
        ) from error


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _as_safetensors(checkpoint: Mapping[str, Any]) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint["model"].items()}
    others = {key: value for key, value in checkpoint.items() if key not in ("model", *_TO_GO_ON)}
    return safetensors.torch.save(tensors, metadata={_METADATA: json.dumps(others)})


def load_checkpoint(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours, or of the published code, onto the CPU.

    `verify` compares the checksums of a torch.save file first, which reading it does not: a crash may leave zeros.

    Raises UserError when there is none, when it is neither, or when it holds what could execute code.
    """
    if verify:
        _verify(Path(path))
    checkpoint = read_file(path)
    if is_official(checkpoint):
        checkpoint = from_official(checkpoint, source=str(path))
        for note in checkpoint["notes"]:
            logger.info("%s: %s", path, note)
    missing = [key for key in _KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of ats_detr (it has no {missing[0]!r})")
    return checkpoint


def _verify(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: a damaged checkpoint ({_first_line(error)})") from error
    if damaged is not None:
        raise UserError(f"{path}: a damaged checkpoint (the checksum of {damaged} is wrong)")


def read_file(path: str | Path) -> Any:
    """What a file of torch.save, a .safetensors file of ours or a model's folder holds, on the CPU.

    Pickles are read by torch's weights-only unpickler: tensors, plain values and argparse.Namespace. Anything else is
    refused before it is made, so that a hostile file executes nothing. Raises UserError.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.suffix == ".safetensors":
            return _from_safetensors(path)
        with path.open("rb") as file:
            beginning = file.read(len(_OLD_TORCH_SAVE))
        if not beginning.startswith(_ZIP) and beginning != _OLD_TORCH_SAVE:
            raise UserError(f"{path}: not a checkpoint (torch.save did not write it)")
        with torch.serialization.safe_globals(ALLOWED_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read this checkpoint ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            reason = f"it holds {forbidden[1]}, which a checkpoint may not hold; nothing of it was executed"
            raise UserError(f"{path}: refused ({reason})") from error
        raise UserError(f"{path}: not a checkpoint, or a damaged one (its pickle is unreadable)") from error
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({_first_line(error)})") from error


def _from_folder(folder: Path) -> dict[str, Any]:
    if not (folder / MODEL_CONFIG).is_file():
        raise UserError(f"{folder}: not a model's folder, it has no {MODEL_CONFIG}")
    others = json.loads((folder / MODEL_CONFIG).read_bytes())
    if not isinstance(others, dict):
        raise UserError(f"{folder / MODEL_CONFIG}: not the configuration of a model")
    return {**_from_safetensors(folder / _MODEL_WEIGHTS), **others}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _from_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    return {"model": tensors, **json.loads(metadata.get(_METADATA, "{}"))}


def config_of(checkpoint: Mapping[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a checkpoint was trained with, after `a.b=c` overrides."""
    tree = copy.deepcopy(checkpoint["config"])
    for override in overrides:
        apply_override(tree, override)
    try:
        return config_from_dict(tree)
    except ConfigError as error:
        raise UserError(f"{path}: the configuration stored in this checkpoint: {error}") from error


def resolve_checkpoint(source: str | Path) -> Path:
    """The checkpoint that a file, a model's or run's folder, or the name of a run means. Raises UserError."""
    path = Path(source)
    if path.is_file():
        return path
    for folder in (path, Path("runs") / path):
        if (folder / MODEL_CONFIG).is_file():
            return folder
        for candidate in (folder / "student" / FINISHED, folder / FINISHED):
            if candidate.is_file():
                return candidate
    raise UserError(
        f"{source}: no checkpoint; give a file, a folder with config.json and model.safetensors, or a finished run"
        f" (its folder, or its name under runs/)"
    )


def load_model(path: str | Path) -> tuple[Detr, dict[str, Any]]:
    """The detector of a checkpoint, with its weights, in evaluation mode; and the checkpoint."""
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, path)
    return load_detector(config, checkpoint, path), checkpoint


def load_detector(config: Config, checkpoint: Mapping[str, Any], path: str | Path) -> Detr:
    """The detector that `config` describes with the weights of a checkpoint, in evaluation mode.

    Two settings follow the checkpoint, whatever `config` says: there is no adaption layer where it has none (inference
    does not use it), and weights of the published code average over padding, as they were trained to.
    """
    _check_same_reading(config, checkpoint, path)
    changes: dict[str, Any] = {}
    if not any(name.startswith("adaption.") for name in checkpoint["model"]):
        changes["adaption"] = False
    if checkpoint.get("published") and config.model.selector is not None:
        changes["selector"] = dataclasses.replace(config.model.selector, masked_mean=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    model = build_without_fetching(config, checkpoint["num_classes"])
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def _check_same_reading(config: Config, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse weights of equal names and shapes that were trained to be read otherwise."""
    own, stored = config.model, config_of(checkpoint, path).model
    pairs: list[tuple[str, Any, Any]] = [("num_heads", own.num_heads, stored.num_heads)]
    if own.selector is not None and stored.selector is not None:
        pairs.append(("selector.scores", own.selector.scores, stored.selector.scores))
    for key, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"{path}: a checkpoint of another architecture, model.{key} is {theirs!r} there and {ours!r} here"
            )


def build_without_fetching(config: Config, num_classes: int) -> Detr:
    """The model with random weights everywhere: they are about to be replaced."""
    backbone = dataclasses.replace(config.model.backbone, pretrained=False)
    return build_model(dataclasses.replace(config.model, backbone=backbone), num_classes)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state of exactly this architecture. Raises UserError naming what differs."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    parts = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in (
            (missing, "tensors missing"),
            (unknown, "unknown"),
            (reshaped, "of another shape"),
        )
        if names
    ]
    if parts:
        raise UserError(f"{path}: a checkpoint of another architecture ({'; '.join(parts)})")
    model.load_state_dict(dict(state))
