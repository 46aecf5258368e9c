"""Checkpoints: reading, writing and checking them. Files are replaced atomically.

A checkpoint is a dictionary of tensors and plain values, readable with `torch.load(..., weights_only=True)`: `model`,
`config`, `num_classes`, `classes` (names and category ids by class index), `training_images` (number and digest),
`num_processes`, `teacher_weights` (digests), `epoch` (completed), `epoch_step` (completed steps of the next epoch),
`step`, `train_seconds`, `best_ap`, `skipped_steps`, `is_evaluated`, `finished`. A resumable checkpoint adds
`optimizer`, `rng` (one state per process) and, where they exist, `average` (of the weights) and `difficulty` (of the
images); a finished one adds `metrics`, and a calibrated one `budget_calibration`. A .safetensors file has the same
content without the state of the training, with plain values as JSON in its metadata. Checkpoints of the published code
are converted on reading.

A model folder has the content of a .safetensors file in two: `model.safetensors`, for any safetensors reader, and
`config.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
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
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ats_detr.budgets import CALIBRATION, Calibration
from ats_detr.config import Config, ConfigError, apply_override, config_from_dict, config_to_dict
from ats_detr.convert import ALLOWED_TYPES, from_official, is_official
from ats_detr.data.classes import ClassMap
from ats_detr.errors import UserError
from ats_detr.files import make_folder, replaced_file
from ats_detr.model import Detr, build_without_fetching
from ats_detr.remote import PUBLISHED, fetch, is_remote
from ats_detr.text import first_line, mismatches
from ats_detr.transformers_format import (
    PREPROCESSOR,
    from_transformers,
    is_transformers,
    read_json,
    tensors_of,
    to_transformers,
)

logger = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
_OLD_TORCH_SAVE = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
"""First bytes of torch.save files, since and before torch 1.6."""
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
    b"<": "a web page; download the file itself",
    b"{": "a JSON file; give the folder that holds it",
    b"": "neither written by torch.save nor a .safetensors file",
}
"""What files with other first bytes are."""
_TORCHSCRIPT = "/constants.pkl"
"""Suffix of a name in the archive of a TorchScript program, which holds code."""
_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, MemoryError, OverflowError),
    *(struct.error, SafetensorError, zipfile.BadZipFile),
)
"""Exceptions of the readers on damaged files."""
FINISHED = "final.pt"
"""In the folder of a training: the final weights. It exists only once the training is finished."""
_METADATA = "ats_detr"
"""Key of the plain values in the metadata of a .safetensors file."""
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth")
"""Suffixes of checkpoint files; a path with another suffix is a model folder."""
MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = "model.safetensors"
_TRAINING_STATE = ("optimizer", "rng", "average", "difficulty")
"""Keys that only resuming needs."""
_TYPES: dict[str, Any] = {
    **{"model": Mapping, "config": dict, "num_classes": int, "classes": dict, "epoch": int, "finished": bool},
    **{"train_seconds": (int, float), "metrics": (dict, type(None)), "published": bool},
    CALIBRATION: dict,
}
_KEYS = ("model", "config", "num_classes", "classes", "epoch", "finished")
"""Required keys of a checkpoint, of these types."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path, *, previous: Path | None = None) -> None:
    """Write a checkpoint atomically; see `replaced_file`.

    Args:
        path: a suffix of .safetensors selects that format.
        previous: new name of the file that `path` replaces. A crash between the two renames leaves only `previous`.

    Raises UserError where the file cannot be written (no space, no permission); the old file is not changed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path, previous=previous) as file:
            if path.suffix == ".safetensors":
                file.write(_as_safetensors(checkpoint))
            else:
                torch.save(dict(checkpoint), file)
    except (OSError, RuntimeError) as error:  # torch raises either on a failed write
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        kept = "the previous checkpoint is intact" if path.exists() else "nothing was written"
        raise UserError(f"{path}: cannot write this checkpoint ({reason}); {kept}") from error


def add_to_checkpoint(facts: Mapping[str, Any], path: Path) -> None:
    """Add plain values to a checkpoint of this package, atomically; the file of the weights of a folder is not touched.

    Raises UserError where it is in another format, or cannot be written; it is not changed then.
    """
    if path.name == _MODEL_WEIGHTS and (path.parent / MODEL_CONFIG).exists():
        path = path.parent
    content = read_own_file(path)
    if not path.is_dir():
        save_checkpoint({**content, **facts}, path)
        return
    try:
        others = {key: value for key, value in content.items() if key != "model"}
        write_json({**others, **facts}, path / MODEL_CONFIG)
    except OSError as error:
        raise UserError(f"{path}: cannot write {MODEL_CONFIG} ({error.strerror})") from error


def read_own_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this package. Raises UserError, also for one in another format."""
    content = read_file(path)
    if not isinstance(content, dict) or any(key not in content for key in _KEYS):
        raise UserError(
            f"{path}: not in the format of this package; convert it first: ats-detr convert {path} FOLDER"
        )
    return content


