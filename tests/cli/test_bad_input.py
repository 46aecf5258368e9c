"""Arguments that cannot be used end a command with exit code 2 and one short line, and change no file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from ats_detr.cli import main
from ats_detr.console import run_cli
from tests.small_detector import SMALL, save_small_detector

LONG = "n" * 5000
DIGITS = "9" * 400


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    save_small_detector(folder / "m.pt")
    Image.new("RGB", (64, 48)).save(folder / "a.jpg")
    (folder / "file").write_text("text")
    return folder


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: main(arguments))
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.err.count("\n") == 1
    return printed.err


TRAIN = ["train", "--config", "quickstart", *SMALL]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN, "output_dir=file/x"], "file/x"),
        ([*TRAIN, "output_dir=/proc/x"], "/proc/x"),
        ([*TRAIN, f"output_dir={LONG}"], "File name too long"),
        ([*TRAIN, "data.root=file/x", "output_dir=o"], "file"),
        ([*TRAIN, 'output_dir="a\\0b"'], "null characters"),
        ([*TRAIN, f"seed={DIGITS}"], "must be <="),
        ([*TRAIN, "data.synthetic.seed=-3"], "must be >= 0"),
        ([*TRAIN, f"train.learning_rate={DIGITS}"], "finite number"),
        ([*TRAIN, f"name={DIGITS}"], "a string"),
        ([*TRAIN, "model.backbone.options={a: &a [*a]}"], "nested"),
        ([*TRAIN, "model.backbone.options={a: " + "[" * 20 + "]" * 20 + "}"], "nested"),
        ([*TRAIN, "train.epochs=" + "[" * 5000 + "]" * 5000], "not YAML"),
        ([*TRAIN, "model.backbone.weights=file"], "not a checkpoint"),
        (["train", "--config", LONG], "no such file"),
        (["info", LONG], "no checkpoint; must be a file"),
        (["info", "m.pt", f"model.num_queries={DIGITS}"], "must be <="),
        (["datasets", "check", LONG], "File name too long"),
        (["datasets", "check", ".", "--most", "-1"], "must be >= 0"),
        (["kernels", "compile", LONG], "no such file"),
        (["kernels", "compile", "quickstart", "--arch", "12"], "must be in 80..129"),
        (["kernels", "compile", "quickstart", "--arch", "90", "--jobs", "0"], "--jobs 0: must be >= 1"),
        (["kernels", "compile", "quickstart", "--arch", "90"], "TRITON_INTERPRET = 1: unset it"),
        (["convert", "m.pt", "m.pt"], "is the source itself"),
        (["convert", "m.pt", "out.pth"], "must be ResNet-18"),
        (["convert", "m.pt", "file"], "cannot create this folder"),
        (["predict", LONG, "--checkpoint", "m.pt"], "File name too long"),
        (["predict", "a.jpg", "--checkpoint", "m.pt", "--out", "file/x"], "cannot create this folder"),
        (["predict", "a.jpg", "--checkpoint", "m.pt", "--batch-size", DIGITS], "must be in 1.."),
        (["export", "m.pt", "x.pt2", "--size", f"{DIGITS}x32"], "must be multiples of 32"),
        (["export", "m.pt", "file/x.pt2", "--size", "32x32"], "cannot write"),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: list[str], words: str, inputs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert words in error(arguments, capsys)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_bad_urls_are_reported_and_skipped(inputs: Path, tmp_path: Path, capsys) -> None:
    urls = ["http://[::1", "http://ex ample/", "http://localhost:x/", "http://" + "a" * 300 + ".com/a"]
    with pytest.raises(SystemExit) as end:
        main(
            [
                "predict",
                *urls,
                "--checkpoint",
                str(inputs / "m.pt"),
                "--allow-urls",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert end.value.code == 1
    assert capsys.readouterr().err.count("cannot be fetched") == len(urls)


def test_names_of_any_length_get_pictures(inputs: Path, tmp_path: Path) -> None:
    names = ["n" * 251 + ".png", "猫" * 83 + ".png", "n" * 250 + "m.png"]
    for name in names:
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    out = tmp_path / "out"
    main(["predict", str(tmp_path), "--checkpoint", str(inputs / "m.pt"), "--out", str(out)])
    assert len(list((out / "pictures").iterdir())) == 2 * len(names)
