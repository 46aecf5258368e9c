"""YOLO, Pascal VOC and Roboflow forms of a dataset give the objects of its COCO form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ats_detr.cli import main
from ats_detr.config import DataConfig
from ats_detr.data.check import check_dataset, find_splits, report
from ats_detr.data.coco import CocoDetection
from ats_detr.data.sources import find_layout, find_split
from ats_detr.errors import UserError
from ats_detr.training.datasets import open_dataset
from tests.data.exporters import content, save_picture
from tests.data.formats import as_roboflow, as_voc, as_yolo, coco_dataset

pytest.importorskip("supervision", reason="reads YOLO and VOC labels")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_dataset(tmp_path_factory.mktemp("coco"))


def objects(dataset: CocoDetection) -> list[Any]:
    """(name of the class, box) of each image."""
    result = []
    for index in range(len(dataset)):
        boxes, labels = dataset.objects(index)
        names = [dataset.class_map.name_of_row(row) for row in labels.tolist()]
        result.append(sorted(zip(names, boxes.tolist(), strict=True)))
    return result


def opened(root: Path, **settings: Any) -> tuple[CocoDetection, CocoDetection]:
    config = DataConfig(root=str(root), **settings)
    train = open_dataset(config, "train")
    return train, open_dataset(config, "val", train.class_map)


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "Roboflow COCO": as_roboflow,
    "Roboflow YOLO": as_yolo,
    "Ultralytics": lambda source, root: as_yolo(source, root, roboflow=False),
    "VOC devkit": as_voc,
    "Roboflow VOC": lambda source, root: as_voc(source, root, devkit=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_dataset_has_the_same_images_and_objects(
    form: str, coco: Path, tmp_path: Path
) -> None:
    expected = opened(coco)
    root = FORMS[form](coco, tmp_path / "data")
    found = opened(root)
    for ours, theirs in zip(found, expected, strict=True):
        assert objects(ours) == objects(theirs)
        assert [ours.size(i) for i in range(len(ours))] == [theirs.size(i) for i in range(len(theirs))]
    assert found[1].class_map == found[0].class_map
    splits = find_splits(root)
    check_dataset(splits)
    result = report(splits)
    assert result["accepted"], [split["errors"] for split in result["splits"]]
    assert [split["num_images"] for split in result["splits"]] == [4, 3]
    sizes = [sum(map(len, objects(dataset))) for dataset in expected]
    assert [split["num_objects"] for split in result["splits"]] == sizes


def test_class_indices_of_yolo_are_the_category_ids(coco: Path, tmp_path: Path) -> None:
    train, _ = opened(as_yolo(coco, tmp_path / "data"))
    assert train.class_map.names == ("zebra & co", "apple", "möwe") and train.class_map.category_ids == (
        0,
        1,
        2,
    )


# ------------------------------------------------------------------------------------------------- single properties
def yolo(
    root: Path, lines: dict[str, str], *, names: Any = ("a", "b"), sets: Any = None, **more: Any
) -> Path:
    """A folder images/ and labels/ with these label files of pictures of 64 x 48."""
    (root / "labels").mkdir(parents=True)
    for name, text in lines.items():
        save_picture(root / "images" / f"{name}.jpg")
        (root / "labels" / f"{name}.txt").write_text(text)
    about = {
        **(sets or {"train": "images"}),
        "names": list(names) if isinstance(names, tuple) else names,
        **more,
    }
    (root / "data.yaml").write_text(yaml.safe_dump(about))
    return root


def messages(root: Path, **options: Any) -> list[str]:
    splits = find_splits(root)
    check_dataset(splits, **options)
    return [str(finding) for split in splits for finding in split.findings]


BOX = "0 0.5 0.5 0.25 0.25"


def test_a_gap_among_the_names_of_yolo_moves_no_class(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": f"{BOX}\n2 0.5 0.5 0.5 0.5"}, names={0: "a", 2: "c"})
    dataset = open_dataset(DataConfig(root=str(root)), "train")
    assert [name for name, _ in objects(dataset)[0]] == ["a", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.25", "labels/p.txt:2 of images/p.jpg needs bbox"),
        ("0 0.5 0.5 0.25 x", "labels/p.txt:2 of images/p.jpg needs bbox"),
        ("0 0.5 0.5 0.25 -0.25", "labels/p.txt:2 of images/p.jpg needs bbox"),
        ("7 0.5 0.5 0.25 0.25", "labels/p.txt:2 has category_id 7"),
        ("cat 0.5 0.5 0.25 0.25", "labels/p.txt:2 has category_id 'cat'"),
        ("0 32 24 16 12", "boxes outside their image"),
    ],
)
def test_bad_lines_of_yolo_are_reported_with_their_place_and_skipped_on_request(
    line: str, message: str, tmp_path: Path
) -> None:
    root = yolo(tmp_path / "d", {"p": f"{BOX}\n{line}", "q": BOX})
    config = {"root": str(root), "val_images": None}
    with pytest.raises(UserError, match=r"datasets check|on_bad_annotation=skip") as raised:
        open_dataset(DataConfig(**config), "train")
    assert message in str(raised.value)
    dataset = open_dataset(DataConfig(**config, on_bad_annotation="skip"), "train")
    assert [len(found) for found in objects(dataset)] == [1, 1]


def test_polygons_poses_and_confidences_of_yolo_are_boxes(tmp_path: Path) -> None:
    lines = "0 0.25 0.25 0.75 0.25 0.75 0.75\n0 0.5 0.5 0.5 0.5 0.9"
    dataset = open_dataset(DataConfig(root=str(yolo(tmp_path / "d", {"p": lines}))), "train")
    assert [box for _, box in objects(dataset)[0]] == [[16, 12, 48, 36]] * 2
    pose = yolo(tmp_path / "pose", {"p": "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 2"}, kpt_shape=[2, 3])
    assert [box for _, box in objects(open_dataset(DataConfig(root=str(pose)), "train"))[0]] == [
        [16, 12, 48, 36]
    ]


def test_images_without_labels_and_labels_without_images_are_reported(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": BOX, "q": BOX, "r": "", "s": BOX})
    (root / "labels/q.txt").unlink()
    (root / "images/s.jpg").unlink()
    found = messages(root)
    assert any("1 images without a label file (used as background): images/q.jpg" in text for text in found)
    assert any("missing" in text and "images/s" in text for text in found)
    for file in (root / "labels").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="none of the 3 images of the split 'train' has a label file"):
        find_layout(root)


def test_the_boxes_of_yolo_refer_to_the_upright_image(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": "0 0.5 0.25 1 0.5"})
    save_picture(root / "images/p.jpg", orientation=6)
    dataset = open_dataset(DataConfig(root=str(root)), "train")
    assert dataset.size(0) == (64, 48) and dataset.upright.all()
    assert objects(dataset)[0] == [("a", [0, 0, 48, 32])]
    assert dataset.read_image(0).size == (48, 64)


def test_damaged_images_of_yolo_are_reported_not_fatal(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": BOX, "q": BOX})
    (root / "images/q.jpg").write_bytes(b"not an image")
    assert any("images that cannot be read" in text for text in messages(root))
    dataset = open_dataset(DataConfig(root=str(root), on_bad_image="skip"), "train")
    assert [len(found) for found in objects(dataset)] == [1, 0]


def test_nested_folders_and_lists_of_images_are_read(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": BOX, "q": BOX})
    for name, folder in (("p", "one"), ("q", "two")):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            (root / kind / folder).mkdir()
            shutil.move(root / kind / f"{name}.{suffix}", root / kind / folder / f"same.{suffix}")
    (root / "labels/two/same.txt").write_text("1 0.5 0.5 0.5 0.5")
    dataset = open_dataset(DataConfig(root=str(root)), "train")
    assert [name for found in objects(dataset) for name, _ in found] == ["a", "b"]
    (root / "train.txt").write_text("./images/two/same.jpg\n")
    (root / "val.txt").write_text("data/images/one/same.jpg\n")  # as CVAT
    (root / "data.yaml").write_text(
        yaml.safe_dump({"train": "train.txt", "val": "val.txt", "names": ["a", "b"]})
    )
    train, val = opened(root)
    assert [name for dataset in (train, val) for found in objects(dataset) for name, _ in found] == ["b", "a"]


def test_classes_txt_of_label_studio(tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": "1 0.5 0.5 0.5 0.5"})
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"need their images, and data\.yaml or classes\.txt"):
        find_layout(root)
    (root / "classes.txt").write_text("a\nb\n")
    (root / "notes.json").write_text('{"categories": [], "info": {}}')
    assert objects(open_dataset(DataConfig(root=str(root)), "train"))[0][0][0] == "b"


def test_folders_of_other_datasets_beside_are_not_taken(tmp_path: Path) -> None:
    """Roboflow writes ../train/images for train/images."""
    yolo(tmp_path / "train", {"other": BOX})
    root = tmp_path / "mine"
    yolo(root / "train", {"p": BOX})
    (root / "train/data.yaml").rename(root / "data.yaml")
    (root / "data.yaml").write_text(yaml.safe_dump({"train": "../train/images", "names": ["a"]}))
    dataset = open_dataset(DataConfig(root=str(root)), "train")
    assert dataset.path(0).resolve() == (root / "train/images/p.jpg").resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": {"x": "a"}}, "must be class indices"),
        ({"names": "a"}, "must list the class names"),
        ({"names": ["a"], "nc": 2}, "nc = 2: must be 1"),
        ({"train": "elsewhere"}, "the training images do not exist .train: elsewhere."),
        ({"kpt_shape": [0]}, "kpt_shape"),
    ],
)
def test_errors_of_the_data_file_are_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": BOX})
    about = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(about | settings))
    with pytest.raises(UserError, match=message) as raised:
        find_layout(root)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------- Pascal VOC
def test_coordinates_of_voc_that_count_from_zero_are_recognised(coco: Path, tmp_path: Path) -> None:
    """A box that starts at 0 proves it; without a proof the devkit's count from 1 holds."""
    root = as_voc(coco, tmp_path / "data", first_pixel=0)
    expected, found = opened(coco), opened(root)
    assert objects(found[0]) != objects(expected[0])
    file = next(
        file for file in sorted((root / "Annotations").glob("val*")) if "<object>" in file.read_text()
    )
    text = file.read_text(encoding="utf-8")
    start, end = text.index("<object>"), text.index("</object>")
    added = (
        "<object><name>apple</name><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    )
    file.write_text(text[:start] + added + text[end:], encoding="utf-8")
    train, val = opened(root)
    assert objects(train) == objects(expected[0])
    assert ("apple", [0, 3, 9, 9]) in [entry for entries in objects(val) for entry in entries]
    assert any("count from 0" in text for text in messages(root))


def test_difficult_objects_of_voc_are_ignored_and_counted(coco: Path, tmp_path: Path) -> None:
    root = as_voc(coco, tmp_path / "data")
    before = open_dataset(DataConfig(root=str(root)), "train").num_objects.sum()
    file = next(file for file in sorted((root / "Annotations").iterdir()) if "<object>" in file.read_text())
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    dataset = open_dataset(DataConfig(root=str(root)), "train")
    assert dataset.num_objects.sum() == before - 1 and dataset.annotations.crowd.sum() == 1
    assert any("1 objects marked as difficult" in text for text in messages(root))


def test_rotated_boxes_of_cvat_are_replaced_by_the_boxes_around_them(coco: Path, tmp_path: Path) -> None:
    """In COCO and VOC files, CVAT writes the box before its rotation, and the angle as an attribute."""
    box = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>24</ymax></bndbox>"
    angle = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes>"
    root = as_voc(coco, tmp_path / "voc")
    for file in (root / "Annotations").iterdir():
        text = re.sub("(?s)<object>.*</object>", "", file.read_text())
        rotated = f"<object><name>apple</name>{box}{angle}</object>"
        file.write_text(text.replace("</annotation>", rotated + "</annotation>"))
    own = shutil.copytree(coco, tmp_path / "coco")
    annotations = own / "annotations/instances_train2017.json"
    tree = json.loads(annotations.read_text())
    apple = next(row["id"] for row in tree["categories"] if row["name"] == "apple")
    tree["annotations"] = [
        {
            "id": image["id"],
            "image_id": image["id"],
            "category_id": apple,
            "bbox": [10, 20, 40, 4],
            "area": 160,
        }
        | {"iscrowd": 0, "attributes": {"occluded": False, "rotation": 90.0}}
        for image in tree["images"]
    ]
    annotations.write_text(json.dumps(tree))
    for found in (root, own):
        entries = [entry for of_image in objects(opened(found)[0]) for entry in of_image]
        assert entries and all(entry == ("apple", [28, 2, 32, 42]) for entry in entries)
        assert any("rotated boxes (of CVAT)" in text for text in messages(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "not a Pascal VOC annotation"),
        (lambda text: text.replace("<xmin>", "<left>").replace("</xmin>", "</left>"), "object 1 of"),
        (lambda text: text.replace("<name>", "<nome>").replace("</name>", "</nome>"), "has category_id None"),
    ],
)
def test_bad_xml_is_reported_with_its_file(change: Any, message: str, coco: Path, tmp_path: Path) -> None:
    root = as_voc(coco, tmp_path / "data")
    file = next(
        file for file in sorted((root / "Annotations").glob("train*")) if "<object>" in file.read_text()
    )
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=message) as raised:
        open_dataset(DataConfig(root=str(root)), "train")
    assert file.name in str(raised.value)


