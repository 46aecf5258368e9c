"""Pictures show boxes, tokens and budgets at the right positions, measured in pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr.cli.eval import write_pictures
from ats_detr.data.coco import CocoDetection, spread_over_difficulty
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.detector import Detector, Result
from ats_detr.evaluation import AveragePrecision, ImageRecord, Metrics
from ats_detr.model.output import TokenBudget
from ats_detr.visualize import KeptTokens, add_caption, class_colour, draw_kept_tokens, plot_budgets
from tests.small_detector import small_detector


def drawn(image: Image.Image, *rows: tuple[float, int, list[float]], min_score: float = 0.4) -> Image.Image:
    """The image with objects of these scores, labels and boxes."""
    labels = np.array([label for _, label, _ in rows], np.int64)
    return Result(
        source=image,
        name="image 0",
        size=(image.height, image.width),
        boxes_xyxy=np.array([box for *_, box in rows], np.float32).reshape(-1, 4),
        scores=np.array([score for score, *_ in rows], np.float32),
        labels=labels,
        category_ids=labels + 1,
        names=tuple(("cat", "dog")[label] for label in labels),
        budget=TokenBudget(num_valid_tokens=1, num_kept_tokens=1, budget_class=None),
    ).draw(min_score=min_score)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (abs(pixels.astype(int) - colour) <= 12).all(-1)


def test_boxes_above_min_score_are_drawn_at_their_position_in_their_class_colour():
    image = Image.new("RGB", (700, 650))
    picture = np.asarray(drawn(image, (0.9, 0, [100, 200, 300, 400]), (0.1, 1, [500, 500, 600, 600])))
    assert picture.shape == (650, 700, 3)
    ys, xs = near(picture, class_colour(0)).nonzero()
    assert (xs.min(), xs.max(), ys.max()) == (100, 300, 400)
    assert 170 < ys.min() < 200  # the name is above the box
    assert not near(picture, class_colour(1)).any()


def test_small_images_are_enlarged_with_their_boxes():
    picture = drawn(Image.new("RGB", (128, 96)), (0.9, 1, [32, 48, 64, 90]))
    assert picture.size == (128 * 7, 96 * 7)
    _, xs = near(np.asarray(picture)[350:], class_colour(1)).nonzero()  # below the name
    assert (xs.min(), xs.max()) == (32 * 7, 64 * 7)


@pytest.mark.parametrize(
    "box", [[-20, -30, 900, 800], [700, 650, 720, 660], [50, 5, 20, 2], [-9, -9, -5, -5]]
)
def test_degenerate_boxes_and_boxes_outside_the_image_can_be_drawn(box):
    assert drawn(Image.new("RGB", (700, 650)), (0.9, 0, box)).size == (700, 650)


def test_without_detections_the_image_is_unchanged():
    image = Image.effect_noise((640, 640), 50).convert("RGB")
    assert np.array_equal(np.asarray(drawn(image)), np.asarray(image))


def test_discarded_tokens_are_dimmed():
    """A white image of 64 x 96 padded to 64 x 128; kept are tokens of the right part of the fine level only."""
    fine = torch.zeros(8, 16, dtype=torch.bool)
    fine[:, 6:] = True  # columns from 12 on are padding
    kept_S = torch.cat([fine.flatten(), torch.zeros(4 * 8, dtype=torch.bool)])
    kept = KeptTokens.from_flat(kept_S, [(8, 16), (4, 8)], resized_size=(64, 96), padded_size=(64, 128))
    assert [(int(kept.in_image(i).sum()), kept.in_image(i).size) for i in (0, 1)] == [(48, 96), (0, 24)]
    assert [kept.stride(i) for i in (0, 1)] == [8, 16]
    sheet = np.asarray(draw_kept_tokens(Image.new("RGB", (192, 128), "white"), kept, title="t"))
    panels = sheet[:, :840], sheet[:, 840:]
    heights = [(abs(panel - 71.0) < 3).all(-1).any(1).nonzero()[0] for panel in panels]  # 255 * 0.28
    top, bottom = heights[0].min(), heights[0].max()
    widths = (abs(panels[0][top:bottom] - 71.0) < 3).all(-1).any(0).nonzero()[0]
    left = widths.min()
    right = left + 1.5 * (bottom - top)  # the panel has the aspect ratio of the image

    def brightness(x: float, y: float) -> float:
        column, row = left + x / 96 * (right - left), top + y / 64 * (bottom - top)
        return panels[0][round(row), round(column)].mean()

    assert brightness(20, 20) < 90
    assert brightness(44, 60) < 90
    assert brightness(52, 4) > 240
    assert brightness(92, 60) > 240
    dimmed = (abs(panels[1][heights[1].min() : heights[1].max()] - 71.0) < 3).all(-1)
    assert dimmed.mean() > 0.9, "no token of the coarse level is kept"


def test_borders_surround_large_tokens_and_groups_of_small_ones():
    def accent_share(cells: int) -> float:
        kept = KeptTokens((np.ones((cells, cells), bool),), (512, 512), (512, 512))
        sheet = np.asarray(draw_kept_tokens(Image.new("RGB", (64, 64), "white"), kept))
        return near(sheet, (255, 159, 28)).mean()

    assert accent_share(8) > 0.005
    assert accent_share(256) > 0.1
    assert accent_share(400) == 0


def test_a_caption_is_below_the_picture_and_fits_its_width():
    picture = Image.new("RGB", (120, 300), "white")
    captioned = np.asarray(add_caption(picture, "keeps 123 of 4567 tokens (3%), 12 objects"))
    assert captioned.shape[1] == 120
    assert (captioned[:300] == 255).all()
    bar = captioned[300:]
    assert bar[0, 0].tolist() == [34, 48, 60]
    assert (bar > 200).any(), "there is text"
    assert (bar[:, [0, -1]] < 100).all(), "the text does not reach the edge"


def metrics(num_kept: list[int]) -> Metrics:
    records = tuple(
        ImageRecord(
            image_id=i, num_objects=i, num_valid_tokens=100, num_kept_tokens=kept, budget_class=kept // 10
        )
        for i, kept in enumerate(num_kept)
    )
    return Metrics(precision=AveragePrecision(*[0.5] * 6), images=records, num_budgets=0, num_skipped=0)


def test_budget_figure_shows_the_correlation_and_the_means():
    figure = plot_budgets(metrics([10, 20, 30, 40]))
    axis = figure.axes[0]
    assert "Spearman r = 1.00, 4 images" in axis.get_title()
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0, 10], [1, 20], [2, 30], [3, 40]])
    assert math.isclose(axis.lines[1].get_ydata()[0], 25)
    constant = plot_budgets(metrics([10, 10, 10])).axes[0]
    assert "the budget is constant" in constant.get_title()
    assert constant.get_ylim()[1] > 10.5, "the points are inside the axes"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    root = synthetic_dataset(
        tmp_path_factory.mktemp("synthetic"), num_train=1, num_val=9, image_size=64, max_objects=5
    )
    return CocoDetection(root / "val2017", root / "annotations/instances_val2017.json")


def test_chosen_images_span_the_difficulty(dataset):
    chosen = spread_over_difficulty(dataset, 3)
    counts = [len(dataset.objects(i)[1]) for i in chosen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 5)
    assert sorted(spread_over_difficulty(dataset, 100)) == list(range(9))


@pytest.mark.parametrize("selects", [True, False])
def test_pictures_of_every_image_are_written(dataset, tmp_path: Path, selects):
    off = {"selector": None, "encoder_auxiliary": False}
    detector = small_detector(**({} if selects else off))
    root = str(dataset.path(0).parents[1])
    config = replace(
        detector.config, num_pictures=3, data=replace(detector.config.data, root=root, num_workers=0)
    )
    write_pictures(Detector(detector.model, config, dataset.class_map), metrics([10]), tmp_path)
    written = sorted((tmp_path / "pictures").iterdir())
    kinds = ["detections.png", "tokens.png"] if selects else ["detections.png"]
    assert [path.name.split("_")[2] for path in written] == kinds * 3
    first = min(dataset.image_id(i) for i in range(len(dataset)) if len(dataset.objects(i)[1]) == 1)
    assert f"00_{first:06d}_detections.png" in {path.name for path in written}
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
