"""Folders as exporters and users leave them: each image in its split, or one error that names the culprit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ats_detr.cli import main
from ats_detr.config import DataConfig
from ats_detr.data.check import check_dataset, find_splits
from ats_detr.data.coco import CocoDetection
from ats_detr.data.layout import Role, role_of
from ats_detr.data.sources import find_layout, find_split
from ats_detr.errors import UserError
from ats_detr.training.datasets import open_dataset
from tests.data.exporters import content, save_picture

pytest.importorskip("supervision", reason="reads YOLO and VOC labels")

BOX = "0 0.5 0.5 0.25 0.25"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def yolo(images: Path, labels: Path, *names: str, line: str = BOX) -> None:
    for name in names:
        save_picture(images / f"{name}.jpg")
        write(labels / f"{name}.txt", line)


def voc(images: Path, labels: Path, *names: str) -> None:
    for name in names:
        save_picture(images / f"{name}.jpg")
        box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>"
        text = f"<filename>{name}.jpg</filename><size><width>64</width><height>48</height></size>"
        write(labels / f"{name}.xml", f"<annotation>{text}<object><name>a</name>{box}</object></annotation>")


def coco(file: Path, images: Path, *names: str) -> None:
    data = content()
    data["images"] = [
        {"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48} for i, name in enumerate(names)
    ]
    data["annotations"] = [data["annotations"][0] | {"id": i, "image_id": i} for i in range(len(names))]
    write(file, json.dumps(data))
    for name in names:
        save_picture(images / f"{name}.jpg")


def opened(root: Path, role: Role = "train") -> CocoDetection:
    return open_dataset(DataConfig(root=str(root)), role)


def names(root: Path, role: Role = "train") -> list[str]:
    """The images of a split by stem, each of which has one object."""
    dataset = opened(root, role)
    assert dataset.num_objects.tolist() == [1] * len(dataset)
    return [dataset.path(index).stem for index in range(len(dataset))]


# ------------------------------------------------------------------------------------------------------ right splits
def upper_case(root: Path) -> None:
    for split, name in (("Train", "p"), ("Val", "q"), ("TEST", "r")):
        yolo(root / split / "Images", root / split / "Labels", name)
    write(root / "classes.txt", "a\n")


def years(root: Path) -> None:
    yolo(root / "images/train2017", root / "labels/train2017", "p")
    yolo(root / "images/val2017", root / "labels/val2017", "q")
    write(root / "classes.txt", "a\n")


def darknet(root: Path) -> None:
    """CVAT's YOLO 1.1."""
    for split, name in (("train", "p"), ("valid", "q")):
        folder = root / f"obj_{split}_data"
        yolo(folder, folder, name)
        write(root / f"{split}.txt", f"data/obj_{split}_data/{name}.jpg\n")
    write(root / "obj.names", "a\n")
    write(
        root / "obj.data",
        "classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
    )


def darknet_lists(root: Path) -> None:
    yolo(root / "obj", root / "obj", "p", "q")
    write(root / "train.txt", "/content/darknet/data/obj/p.jpg\n")
    write(root / "test.txt", "C:\\darknet\\data\\obj\\q.jpg\n")
    write(root / "obj.names", "a\n")


def darknet_of_roboflow(root: Path) -> None:
    for split, name in (("train", "p"), ("valid", "q")):
        yolo(root / split, root / split, name)
        write(root / split / "_darknet.labels", "a\n")


def labelimg(root: Path) -> None:
    """The list of classes is in every folder of labels."""
    for split, name in (("train", "p"), ("val", "q")):
        yolo(root / "images" / split, root / "labels" / split, name)
        write(root / "labels" / split / "classes.txt", "a\n")


def paths_of_kaggle(root: Path) -> None:
    for split, name in (("train", "p"), ("val", "q")):
        yolo(root / split / "images", root / split / "labels", name)
    write(
        root / "data.yaml",
        "train: /kaggle/input/x/train/images\nval: C:\\x\\val\\images\nnc: 1\nnames: [a]\n",
    )


