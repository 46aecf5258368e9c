"""The synthetic dataset: reproducible, exact boxes, difficulty as promised, safe to make from several
processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ats_detr.data import synthetic
from ats_detr.data.coco import CocoDetection
from ats_detr.data.synthetic import (
    CLASSES,
    MIN_SIDE,
    MIN_VISIBLE,
    draw_image,
    spread_counts,
    synthetic_dataset,
)
from ats_detr.errors import UserError

TINY = {"num_train": 5, "num_val": 3, "image_size": 64, "max_objects": 4}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 25), st.integers(1, len(CLASSES)))
def test_images_hold_exactly_the_promised_objects(seed, num_objects, num_classes):
    drawn = draw_image(np.random.default_rng(seed), (128, 128), num_objects, num_classes)
    assert drawn.pixels.shape == (128, 128, 3)
    assert len(drawn.classes) == len(drawn.boxes_xyxy) == len(drawn.areas) == num_objects
    assert ((drawn.classes >= 0) & (drawn.classes < num_classes)).all()
    sides = drawn.boxes_xyxy[:, 2:] - drawn.boxes_xyxy[:, :2]
    assert (drawn.boxes_xyxy >= 0).all()
    assert (drawn.boxes_xyxy <= 128).all()
    assert (sides > 0).all()
    assert (drawn.areas <= sides.prod(1)).all()
    # The thinnest class covers an eighth of its side squared; MIN_VISIBLE of that stays in sight.
    assert (drawn.areas >= MIN_VISIBLE * MIN_SIDE**2 / 8).all()


def test_boxes_are_tight_around_the_visible_pixels():
    """Painting the topmost object in another colour shows which pixels are its own."""
    rng_seed, num_objects = 3, 6
    drawn = draw_image(np.random.default_rng(rng_seed), (96, 160), num_objects, 4)
    painted = []
    original = synthetic._colours

    def record_and_paint(rng, background):
        painted.append(len(painted))
        colour, texture = original(rng, background)
        if len(painted) == num_objects:  # the last object, which lies on top, in a colour nothing else has
            colour = texture = np.array([255, 0, 255], np.float32)
        return colour, texture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_colours", record_and_paint)
        marked = draw_image(np.random.default_rng(rng_seed), (96, 160), num_objects, 4)
    np.testing.assert_array_equal(marked.boxes_xyxy, drawn.boxes_xyxy)
    distance = abs(marked.pixels.astype(int) - [255, 0, 255]).sum(-1)
    changed = abs(drawn.pixels.astype(int) - marked.pixels.astype(int)).sum(-1) > 0
    ys, xs = np.nonzero(changed)
    left, top, right, bottom = drawn.boxes_xyxy[-1]
    # Antialiasing tints pixels less than half covered, one beyond the box at most.
    assert (
        abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - [left, top, right, bottom]).max()
        <= 1
    )
    inside = (distance < 5).sum()
    assert 0.6 * drawn.areas[-1] <= inside <= drawn.areas[-1]


def test_crowded_images_have_smaller_objects():
    sides = []
    for num_objects in (1, 5, 25):
        drawn = [
            draw_image(np.random.default_rng([num_objects, i]), (128, 128), num_objects, 4) for i in range(10)
        ]
        boxes = np.concatenate([image.boxes_xyxy for image in drawn])
        sides.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)).mean())
    assert sides[0] > 1.7 * sides[1] > 2.8 * sides[2]
    assert sides[2] > 11


@pytest.mark.parametrize("num_images", [60, 250, 4000])
def test_counts_cover_the_whole_range_and_favour_few(num_images):
    counts = spread_counts(np.random.default_rng(0), num_images, 1, 25)
    assert set(counts.tolist()) == set(range(1, 26))
    assert 6 <= np.median(counts) <= 8


def test_same_arguments_same_images_and_other_seed_other_images(tmp_path):
    first, second = (synthetic_dataset(tmp_path / name, **TINY) for name in ("a", "b"))
    other = synthetic_dataset(tmp_path / "a", **TINY, seed=1)
    names = sorted(str(file.relative_to(first)) for file in first.rglob("*") if file.is_file())
    assert len(names) == 10
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    image = "train2017/000001.jpg"
    assert (first / image).read_bytes() != (other / image).read_bytes()
    assert (first / image).read_bytes() != (first / image.replace("train", "val")).read_bytes()


def test_cache_is_reused_and_nothing_unfinished_is_left(tmp_path):
    root = synthetic_dataset(tmp_path, **TINY)
    written = (root / "annotations/instances_val2017.json").stat().st_mtime_ns
    assert synthetic_dataset(tmp_path, **TINY) == root
    assert (root / "annotations/instances_val2017.json").stat().st_mtime_ns == written
    assert os.listdir(tmp_path) == [root.name]


def test_two_processes_at_once_end_with_one_complete_dataset(tmp_path):
    (tmp_path / ".synthetic-v1-other-abcd" / "train2017").mkdir(parents=True)  # of a killed process
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=synthetic_dataset, args=(tmp_path,), kwargs=TINY) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (folder,) = os.listdir(tmp_path)
    assert len(list((tmp_path / folder / "train2017").iterdir())) == 5


def test_dataset_opens_as_coco_and_ground_truth_is_where_the_objects_are(tmp_path):
    root = synthetic_dataset(tmp_path, num_train=4, num_val=12, max_aspect_ratio=2.0)
    dataset = CocoDetection(root / "val2017", root / "annotations/instances_val2017.json")
    assert dataset.class_map.names == tuple(name for name, _, _ in CLASSES[:4])
    sizes = [dataset.size(i) for i in range(len(dataset))]
    assert len(set(sizes)) > 6
    assert all(1 / 2.1 < height / width < 2.1 for height, width in sizes)
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    assert len(content["images"]) == 12
    contrasts = []
    for i in range(len(dataset)):
        image, boxes, _ = dataset[i]
        gray = np.asarray(image.convert("L"), float)
        mask = np.zeros(gray.shape, bool)
        for left, top, right, bottom in boxes.int().tolist():
            mask[top:bottom, left:right] = True
        contrasts.append(gray[mask].std() / gray[~mask].std())
    assert np.mean(contrasts) > 1.8  # objects stand out; background is softer than what the boxes hold


def test_drawing_is_fast_enough_for_the_quickstart():
    started = time.perf_counter()
    for i in range(50):
        draw_image(np.random.default_rng(i), (128, 128), 9, 4)
    assert time.perf_counter() - started < 2.5  # about 0.1 s on an idle core


@pytest.mark.parametrize(
    "options",
    [
        {"num_val": 0},
        {"num_classes": 9},
        {"min_objects": 5, "max_objects": 4},
        {"image_size": 64, "max_objects": 25},
        {"max_aspect_ratio": 0.5},
    ],
)
def test_impossible_datasets_are_refused(tmp_path, options):
    with pytest.raises(UserError, match="synthetic"):
        synthetic_dataset(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_unwritable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write the synthetic dataset to .*file"):
        synthetic_dataset(tmp_path / "file", **TINY)


def test_disk_full_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        synthetic_dataset(tmp_path, **TINY)
    assert not list(tmp_path.iterdir())
