"""All entry points run the same command line, and torch is imported only if a model is needed."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ats_detr
from ats_detr.cli import COMMANDS, parse_arguments
from ats_detr.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ats-detr {name} ")


@pytest.mark.parametrize(
    ("script", "arguments", "usage"),
    [
        ("train.py", [], "train.py: error: the following arguments are required: --config"),
        ("eval.py", [], "eval.py: error: the following arguments are required: --checkpoint"),
        (
            "ats_detr/__main__.py",
            ["train"],
            "ats-detr train: error: the following arguments are required: --config",
        ),
        ("ats_detr/__main__.py", ["trian"], "ats-detr: error: argument COMMAND: invalid choice: 'trian'"),
        ("ats_detr/__main__.py", [], "ats-detr: error: the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors_have_exit_code_2(
    script: str,
    arguments: list[str],
    usage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 2
    assert usage in capsys.readouterr().err


def test_an_unknown_config_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "quikstart"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: quikstart: no such file")
    assert error.count("\n") == 1


def test_overrides_may_stand_before_and_after_options() -> None:
    arguments = parse_arguments(
        ["train", "seed=1", "--config", "quickstart", "device=cpu", "--stage", "weak", "a=b"]
    )
    assert arguments.overrides == ["seed=1", "device=cpu", "a=b"]
    assert (arguments.config, arguments.stage) == ("quickstart", "weak")


def test_the_package_has_its_public_names() -> None:
    assert sorted(ats_detr.__all__) == [
        *("CompiledDetr", "Detector", "MeanBudget", "Result", "UserError", "load_config")
    ]
    assert set(ats_detr.__all__) <= set(dir(ats_detr))
    assert all(callable(getattr(ats_detr, name)) for name in ats_detr.__all__)
    assert ats_detr.UserError is UserError
    with pytest.raises(AttributeError, match="has no attribute 'Detectr'"):
        ats_detr.Detectr  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import ats_detr",
        "from ats_detr import UserError, load_config; load_config('quickstart')",
        "from ats_detr.cli import parse_arguments\ntry: parse_arguments(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "load_config", "help"],
)
def test_torch_is_not_imported_without_a_model(code: str) -> None:
    check = f"{code}\nimport sys\nsys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