def unnamed_folder_of_images(root: Path) -> None:
    """Images in a folder that no split is named after are evaluated, not dropped."""
    yolo(root / "images/train", root / "labels/train", "p")
    yolo(root / "images/eval", root / "labels/eval", "q")
    save_picture(root / "docs/logo.png")
    write(root / "classes.txt", "a\n")


def shared_folder_of_labels(root: Path) -> None:
    yolo(root / "train", root / "labels", "p")
    yolo(root / "val", root / "labels", "q")
    write(root / "data.yaml", "train: train\nval: val\nnames: [a]\n")


def notebook(root: Path) -> None:
    for split, name in (("train", "p"), ("valid", "q")):
        coco(root / split / "_annotations.coco.json", root / split, name)
        save_picture(root / split / ".ipynb_checkpoints/p-checkpoint.jpg")
        hidden = root / split / ".ipynb_checkpoints/_annotations.coco-checkpoint.json"
        shutil.copy(root / split / "_annotations.coco.json", hidden)
        write(root / "__MACOSX" / split / "_annotations.coco.json", "x")


def upper_case_coco(root: Path) -> None:
    coco(root / "Annotations/train.json", root / "Images/Train", "p")
    coco(root / "Annotations/val.json", root / "Images/Val", "q")


def deeper_coco(root: Path) -> None:
    for split, name in (("train", "p"), ("valid", "q")):
        coco(root / "Set/export" / split / "_annotations.coco.json", root / "Set/export" / split, name)


def folders_with_longer_names(root: Path) -> None:
    coco(root / "export/my_train/labels.json", root / "export/my_train/data", "p")
    coco(root / "export/my_val/labels.json", root / "export/my_val/data", "q")


def labelme_beside(root: Path) -> None:
    coco(root / "annotations/train.json", root / "images", "p")
    coco(root / "annotations/val.json", root / "images", "q")
    write(root / "annotations/p.json", '{"version": "5.1", "flags": {}, "shapes": [], "imagePath": "p.jpg"}')


def voc_subsets_of_cvat(root: Path) -> None:
    voc(root / "JPEGImages/a", root / "Annotations/a", "p")
    voc(root / "JPEGImages/b", root / "Annotations/b", "q")
    write(root / "ImageSets/Main/Train.txt", "a/p\n")
    write(root / "ImageSets/Main/Validation.txt", "b/q\n")


def voc_names_with_spaces(root: Path) -> None:
    voc(root / "JPEGImages", root / "Annotations", "p 1", "q")
    write(root / "ImageSets/Main/train.txt", "p 1\n")
    write(root / "ImageSets/Main/val.txt", "q  1\n")
    write(root / "ImageSets/Main/a_train.txt", "p 1  1\nq -1\n")


def voc_split_folders(root: Path) -> None:
    for split, name in (("Train", "p"), ("Valid", "q")):
        voc(root / split / "Images", root / split / "annotation", name)
        write(root / split / "annotation" / f"._{name}.xml", "\0")


