"""List the published checkpoints that have a short name, each with the configuration that belongs to it.

A name is accepted wherever a checkpoint is: `ats-detr predict photo.jpg --checkpoint deformable-detr`. So is any other
repository or file of the Hugging Face Hub: hf://owner/repo, hf://owner/repo/file, hf://owner/repo@revision/file.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.table import Table

from ats_detr.console import console
from ats_detr.remote import PUBLISHED


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options: none."""


def run(arguments: Namespace) -> None:
    """Print the table."""
    table = Table()
    for column in ("name", "model", "configuration", "source"):
        table.add_column(column, overflow="fold")
    for name, model in PUBLISHED.items():
        table.add_row(name, model.about, model.config, model.source)
    console.print(table)
