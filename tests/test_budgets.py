"""Budgets chosen at run time: fixed ratios and calibrated means, alike in every way of running a model."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ats_detr import Detector, MeanBudget, UserError
from ats_detr.batch import ImageBatch
from ats_detr.budgets import Calibration, budget_options, parse_budget
from ats_detr.model import CompiledDetr
from ats_detr.model.selector import TokenSelector
from tests.model.test_detr import images as noise
from tests.model.test_detr import small_model
from tests.small_detector import small_detector

RATIOS = (0.1, 0.35, 1.0)
FIXED = {"keep_ratio": 0.3, "min_ratio": None, "max_ratio": None, "min_tokens": 0}


def pictures(number: int, seed: int = 0) -> list[np.ndarray]:
    """Images of several sizes, contents and contrasts, so that budgets differ."""
    random = np.random.default_rng(seed)
    sizes = [(64, 96), (60, 90), (90, 60), (64, 64)]
    found = []
    for i in range(number):
        coarse = random.integers(0, 256, (int(random.integers(1, 9)), 4, 3))
        rows, columns = (
            np.arange(side) * n // side for side, n in zip(sizes[i % 4], coarse.shape, strict=False)
        )
        found.append((coarse[rows[:, None], columns] * random.uniform(0.1, 1)).astype(np.uint8))
    return found


@pytest.fixture(scope="module")
def detector() -> Detector:
    return small_detector()


# ------------------------------------------------------------------------------------------------------- fixed ratios
@pytest.mark.parametrize("changes", [{}, {"selector": FIXED}], ids=["adaptive", "one budget"])
def test_a_ratio_applies_to_every_image_and_is_reported(changes: dict[str, Any]) -> None:
    detector, shown = small_detector(**changes), pictures(6)
    for ratio in RATIOS:
        expected = copy.deepcopy(detector)
        expected.model.selector.fix_ratio(ratio)
        for batch_size in (1, 4):
            found = detector.predict(shown, threshold=0, budget=ratio, batch_size=batch_size)
            for one, other in zip(found, expected.predict(shown, threshold=0), strict=True):
                assert one.budget == other.budget
                assert one.budget.budget_class is None
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
                np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-2)


def test_the_budget_of_a_detector_is_the_default_of_predict(detector: Detector) -> None:
    narrow = Detector(detector.model, detector.config, detector.classes, budget=0.1)
    image = pictures(1)[0]
    (auto,), (wide,), (default,) = (narrow.predict(image, budget=budget) for budget in ("auto", 0.8, None))
    assert auto.budget == detector.predict(image)[0].budget
    assert default.budget.num_kept_tokens == int(default.budget.num_valid_tokens * 0.1) + 1
    assert wide.budget.num_kept_tokens == int(wide.budget.num_valid_tokens * 0.8) + 1


def test_texts_are_those_of_the_command_line(detector: Detector) -> None:
    image = pictures(1)[0]
    (text,), (number,) = (detector.predict(image, budget=budget) for budget in ("0.1", 0.1))
    assert text.budget == number.budget


@pytest.mark.parametrize(
    "budget", [0, -0.1, 1.0001, float("nan"), MeanBudget(0.0), "half", None, [0.1], True, np.ones(2)]
)
def test_unusable_budgets_are_user_errors(budget: Any, detector: Detector) -> None:
    with pytest.raises(UserError, match=r"must be (in \(0, 1\]|'?auto'?, )"):
        Detector(detector.model, detector.config, detector.classes, budget=budget)


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({"selector": None, "encoder_auxiliary": False}, 0.2, "keeps all of them"),
        ({"selector": None, "encoder_auxiliary": False}, MeanBudget(0.2), "keeps all of them"),
        ({"selector": FIXED}, MeanBudget(0.2), "use budget = 0.2"),
        ({}, MeanBudget(0.4), "run ats-detr calibrate"),
    ],
)
def test_models_that_cannot_have_a_budget_say_so(changes: dict, budget: Any, message: str) -> None:
    detector = small_detector(**changes)
    assert detector.predict(pictures(1), budget="auto")
    with pytest.raises(UserError, match=message):
        detector.predict(pictures(1), budget=budget)


def test_budgets_of_a_command_line() -> None:
    assert parse_budget("auto") == "auto"
    assert parse_budget(" 0.15") == 0.15
    assert parse_budget("mean:0.15") == MeanBudget(0.15)
    assert parse_budget(str(MeanBudget(0.15))) == MeanBudget(0.15)
    for text in ("mean", "mean:", "15%", "mean:2", "0", "nan", ""):
        with pytest.raises(UserError, match="must be"):
            parse_budget(text)


# ------------------------------------------------------------------------------------------------------------- means
@pytest.mark.parametrize("num_budgets", [2, 4])
def test_a_calibrated_mean_is_reached_on_other_images(num_budgets: int) -> None:
    generator = torch.Generator().manual_seed(0)
    selector = TokenSelector(16, 0.05, 0.4, num_budgets, 4)
    logits = torch.randn(2000, num_budgets, generator=generator) * torch.linspace(1, 3, num_budgets)
    num_valid = torch.randint(200, 2000, (2000,), generator=generator)
    calibration = Calibration.measure(selector, logits[:1000], num_valid[:1000])
    for mean in (0.06, 0.1, 0.15, 0.25, 0.39):
        options = budget_options(MeanBudget(mean), selector, calibration)
        chosen = selector.ratio_of_budget(selector.choose_budgets(logits[1000:], options["cost"]))
        kept = selector.num_tokens(num_valid[1000:], chosen) / num_valid[1000:]
        assert float(kept.mean()) == pytest.approx(mean, rel=0.1)


@given(
    st.lists(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), min_size=1, max_size=30),
    st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_the_rows_of_a_calibration_are_exact(rows: list[list[float]], min_tokens: int) -> None:
    """Also with equal logits; the mean never rises with the cost, and both ends are reached."""
    selector, logits = TokenSelector(16, 0.1, 0.5, 3, min_tokens), torch.tensor(rows)
    num_valid = torch.arange(len(rows)) + 50
    calibration = Calibration.measure(selector, logits, num_valid)
    means = calibration.mean_keep_ratios
    assert list(calibration.costs) == sorted(calibration.costs)
    assert list(means) == sorted(means, reverse=True)
    for cost, mean in zip(calibration.costs, means, strict=True):
        chosen = selector.ratio_of_budget(selector.choose_budgets(logits, cost))
        kept = selector.num_tokens(num_valid, chosen).double() / num_valid
        assert float(kept.mean()) == pytest.approx(mean, rel=1e-6)
    for end, budget in ((0, 2), (-1, 0)):
        kept = selector.num_tokens(num_valid, selector.ratio_of_budget(torch.tensor(budget))) / num_valid
        assert means[end] == pytest.approx(float(kept.mean()), rel=1e-6)
    assert (
        Calibration.of({"budget_calibration": json.loads(json.dumps(calibration.to_dict()))}) == calibration
    )


def test_means_out_of_reach_are_user_errors() -> None:
    selector = TokenSelector(16, 0.1, 0.4, 2)
    equal = Calibration.measure(selector, torch.zeros(10, 2), torch.full((10,), 1000))
    assert selector.choose_budgets(torch.zeros(1, 2), equal.cost_of(MeanBudget(0.4))).item() == 1
    for mean in (0.05, 0.25, 0.6):  # nothing lies between the budgets of equal images
        with pytest.raises(UserError, match=r"means of 0\.101 to 0\.401 on the 10 calibrated images"):
            equal.cost_of(MeanBudget(mean))
    with pytest.raises(UserError, match="calibrated with other budgets"):
        budget_options(MeanBudget(0.2), TokenSelector(16, 0.1, 0.3, 2), equal)


def test_a_calibrated_detector_reaches_means_and_does_not_depend_on_batches() -> None:
    detector, shown, budget = small_detector(), pictures(60, seed=2), MeanBudget(0.45)
    detector.calibrate(pictures(60, seed=1), batch_size=8)
    single = detector.predict(shown, threshold=0, budget=budget)
    assert np.mean([result.budget.keep_ratio for result in single]) == pytest.approx(0.45, rel=0.1)
    assert {result.budget.budget_class for result in single} == {0, 1}
    batched = detector.predict(shown, threshold=0, budget=budget, batch_size=8)
    for one, other in zip(single, batched, strict=True):
        assert one.budget == other.budget
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_calibration_needs_budgets_and_images(detector: Detector) -> None:
    with pytest.raises(UserError, match="no images"):
        detector.calibrate([])
    with pytest.raises(UserError, match="no choice of budgets"):
        small_detector(selector=FIXED).calibrate(pictures(2))
    assert detector.calibration is None


# ------------------------------------------------------------------------------------------------- compiled, captured
@torch.no_grad()
@pytest.mark.parametrize("options", [{"keep_ratio": 0.3}, {"cost": -40.0}])
def test_compiled_models_and_kernels_have_the_same_budgets(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = small_model(), ImageBatch.collate(noise((96, 96), (64, 80), (96, 70)))
    expected = model(batch, **options)
    compiled = CompiledDetr(model)(batch, **options)
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    for output in (compiled, model(batch, **options)):
        assert torch.equal(output.selection.num_kept_B, expected.selection.num_kept_B)
        torch.testing.assert_close(output.last.logits, expected.last.logits, atol=1e-4, rtol=1e-4)
    assert not output.selection.plan.exact, "an exact plan needs a device-to-host synchronisation"


@pytest.mark.parametrize("option", ["keep_ratio", "cost"])
def test_a_cuda_pass_with_a_budget_does_not_synchronise(option: str) -> None:
    """With tensors without contents, any read by the host would raise."""
    model = _Detect(small_model())
    state = model.state_dict()
    with FakeTensorMode(), torch.no_grad():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in state.items()
        }
        inputs = (
            torch.empty(2, 3, 64, 64, device="cuda"),
            torch.empty(2, 2, dtype=torch.int64, device="cuda"),
        )
        options = {"keep_ratio": 0.3} if option == "keep_ratio" else {"cost": torch.empty((), device="cuda")}
        output = torch.func.functional_call(model, weights, inputs, options)
    selection = output.selection
    tokens = selection.scores_BS.shape[1]
    largest = 0.3 if option == "keep_ratio" else 0.5
    assert len(selection.plan.token_index_K) == 2 * (math.ceil(largest * tokens) + 1)


class _Detect(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, **options: Any) -> Any:
        return self.model.detect(images, sizes, supervision=False, **options)


def test_a_cost_moves_budgets_one_way() -> None:
    selector, logits = TokenSelector(16, 0.1, 0.4, 4), torch.randn(200, 4)
    kept = [selector.choose_budgets(logits, cost) for cost in (-1000.0, -3.0, 0.0, 3.0, 1000.0)]
    assert torch.equal(kept[2], selector.choose_budgets(logits))
    assert (kept[0] == 3).all() and (kept[-1] == 0).all()
    assert all((more >= less).all() for more, less in itertools.pairwise(kept))