@pytest.mark.parametrize(
    "layout",
    [
        upper_case, years, darknet, darknet_lists, darknet_of_roboflow, labelimg, paths_of_kaggle,
        unnamed_folder_of_images, shared_folder_of_labels, notebook, upper_case_coco, deeper_coco,
        folders_with_longer_names, labelme_beside,
        voc_subsets_of_cvat, voc_names_with_spaces, voc_split_folders,
    ],
)  # fmt: skip
def test_each_split_has_its_images(layout: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "d"
    layout(root)
    found = names(root), names(root, "val")
    assert found in ((["p"], ["q"]), (["p 1"], ["q"]))


@pytest.mark.parametrize("form", ["yolo", "voc", "coco"])
def test_symbolic_links_are_followed_once(form: str, tmp_path: Path) -> None:
    pool, root = tmp_path / "pool", tmp_path / "d"
    root.mkdir()
    if form == "coco":
        coco(pool / "labels.json", pool / "data", "p", "q")
        os.symlink(pool, root / "linked")
    else:
        images, labels = ("images", "labels") if form == "yolo" else ("JPEGImages", "Annotations")
        {"yolo": yolo, "voc": voc}[form](pool / images, pool / labels, "p", "q")
        os.symlink(pool / images, root / images)
        os.symlink(pool / labels, root / labels)
        write(root / "classes.txt", "a\n")
    os.symlink(root, root / "loop")
    assert names(root) == ["p", "q"]


def test_the_folder_of_the_labels_means_its_dataset(tmp_path: Path) -> None:
    voc(tmp_path / "d/JPEGImages", tmp_path / "d/Annotations", "p", "q")
    write(tmp_path / "d/ImageSets/Main/train.txt", "p\n")
    write(tmp_path / "d/ImageSets/Main/val.txt", "q\n")
    assert names(tmp_path / "d/Annotations") == ["p"]


@pytest.mark.parametrize("root_name", ["my_test", "val", "train_and_more"])
def test_the_name_of_the_dataset_is_no_split(root_name: str, tmp_path: Path) -> None:
    coco(tmp_path / "coco" / root_name / "labels.json", tmp_path / "coco" / root_name / "data", "p", "q")
    yolo(tmp_path / root_name / "images", tmp_path / root_name / "labels", "p", "q")
    write(tmp_path / root_name / "classes.txt", "a\n")
    (tmp_path / "above").mkdir()
    shutil.copytree(tmp_path / "coco" / root_name, tmp_path / "above/my test project")
    for root in (tmp_path / "coco" / root_name, tmp_path / root_name, tmp_path / "above"):
        assert [split.role for split in find_layout(root).splits] == [None] and names(root) == ["p", "q"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Train", "train"), ("val2017", "val"), ("validation", "val"), ("obj_train_data", "train"),
        ("test-dev2017", "test"), ("trainval", "train"), ("train_images", "train"), ("images", None),
        ("latest", None), ("test_of_lamps", None), ("aeroplane_train", None), ("training data of 2020", None),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, role: Role | None) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize("only", ["test", "valid"])
@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_no_other_split_is_trained_on(form: str, only: str, tmp_path: Path) -> None:
    root = tmp_path / "d"
    if form == "coco":
        coco(root / only / "_annotations.coco.json", root / only, "p", "q")
    else:
        yolo(root / only / "images", root / only / "labels", "p", "q")
        write(root / "data.yaml", f"{only}: ../{only}/images\nnames: [a]\n")
    with pytest.raises(
        UserError, match=r"no file to train on, only .*set data\.train_annotations="
    ) as raised:
        opened(root)
    assert names(root, "val") == ["p", "q"]
    splits = find_splits(root)
    check_dataset(splits)
    assert any("no file to train on" in str(finding) for finding in splits[0].findings.of("error"))
    settings = dict(text.split("=") for text in str(raised.value).split() if text.startswith("data.train_"))
    config = DataConfig(
        root=str(root), **{key.removeprefix("data."): value for key, value in settings.items()}
    )
    assert len(open_dataset(config, "train")) == 2, "the fix that the message names"
    file = find_split(DataConfig(root=str(root)), "val").annotations
    if form == "coco":
        assert names(file) == ["p", "q"], "a file that is given itself is trained on"


# ---------------------------------------------------------------------------------------------------------- contents
def test_boxes_of_yolo_refer_to_upright_images_of_any_orientation(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for orientation, size in ((2, (64, 48)), (3, (64, 48)), (4, (64, 48)), (6, (48, 48)), (8, (64, 48))):
        yolo(root / "images", root / "labels", f"p{orientation}")
        save_picture(root / f"images/p{orientation}.jpg", size=size, orientation=orientation)
    write(root / "classes.txt", "a\n")
    assert opened(root).upright.all()
    main(["datasets", "convert", str(root), str(tmp_path / "coco")])
    assert opened(tmp_path / "coco").upright.all()
    main(["datasets", "split", str(root), str(tmp_path / "split")])
    assert opened(tmp_path / "split").upright.all() and opened(tmp_path / "split", "val").upright.all()
    stored = open_dataset(DataConfig(root=str(root), exif="stored", on_bad_image="skip"), "train")
    assert not stored.upright.any()


def test_names_of_classes_are_texts(tmp_path: Path) -> None:
    listed = ("yes", "no", "007", "1.0", "null", "2024-01-01", "0x10")
    yolo(tmp_path / "d/images", tmp_path / "d/labels", "p", "q", line=f"6{BOX[1:]}")
    for text in (f"[{', '.join(listed)}]", "".join(f"\n  {i}: {name}" for i, name in enumerate(listed))):
        write(tmp_path / "d/data.yaml", f"train: images\nval: ~\ntest:\nnc: {len(listed)}\nnames: {text}\n")
        assert opened(tmp_path / "d").class_map.names == listed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 .5 .5 .5 .5 .4 .4 2 .6 .6 1", r"kpt_shape: \[2, 3\]"),
        (f"0 .5 .5 .5 .5 {'.4 .4 2 ' * 17}", r"kpt_shape: \[17, 3\]"),
    ],
)
def test_poses_without_their_shape_are_errors(line: str, message: str, tmp_path: Path) -> None:
    yolo(tmp_path / "d/images", tmp_path / "d/labels", "p", "q", line=line)
    write(tmp_path / "d/data.yaml", "train: images\nnames: [a]\n")
    with pytest.raises(UserError, match=f"look like boxes with keypoints; set {message}"):
        find_layout(tmp_path / "d")
    shape = [2, 3] if "17" not in message else [17, 3]
    write(tmp_path / "d/data.yaml", f"train: images\nnames: [a]\nkpt_shape: {shape}\n")
    assert opened(tmp_path / "d").objects(0)[0].tolist() == [[16, 12, 48, 36]]
    write(tmp_path / "d/data.yaml", "train: images\nnames: [a]\nkpt_shape: [5, 3]\n")
    with pytest.raises(UserError, match=r"labels/p\.txt:1"):
        opened(tmp_path / "d")


