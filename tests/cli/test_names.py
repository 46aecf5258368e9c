"""Names of classes, files and folders are printed unchanged by every command: markup in them has no effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ats_detr.cli import COMMANDS, main
from ats_detr.console import console, printable
from ats_detr.errors import UserError
from tests.data.exporters import save_picture
from tests.training.small import small_tree

CLASSES = (
    "car[/truck]", "[bold]cat", "[red", "esc\x1b[2J", "line\nbreak", ":smile:", "猫 é Кот قطة 🐈", "<b>&amp;</b>",
    "$x^$", "\ud800 lone", "a\u202eb", "100%s {0}",
)  # fmt: skip
FOLDER = "set [/bold] :cat: [red]"


def write_dataset(folder: Path) -> Path:
    root = folder.joinpath(*FOLDER.split("/"))
    images = [
        {"id": i, "file_name": f"[/b]{i}.jpg".replace("/", "_"), "width": 64, "height": 48}
        for i in (1, 2, 3, 4)
    ]
    for image in images:
        save_picture(root / "images" / str(image["file_name"]))
    annotations = [
        {"id": i, "image_id": 1 + i % 4, "category_id": i, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0}
        for i in range(1, len(CLASSES))  # the last class has no object, which is reported by its name
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    for name in ("train [_x]", "val [bold]"):
        path = root / "annotations" / f"instances_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a finished run on that data set, in a folder of such a name."""
    folder = tmp_path_factory.mktemp("names")
    root = write_dataset(folder)
    run = folder / "run [/bold]"
    tree = small_tree(
        folder, data={"kind": "coco", "root": str(root)}, train={"epochs": 1}, output_dir=str(run)
    )
    path = folder / "c [_b].yaml"
    path.write_text(yaml.safe_dump({**tree, "name": "[bold]"}, allow_unicode=True), encoding="utf-8")
    main(["train", "--config", str(path)])
    return path


def test_every_command_prints_names_as_they_are(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # progress bars, as on a terminal
    folder = trained.parent
    root = folder.joinpath(*FOLDER.split("/"))
    checkpoint = folder / "run [" / "bold]" / "final.pt"
    again = tmp_path / "[" / "red]"
    picture = tmp_path / "[red].jpg"
    Image.new("RGB", (64, 48), "gray").save(picture)
    commands: dict[str, list[object]] = {
        "train": ["--config", trained, f"output_dir={again}", f"train.init_from={checkpoint}"],
        "eval": ["--checkpoint", checkpoint, "--output", again / "eval"],
        "predict": [picture, root / "images", "--checkpoint", checkpoint, "--out", again / "out", "--threshold", 0],
        "info": [checkpoint],
        "convert": [checkpoint, again / "model[", ],
        "calibrate": [checkpoint, picture],
        "datasets": ["check", root, "--picture", again / "[red].png"],
        "export": [checkpoint, again / "[red].txt"],
        "kernels": ["compile", trained, "--arch", 1],
        "models": [],
    }  # fmt: skip
    assert set(commands) == set(COMMANDS)
    for command, arguments in commands.items():
        with (
            pytest.raises(UserError) if command in ("calibrate", "export", "kernels") else nullcontext()
        ):  # after loading the checkpoint
            main([command, *map(str, arguments)])
        out = capsys.readouterr().out
        assert "\x1b[2J" not in out
        assert "\u202e" not in out
        if command in ("info", "datasets"):
            known = [name.replace("\ud800", "\ufffd") for name in CLASSES]
            expected = known if command == "info" else (known[-1], FOLDER.split("/")[-1])
            assert all(printable(name) in out for name in expected), (command, out)
    page = (again / "out" / "gallery.html").read_text(encoding="utf-8")
    assert "<b>&amp;" not in page


def test_tables_titles_and_progress_bars_have_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title="[/b] title")
    table.add_column("[/b] column")
    table.add_row("[/b] :cat: row\x1b[2J")
    with console.capture() as captured:
        console.print(table)
        console.print("[/b]\nline")
    text = captured.get()
    for word in ("title", "column", ":cat: row\\x1b[2J"):
        assert f"[/b] {word}" in text
    assert "[/b]\\nline" in text


def test_any_locale_reads_and_prints_utf8(trained: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    root = write_dataset(tmp_path / "données 猫")
    done = subprocess.run(
        [sys.executable, "-m", "ats_detr", "datasets", "check", str(root), "--json", str(root / "é.json")],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "données 猫" in done.stdout.decode("utf-8")
    assert json.loads((root / "é.json").read_bytes())["accepted"]