def save_folder(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a model folder. `config.json` is written last: where it exists, the weights beside it are complete.

    Raises UserError where the folder cannot be written.
    """
    others = {key: value for key, value in checkpoint.items() if key not in ("model", *_TRAINING_STATE)}
    make_folder(folder)
    try:
        (folder / MODEL_CONFIG).unlink(missing_ok=True)
        save_checkpoint({"model": checkpoint["model"]}, folder / _MODEL_WEIGHTS)
        write_json(others, folder / MODEL_CONFIG)
    except OSError as error:
        raise UserError(f"{folder}: cannot write {MODEL_CONFIG} ({error.strerror})") from error


def save_transformers(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a folder that `DeformableDetrForObjectDetection.from_pretrained` reads. Raises UserError."""
    state, config, preprocessor = to_transformers(checkpoint)
    make_folder(folder)
    try:
        (folder / MODEL_CONFIG).unlink(missing_ok=True)
        with replaced_file(folder / _MODEL_WEIGHTS) as file:
            file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
        write_json(preprocessor, folder / PREPROCESSOR)
        write_json(config, folder / MODEL_CONFIG)
    except OSError as error:
        raise UserError(f"{folder}: cannot write this folder ({error.strerror})") from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    with replaced_file(path) as file:
        file.write(text.encode())


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    with replaced_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _as_safetensors(checkpoint: Mapping[str, Any]) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint["model"].items()}
    others = {key: value for key, value in checkpoint.items() if key not in ("model", *_TRAINING_STATE)}
    return safetensors.torch.save(tensors, metadata={_METADATA: json.dumps(others)})