@pytest.mark.parametrize(
    ("line", "warns"),
    [
        ("0 .5 .5 .5 .5 .4 .4 .6 .6", True),
        ("0 .2 .3 .6 .3 .6 .7 .2 .7", False),
        ("0 0 0 1 0 1 1 0 1 0 0", False),
    ],
)
def test_polygons_that_may_be_poses_are_reported(line: str, warns: bool, tmp_path: Path) -> None:
    yolo(tmp_path / "d/images", tmp_path / "d/labels", "p", "q", line=line)
    write(tmp_path / "d/data.yaml", "train: images\nnames: [a]\n")
    assert any("may be boxes with keypoints" in str(f) for f in opened(tmp_path / "d").findings) == warns


def test_names_that_are_not_utf_8_and_quoted_names_are_found(tmp_path: Path) -> None:
    root = tmp_path / "d"
    yolo(root / "images", root / "labels", "p 1", "q")
    (root / "labels/p 1.txt").rename(root / "labels/p%201.txt")
    for folder, suffix in (("images", ".jpg"), ("labels", ".txt")):
        try:
            os.rename(root / folder / f"q{suffix}", os.fsencode(root / folder) + b"/q\xff" + suffix.encode())
        except OSError:
            pytest.skip("the file system has names in UTF-8 only")
    write(root / "classes.txt", "a\n")
    write(root / "notes.json", '{"categories": [], "info": {}}')
    assert len(names(root)) == 2


