"""Tools around checkpoints: `python -m ats_detr convert official.pth ours.safetensors`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ats_detr.config import ConfigError, apply_override, config_from_dict
from ats_detr.convert import from_official, is_official, to_official
from ats_detr.errors import UserError, run_cli
from ats_detr.flops import num_parameters
from ats_detr.training.checkpoint import load_checkpoint, load_model, read_file, save_checkpoint

console = Console(highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ats_detr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert",
        help="a published checkpoint as one of ours, or one of ours as a published one",
        description="Convert a checkpoint of the published code (Deformable DETR, Sparse DETR, ATS-DETR) to one of "
        "ours, or one of ours back. The direction follows from what SOURCE holds.",
    )
    command.add_argument("source", type=Path)
    command.add_argument("destination", type=Path, help="ours: .safetensors or .pt; published: .pth")
    command.add_argument(
        "--keep-adaption", action="store_true", help="keep the adaption layer, which only distillation uses"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as model.selector.keep_ratio=0.2"
    )
    arguments = parser.parse_args(argv)
    convert(
        arguments.source, arguments.destination, arguments.overrides, keep_adaption=arguments.keep_adaption
    )


def convert(
    source: Path, destination: Path, overrides: Sequence[str] = (), *, keep_adaption: bool = False
) -> None:
    """Write `source` in the other of the two forms, and tell what it is. Raises UserError; writes whole files only."""
    if destination.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"{destination}: give the destination the suffix .safetensors, .pt or .pth")
    content = read_file(source)
    if not is_official(content):
        if destination.suffix == ".safetensors" or overrides or keep_adaption:
            raise UserError(
                f"{source} is one of ours: it converts to a published .pth file, without further options"
            )
        save_checkpoint(to_official(load_checkpoint(source)), destination)
        console.print(f"{destination}: as the published code stores it")
        return
    checkpoint = from_official(content, source=str(source), keep_adaption=keep_adaption)
    for override in overrides:
        apply_override(checkpoint["config"], override)
    try:
        config_from_dict(checkpoint["config"])
    except ConfigError as error:
        raise UserError(str(error)) from error
    save_checkpoint(checkpoint, destination)
    model, _ = load_model(destination)  # strict: what was written is exactly the model it claims to be
    for note in checkpoint["notes"]:
        console.print(note)
    console.print(f"{destination}: {_describe(checkpoint)}, {num_parameters(model) / 1e6:.1f} M parameters")


def _describe(checkpoint: dict) -> str:
    config = config_from_dict(checkpoint["config"]).model
    selector = config.selector
    if selector is None:
        name = "Efficient DETR" if config.queries_from_memory else "Deformable DETR"
        name += ", two-stage" * config.two_stage + ", box refinement" * config.box_refine
    elif selector.adaptive:
        name = f"ATS-DETR, {selector.min_ratio:.0%} to {selector.max_ratio:.0%} of the tokens"
    else:
        family = "Sparse DETR" if selector.scores == "proposals" else "ATS-DETR's teacher"
        name = f"{family}, {selector.keep_ratio:.0%} of the tokens"
    return f"{name}, {config.backbone.name}, {checkpoint['num_classes']} class rows"


if __name__ == "__main__":
    run_cli(main)