def load_checkpoint(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this package, of the published code or of transformers' Deformable DETR, onto the CPU.

    Args:
        verify: check the checksums of a torch.save file first, which torch.load does not; a crash may leave zeros.

    Raises UserError where the file is missing, is not a checkpoint, or holds objects that could execute code.
    """
    if verify:
        _verify(Path(path))
    return interpret(read_file(path), path)


def is_checkpoint(content: Any) -> bool:
    """Whether the content of a file is meant to be a detector, in one of the formats of `load_checkpoint`."""
    has_keys = isinstance(content, dict) and all(key in content for key in _KEYS)
    return has_keys or is_official(content) or is_transformers(content)


def interpret(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """The content of a file, as `read_file` returns it, as a checkpoint of this package. Raises UserError."""
    if is_transformers(checkpoint):
        beside = Path(path) if Path(path).is_dir() else Path(path).parent
        settings = {**read_json(beside / MODEL_CONFIG), "preprocessor": read_json(beside / PREPROCESSOR)}
        checkpoint = from_transformers({**settings, **checkpoint}, source=str(path))
    elif is_official(checkpoint):
        checkpoint = from_official(checkpoint, source=str(path))
        for note in checkpoint["notes"]:
            logger.info("%s: %s", path, note)
    _check_content(checkpoint, path)
    return checkpoint


def _check_content(checkpoint: Any, path: str | Path) -> None:
    """Raise UserError unless a file has the entries of a checkpoint, of the types that its readers assume.

    A file of unknown origin must not exhaust memory: a tensor that repeats its elements by its strides is larger than
    its share of the file.
    """
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in _KEYS):
        raise UserError(
            f"{path}: not a checkpoint of this package, of the published code or of transformers' Deformable DETR, but"
            f" {_description(checkpoint)}"
        )
    wrong = [key for key in _TYPES if key in checkpoint and not isinstance(checkpoint[key], _TYPES[key])]
    state = checkpoint["model"]
    if not wrong:
        wrong = [f"model.{str(name)[:100]}" for name, value in state.items() if not _is_plain(name, value)]
    if wrong:
        raise UserError(f"{path}: not a checkpoint of this package: invalid content under {wrong[0]!r}")
    if (name := not_finite(state)) is not None:
        raise UserError(
            f"{path}: model.{name} holds values that are not finite, so its training diverged; use another checkpoint"
        )
    try:
        classes = ClassMap.from_dict(checkpoint["classes"])
    except UserError as error:
        raise UserError(f"{path}: invalid classes: {error}") from None
    try:
        Calibration.of(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if classes.num_rows != checkpoint["num_classes"]:
        raise UserError(
            f"{path}: num_classes = {checkpoint['num_classes']}: must be {classes.num_rows}, as in classes"
        )


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN, infinity or, in float64, a number beyond float32; None if none does."""
    return next((name for name, value in state.items() if not value.float().isfinite().all()), None)


def _is_plain(name: Any, value: Any) -> bool:
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        return False
    is_dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return is_dense and not value.is_complex() and value.nbytes <= value.untyped_storage().nbytes()


def _description(content: Any) -> str:
    """What a file contains, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [repr(str(key)[:40]) for key in content]
    return f"a dictionary with {len(keys)} keys: {', '.join(keys[:5])}{', ...' * (len(keys) > 5)}"


def _verify(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: a damaged checkpoint ({first_line(error)})") from error
    if damaged is not None:
        raise UserError(f"{path}: a damaged checkpoint (the checksum of {damaged} is wrong)")


def read_file(path: str | Path) -> Any:
    """The content of a torch.save file, a .safetensors file or a model folder, on the CPU.

    Pickles are read by torch's weights-only unpickler: tensors, plain values and argparse.Namespace. All other types
    are rejected before an object is made, so a hostile file executes nothing. Raises UserError.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.exists() and not path.is_file():  # a FIFO or a device could block forever
            raise UserError(f"{path}: not a checkpoint (not a regular file)")
        with path.open("rb") as file:
            beginning = file.read(32)
        if beginning[8:9] == b"{":  # after the length of the header
            content = _from_safetensors(path)
            if path.name == _MODEL_WEIGHTS and len(content) == 1:  # of a model folder
                content |= read_json(path.with_name(MODEL_CONFIG))
            return content
        if beginning.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
                is_program = any(name.endswith(_TORCHSCRIPT) for name in archive.namelist())
            if size > path.stat().st_size:  # torch.save does not compress
                raise UserError(f"{path}: rejected (compressed data, {size} bytes when unpacked)")
            if is_program:
                raise UserError(f"{path}: rejected (a TorchScript program, not weights)")
        elif not beginning.startswith(_OLD_TORCH_SAVE):
            kind = next(text for start, text in _NOT_WEIGHTS.items() if beginning.startswith(start))
            raise UserError(f"{path}: not a checkpoint ({kind})")
        with path.open("rb") as file, torch.serialization.safe_globals(ALLOWED_TYPES):
            return torch.load(
                file, map_location="cpu", weights_only=True
            )  # of a path it would read the suffix
    except OSError as error:
        raise UserError(f"{path}: cannot read this checkpoint ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            reason = f"it holds {forbidden[1]}, which is not allowed in a checkpoint; nothing was executed"
            raise UserError(f"{path}: rejected ({reason})") from error
        raise UserError(f"{path}: not a checkpoint, or a damaged one (its pickle is unreadable)") from error
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({first_line(error)})") from error


def _from_folder(folder: Path) -> dict[str, Any]:
    if not (folder / MODEL_CONFIG).is_file():
        raise UserError(f"{folder}: not a model folder, it has no {MODEL_CONFIG}")
    others = read_json(folder / MODEL_CONFIG)
    if "model_type" in others:
        return {**others, "model": _from_hub_files(folder)}
    return {**read_file(folder / _MODEL_WEIGHTS), **others}


def _from_hub_files(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of transformers: one file or several, of safetensors or of torch.save."""
    for name in (_MODEL_WEIGHTS, "pytorch_model.bin"):
        parts, index = [name], folder / f"{name}.index.json"
        if index.is_file() and not (folder / name).is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
                raise UserError(f"{index}: must have a weight_map, which names the file of each tensor")
            parts = sorted({Path(part).name for part in listed.values()})
            if missing := [part for part in parts if not (folder / part).is_file()]:
                raise UserError(
                    f"{folder}: {len(missing)} of the {len(parts)} files of its weights are missing, such as"
                    f" {missing[0]}"
                )
        elif not (folder / name).exists():
            continue
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors |= tensors_of(read_file(folder / part))
        if not tensors:
            raise UserError(f"{folder / parts[0]}: holds no tensors" if parts else f"{index}: names no files")
        return tensors
    raise UserError(f"{folder}: has a {MODEL_CONFIG} but no weights ({_MODEL_WEIGHTS} or pytorch_model.bin)")


def _from_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    return {"model": tensors, **json.loads(metadata.get(_METADATA, "{}"))}


def config_of(checkpoint: Mapping[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration stored in a checkpoint, with `key.sub=value` overrides. Raises UserError."""
    try:
        tree = copy.deepcopy(checkpoint["config"])
    except RecursionError:
        raise UserError(f"{path}: the configuration stored in this checkpoint is nested too deeply") from None
    for override in overrides:
        apply_override(tree, override)
    try:
        return config_from_dict(tree)
    except ConfigError as error:
        raise UserError(f"{path}: the configuration stored in this checkpoint: {error}") from error


SHIPPED = Path(__file__).with_name("shipped")
"""Model folders that are part of this package, by name."""


def resolve_checkpoint(source: str | Path) -> Path:
    """The checkpoint of a file, of a model folder, or of a finished run given by its folder or its name under runs/; or
    a model folder of SHIPPED, by name.

    One of the Hugging Face Hub, or with a short name, is fetched unless it is cached (see `remote`).

    Of a run with teachers it is the student's. Raises UserError, also where a folder has a run with and one without
    teachers.
    """
    path = Path(source)
    if is_remote(source):
        return fetch(source)
    if os.path.isfile(path):  # the functions of pathlib raise where a name is too long
        return path
    for folder in (path, Path("runs") / path, SHIPPED / path):
        if os.path.isfile(folder / MODEL_CONFIG):
            return folder
        found = [path for path in (folder / "student" / FINISHED, folder / FINISHED) if os.path.isfile(path)]
        if len(found) > 1:
            raise UserError(
                f"{source}: two finished runs; choose {found[0]} or {found[1]}, or delete one of them"
            )
        if found:
            return found[0]
    raise UserError(
        f"{source}: no checkpoint; must be a file, a folder with {MODEL_CONFIG} and {_MODEL_WEIGHTS}, a finished run"
        " (its folder, or its name under runs/), hf://owner/repo, or a name that `ats-detr models` lists"
        + (f", such as {near[0]}" if (near := difflib.get_close_matches(str(source), PUBLISHED, n=1)) else "")
    )


def load_model(path: str | Path) -> tuple[Detr, dict[str, Any]]:
    """The detector of a checkpoint, in evaluation mode, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, path)
    return load_detector(config, checkpoint, path), checkpoint


def load_detector(config: Config, checkpoint: Mapping[str, Any], path: str | Path) -> Detr:
    """The detector of a config with the weights of a checkpoint, in evaluation mode. Raises UserError.

    Two settings of the checkpoint override those of `config`: no adaption layer where the checkpoint has none
    (inference does not use it), and `masked_mean=False` for published weights, which were trained that way.
    """
    _check_interpretation(config, checkpoint, path)
    changes: dict[str, Any] = {}
    if not any(name.startswith("adaption.") for name in checkpoint["model"]):
        changes["adaption"] = False
    if checkpoint.get("published") and config.model.selector is not None:
        changes["selector"] = dataclasses.replace(config.model.selector, masked_mean=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    # Without memory first: the sizes in a file of unknown origin must be those of its tensors.
    backbone = dataclasses.replace(config.model.backbone, frozen_stages=0)
    with torch.device("meta"):
        outline = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
        check_weights(build_without_fetching(outline, checkpoint["num_classes"]), checkpoint["model"], path)
    model = build_without_fetching(config, checkpoint["num_classes"])
    model.load_state_dict(dict(checkpoint["model"]))
    return model.eval()


def _check_interpretation(config: Config, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError where settings that do not change names or shapes of the weights differ."""
    own, stored = config.model, config_of(checkpoint, path).model
    pairs: list[tuple[str, Any, Any]] = [
        ("num_heads", own.num_heads, stored.num_heads),
        ("num_norm_groups", own.norm_groups, stored.norm_groups),
    ]
    if own.selector is not None and stored.selector is not None:
        pairs.append(("selector.scores", own.selector.scores, stored.selector.scores))
    for key, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"{path}: a checkpoint of another architecture, model.{key} is {theirs!r} there, {ours!r} here"
            )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state dict strictly. Raises UserError listing missing, unknown and reshaped tensors."""
    check_weights(model, state, path)
    model.load_state_dict(dict(state))


def check_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError where names or shapes differ, listing the tensors, or where integers stand for real numbers."""
    own = model.state_dict()
    if found := mismatches(own, state):
        raise UserError(f"{path}: a checkpoint of another architecture ({found})")
    for name, tensor in own.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise UserError(
                f"{path}: model.{name} has dtype {state[name].dtype}, must be like {tensor.dtype}"
            )