def test_images_in_folders_without_labels_are_no_background(tmp_path: Path) -> None:
    yolo(tmp_path / "d/images", tmp_path / "d/labels", "p", "q")
    save_picture(tmp_path / "d/predictions/pictures/p.jpg")
    write(tmp_path / "d/classes.txt", "a\n")
    assert names(tmp_path / "d") == ["p", "q"]


def test_images_that_share_labels_are_reported(tmp_path: Path) -> None:
    yolo(tmp_path / "d/images", tmp_path / "d/labels", "p", "q")
    save_picture(tmp_path / "d/images/p.png")
    write(tmp_path / "d/data.yaml", "train: images\nval: images\nnames: [a]\n")
    found = [str(finding) for finding in opened(tmp_path / "d").findings]
    assert any("2 images that share a label file with another image: images/p.jpg" in text for text in found)


# ------------------------------------------------------------------------------------------------------------ errors
def two_lists_of_classes(root: Path) -> None:
    labelimg(root)
    write(root / "labels/val/classes.txt", "b\na\n")


def only_one_folder_of_two_splits(root: Path) -> None:
    yolo(root / "images", root / "labels", "p")
    write(root / "data.yaml", "train: /x/images\nval: /y/other/images\nnames: [a]\n")


def split_without_images(root: Path) -> None:
    yolo(root / "valid/images", root / "valid/labels", "p")
    (root / "train/images").mkdir(parents=True)
    write(root / "data.yaml", "train: train/images\nval: valid/images\nnames: [a]\n")


def damaged_data_file(root: Path) -> None:
    yolo(root / "images", root / "labels", "p")
    write(root / "data.yaml", "train: images\nnames: [a\n")


def missing_images(root: Path) -> None:
    write(root / "valid.txt", "obj_valid_data/p.jpg\n")
    write(root / "obj.names", "a\n")
    write(root / "obj.data", "names = obj.names\nvalid = missing.txt\n")


def list_of_missing_images(root: Path) -> None:
    write(root / "labels/train/p.txt", BOX)
    write(root / "train.txt", "data/images/train/p.jpg\n")
    write(root / "data.yaml", "train: train.txt\nnames: [a]\n")


def xml_of_cvat(root: Path) -> None:
    write(root / "annotations.xml", "<?xml version='1.0'?><annotations><image name='p.jpg'/></annotations>")


def json_of_labelme(root: Path) -> None:
    for i in range(60):
        write(root / f"annotations/{i}.json", '{"version": "5.1", "flags": {}, "shapes": []}')


