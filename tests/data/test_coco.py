"""Reading COCO-format data: what is kept, how classes are numbered, and that every mistake is named."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from ats_detr.data.annotations import CocoAnnotations
from ats_detr.data.classes import COCO_2017_IDS, ClassMap
from ats_detr.data.coco import CocoDetection
from ats_detr.data.findings import AnnotationError
from ats_detr.data.images import ImageFileError
from ats_detr.errors import UserError
from tests.data.conftest import annotation_content


def test_objects_are_clipped_and_crowds_and_empty_boxes_dropped(make_dataset):
    dataset = make_dataset()
    assert [dataset.image_id(i) for i in range(2)] == [3, 7]
    boxes, labels = dataset.objects(1)
    assert boxes.tolist() == [[1, 2, 11, 14], [30, 20, 40, 30]]
    assert labels.tolist() == [1, 0]  # categories 20 and 5, numbered in ascending order of their ids
    assert dataset.class_map.names == ("cat", "cup")


def test_images_without_objects_are_kept(make_dataset):
    dataset = make_dataset()
    image, boxes, labels = dataset[0]
    assert image.size == (40, 30)
    assert boxes.shape == (0, 4)
    assert labels.dtype == torch.int64
    assert len(dataset) == 2


def test_ground_truth_of_the_evaluation_equals_pycocotools_reading_of_the_file(coco_tiny):
    file = coco_tiny / "annotations/instances_val2017.json"
    annotations = CocoAnnotations.read(file)
    ours, theirs = COCO(), COCO(file)
    ours.dataset = annotations.by_position(range(len(annotations)))
    ours.createIndex()
    assert annotations.image_ids.tolist() == sorted(theirs.getImgIds())
    category_ids = sorted(theirs.getCatIds())
    assert [ours.cats[i]["name"] for i in sorted(ours.getCatIds())] == [
        theirs.cats[i]["name"] for i in category_ids
    ]
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        own = ours.loadAnns(ours.getAnnIds(imgIds=[index]))
        original = theirs.loadAnns(theirs.getAnnIds(imgIds=[image_id]))
        assert [category_ids[a["category_id"]] for a in own] == [a["category_id"] for a in original]
        fields = ("bbox", "area", "iscrowd")
        assert [[a[f] for f in fields] for a in own] == [[a[f] for f in fields] for a in original]


def test_coco_keeps_the_published_91_rows(coco_tiny):
    dataset = CocoDetection(coco_tiny / "train2017", coco_tiny / "annotations/instances_train2017.json")
    assert dataset.class_map.num_rows == 91
    assert dataset.class_map.rows == tuple(sorted(COCO_2017_IDS))
    assert dataset.class_map.name_of_row(18) == "dog"
    assert dataset.class_map.name_of_row(12) == "row 12"
    objects = [dataset.objects(i) for i in range(len(dataset))]
    assert any(len(labels) == 0 for _, labels in objects)
    labels = torch.cat([labels for _, labels in objects])
    assert set(labels.tolist()) <= COCO_2017_IDS
    assert all((boxes[:, 2:] > boxes[:, :2]).all() for boxes, _ in objects)


def test_class_map_survives_the_checkpoint_and_converts_both_ways():
    class_map = ClassMap.from_categories({30: "b", 4: "a", 100: "c"})
    restored = ClassMap.from_dict(json.loads(json.dumps(class_map.to_dict())))
    assert restored == class_map
    np.testing.assert_array_equal(restored.rows_of(np.array([100, 4, 5])), [2, 0, -1])
    np.testing.assert_array_equal(restored.category_ids_of(np.array([1, 0, 3])), [30, 4, -1])


def test_validation_uses_the_class_map_of_the_model(make_dataset):
    class_map = ClassMap.from_categories({1: "dog", 5: "cat", 20: "cup"})
    _, labels = make_dataset(class_map=class_map).objects(1)
    assert labels.tolist() == [2, 1]


def test_category_ids_outside_the_models_classes_are_refused(make_dataset):
    with pytest.raises(AnnotationError, match=r"outside the model's 1 classes: 5 \(cat\)"):
        make_dataset(class_map=ClassMap.from_categories({20: "cup"}))


def test_category_of_another_name_is_refused(make_dataset):
    with pytest.raises(AnnotationError, match=r"5 \(cat, in the model dog\)"):
        make_dataset(class_map=ClassMap.from_categories({5: "dog", 20: "cup"}))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(make_dataset, mode):
    assert make_dataset(modes=(mode, mode))[0][0].mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("listed_upright", [False, True])
@pytest.mark.parametrize("rule", ["auto", "stored", "upright"])
def test_pixels_are_those_that_the_exif_rule_says(make_dataset, orientation, rule, listed_upright):
    """The second image, of orientation 6, proves by its listed size what the annotation tool showed."""
    dataset = make_dataset()
    exif = Image.Exif()
    marked = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40).astype(np.uint8))
    for path, turn in ((dataset.path(0), orientation), (dataset.path(1), 6)):
        exif[0x0112] = turn
        marked.save(path, exif=exif)
    pixels = Image.open(dataset.path(0)).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(dataset.path(0))).convert("RGB")
    content = annotation_content() | {"annotations": []}
    listed = {7: (30, 40), 3: upright.size} if listed_upright else {7: (40, 30), 3: (40, 30)}
    for image in content["images"]:
        image["width"], image["height"] = listed[image["id"]]
    dataset.annotations.file.write_text(json.dumps(content))
    if rule != "auto" and (rule == "upright") != listed_upright:
        with pytest.raises(UserError, match="is .* pixels but listed as"):
            CocoDetection(dataset.image_folder, dataset.annotations.file, exif=rule).read_image(1)
        return
    read = CocoDetection(dataset.image_folder, dataset.annotations.file, exif=rule).read_image(0)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(upright if listed_upright else pixels))


def test_orientations_without_a_proof_are_read_as_stored_and_counted(make_dataset, caplog):
    dataset = make_dataset()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 30)).save(dataset.path(0), exif=exif)
    with caplog.at_level(logging.WARNING):
        dataset = CocoDetection(dataset.image_folder, dataset.annotations.file)
    assert not dataset.upright.any()
    assert "1 images with an EXIF orientation other than 1, read as stored" in caplog.text
    assert "a.jpg" in caplog.text


def test_sixteen_bit_gray_is_scaled_not_clipped(make_dataset):
    dataset = make_dataset()
    ramp = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(ramp).save(dataset.path(0), format="PNG")
    pixels = np.asarray(dataset.read_image(0))
    np.testing.assert_allclose(pixels[..., 1], ramp / 257, atol=1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json {", "is not JSON"),
        ("[1, 2]", "not a COCO instances file: no list under 'images', 'annotations', 'categories'"),
        ('{"images": [], "categories": []}', "no list under 'annotations'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "lists no images"),
    ],
)
def test_files_that_are_not_coco_are_refused_in_one_line(make_dataset, tmp_path, text, message):
    make_dataset()
    file = tmp_path / "annotations.json"
    file.write_text(text)
    with pytest.raises(AnnotationError, match=message) as raised:
        CocoDetection(tmp_path / "images", file, need_objects=True)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, UserError)


@pytest.mark.parametrize(
    ("key", "field", "value", "message"),
    [
        ("images", "id", 3, r"images\[1\] repeats id 3 of b.jpg"),
        ("annotations", "image_id", 99, r"annotations\[0\] has image_id 99"),
        ("annotations", "image_id", [7], r"annotations\[0\] has image_id \[7\]"),
        ("annotations", "category_id", 6, r"annotations\[0\] has category_id 6, .* \(ids 5..20\)"),
        ("annotations", "bbox", [1, 2, 3], r"annotations\[0\] of b.jpg needs bbox"),
        ("annotations", "bbox", [1, 2, 3, float("nan")], r"annotations\[0\] of b.jpg needs bbox"),
        ("annotations", "bbox", [1, 2, -3, 4], r"annotations\[0\] of b.jpg: bbox .* is negative"),
        ("annotations", "bbox", [50, 2, 3, 4], r"1 boxes outside their image: b.jpg: bbox \[50"),
    ],
)
def test_broken_records_are_named(make_dataset, key, field, value, message):
    content = annotation_content()
    content[key][0][field] = value
    with pytest.raises(AnnotationError, match=message):
        make_dataset(content=content)


def test_missing_folder_and_missing_file_are_named(tmp_path, make_dataset):
    dataset = make_dataset()
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        CocoDetection(tmp_path / "nowhere", dataset.annotations.file)
    with pytest.raises(UserError, match="annotation file .*nothing.json does not exist"):
        CocoDetection(tmp_path, tmp_path / "nothing.json")


def test_bad_records_are_omitted_on_request_and_counted(make_dataset, caplog):
    content = annotation_content()
    content["annotations"] += [{**content["annotations"][0], "id": 10 + i, "image_id": 99} for i in range(3)]
    content["annotations"] += [{**content["annotations"][0], "id": 20, "bbox": [99, 9, 9, 9]}]
    with pytest.raises(
        AnnotationError, match=r"3 annotations of unknown images: annotations\[4\] .* and 2 more"
    ) as raised:
        make_dataset(content=content)
    assert "data.on_bad_annotation=skip" in str(raised.value)
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(content=content, on_bad_annotation="skip")
    assert dataset.num_objects.tolist() == [0, 2]
    assert len(dataset.annotations.by_position([0, 1])["annotations"]) == 4, "evaluated without them, too"
    assert "3 annotations of unknown images (omitted)" in caplog.text
    assert "1 boxes outside their image (omitted)" in caplog.text


@pytest.mark.parametrize("cache_images", [False, True])
def test_missing_image_is_named_at_once_or_left_to_the_loaders(make_dataset, caplog, cache_images):
    whole = make_dataset()
    whole.path(0).unlink()
    folder, file = whole.image_folder, whole.annotations.file
    with pytest.raises(UserError, match=r"1 images that are missing from .*: a\.jpg"):
        CocoDetection(folder, file, cache_images=cache_images)
    with caplog.at_level(logging.WARNING):
        dataset = CocoDetection(folder, file, cache_images=cache_images, on_bad_image="skip")
    assert "1 images that are missing" in caplog.text
    with pytest.raises(ImageFileError, match=r"image .*a\.jpg does not exist"):
        dataset.read_image(0)
    dataset.read_image(1)


def test_a_folder_without_any_of_the_images_is_an_error_even_when_skipping(make_dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFileError, match="none of its 2 images is in"):
        CocoDetection(tmp_path / "empty", make_dataset().annotations.file, on_bad_image="skip")


@pytest.mark.parametrize("cache_images", [False, True])
def test_truncated_image_is_named(make_dataset, cache_images):
    path = make_dataset().path(1)
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    dataset = CocoDetection(path.parent, path.parents[1] / "annotations.json", cache_images=cache_images)
    with pytest.raises(ImageFileError, match=r"image .*b\.jpg cannot be read: .*truncated"):
        dataset.read_image(1)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"images that cannot be read: .*b\.jpg"):
        CocoDetection(path.parent, dataset.annotations.file)


def test_image_of_another_size_than_annotated_is_named(make_dataset):
    dataset = make_dataset()
    Image.new("RGB", (30, 40)).save(dataset.path(0))
    with pytest.raises(ImageFileError, match=r"a\.jpg is 30 x 40 pixels but listed as 40 x 30; .* swapped"):
        dataset.read_image(0)
    with pytest.raises(UserError, match=r"1 images of another size than listed: a\.jpg is 30 x 40"):
        CocoDetection(dataset.image_folder, dataset.annotations.file)


def test_cache_serves_the_same_images_without_the_files(make_dataset):
    dataset = make_dataset(cache_images=True)
    before = [np.asarray(dataset.read_image(i)) for i in range(2)]
    for i in range(2):
        dataset.path(i).unlink()
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(dataset.read_image(i)), before[i])
    assert (
        len(pickle.dumps(dataset)) < 20_000
    )  # workers that do not fork share the block instead of copying it
