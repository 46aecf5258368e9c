"""What the README tells people to type exists and is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ats_detr.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c], ids=lambda command: command[:60])
def test_every_command_names_a_script_a_config_and_settings_that_exist(command: str) -> None:
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    overrides = [word for word in words if "=" in word]
    if "--config" in words:
        load_config(ROOT / words[words.index("--config") + 1], overrides)
    else:
        assert script == "eval.py", "only eval.py reads its settings from the checkpoint"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_linked_exists() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_config_that_is_named_exists() -> None:
    for stem, choices in re.findall(r"`(\w+_r50_?)\{([\w.,]+)\}`", README):
        for choice in choices.split(","):
            assert (ROOT / "configs" / f"{stem}{choice}.yaml").exists(), f"{stem}{choice}"