def coco_file_per_image(root: Path) -> None:
    for i in range(60):
        write(root / f"labels/{i}.json", json.dumps(content()))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (two_lists_of_classes, r"several datasets: YOLO \(labels/train/classes.txt\); YOLO"),
        (only_one_folder_of_two_splits, r"data.yaml: of the splits /x/images and /y/other/images only .* exists"),
        (split_without_images, r"training images do not exist \(train: train/images, without images\)"),
        (damaged_data_file, r"data.yaml, line 3: not YAML"),
        (list_of_missing_images, r"none of the 1 images of the split 'train' exists, first data/images"),
        (missing_images, "obj.data: no images of this YOLO dataset were found"),
        (xml_of_cvat, "annotations.xml is XML of another format than Pascal VOC"),
        (json_of_labelme, "annotations/0.json is JSON without the lists of a COCO file"),
        (coco_file_per_image, r"60 COCO annotation files \(labels/0.json, .* and 55 more\); must be at most 50"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_one_error(
    layout: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    layout(tmp_path / "d")
    with pytest.raises(UserError, match=message) as raised:
        find_layout(tmp_path / "d")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


def test_a_damaged_annotation_file_is_not_ignored(tmp_path: Path) -> None:
    coco(tmp_path / "d/annotations/train.json", tmp_path / "d/images", "p")
    write(tmp_path / "d/annotations/val.json", '{"images": [')
    with pytest.raises(UserError, match=r"val\.json is not JSON"):
        opened(tmp_path / "d", "val")


def test_every_path_to_a_dataset_shares_its_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "d"
    yolo(root / "images", root / "labels", *"pqrst")
    write(root / "data.yaml", "train: images\nnames: [a]\n")
    os.symlink(root, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    written: set[Any] = set()
    for path in (
        root,
        Path("d"),
        Path("./link/../d"),
        tmp_path / "link",
        root / "data.yaml",
        Path("d/data.yaml"),
    ):
        for share in (None, 0.4):
            file = find_split(DataConfig(root=str(path), val_share=share), "train").annotations
            written.add((file, file.stat().st_mtime_ns))
    assert len(written) == 2


@pytest.mark.parametrize("action", ["convert", "split"])
@pytest.mark.parametrize("out", ["d", "d/out", "."])
def test_no_dataset_is_written_into_or_around_another(action: str, out: str, tmp_path: Path) -> None:
    root = tmp_path / "d"
    yolo(root / "images", root / "labels", "p", "q")
    write(root / "data.yaml", "train: images\nnames: [a]\n")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=r"would then contain two datasets, .*choose another folder"):
        main(["datasets", action, str(root), str(tmp_path / out)])
    assert sorted(root.rglob("*")) == before


# ---------------------------------------------------------------------------------------------- contradictory folders
def notes(root: Path) -> str:
    """What the converted training file says about its data."""
    info = json.loads(find_split(DataConfig(root=str(root)), "train").annotations.read_text())["info"]
    return str(info)


def test_the_path_of_yolo_comes_before_the_folder_of_the_data_file(tmp_path: Path) -> None:
    root = tmp_path / "data"
    yolo(root / "images/train", root / "labels/train", "old")
    yolo(root / "v2/images/train", root / "v2/labels/train", "new")
    write(root / "data.yaml", "path: v2\ntrain: images/train\nnames: [a]\n")
    assert names(root) == ["new"]


def test_labels_of_yolo_come_before_other_annotations(tmp_path: Path) -> None:
    root = tmp_path / "data"
    yolo(root / "images", root / "annotations", "p", line="1 0.5 0.5 0.1 0.1")
    yolo(root / "images", root / "labels", "p")
    write(root / "data.yaml", "train: images\nnames: [a, b]\n")
    dataset = opened(root)
    assert dataset.class_map.name_of_row(int(dataset.objects(0)[1][0])) == "a"


def test_validation_images_of_yolo_below_train_are_not_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "data"
    yolo(root / "images", root / "labels", "p")
    yolo(root / "images/val", root / "labels/val", "q")
    write(root / "data.yaml", "train: images\nval: images/val\nnames: [a]\n")
    assert names(root) == ["p"] and names(root, "val") == ["q"]
    assert "not trained on" in notes(root) and "images/val/q.jpg" in notes(root)
    write(root / "data.yaml", "train: images/val\nval: images\nnames: [a]\n")
    with pytest.raises(UserError, match="all training images are in other splits"):
        opened(root)


def test_a_validation_split_equal_to_train_is_none(tmp_path: Path) -> None:
    root = tmp_path / "data"
    yolo(root / "images", root / "labels", "p", "q", "r", "s")
    write(root / "data.yaml", "train: images\nval: images\nnames: [a]\n")
    assert len(opened(root)) == 4 and "data.val_share" in notes(root)
    config = DataConfig(root=str(root), val_share=0.25)
    assert [len(open_dataset(config, "train")), len(open_dataset(config, "val"))] == [3, 1]


def test_xml_that_names_another_image_is_noted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    voc(root / "images", root / "annotations", "p", "q")
    file = root / "annotations/p.xml"
    assert "the stem counts" not in notes(root)
    file.write_text(file.read_text().replace("p.jpg", "q.jpg"))
    assert "the stem counts" in notes(root) and "annotations/p.xml" in notes(root)
