"""Loaders: every image exactly once, nothing depends on batch mates or workers, bad images are named or
passed over.
"""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from ats_detr.batch import ImageBatch, bucket_size
from ats_detr.data.coco import CocoDetection, ImageFileError
from ats_detr.data.loader import EvaluationLoader, TrainingLoader
from ats_detr.data.transforms import resized_size, training_transform
from ats_detr.errors import UserError

SMALL = {"short_sides": (48, 64), "long_side": 128, "crop_short_sides": (50,), "crop_size": (32, 48)}
EVALUATION = {"short_side": 48, "long_side": 96, "size_multiple": 32}


def training_loader(dataset: CocoDetection, **options) -> TrainingLoader:
    return TrainingLoader(dataset, training_transform(**SMALL), **{"batch_size": 4, "seed": 1} | options)


def ids(batches) -> list[int]:
    return [target.image_id for _, targets in batches for target in targets]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 5)])
def test_evaluation_shards_hold_every_image_exactly_once(varied, world_size, batch_size):
    seen = Counter()
    for rank in range(world_size):
        loader = EvaluationLoader(
            varied, batch_size=batch_size, rank=rank, world_size=world_size, **EVALUATION
        )
        assert len(list(loader)) == len(loader)
        seen.update(ids(loader))
    assert seen == Counter(varied.image_id(i) for i in range(31))


def test_an_image_is_padded_the_same_alone_and_in_any_batch_and_order(varied):
    alone = {
        i: next(iter(EvaluationLoader(varied, indices=[i], **EVALUATION)))[0] for i in range(len(varied))
    }
    assert len({batch.images_B3HW.shape[-2:] for batch in alone.values()}) > 3
    order = np.random.default_rng(0).permutation(len(varied)).tolist()
    num_compared = 0
    for batch, targets in EvaluationLoader(varied, batch_size=5, indices=order, **EVALUATION):
        for image, size, target in zip(batch.images_B3HW, batch.sizes, targets, strict=True):
            index = target.image_id - 1
            assert torch.equal(image, alone[index].images_B3HW[0])
            assert size == alone[index].sizes[0] == resized_size(varied.size(index), 48, 96)
            assert tuple(image.shape[-2:]) == bucket_size(size, 32)
            num_compared += 1
    assert num_compared == len(varied)


def test_targets_of_the_evaluation_are_in_original_pixels_and_class_rows(varied):
    for _, targets in EvaluationLoader(varied, batch_size=4, **EVALUATION):
        for target in targets:
            boxes, labels = varied.objects(target.image_id - 1)
            height, width = target.original_size
            assert torch.equal(target.labels_N, labels)
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / torch.tensor([width, height])
            torch.testing.assert_close(target.boxes_N4[:, :2], centres)


def test_training_epoch_visits_images_at_most_once_and_reshuffles(varied):
    loader = training_loader(varied)
    assert len(loader) == 7
    epochs = [ids(loader.epoch(epoch)) for epoch in range(2)]
    for seen in epochs:
        assert len(seen) == len(set(seen)) == 28
    assert epochs[0] != epochs[1]


