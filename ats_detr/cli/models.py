"""List the checkpoints that have a short name, each with the configuration that belongs to it: those that this package
contains, and published ones.

A name is accepted wherever a checkpoint is: `ats-detr predict photo.jpg --checkpoint deformable-detr`. So is any other
repository or file of the Hugging Face Hub: hf://owner/repo, hf://owner/repo/file, hf://owner/repo@revision/file.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.table import Table

from ats_detr.checkpoint import SHIPPED, config_of, load_checkpoint
from ats_detr.console import console
from ats_detr.model_card import name_of_model
from ats_detr.remote import PUBLISHED


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options: none."""


def run(arguments: Namespace) -> None:
    """Print the table."""
    table = Table()
    for column in ("name", "model", "configuration", "source"):
        table.add_column(column, overflow="fold")
    for folder in sorted(SHIPPED.iterdir()):
        config = config_of(load_checkpoint(folder), folder)
        table.add_row(folder.name, name_of_model(config.model), config.name, "in this package")
    for name, model in PUBLISHED.items():
        table.add_row(name, model.about, model.config, model.source)
    console.print(table)
