"""The commands and examples of README and docs work.

All commands are parsed. The blocks of the pages that are run here execute from top to bottom, in a folder with the
files that the page names, except blocks whose first line is `# needs COCO` or `# needs a GPU`. Training uses a small
model.
"""

from __future__ import annotations

import functools
import glob
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr.checkpoint import load_checkpoint
from ats_detr.cli import main, parse_arguments
from ats_detr.config import load_config
from ats_detr.convert import to_official
from ats_detr.data.images import decode_image
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.data.transforms import evaluation_transform, image_to_tensor
from tests.small_detector import SMALL, save_small_detector

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("architecture", "configuration", "detector")),
    *(f"docs/{name}.md" for name in ("export", "finetuning", "results", "training")),
]


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """The requirements in its first line, or None."""
        match = re.match(r"# needs (.*)\n", self.text)
        return match[1] if match else None

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(page, *match) for match in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)]


EVERY_PAGE = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page, c)
    for page in EVERY_PAGE
    for block in blocks_of(page)
    if block.language == "sh"
    for c in block.commands
]
NOT_RUN = ("make ", "pip ", "mkdir ", "cd ", "wget ", "unzip ", "sbatch ")
"""Commands that are not executed. `make demo` is the training that runs below; `make test` runs this file."""


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c[:60]}" for p, c in COMMANDS])
def test_scripts_configs_and_settings_of_every_command_exist(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "ats-detr":
        parse_arguments(words[1:])
        return
    scripts = [word for word in words if word.endswith(".py")]
    if not scripts:
        assert command.startswith(NOT_RUN)
        return
    assert (ROOT / scripts[0]).exists()
    overrides = [word for word in words if "=" in word]
    if "--config" in words:
        load_config(ROOT / words[words.index("--config") + 1], overrides)
    else:
        assert scripts == ["eval.py"], "only eval.py reads its settings from the checkpoint"


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_demo_runs_the_training_of_the_readme() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)/", "") for line in recipe.splitlines()]
    assert len(commands) == 2 and {("README.md", command) for command in commands} <= set(COMMANDS)


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_linked_files_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_source_files_that_a_page_names_exist(page: str) -> None:
    folders = [ROOT, ROOT / "ats_detr", ROOT / "ats_detr" / "kernels"]
    for name in re.findall(r"`([\w/]+\.py)`", (ROOT / page).read_text()):
        is_test = name.startswith("test_") and list((ROOT / "tests").rglob(name))
        assert is_test or any((folder / name).exists() for folder in folders), name


def test_configs_in_the_readme_exist() -> None:
    for stem, choices in re.findall(r"`(\w+_r50_?)\{([\w.,]+)\}`", (ROOT / "README.md").read_text()):
        for choice in choices.split(","):
            assert (ROOT / "configs" / f"{stem}{choice}.yaml").exists(), f"{stem}{choice}"


@pytest.mark.parametrize("page", PAGES)
def test_requirements_of_blocks_are_coco_or_a_gpu(page: str) -> None:
    assert {block.needs for block in blocks_of(page)} <= {None, "COCO", "COCO and a GPU", "a GPU"}