def test_ranks_share_the_global_batches_of_one_process(varied):
    single = training_loader(varied, batch_size=6)
    pair = [training_loader(varied, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    assert [len(loader) for loader in pair] == [len(single)] * 2
    for whole, first, second in zip(*(loader.epoch(3) for loader in (single, *pair)), strict=True):
        parts = [ids([first]), ids([second])]
        assert ids([whole])[0::2] == parts[0]
        assert ids([whole])[1::2] == parts[1]
        # The augmentation of an image is the same too.
        for i, size in enumerate(whole[0].sizes):
            assert size == (first, second)[i % 2][0].sizes[i // 2]


def test_batches_group_similar_aspect_ratios(varied):
    """Random batches of this set mix portrait and landscape; grouped ones do so only in the left-overs."""
    sizes = varied.annotations.sizes
    landscape = sizes[:, 1] >= sizes[:, 0]
    batches = training_loader(varied, batch_size=3).global_batches(0)
    mixed = [len(set(landscape[batch].tolist())) == 2 for batch in batches]
    assert sum(mixed) <= 3
    assert not any(mixed[:6])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_can_be_resumed_in_the_middle_to_the_pixel(varied, num_workers):
    whole = list(training_loader(varied).epoch(5))
    rest = list(training_loader(varied, num_workers=num_workers).epoch(5, start=3))
    assert len(rest) == len(whole) - 3
    for (a, targets_a), (b, targets_b) in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.images_B3HW, b.images_B3HW)
        assert all(torch.equal(x.boxes_N4, y.boxes_N4) for x, y in zip(targets_a, targets_b, strict=True))


def test_loading_leaves_the_random_numbers_of_training_alone(varied):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in training_loader(varied).epoch(0):
        pass
    assert torch.equal(torch.rand(3), expected)


def test_augmentation_differs_between_images_epochs_and_seeds(varied):
    def draw(image, boxes, labels):
        return torch.rand(3, 1, 1), boxes, labels

    drawn = [
        float(image[0])
        for seed in range(2)
        for epoch in range(2)
        for batch, _ in TrainingLoader(varied, draw, batch_size=4, seed=seed).epoch(epoch)
        for image in batch.images_B3HW
    ]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 28


def test_images_without_objects_reach_training(varied):
    empty = {i + 1 for i in range(len(varied)) if len(varied.objects(i)[1]) == 0}
    assert empty
    loader = training_loader(varied, batch_size=31)
    targets = next(loader.epoch(0))[1]
    assert all(target.boxes_N4.shape == (len(target.labels_N), 4) for target in targets)
    assert empty <= {target.image_id for target in targets}


def test_too_few_images_for_a_batch_is_an_error(varied):
    with pytest.raises(UserError, match="31 training images do not fill one batch of 16 x 2 processes"):
        training_loader(varied, batch_size=16, world_size=2)


@pytest.fixture
def damaged(tmp_path, varied) -> CocoDetection:
    """A copy of `varied` whose image 3 is cut in half."""
    for i in range(len(varied)):
        content = varied.path(i).read_bytes()
        (tmp_path / varied.path(i).name).write_bytes(content[: len(content) // 2] if i == 2 else content)
    return CocoDetection(tmp_path, varied.annotations.file)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_image_stops_with_one_line_that_names_it(damaged, num_workers):
    loaders = (
        training_loader(damaged, batch_size=31, num_workers=num_workers).epoch(0),
        EvaluationLoader(damaged, num_workers=num_workers, **EVALUATION),
    )
    for loader in loaders:
        with pytest.raises(ImageFileError, match=r"image .*000003\.jpg cannot be read") as raised:
            list(loader)
        assert "\n" not in str(raised.value)


def test_damaged_image_is_skipped_counted_and_replaced_in_training(damaged, caplog):
    dataset = CocoDetection(damaged.image_folder, damaged.annotations.file, on_bad_image="skip")
    evaluation = EvaluationLoader(dataset, batch_size=4, **EVALUATION)
    with caplog.at_level(logging.WARNING):
        assert sorted(ids(evaluation)) == [i for i in range(1, 32) if i != 3]
        training = training_loader(dataset, batch_size=31)
        for epoch in range(2):
            seen = ids(training.epoch(epoch))
            assert len(seen) == 31
            assert Counter(seen)[4] == 2
    assert caplog.text.count("000003.jpg") == 2  # once per loader, not once per epoch


def test_real_images_load_and_batch(coco_tiny):
    dataset = CocoDetection(coco_tiny / "train2017", coco_tiny / "annotations/instances_train2017.json")
    transform = training_transform((160, 192), 320, (140, 160), (128, 160))
    batch, targets = next(TrainingLoader(dataset, transform, batch_size=8).epoch(0))
    assert isinstance(batch, ImageBatch)
    assert len(batch) == len(targets) == 8
    assert batch.images_B3HW.isfinite().all()
    assert all((t.boxes_N4 >= 0).all() and (t.boxes_N4 <= 1).all() for t in targets)
    seen = ids(EvaluationLoader(dataset, short_side=160, long_side=320, batch_size=4))
    assert sorted(seen) == dataset.annotations.image_ids.tolist()
