"""The published resize and augmentation: sizes to the pixel, boxes where the pixels went."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.data.transforms import (
    IMAGE_MEAN,
    IMAGE_STD,
    evaluation_transform,
    image_to_tensor,
    resized_size,
    training_transform,
)

SMALL = {
    "short_sides": (96, 112, 128),
    "long_side": 192,
    "crop_short_sides": (80, 100),
    "crop_size": (64, 90),
}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 800 * 640 / 480 = 1066.67, truncated
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((300, 900), (444, 1332)),  # short side round(1333 * 300 / 900) = 444; the long one 1332, not 1333
        ((800, 900), (800, 900)),
        ((1000, 1000), (800, 800)),
    ],
)
def test_evaluation_sizes_are_the_published_ones(size, expected):
    assert resized_size(size, 800, 1333) == expected


@given(st.integers(50, 3000), st.integers(50, 3000))
def test_resize_keeps_within_the_limits_and_treats_both_orientations_alike(height, width):
    resized = resized_size((height, width), 800, 1333)
    assert resized == resized_size((width, height), 800, 1333)[::-1]
    assert min(resized) <= 800
    # Rounding the short side to nearest may lengthen the long one by half its ratio.
    assert max(resized) <= 1333 + 0.5 * max(height, width) / min(height, width)


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A white rectangle on black: where it is after the transform can be measured in the pixels."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    return image


def measured_box(image_3HW: torch.Tensor) -> torch.Tensor:
    """xyxy of the white pixels, whose luminance fades over at most two pixels at the resampled edges."""
    white = image_3HW[0] * IMAGE_STD[0] + IMAGE_MEAN[0] > 0.5
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(90, 260), st.integers(90, 260), st.data())
def test_boxes_follow_the_pixels_through_every_augmentation(seed, width, height, data):
    left, top = data.draw(st.integers(0, width - 12)), data.draw(st.integers(0, height - 12))
    right, bottom = data.draw(st.integers(left + 12, width)), data.draw(st.integers(top + 12, height))
    box = (left, top, right, bottom)
    torch.manual_seed(seed)
    boxes_in, labels_in = torch.tensor([box]).float(), torch.tensor([3])
    image, boxes, labels = training_transform(**SMALL)(painted(width, height, box), boxes_in, labels_in)
    height_out, width_out = image.shape[-2:]
    assert len(boxes) == len(labels) <= 1
    if len(boxes):
        corners = cxcywh_to_xyxy(boxes)[0] * torch.tensor([width_out, height_out, width_out, height_out])
        assert (corners[2:] > corners[:2]).all()
        if (corners[2:] - corners[:2]).min() > 4:  # slivers may fade below the threshold
            torch.testing.assert_close(measured_box(image), corners, atol=2.0, rtol=0)
    else:
        assert (image * IMAGE_STD[0] + IMAGE_MEAN[0]).max() < 1.5  # the object was cropped away
    assert max(height_out, width_out) <= SMALL["long_side"] + 2


def test_augmentation_uses_flips_crops_and_every_size():
    transform = training_transform(**SMALL)
    image = painted(120, 100, (0, 0, 30, 100))
    torch.manual_seed(0)
    results = [transform(image, torch.tensor([[0.0, 0, 30, 100]]), torch.tensor([1])) for _ in range(200)]
    short_sides = {min(image.shape[-2:]) for image, _, _ in results}
    assert set(SMALL["short_sides"]) <= short_sides
    flipped = sum(len(boxes) > 0 and bool(boxes[0, 0] > 0.6) for _, boxes, _ in results)
    assert 60 < flipped < 140
    cropped = sum(len(boxes) == 0 or abs(float(boxes[0, 2]) - 0.25) > 0.02 for _, boxes, _ in results)
    assert 60 < cropped < 140


def test_same_seed_same_augmentation():
    image, box, label = painted(120, 100, (5, 5, 60, 60)), torch.tensor([[5.0, 5, 60, 60]]), torch.tensor([1])
    pair = []
    for _ in range(2):
        torch.manual_seed(11)
        pair.append(training_transform(**SMALL)(image, box, label))
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


def test_clipped_boxes_stay_and_boxes_cropped_away_go_with_their_labels():
    transform = training_transform((64,), 200, crop_short_sides=(100,), crop_size=(64, 64))
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 100, 100]])
    kept = set()
    for seed in range(30):
        torch.manual_seed(seed)
        _, boxes_out, labels = transform(Image.new("RGB", (100, 100)), boxes, torch.tensor([0, 1]))
        assert labels[-1] == 1
        torch.testing.assert_close(boxes_out[-1], torch.tensor([0.5, 0.5, 1, 1]))
        kept.add(len(labels))
    assert kept == {1, 2}


def test_boxes_beyond_the_image_are_clipped():
    boxes = torch.tensor([[-30.0, 10, 50, 120], [101, 0, 110, 9]])
    _, boxes_out, labels = evaluation_transform(100, 100)(
        Image.new("RGB", (100, 100)), boxes, torch.tensor([4, 5])
    )
    torch.testing.assert_close(boxes_out, torch.tensor([[0.25, 0.55, 0.5, 0.9]]))
    assert labels.tolist() == [4]


def test_images_without_objects_pass():
    image, boxes, labels = training_transform(**SMALL)(
        Image.new("RGB", (100, 120)), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    )
    assert image.ndim == 3
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    expected = (pixels / 255 - IMAGE_MEAN) / IMAGE_STD
    np.testing.assert_allclose(
        image_to_tensor(Image.fromarray(pixels)).numpy(), expected.transpose(2, 0, 1), atol=1e-6
    )


def test_evaluation_transform_resizes_and_scales_boxes():
    image, boxes, _ = evaluation_transform(100, 150)(
        painted(80, 40, (20, 10, 60, 30)), torch.tensor([[20.0, 10, 60, 30]]), torch.tensor([2])
    )
    assert image.shape == (3, 75, 150)
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    torch.testing.assert_close(
        measured_box(image), torch.tensor([37.5, 18.75, 112.5, 56.25]), atol=1.0, rtol=0
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"short_sides": ()},
        {"short_sides": (0,)},
        {"crop_size": (500, 600)},  # larger than the smallest crop_short_sides
        {"crop_size": (600, 384)},
    ],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="short_sides|crop_size"):
        training_transform(**sizes)


def test_rotation_by_90_degrees_moves_boxes_with_the_pixels():
    image, box = painted(120, 80, (10, 10, 50, 50)), torch.tensor([[10.0, 10, 50, 50]])
    transform = training_transform((80,), 200, (), rotate_90=True)
    shapes = set()
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, boxes, _ = transform(image, box, torch.tensor([1]))
        height, width = pixels.shape[1:]
        x, y, w, h = (boxes[0] * torch.tensor([width, height, width, height])).tolist()
        corners = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        torch.testing.assert_close(measured_box(pixels), corners, atol=1e-4, rtol=0)
        shapes.add((tuple(pixels.shape[1:]), round(x), round(y)))
    assert len(shapes) == 8  # four angles, each with and without the flip


def test_colour_jitter_changes_pixels_only():
    image, box = painted(60, 50, (5, 5, 30, 30)), torch.tensor([[5.0, 5, 30, 30]])
    torch.manual_seed(0)
    pixels, boxes, labels = training_transform((50,), 200, (), color_jitter=0.5)(
        image, box, torch.tensor([3])
    )
    plain, _, _ = evaluation_transform(50, 200)(image, box, torch.tensor([3]))
    assert min((pixels - plain).abs().max(), (pixels.flip(-1) - plain).abs().max()) > 0.05
    torch.testing.assert_close(boxes[0, 2:], torch.tensor([25 / 60, 0.5]))
    assert labels.tolist() == [3]
