"""The check of a dataset finds every planted fault in one go, and nothing in a clean set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ats_detr.cli import main
from ats_detr.data.check import check_dataset, find_splits, lines, plot_dataset
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.errors import UserError


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_dataset(
        tmp_path_factory.mktemp("data"),
        num_train=6,
        num_val=3,
        image_size=64,
        min_objects=4,
        max_objects=5,
        num_classes=2,
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder in which everything is wrong once."""
    images = tmp_path / "train"
    images.mkdir()
    for name, shade in (("a.jpg", 10), ("b.jpg", 20), ("turned.jpg", 30), ("extra.png", 40)):
        Image.new("RGB", (40, 30), (shade, 0, 0)).save(images / name)
    (images / "copy.jpg").write_bytes((images / "a.jpg").read_bytes())
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])

    def image(i: int, name: str, **changes: Any) -> dict[str, Any]:
        return {"id": i, "file_name": name, "height": 30, "width": 40} | changes

    def box(i: int, *xywh: float, **changes: Any) -> dict[str, Any]:
        return {"id": i, "image_id": 1, "category_id": 1, "bbox": list(xywh)} | changes

    content = {
        "images": [
            image(1, "a.jpg"),
            image(2, "b.jpg"),
            image(2, "b.jpg"),  # an id twice
            image(3, "gone.jpg"),
            image(4, "cut.jpg"),
            image(5, "copy.jpg"),
            image(6, "turned.jpg", height=40, width=30),
            image(7, "flat.jpg", height=0),
            {"id": 8, "height": 30, "width": 40},  # no name
        ],
        "annotations": [
            box(1, 2, 2, 10, 10),
            box(1, 2, 2, 10, 10),  # an id twice, and the object
            box(2, 0, 0, 60, 10),  # sticks out
            box(3, 50, 0, 10, 10),  # outside
            box(4, 5, 5, 0, 9),  # no area
            box(5, 1, 1, 5, 5, image_id=99),
            box(6, 1, 1, 5, 5, category_id=99),
            box(7, 1, 1, 5),
            box(8, 0, 0, 40, 30, image_id=5, iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "dog"}],
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


EXPECTED = {
    "error": {
        "entries of 'images' that cannot be used": 1,
        "ids that occur twice under 'images'": 1,
        "images of no height or width": 1,
        "annotations of unknown images": 1,
        "annotations of unknown categories": 1,
        "annotations that cannot be used": 1,
        "boxes outside their image": 1,
        "image files that are missing": 2,
        "image files that cannot be read": 1,
        "images of another size than listed": 1,
    },
    "warning": {
        "categories of one name and different ids": 1,
        "boxes that stick out of their image (they are cut off)": 1,
        "boxes without area (they are left out)": 1,
        "objects that are annotated twice": 1,
        "annotation ids that occur twice": 1,
        "categories without any object": 2,
        "files of equal content": 1,
    },
    "note": {
        "images without objects (they are trained on, as background)": 6,
        "crowd regions (not trained on, not counted as misses)": 1,
        "image files that are not listed": 1,
    },
}


def test_every_fault_is_found_in_one_go(broken: Path) -> None:
    (split,) = find_splits(broken)
    assert split.images == broken / "train"
    assert check_dataset([split]) == []
    found: dict[str, Counter[str]] = {level: Counter() for level in EXPECTED}
    for finding in split.findings:
        found[finding.level][finding.what] += len(finding.places)
    assert {level: dict(counts) for level, counts in found.items()} == EXPECTED


def test_places_say_where_and_are_cut_to_a_few(broken: Path) -> None:
    splits = find_splits(broken)
    check_dataset(splits)
    text = list(lines(splits[0].findings, most=1))
    assert text[0].startswith("error: ")
    assert "    annotations[3] of a.jpg: [50, 0, 10, 10] in 40 x 30" in text
    assert (
        "    turned.jpg is 40 x 30, listed as 30 x 40 (turned by its EXIF data: boxes refer to stored pixels)"
        in text
    )
    assert "    ... and 1 more" in text
    levels = [line.split(":")[0] for line in text if not line.startswith(" ")]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)


def test_a_clean_dataset_has_no_findings(clean: Path) -> None:
    splits = find_splits(clean)
    assert [split.images.name for split in splits] == ["train2017", "val2017"]
    assert check_dataset(splits) == []
    assert [split.findings for split in splits] == [[], []]
    assert (
        sum(splits[0].objects_per_image)
        == sum(splits[0].objects_per_category.values())
        == len(splits[0].box_sides)
    )


def test_splits_that_disagree_or_share_images_are_told(clean: Path, tmp_path: Path) -> None:
    train, val = find_splits(clean)
    content = json.loads(train.annotations.read_text())
    content["categories"][0]["name"] = "renamed"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    splits = [train, find_splits(other, train.images)[0], val]
    findings = check_dataset(splits)
    assert [(f.level, f.what.split(" between")[0].split(" that are")[0]) for f in findings] == [
        ("error", "categories that differ"),
        ("warning", "images"),
        ("error", "categories that differ"),
    ]
    assert len(findings[1].places) == 6


def test_an_unusable_file_is_an_error_like_the_others(broken: Path) -> None:
    (broken / "annotations" / "val.json").write_text("{")
    train, val = find_splits(broken)
    check_dataset([train, val])
    assert train.num_errors > 5
    assert val.num_errors == 1


@pytest.mark.parametrize("layout", ["roboflow", "flat"])
def test_other_layouts_are_found(clean: Path, tmp_path: Path, layout: str) -> None:
    text = (clean / "annotations/instances_val2017.json").read_text()
    folder = tmp_path / "valid" if layout == "roboflow" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / ("_annotations.coco.json" if layout == "roboflow" else "labels.json")).write_text(text)
    (split,) = find_splits(tmp_path)
    assert split.images == folder


def test_nothing_to_check_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no annotation file in it"):
        find_splits(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        find_splits(tmp_path / "gone")


def test_the_picture_has_a_bar_for_each_class_and_split(clean: Path) -> None:
    splits = find_splits(clean)
    check_dataset(splits)
    figure = plot_dataset(splits)
    bars = figure.axes[3]
    assert {label.get_text() for label in bars.get_yticklabels()} == set(splits[0].categories.values())
    assert sum(bar.get_width() for bar in bars.patches) == sum(sum(s.objects_per_image) for s in splits)


def test_the_command_tells_by_its_exit_code(
    broken: Path, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sizes.png"
    main(["datasets", "check", str(clean), "--picture", str(picture)])
    assert Image.open(picture).width > 800
    said = capsys.readouterr().out
    assert f"no kinds of errors; sizes and classes: {picture}" in said
    with pytest.raises(SystemExit) as end:
        main(["datasets", "check", str(broken), "--picture", str(picture)])
    assert end.value.code == 1
    assert "10 kinds of errors" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--picture .*sizes\.foo: .*not supported"):
        main(["datasets", "check", str(clean), "--picture", str(tmp_path / "sizes.foo")])


def test_a_check_writes_nothing_unless_asked(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither where one happens to be nor into the data, which may not be one's own."""
    monkeypatch.chdir(tmp_path)
    before = {*clean.rglob("*")}
    main(["datasets", "check", str(clean)])
    assert not [*tmp_path.iterdir()]
    assert {*clean.rglob("*")} == before
    assert "--picture FILE draws" in capsys.readouterr().out


def test_real_annotations_have_no_errors(coco_tiny: Path) -> None:
    splits = find_splits(coco_tiny)
    check_dataset(splits)
    assert [split.num_errors for split in splits] == [0, 0]