def test_images_of_voc_are_found_by_stem_then_by_the_listed_name(coco: Path, tmp_path: Path) -> None:
    root = as_voc(coco, tmp_path / "data", devkit=False)
    expected = objects(opened(root)[0])
    for file in (root / "train").glob("*.xml"):
        file.rename(file.with_name(f"label_{file.name}"))
    assert objects(opened(root)[0]) == expected
    file = next((root / "train").glob("*.xml"))
    shutil.copy(file, file.with_name(f"copy_{file.name}"))
    with pytest.raises(UserError, match="describe the same image"):
        find_layout(root)


# -------------------------------------------------------------------------------------------------- cache, ambiguity
def test_the_cached_files_follow_the_data(cache: Path, tmp_path: Path) -> None:
    root = yolo(tmp_path / "d", {"p": BOX})
    split = find_split(DataConfig(root=str(root)), "train")
    assert cache in split.annotations.parents and not list(root.glob("**/*.json"))
    written = split.annotations.stat().st_mtime_ns
    find_split(DataConfig(root=str(root)), "train")
    assert split.annotations.stat().st_mtime_ns == written
    (root / "labels/p.txt").write_text("1 0.5 0.5 0.25 0.25")  # of equal length
    assert objects(open_dataset(DataConfig(root=str(root)), "train"))[0][0][0] == "b"
    save_picture(root / "images/p.jpg", size=(32, 24))
    assert open_dataset(DataConfig(root=str(root)), "train").size(0) == (24, 32)
    split.annotations.write_text("{")
    assert len(open_dataset(DataConfig(root=str(root)), "train")) == 1


