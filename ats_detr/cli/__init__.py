"""The command line: `ats-detr COMMAND ...`, or `python -m ats_detr COMMAND ...` without the console script.

A command is a module of this package: its docstring is the text of `--help`, `add_arguments` declares its options, and
`run` executes it. Only the module of the given command is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ats_detr import __version__
from ats_detr.console import run_cli

COMMANDS = {
    "train": "train a detector and the teachers it needs",
    "eval": "evaluate a checkpoint: COCO AP, budgets, pictures",
    "predict": "detect objects in images, folders and videos",
    "calibrate": "prepare a checkpoint for mean budgets",
    "info": "describe a configuration or a checkpoint",
    "export": "export a detector to ONNX or torch.export",
    "convert": "convert between published checkpoints and those of this package",
    "models": "list published checkpoints by short name",
    "datasets": "check, convert, divide and fetch datasets",
    "kernels": "compile the GPU kernels of a configuration in advance",
}
_DESCRIPTION = """Object detection with an adaptive share of the tokens. `ats-detr COMMAND --help` describes a command.

exit codes:
  0    success
  1    finished, but some inputs failed: unreadable files, errors in a data set
  2    invalid input, reported in one line; nothing was done
  130  interrupted"""


def run_command(*command: str, prog: str | None = None) -> None:
    """Run this process's command line, after the words of `command`, and exit. The entry point of all scripts."""
    run_cli(lambda: main([*command, *sys.argv[1:]], prog=prog))


def main(argv: Sequence[str], *, prog: str | None = None) -> None:
    """Run one command. Raises UserError, and SystemExit with the exit code if it is not 0."""
    arguments = parse_arguments(argv, prog=prog)
    arguments.run(arguments)


def parse_arguments(argv: Sequence[str], *, prog: str | None = None) -> argparse.Namespace:
    """The options of a command; `run` is the function that executes it.

    Args:
        argv: the name of the command, then its arguments.
        prog: the program in usage messages. None: `ats-detr COMMAND`.
    """
    if not argv or argv[0] not in COMMANDS:
        _explain(argv)
    module = importlib.import_module(f"ats_detr.cli.{argv[0]}")
    parser = argparse.ArgumentParser(
        prog=prog or f"ats-detr {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser.parse_intermixed_args(argv[1:])  # `key=value` may stand before and after options


def _explain(argv: Sequence[str]) -> None:
    """Print the list of commands, the version, or what is wrong, and exit."""
    parser = argparse.ArgumentParser(
        prog="ats-detr", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ats_detr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(argv)
    parser.error("the command must be the first argument")
