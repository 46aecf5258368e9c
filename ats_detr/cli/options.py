"""Options that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from ats_detr.config import shipped_configs
from ats_detr.errors import UserError

FAILURES = 1
"""Exit code of a command that finished although some of its inputs failed."""
CHECKPOINT = (
    "a checkpoint file, the folder of a model or a run, the name of a run under runs/, hf://owner/repo[/file], or a"
    " name that `ats-detr models` lists, such as shapes"
)
CONFIG = "a YAML file, or the name of a shipped configuration such as quickstart"


def add_config(parser: ArgumentParser, *, default: str | None = None) -> None:
    """`--config`; required unless there is a default, which is described by `default`."""
    names = ", ".join(shipped_configs())
    text = f"{CONFIG}; {f'default: {default}' if default else f'all shipped names: {names}'}"
    parser.add_argument("--config", required=default is None, help=text)


def image_size(text: str) -> tuple[int, int]:
    """An argument such as 832x1344: height and width in pixels."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ArgumentTypeError(f"{text!r}: must be HEIGHTxWIDTH, such as 832x1344")
    return int(height), int(width)


def add_max_detections(parser: ArgumentParser) -> None:
    """`--max-detections`."""
    from ats_detr.evaluation import MAX_DETECTIONS  # loads torch

    parser.add_argument(
        "--max-detections", type=int, default=MAX_DETECTIONS, help="per image; default: %(default)s"
    )


def add_budget(parser: ArgumentParser) -> None:
    """`--budget`, for `budgets.parse_budget`."""
    parser.add_argument(
        "--budget",
        default="auto",
        help="share of the tokens to keep: auto (as trained), a ratio for every image such as 0.15, or the mean of a"
        " calibrated model such as mean:0.15; default: %(default)s",
    )


def require_replaceable(option: str, file: Path, beginning: bytes) -> None:
    """Raise UserError where an output file exists that `option` has not written, such as an input of the command.

    Args:
        beginning: first bytes of the files that it writes. An empty file may be replaced, too.
    """
    if not file.is_file():
        return
    with file.open("rb") as existing:
        found = existing.read(len(beginning))
    if found and found != beginning:
        raise UserError(
            f"{option} {file}: this file exists and was not written by {option}; choose another one"
        )


def add_overrides(parser: ArgumentParser, example: str) -> None:
    """`key=value ...` as `overrides`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"settings that take precedence over the configuration, such as {example}",
    )