def test_an_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo(tmp_path / "d", {"p": BOX})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set ATS_DETR_CACHE to a folder that can be written"):
        find_layout(root)


def test_without_supervision_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = yolo(tmp_path / "d", {"p": BOX})
    monkeypatch.setitem(__import__("sys").modules, "supervision.dataset.formats", None)
    with pytest.raises(UserError, match=r"pip install 'ats_detr\[supervision\]'"):
        find_layout(root)


def test_a_folder_with_two_datasets_is_refused_and_explicit_settings_win(coco: Path, tmp_path: Path) -> None:
    root = as_yolo(coco, tmp_path / "d")
    shutil.copytree(coco, root / "coco", dirs_exist_ok=True)
    with pytest.raises(
        UserError, match=r"several datasets: COCO \(coco/annotations/.*\); YOLO \(data\.yaml\)"
    ):
        find_layout(root)
    assert find_layout(root / "data.yaml").title.startswith("YOLO")
    assert find_layout(root / "coco").title.startswith("COCO 2017")
    given = "coco/annotations/instances_train2017.json"
    split = find_split(DataConfig(root=str(root), train_annotations=given), "train")
    assert split.annotations == root / given


def test_a_missing_folder_names_the_datasets_beside_it(coco: Path, tmp_path: Path) -> None:
    as_yolo(coco, tmp_path / "mine")
    as_roboflow(coco, tmp_path / "other")
    with pytest.raises(UserError, match=r"there is no such folder; found .*mine \(YOLO\), .*other \(COCO\)"):
        find_split(DataConfig(root=str(tmp_path / "mien")), "train")
    with pytest.raises(UserError, match=r"does not exist; found train/_annotations"):
        find_split(DataConfig(root=str(tmp_path / "other"), train_annotations="a.json"), "train")


