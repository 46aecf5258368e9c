"""Convert between checkpoints of this package, of the published code and of transformers' Deformable DETR.

A checkpoint of the published code (Deformable DETR, Sparse DETR, ATS-DETR) or of transformers becomes one of this
package; a checkpoint of this package becomes a published one, a model folder or, with --transformers, a folder of
transformers. The contents of SOURCE determine the direction.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from ats_detr.checkpoint import (
    CHECKPOINT_SUFFIXES,
    config_of,
    load_checkpoint,
    load_model,
    read_file,
    resolve_checkpoint,
    save_checkpoint,
    save_folder,
    save_transformers,
)
from ats_detr.cli.options import CHECKPOINT, add_overrides
from ats_detr.config import config_to_dict
from ats_detr.console import say
from ats_detr.convert import from_official, is_official, to_official
from ats_detr.errors import UserError
from ats_detr.flops import num_parameters
from ats_detr.model_card import name_of_model
from ats_detr.transformers_format import is_transformers


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", help=CHECKPOINT)
    parser.add_argument(
        "destination",
        type=Path,
        help="of this package: .safetensors, .pt, or a folder (model.safetensors and config.json); published: .pth",
    )
    parser.add_argument(
        "--keep-adaption", action="store_true", help="keep the adaption layer, which only distillation uses"
    )
    parser.add_argument(
        "--transformers", action="store_true", help="write a folder for transformers' Deformable DETR"
    )
    add_overrides(parser, "model.selector.keep_ratio=0.2")


def run(arguments: Namespace) -> None:
    """Convert one checkpoint."""
    source = resolve_checkpoint(arguments.source)
    if arguments.transformers:
        export_to_transformers(source, arguments.destination, arguments.overrides)
        return
    convert(source, arguments.destination, arguments.overrides, keep_adaption=arguments.keep_adaption)


def export_to_transformers(source: Path, destination: Path, overrides: Sequence[str] = ()) -> None:
    """Write any checkpoint as a folder of transformers. Raises UserError."""
    if destination.suffix or overrides:
        raise UserError(f"{destination}: --transformers writes a folder, without further options")
    if destination.exists() and destination.samefile(source):
        raise UserError(f"{destination}: is the source itself; choose another destination")
    _, checkpoint = load_model(source)
    save_transformers(checkpoint, destination)
    load_model(destination)  # reads it back
    say(f"{destination}: in the format of transformers (DeformableDetrForObjectDetection)")


def convert(
    source: Path, destination: Path, overrides: Sequence[str] = (), *, keep_adaption: bool = False
) -> None:
    """Write `source` in the other format and print a summary. Raises UserError; a failure leaves no partial file."""
    is_folder = not destination.suffix
    if not is_folder and destination.suffix not in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"{destination}: the suffix must be .safetensors, .pt or .pth, or omitted to write a folder"
        )
    if destination.exists() and destination.samefile(source):
        raise UserError(f"{destination}: is the source itself; choose another destination")
    content = read_file(source)
    is_foreign = is_transformers(content)
    if not is_official(content) and not is_foreign:
        _, checkpoint = load_model(source)  # strict, also where the file is of neither kind
        if destination.suffix == ".safetensors" or overrides or keep_adaption:
            raise UserError(
                f"{source} is a checkpoint of this package: it converts only to a published .pth file or a folder,"
                " without further options"
            )
        if is_folder:
            save_folder(checkpoint, destination)
            say(f"{destination}: model.safetensors and config.json")
        else:
            save_checkpoint(to_official(checkpoint), destination)
            say(f"{destination}: in the format of the published code")
            selector = config_of(checkpoint, source).model.selector
            if selector is not None and selector.masked_mean:
                say(
                    "the published code scores the tokens of padded images by averages that include the padding"
                    " (model.selector.masked_mean=false)"
                )
        return
    if is_foreign:
        checkpoint = load_checkpoint(source)
    else:
        checkpoint = from_official(content, source=str(source), keep_adaption=keep_adaption)
    config = config_of(checkpoint, source, overrides)
    checkpoint["config"] = config_to_dict(config)
    (save_folder if is_folder else save_checkpoint)(checkpoint, destination)
    model, _ = load_model(destination)  # strict: the file contains exactly the model of its configuration
    for note in checkpoint["notes"]:
        say(note)
    say(
        f"{destination}: {name_of_model(config.model)}, {checkpoint['num_classes']} class indices,"
        f" {num_parameters(model) / 1e6:.1f} M parameters"
    )
