"""Settings: parsing, precedence, and the errors for invalid values."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ats_detr.checkpoint import save_config
from ats_detr.config import (
    Config,
    SelectorConfig,
    TeachersConfig,
    config_from_dict,
    config_to_dict,
    load_config,
)
from ats_detr.errors import UserError
from ats_detr.model import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED_CLASSES = 91


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_model(path: Path) -> None:
    config = load_config(path, ["model.backbone.pretrained=false"])
    assert config.name == path.stem
    assert path.read_text().startswith("# "), "the first comment says what the config is"
    with torch.device("meta"):
        model = build_model(config.model, PUBLISHED_CLASSES)
    assert model.num_classes == PUBLISHED_CLASSES


TAUGHT = [path for path in SHIPPED if isinstance(load_config(path).teachers, TeachersConfig)]


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_the_teachers_of_a_shipped_student_keep_its_smallest_and_largest_budget(path: Path) -> None:
    student = load_config(path)
    assert student.teachers is not None
    assert student.model.selector is not None
    weak, strong = (
        load_config(teacher.config) for teacher in (student.teachers.weak, student.teachers.strong)
    )
    assert weak.model.selector is not None
    assert strong.model.selector is not None
    assert weak.model.selector.keep_ratio == student.model.selector.min_ratio
    assert strong.model.selector.keep_ratio == student.model.selector.max_ratio


def test_a_file_states_differences_from_its_base_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases", "train: {epochs: 3, learning_rate: 1e-3}\nseed: 5", "b.yaml")
    path = write(tmp_path, "base: bases/b.yaml\ntrain: {epochs: 4, drop_epochs: [1, 2]}")
    config = load_config(path, ["seed=6", "train.clip_norm=1e-1", "data.root=/tmp/1", "model.dropout=0"])
    assert (config.train.epochs, config.train.learning_rate, config.train.drop_epochs) == (4, 1e-3, (1, 2))
    assert (config.seed, config.train.clip_norm, config.data.root, config.model.dropout) == (
        6,
        0.1,
        "/tmp/1",
        0.0,
    )


def test_null_replaces_a_section_and_an_override_can_fill_it_again(tmp_path: Path) -> None:
    write(tmp_path, "model: {two_stage: true, selector: {keep_ratio: 0.1}}", "b.yaml")
    path = write(tmp_path, "base: b.yaml\nmodel: {selector: null}")
    assert load_config(path).model.selector is None
    assert load_config(path, ["model.selector.keep_ratio=0.5"]).model.selector == SelectorConfig(
        keep_ratio=0.5
    )


def test_teacher_configs_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path, "seed: 7", "weak.yaml")
    shutil.copy(CONFIGS / "quickstart_strong.yaml", tmp_path)
    path = write(tmp_path, "base: quickstart_chain\nteachers: {weak: {config: weak.yaml}}", "mine.yaml")
    config = load_config(path)
    assert config.teachers is not None
    assert load_config(config.teachers.weak.config).seed == 7
    assert config.teachers.strong.config == "quickstart_strong", (
        "the base names the shipped one, not its neighbour"
    )


@pytest.mark.parametrize(
    "name", ["quickstart_chain", "quickstart_chain.yaml", "configs/quickstart_chain.yaml"]
)
def test_a_shipped_config_is_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_config(CONFIGS / "quickstart_chain.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart_chain").mkdir()  # a folder is not a configuration
    config = load_config(name)
    assert config == expected
    assert config.teachers is not None
    assert load_config(config.teachers.weak.config) == load_config(CONFIGS / "quickstart_weak.yaml")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_file_comes_before_the_shipped_config_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "base: quickstart\nseed: 7", "quickstart.yaml")
    assert load_config("quickstart.yaml").seed == 7
    assert load_config("quickstart").seed == load_config(CONFIGS / "quickstart.yaml").seed


@pytest.mark.parametrize("name", ["quikstart", "my/quickstart.yaml", "configs/quickstrat.yaml"])
def test_an_unknown_config_is_answered_with_the_nearest_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"^{name}: no such file.* nearest names are quickstart, quickstart_"
    ):
        load_config(name)


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "sparse_detr_r50_0.1.yaml", ["seed=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(Config())) == Config()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", "model.widht = 3: there is no such setting; did you mean model.width?"),
        ("trian.epochs=3", "did you mean train?"),
        ("train.epochs=0", "train.epochs = 0: must be > 0"),
        ("train.epochs=2.5", "train.epochs = 2.5: must be an integer"),
        ("train.learning_rate=fast", "train.learning_rate = 'fast': must be a finite number"),
        ("train.learning_rate=.nan", "must be a finite number"),
        ("train.timeout_minutes=1e300", "train.timeout_minutes = 1e+300: must be in (0, 100000]"),
        ("train.drop_epochs=[-1]", "train.drop_epochs = (-1,): must be > 0"),
        ("data.kind=voc", "data.kind = 'voc': must be one of coco, synthetic"),
        ("data.cache_images=1", "data.cache_images = 1: must be true or false"),
        ("data.crop_size=[1,2,3]", "data.crop_size = [1, 2, 3]: must be a list of 2"),
        ("data.train_short_sides=[640,big]", "data.train_short_sides[1] = 'big': must be an integer"),
        ("data.train_short_sides=[0]", "data.train_short_sides = (0,): all lengths must be > 0"),
        ("data.crop_short_sides=[-400]", "data.crop_short_sides = (-400,): all lengths must be > 0"),
        ("model.selector.keep_ratio=1.5", "model.selector.keep_ratio = 1.5: must be in (0, 1]"),
        ("model.selector.min_ratio=0.1", "model.selector.max_ratio = None: set keep_ratio, or both"),
        ("model.selector=0.1", "model.selector = 0.1: must be a mapping of settings"),
        ("model.width=100", "model.width = 100: must be a multiple of num_heads = 8"),
        ("model.queries_from_memory=true", "needs model.two_stage = true"),
        ("teachers.weak.config=a.yaml", "teachers.strong = None: required, it has no default"),
        ("loss.class_cost=-1", "loss.class_cost = -1.0: must be >= 0"),
        ("loss={class_cost: 0, bbox_cost: 0, giou_cost: 0}", "loss.class_cost = 0.0: must be > 0 where"),
        ("loss.focal_alpha=1", "loss.focal_alpha = 1.0: must be in (0, 1)"),
        ("loss.difficulty_iou=0", "loss.difficulty_iou = 0.0: must be in (0, 1]"),
        ("loss.memory_weight=2", "loss.memory_weight = 2.0: has no effect without an adaptive model"),
        ("loss.selector_weight=2", "loss.selector_weight = 2.0: has no effect without model.selector"),
        ("seed", "override 'seed': must have the form key.sub=value"),
        ("seed=[", "the value is not YAML"),
    ],
)
def test_a_wrong_setting_is_reported_with_its_value_and_fix(
    tmp_path: Path, override: str, words: str
) -> None:
    path = write(tmp_path, "seed: 1")
    with pytest.raises(UserError) as raised:
        load_config(path, [override])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_with_a_budget_per_image_needs_teachers(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {two_stage: true, adaption: true, selector: {min_ratio: 0.1, max_ratio: 0.2}}"
    )
    with pytest.raises(UserError, match=r"needs teachers\.weak and teachers\.strong"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1", "found a list"),
        ("base: missing.yaml", "base: missing.yaml: no such file"),
        ("base: a.yaml", "form a cycle"),
        ("base: [a, b]", "must be the name of one YAML file"),
    ],
)
def test_a_file_that_is_not_a_config_is_reported(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        load_config(write(tmp_path, text))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_setting_is_plain_yaml() -> None:
    tree = config_to_dict(Config())
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        f"seed={10**30}",
        "name=..",
        "name='. .'",
        "name='a\\b'",
        f"name={'a' * 300}",
        "model.num_encoder_layers=1000000",
        f"model.width={'9' * 400}",
        f"model.width={'9' * 5000}",
        f"train.learning_rate={'9' * 400}",
        "data.train_short_sides=[640, 99999999]",
        f"model.width={'[' * 3000}{']' * 3000}",
    ],
)
def test_values_that_exhaust_memory_or_leave_the_folder_are_one_short_error(override: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config("quickstart", [override])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


def test_settings_are_utf8_in_every_locale(tmp_path: Path) -> None:
    config = config_from_dict({"name": "größe", "data": {"root": "données/猫"}})
    save_config(config, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_bytes().decode("utf-8").count("猫") == 1
    code = (
        "import sys; from ats_detr.config import load_config;"
        " assert load_config(sys.argv[1]).data.root == 'donn\\xe9es/\\u732b'"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.yaml")], env=environment, check=True)