# ------------------------------------------------------------------------------------------------ command line, splits
def test_convert_writes_a_dataset(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = as_yolo(coco, tmp_path / "data")
    main(["datasets", "convert", str(root), str(tmp_path / "out")])
    assert "instances_train.json: 4 images" in capsys.readouterr().out.replace("\n", "")
    for ours, theirs in zip(opened(tmp_path / "out"), opened(coco), strict=True):
        assert objects(ours) == objects(theirs)
    with pytest.raises(UserError, match="choose another folder"):
        main(["datasets", "convert", str(root), str(root / "coco")])
    file = tmp_path / "mine" / "annotations" / "instances_train.json"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=r"instances_train.json: exists already; choose a new folder"):
        main(["datasets", "convert", str(root), str(tmp_path / "mine")])
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.read_text() == "mine"
    with pytest.raises(UserError, match="in COCO's format already"):
        main(["datasets", "convert", str(coco), str(tmp_path / "again")])


def single_file(root: Path, number: int = 40) -> Path:
    """One file; class b in every tenth image, every eighth image without objects, two versions of each of some."""
    data = content()
    data["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    data["images"] = [{"id": i, "file_name": f"p{i}.jpg", "width": 64, "height": 48} for i in range(number)]
    for i in (1, 2, 3)[: number - 1]:
        data["images"][i]["file_name"] = f"p_jpg.rf.{i}abc.jpg"
    data["annotations"] = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1 + (i % 10 == 5),
            "bbox": [5, 6, 20, 30],
            "area": 600,
            "iscrowd": 0,
        }
        for i in range(number)
        if i % 8
    ]
    for image in data["images"]:
        save_picture(root / "images" / image["file_name"])
    (root / "result.json").write_text(json.dumps(data))
    return root


