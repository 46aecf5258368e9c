"""The check of a dataset reports every planted fault at once, and nothing in a clean dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ats_detr.cli import main
from ats_detr.data.check import check_dataset, find_splits, lines, plot_dataset, report
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.errors import UserError
from tests.data.exporters import save_picture


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
    for name in ("a.jpg", "b.jpg", "turned.jpg", "extra.png"):
        save_picture(images / name, size=(40, 30))
    Image.new("RGB", (40, 30), (9, 9, 9)).save(images / "grey.png")
    (images / "copy.jpg").write_bytes((images / "a.jpg").read_bytes())
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:-300])

    def image(i: int, name: str, **changes: Any) -> dict[str, Any]:
        return {"id": i, "file_name": name, "height": 30, "width": 40} | changes

    def box(i: int, *xywh: float, **changes: Any) -> dict[str, Any]:
        return {"id": i, "image_id": 1, "category_id": 1, "bbox": list(xywh)} | changes

    content = {
        "images": [
            image(1, "a.jpg"),
            image(2, "b.jpg"),
            image(2, "a.jpg"),  # an id twice
            image(3, "gone.jpg"),
            image(4, "cut.jpg"),
            image(5, "copy.jpg"),
            image(6, "turned.jpg", height=40, width=30),
            image(7, "grey.png", height=0),
            {"id": 8, "height": 30, "width": 40},  # no name
        ],
        "annotations": [
            box(1, 2, 2, 10, 10),
            box(1, 3, 2, 10, 10),  # an id twice
            box(9, 2, 2, 10, 10),  # an object twice
            box(2, 0, 0, 60, 10),  # far beyond
            box(10, 0, 0, 42, 10),  # beyond
            box(3, 50, 0, 10, 10),  # outside
            box(4, 5, 5, 0, 9),  # no area
            box(5, 1, 1, 5, 5, image_id=99),
            box(6, 1, 1, 5, 5, category_id=99),
            box(7, 1, 1, 5),
            box(11, 9, 9, -5, -5),
            box(8, 0, 0, 40, 30, image_id=5, iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "dog"}],
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


EXPECTED = {
    "error": {
        "entries of 'images' that cannot be used": 2,
        "annotations of unknown images": 1,
        "annotations of unknown categories": 1,
        "annotations that cannot be used": 1,
        "boxes of negative width or height": 1,
        "boxes outside their image": 1,
        "boxes that reach far beyond their image": 1,
        "images that are missing from {folder}": 1,
        "images that cannot be decoded": 1,
        "images of another size than listed": 1,
    },
    "warning": {
        "annotation files with ids that occur twice (they are not used)": 1,
        "annotations without an area (that of the box is used)": 8,
        "boxes that exceed their image (clipped)": 1,
        "boxes without area (not trained on)": 1,
        "categories of one name and different ids": 1,
        "categories without any object": 2,
        "files of equal content": 1,
        "images of (almost) one colour": 1,
        "images without a size (read from the file)": 1,
        "objects that are annotated twice": 1,
    },
    "note": {
        "crowd regions (not trained on, not counted as misses)": 1,
        "image files that are not listed": 1,
        "images without objects (trained on as background)": 6,
    },
}


def test_every_fault_is_found_in_one_go(broken: Path) -> None:
    (split,) = find_splits(broken)
    check_dataset([split])
    assert split.images == broken / "train"
    found: dict[str, dict[str, int]] = {level: {} for level in EXPECTED}
    for finding in split.findings:
        found[finding.level][finding.what.replace(str(split.images), "{folder}")] = finding.count
    for level, expected in EXPECTED.items():
        assert found[level] == expected
    assert (split.num_images, split.num_objects) == (9, 11), "of a rejected split, what is listed"


def test_what_cannot_be_used_is_omitted_on_request(broken: Path) -> None:
    (split,) = find_splits(broken)
    check_dataset([split], on_bad_image="skip", on_bad_annotation="skip")
    assert split.num_errors == 0
    # Images 1, 5 and 7 (2 is the id of two files); the objects are boxes 1, 1 again, 9 and 10.
    assert (split.num_images, split.num_objects) == (3, 4)
    assert report([split])["accepted"]


def test_places_say_where_and_are_cut_to_a_few(broken: Path) -> None:
    splits = find_splits(broken)
    check_dataset(splits)
    text = list(lines(splits[0].findings, most=1))
    assert text[0].startswith("error: ")
    assert "    a.jpg: bbox [50.0, 0.0, 10.0, 10.0] in 40 x 30 pixels" in text
    assert "    turned.jpg is 40 x 30 pixels but listed as 30 x 40; width and height look swapped" in text
    assert "    ... and 1 more" in text
    levels = [line.split(":")[0] for line in text if not line.startswith(" ")]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)


def test_a_clean_dataset_has_no_findings(clean: Path) -> None:
    splits = find_splits(clean)
    check_dataset(splits)
    assert [split.images.name for split in splits] == ["train2017", "val2017"]
    assert [list(split.findings) for split in splits] == [[], []]
    assert (
        sum(splits[0].objects_per_image)
        == sum(splits[0].objects_per_category.values())
        == len(splits[0].box_sides)
    )


def test_splits_that_disagree_or_share_images_are_reported(clean: Path, tmp_path: Path) -> None:
    train, _ = find_splits(clean)
    content = json.loads(train.annotations.read_text())
    content["categories"][0]["name"] = "renamed"
    other = tmp_path / "val.json"
    other.write_text(json.dumps(content))
    splits = [train, find_splits(other, train.annotations.parents[1] / "train2017")[0]]
    splits[1].is_training = False
    check_dataset(splits)
    assert not list(splits[0].findings)
    found = {finding.what: finding for finding in splits[1].findings}
    assert "renamed" in found["annotation file with other categories than the model"].places[0]
    assert found["images that are also in train2017"].count == 6


def test_an_unusable_file_is_an_error_like_the_others(broken: Path) -> None:
    (broken / "annotations" / "val.json").write_text("{")
    splits = find_splits(broken)
    check_dataset(splits)
    assert splits[0].num_errors > 5
    assert splits[1].num_errors == 1
    assert [split["num_images"] for split in report(splits)["splits"]] == [9, 0]


def test_nothing_to_check_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no annotation file"):
        find_splits(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        find_splits(tmp_path / "gone")
    (tmp_path / "dataset.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"unpack dataset\.zip"):
        find_splits(tmp_path)
    (split,) = find_splits(tmp_path / "dataset.zip")
    check_dataset([split])
    assert "zip archive" in str(split.findings.of("error")[0])


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
    with pytest.raises(SystemExit):
        main(["datasets", "check", str(broken), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["accepted"]
    assert [split["name"] for split in result["splits"]] == ["train"]
    assert result["splits"][0].keys() == {
        *("name", "images", "annotations", "num_images", "num_objects", "errors", "warnings")
    }
    assert len(result["splits"][0]["errors"]) == 10
    with pytest.raises(UserError, match=r"--json .*: cannot write this file"):
        main(["datasets", "check", str(clean), "--json", str(tmp_path)])
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


def test_a_check_does_not_replace_its_inputs(clean: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.touch()
    for _ in range(2):
        main(["datasets", "check", str(clean), "--json", str(report)])
    (annotations,), (image, *_) = clean.glob("annotations/*train*.json"), clean.glob("train2017/*.jpg")
    for option, file in (("--json", annotations), ("--json", image), ("--picture", image)):
        before = file.read_bytes()
        with pytest.raises(UserError, match=f"{option} .*{file.name}: .*; choose another"):
            main(["datasets", "check", str(clean), option, str(file)])
        assert file.read_bytes() == before


def test_real_annotations_have_no_errors(coco_tiny: Path) -> None:
    splits = find_splits(coco_tiny)
    check_dataset(splits)
    assert [split.num_errors for split in splits] == [0, 0]


def test_the_share_of_images_with_too_many_objects_is_drawn_and_printed(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "data.png"
    main(["datasets", "check", str(clean), "--num-queries", "4", "--picture", str(picture)])
    splits = find_splits(clean)
    check_dataset(splits)
    share = sum(count > 4 for count in splits[0].objects_per_image) / 6
    assert 0 < share < 1
    assert f"{share:.1%} of the images have more than 4 objects" in capsys.readouterr().out
    texts = [text.get_text() for axis in plot_dataset(splits, num_queries=4).axes for text in axis.texts]
    assert any(f"train2017: {share:.1%} of 6 images" in text for text in texts)
    assert picture.stat().st_size > 10_000
