"""Pictures show the right thing at the right place, measured in their pixels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ats_detr.batch import ImageBatch
from ats_detr.data.coco import ClassMap, CocoDetection
from ats_detr.data.loader import EvaluationLoader
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.evaluation import AveragePrecision, ImageRecord, Metrics
from ats_detr.kernels import TokenPlan
from ats_detr.model.output import Detections, DetectorOutput, Prediction, TokenScores
from ats_detr.visualize import (
    KeptTokens,
    class_colour,
    draw_detections,
    draw_kept_tokens,
    plot_budgets,
    save_pictures,
    spread_over_difficulty,
)

CLASSES = ClassMap.from_categories({1: "cat", 2: "dog"})


def detections(*rows: tuple[float, int, list[float]]) -> Detections:
    scores, labels, boxes = zip(*rows, strict=True)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).float())


def pixels_of(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (abs(pixels.astype(int) - colour) <= 12).all(-1)


def test_boxes_are_drawn_in_their_class_colour_at_their_place_and_weak_ones_are_not():
    image = Image.new("RGB", (700, 650))
    picture = np.asarray(
        draw_detections(
            image,
            detections((0.9, 0, [100, 200, 300, 400]), (0.1, 1, [500, 500, 600, 600])),
            CLASSES,
        )
    )
    assert picture.shape == (650, 700, 3)
    ys, xs = near(picture, class_colour(0)).nonzero()
    assert (xs.min(), xs.max(), ys.max()) == (100, 300, 400)
    assert 170 < ys.min() < 200  # the name stands above the box
    assert not near(picture, class_colour(1)).any()


def test_small_images_are_enlarged_with_their_boxes():
    picture = draw_detections(Image.new("RGB", (128, 96)), detections((0.9, 1, [32, 48, 64, 90])), CLASSES)
    assert picture.size == (128 * 7, 96 * 7)
    _, xs = near(np.asarray(picture)[350:], class_colour(1)).nonzero()  # below the name
    assert (xs.min(), xs.max()) == (32 * 7, 64 * 7)


@pytest.mark.parametrize(
    "box", [[-20, -30, 900, 800], [700, 650, 720, 660], [50, 5, 20, 2], [-9, -9, -5, -5]]
)
def test_boxes_beyond_the_image_or_degenerate_do_not_break_the_picture(box):
    assert draw_detections(Image.new("RGB", (700, 650)), detections((0.9, 0, box)), CLASSES).size == (
        700,
        650,
    )


def test_no_detections_leave_the_picture_as_it_is():
    image = Image.effect_noise((640, 640), 50).convert("RGB")
    empty = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert np.array_equal(np.asarray(draw_detections(image, empty, CLASSES)), np.asarray(image))


def test_kept_tokens_are_bright_at_their_place_and_the_others_dimmed():
    """A white image of 64 x 96 in 64 x 128: tokens kept in the fine level's right half, in no coarse one."""
    fine = torch.zeros(8, 16, dtype=torch.bool)
    fine[:, 6:] = True  # columns 12.. are padding
    kept_S = torch.cat([fine.flatten(), torch.zeros(4 * 8, dtype=torch.bool)])
    figure = draw_kept_tokens(
        Image.new("RGB", (192, 128), "white"),
        KeptTokens.from_flat(kept_S, [(8, 16), (4, 8)], resized_size=(64, 96), padded_size=(64, 128)),
        title="t",
    )
    pixels = pixels_of(figure)
    first, second = figure.axes
    assert first.get_title() == "stride 8: 48 of 96"
    assert second.get_title() == "stride 16: 0 of 24"
    height = pixels.shape[0]

    def brightness(axis, x: float, y: float) -> float:
        column, row = axis.transData.transform((x, y))
        return pixels[height - 1 - round(row), round(column)].mean()

    assert brightness(first, 20, 20) < 90
    assert brightness(first, 44, 60) < 90
    assert brightness(first, 52, 4) > 240
    assert brightness(first, 92, 60) > 240
    assert brightness(second, 70, 30) < 90


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
    assert constant.get_ylim()[1] > 10.5, "the points are not cut at the edge"


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


class Stub(nn.Module):
    """Finds one object, keeps the first three of four tokens, or does not select at all."""

    def __init__(self, *, selects: bool) -> None:
        super().__init__()
        self.selects = selects

    def forward(self, batch: ImageBatch, *, supervision: bool) -> DetectorOutput:
        size = len(batch)
        padding = torch.zeros(size, 4, dtype=torch.bool)
        keep = torch.tensor([[True, True, True, False]]).expand(size, -1)
        selection = TokenScores(
            scores_BS=torch.zeros(size, 4),
            num_valid_B=torch.full((size,), 4),
            num_kept_B=torch.full((size,), 3),
            budget_logits_BR=None,
            plan=TokenPlan.from_mask(keep),
        )
        return DetectorOutput(
            last=Prediction(torch.full((size, 1, 4), 2.0), torch.full((size, 1, 4), 0.5)),
            level_shapes=((2, 2),),
            padding_mask_BS=padding,
            memory_BSC=torch.zeros(size, 4, 1),
            selection=selection if self.selects else None,
        )


@pytest.mark.parametrize("selects", [True, False])
def test_pictures_of_every_image_are_written(dataset, tmp_path: Path, selects):
    loader = EvaluationLoader(
        dataset, short_side=64, long_side=64, batch_size=2, indices=spread_over_difficulty(dataset, 3)
    )
    written = save_pictures(Stub(selects=selects), loader, "cpu", tmp_path / "pictures")
    assert sorted(written) == sorted((tmp_path / "pictures").iterdir())
    kinds = ["detections.png", "tokens.png"] if selects else ["detections.png"]
    assert sorted(path.name.split("_")[2] for path in written) == sorted(kinds * 3)
    first = min(dataset.image_id(i) for i in range(len(dataset)) if len(dataset.objects(i)[1]) == 1)
    assert f"00_{first:06d}_detections.png" in {path.name for path in written}
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