def test_val_share_divides_one_file_reproducibly(tmp_path: Path) -> None:
    root = single_file(tmp_path / "d")
    train, val = opened(root, val_share=0.25)
    names = [{dataset.path(i).name for i in range(len(dataset))} for dataset in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40
    assert len(val) in range(8, 13)
    assert [sum(found[0][0] == "b" for found in objects(dataset) if found) for dataset in (train, val)] == [
        3,
        1,
    ]
    assert sum(not found for found in objects(val)) in (1, 2)
    versions = {f"p_jpg.rf.{i}abc.jpg" for i in (1, 2, 3)}
    assert versions <= names[0] or versions <= names[1], "versions of one image stay together"
    again = opened(root, val_share=0.25)[1]
    assert [again.path(i) for i in range(len(again))] == [val.path(i) for i in range(len(val))]
    other = opened(root, val_share=0.25, split_seed=1)[1]
    assert {other.path(i).name for i in range(len(other))} != names[1]


def test_split_writes_the_division_of_val_share(tmp_path: Path) -> None:
    root = single_file(tmp_path / "d")
    main(["datasets", "split", str(root), str(tmp_path / "out"), "--share", "0.25"])
    for ours, theirs in zip(opened(tmp_path / "out"), opened(root, val_share=0.25), strict=True):
        assert objects(ours) == objects(theirs)
        paths = [[dataset.path(i).resolve() for i in range(len(dataset))] for dataset in (ours, theirs)]
        assert paths[0] == paths[1]


def test_split_never_replaces_its_source(tmp_path: Path) -> None:
    source = single_file(tmp_path / "d") / "annotations" / "instances_train.json"
    source.parent.mkdir(exist_ok=True)
    (whole,) = (tmp_path / "d").glob("*.json")
    whole.rename(source)
    before = source.read_bytes()
    with pytest.raises(UserError, match="would then contain two datasets"):
        main(["datasets", "split", str(source), str(tmp_path / "d")])
    assert source.read_bytes() == before


def test_val_share_of_a_dataset_with_validation_images_is_refused(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has validation images already"):
        opened(coco, val_share=0.2)
    with pytest.raises(UserError, match="leaves none for validation"):
        opened(single_file(tmp_path / "d", number=1), val_share=0.2)


def test_the_test_split_is_found_or_refused(coco: Path, tmp_path: Path) -> None:
    root = as_roboflow(coco, tmp_path / "d")
    with pytest.raises(UserError, match=r"set data\.test_annotations"):
        open_dataset(DataConfig(root=str(root)), "test")
    shutil.copytree(root / "valid", root / "test")
    assert objects(open_dataset(DataConfig(root=str(root)), "test")) == objects(opened(root)[1])
