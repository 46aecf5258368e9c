"""Budgets chosen at run time: as trained, one keep ratio for all images, or a mean over images (docs/budgets.md).

A mean is reached by a cost of tokens: the model chooses the budget that maximises logit - cost * ratio. The mean keep
ratio at each cost is measured on images without annotations, and stored in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ats_detr.errors import UserError
from ats_detr.model.output import BudgetOptions
from ats_detr.model.selector import TokenSelector

_MAX_COSTS = 500
"""Rows of a calibration; the mean keep ratio of neighbouring rows differs by about 0.2 % of its range."""
_TOLERANCE = 0.05
"""Largest relative difference of a requested mean from the closest mean of a calibration."""
_MEAN = "mean:"
CALIBRATION = "budget_calibration"
"""Key of a `Calibration` in a checkpoint. Training never writes it."""


@dataclass(frozen=True)
class MeanBudget:
    """A mean keep ratio over images, each of which has one of the budgets of the model."""

    keep_ratio: float
    """In (0, 1]."""

    def __str__(self) -> str:
        return f"{_MEAN}{self.keep_ratio:g}"


Budget = Literal["auto"] | float | MeanBudget
"""`auto`: as trained. A number: this keep ratio for every image. A `MeanBudget`: a mean over images."""


def parse_budget(text: str) -> Budget:
    """The budget of a command line: `auto`, `0.15` or `mean:0.15`. Raises UserError."""
    text = text.strip()
    if text == "auto":
        return "auto"
    try:
        number = float(text.removeprefix(_MEAN))
    except ValueError:
        raise UserError(
            f"budget {text!r}: must be auto, a keep ratio such as 0.15, or a mean such as mean:0.15"
        ) from None
    return _checked(MeanBudget(number) if text.startswith(_MEAN) else number)


def _checked(budget: Any) -> Budget:
    """A valid budget with Python numbers. Raises UserError."""
    if isinstance(budget, str):
        return parse_budget(budget)
    ratio = budget.keep_ratio if isinstance(budget, MeanBudget) else budget
    try:
        if isinstance(ratio, bool):
            raise TypeError
        ratio = float(ratio)
    except (TypeError, ValueError):
        raise UserError(f"budget = {budget!r}: must be 'auto', a number or a MeanBudget") from None
    if not 0 < ratio <= 1:  # also true for NaN
        raise UserError(f"budget = {budget}: the keep ratio must be in (0, 1]")
    return MeanBudget(ratio) if isinstance(budget, MeanBudget) else ratio


@dataclass(frozen=True)
class Calibration:
    """Mean keep ratio of a set of images at each cost of tokens.

    Each row is exact for these images; between two rows the mean lies between theirs.
    """

    ratios: tuple[float, ...]
    """The budgets of the model, smallest first."""
    costs: tuple[float, ...]
    """Ascending, with 0, the budgets as trained."""
    mean_keep_ratios: tuple[float, ...]
    """Share of the valid tokens that is kept, a mean over images, at each cost; not ascending."""
    num_images: int

    @staticmethod
    def measure(selector: TokenSelector, budget_logits: Tensor, num_valid: Tensor) -> Calibration:
        """The calibration of a model with several budgets.

        Args:
            selector: of the model.
            budget_logits: float [n, num_budgets], of n images.
            num_valid: int64 [n] number of valid tokens.
        """
        logits, num_valid = budget_logits.cpu().float(), num_valid.cpu()
        levels = torch.arange(selector.num_budgets)
        ratios = selector.ratio_of_budget(levels)
        kept = (
            torch.stack([selector.num_tokens(num_valid, ratio) for ratio in ratios], 1) / num_valid[:, None]
        )
        # The budget of an image changes at costs at which two of its budgets are worth the same.
        lower, upper = torch.triu_indices(selector.num_budgets, selector.num_budgets, offset=1)
        changes = (logits[:, upper] - logits[:, lower]).double() / (ratios[upper] - ratios[lower]).double()
        changes = changes[changes.isfinite()].unique()  # sorted; budgets may have equal ratios
        costs = torch.zeros(1, dtype=torch.float64)
        if len(changes):
            step = 1 + changes.abs().amax()
            costs = torch.cat([changes[:1] - step, (changes[1:] + changes[:-1]) / 2, changes[-1:] + step])
        if len(costs) >= _MAX_COSTS:
            costs = costs[np.linspace(0, len(costs) - 1, _MAX_COSTS - 1).round()]
        costs = torch.cat([costs.float(), torch.zeros(1)]).unique()  # float32, as the model computes
        means = [
            kept.gather(1, selector.choose_budgets(logits, cost)[:, None]).double().mean() for cost in costs
        ]
        return Calibration(
            tuple(ratios.tolist()), tuple(costs.tolist()), tuple(map(float, means)), len(logits)
        )

    def mean_of(self, cost: float) -> float:
        """The mean keep ratio at a cost, interpolated between rows; cost 0: as trained."""
        return float(np.interp(cost, self.costs, self.mean_keep_ratios))

    def cost_of(self, budget: MeanBudget) -> float:
        """The cost at which the mean is closest to `budget`. Raises UserError where it is not close."""
        means = self.mean_keep_ratios
        cost, closest = self.closest(budget.keep_ratio)
        if abs(closest - budget.keep_ratio) > _TOLERANCE * budget.keep_ratio:
            raise UserError(
                f"budget = {budget}: the budgets of this model reach means of {min(means):.3g} to {max(means):.3g} on"
                f" the {self.num_images} calibrated images, the closest is {closest:.3g}; choose another mean,"
                " or calibrate with more images"
            )
        return cost

    def closest(self, mean: float) -> tuple[float, float]:
        """The cost whose mean keep ratio is closest to `mean`, and that mean keep ratio."""
        row = int(np.abs(np.array(self.mean_keep_ratios) - mean).argmin())
        return self.costs[row], self.mean_keep_ratios[row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def of(checkpoint: Mapping[str, Any]) -> Calibration | None:
        """The calibration in a checkpoint; None without one. Raises UserError where it is malformed."""
        if CALIBRATION not in checkpoint:
            return None
        content = checkpoint[CALIBRATION]
        lists = [content.get(key) for key in ("ratios", "costs", "mean_keep_ratios")]
        num_images = content.get("num_images")
        is_valid = isinstance(num_images, int) and all(
            isinstance(values, list)
            and 0 < len(values) <= _MAX_COSTS
            and all(type(value) in (int, float) and math.isfinite(value) for value in values)
            for values in lists
        )
        if not is_valid or len(lists[1]) != len(lists[2]):
            raise UserError(f"invalid content under {CALIBRATION!r}; run ats-detr calibrate again")
        ratios, costs, means = map(tuple, lists)
        return Calibration(ratios, costs, means, num_images)


def budget_options(
    budget: Budget, selector: TokenSelector | None, calibration: Calibration | None
) -> BudgetOptions:
    """The arguments of a model for a budget.

    Args:
        selector: of the model; None for a dense encoder.
        calibration: of the model, which a mean needs.

    Raises:
        UserError: if the budget is not in (0, 1], the model keeps all tokens, or, for a mean, it has a single budget,
            is not calibrated, or cannot reach the mean.
    """
    budget = _checked(budget)
    if budget == "auto":
        return {}
    if selector is None:
        raise UserError(
            f"budget = {budget}: this model does not select tokens, it keeps all of them; omit it"
        )
    if not isinstance(budget, MeanBudget):
        return {"keep_ratio": budget}
    if selector.budget is None:
        raise UserError(
            f"budget = {budget}: this model keeps the same share of every image; use budget = {budget.keep_ratio:g}"
        )
    if calibration is None:
        raise UserError(
            f"budget = {budget}: this model is not calibrated; run ats-detr calibrate CHECKPOINT IMAGES first"
        )
    ratios = tuple(selector.ratio_of_budget(torch.arange(selector.num_budgets)).tolist())
    if ratios != calibration.ratios:
        raise UserError(
            f"budget = {budget}: the model was calibrated with other budgets; run ats-detr calibrate CHECKPOINT IMAGES"
        )
    return {"cost": calibration.cost_of(budget)}