# ------------------------------------------------------------------------------------------------------- page by page
@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs, data, pictures, a published checkpoint and a trained quickstart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    drawn = synthetic_dataset(
        tmp_path / "drawn", num_train=8, num_val=4, image_size=64, min_objects=4, max_objects=5, num_classes=2
    )
    shutil.copytree(drawn, tmp_path / "my_data")
    (tmp_path / "holiday").mkdir()
    random = np.random.default_rng(0)
    for name, size in (("beach.jpg", (40, 60)), ("hills.png", (64, 50))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "holiday" / name)
    photographs = tmp_path / "data" / "trees" / "photographs"
    photographs.mkdir(parents=True)
    Image.new("RGB", (300, 260), "green").save(photographs / "2019_YELL_2_541000_4977000_image_crop.png")
    save_small_detector(tmp_path / "runs" / "quickstart" / "final.pt")
    backbone = {"name": "resnet18", "options": {"channels": [64, 128, 256, 512], "stem_width": 64}}
    published = {"num_norm_groups": 32, "selector": {"min_tokens": 300}}
    ours = save_small_detector(tmp_path / "drawn" / "ours.pt", backbone=backbone, **published)
    torch.save(to_official(load_checkpoint(ours)), tmp_path / "official.pth")
    return tmp_path


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [found for word in shlex.split(command, comments=True) for found in glob.glob(word) or [word]]
    if command.startswith(NOT_RUN):
        return
    if words[0] == "ats-detr":
        main(words[1:])
        return
    script = words[1]
    extra = (
        SMALL
        if script == "train.py"
        else [s for s in SMALL if s.startswith(("data.", "num_pictures", "device"))]
    )
    # Settings of the page override the small ones, except the length of the training.
    given = {word.partition("=")[0] for word in words if "=" in word} - {"train.epochs", "train.drop_epochs"}
    arguments = [*words[2:], *(s for s in extra if s.partition("=")[0] not in given)]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run_page(
    page: str, monkeypatch: pytest.MonkeyPatch, keep: Callable[[Block], bool] = lambda block: True
) -> None:
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if block.needs is not None or not keep(block):
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        else:
            for command in block.commands:
                run_command(command, monkeypatch)


@pytest.mark.parametrize("page", ["README.md", "docs/detector.md", "docs/finetuning.md"])
def test_the_page_runs_as_written(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "README.md":
        shutil.rmtree(place / "runs")  # its first command trains them
    run_page(page, monkeypatch)
    made = {
        "README.md": ["runs/quickstart/summary.json", "runs/mine/student/final.pt", "ours.safetensors"],
        "docs/detector.md": ["boxes.jpg", "predictions/gallery.html", "my_model/config.json"],
        "docs/finetuning.md": [
            "dataset.png",
            "runs/mine/student/evaluation/metrics.json",
            "predictions/gallery.html",
        ],
    }
    for file in made[page]:
        assert (place / file).exists(), file


@pytest.mark.slow
def test_the_export_page_runs_as_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    run_page("docs/export.md", monkeypatch)
    assert (place / "model.pt2").exists()
    assert re.search(r"(cup|cat|kite) 0\.\d+ \[", capsys.readouterr().out), "the example prints detections"


def test_the_onnxruntime_example_prepares_the_pixels_of_predict(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For images of any size that fit into the graph; larger ones are scaled down. Nothing is exported here."""
    seen: dict[str, np.ndarray] = {}
    facts = {"classes": {}, "short_side": 64, "long_side": 128}

    def run_graph(path: str, padded_size: list[int]) -> SimpleNamespace:
        def run(names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.update(inputs)
            return [np.zeros((1, 0, 4)), np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(1)]

        metadata = {"ats_detr": json.dumps({**facts, "padded_size": padded_size})}
        return SimpleNamespace(run=run, get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=metadata))

    (example,) = (block for block in blocks_of("docs/export.md") if block.language == "python")
    random = np.random.default_rng(0)
    transform = evaluation_transform(facts["short_side"], facts["long_side"])
    sizes = [(1, 1), (64, 64), (1, 500), (300, 2), (90, 60), *random.integers(2, 400, (100, 2)).tolist()]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for padded_size in ([128, 128], [32, 64]):
        session = functools.partial(run_graph, padded_size=padded_size)
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=session))
        for height, width in sizes:
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save("holiday/beach.jpg", exif=exif)
            exec(compile(example.text, example.page, "exec"), {})
            image = decode_image(Path("holiday/beach.jpg").read_bytes(), "beach", upright=True)
            expected, _, _ = transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
            resized_height, resized_width = seen["sizes"][0]
            given = seen["images"][0, :, :resized_height, :resized_width]
            assert given.shape[1] == resized_height and given.shape[2] == resized_width, "it fits"
            if expected.shape[1] <= padded_size[0] and expected.shape[2] <= padded_size[1]:
                assert torch.equal(image_to_tensor(Image.fromarray(given.transpose(1, 2, 0))), expected)


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/training.md"])
def test_the_other_pages_have_nothing_to_run(page: str) -> None:
    assert all(block.needs for block in blocks_of(page))
