"""Dual teacher supervision (ATS-DETR): labels for the budget head, and distillation of the encoder's memory; and
supervision of the budget head without teachers.

The weak teacher keeps as few tokens as the student's smallest budget. Its average precision on an image is the label of
the student's budget head: where it is high, few tokens are enough. The strong teacher keeps as many as the largest
budget; the student's memory is trained to match its memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr import distributed
from ats_detr.batch import NO_IMAGE, ImageBatch, Target
from ats_detr.budgets import Calibration
from ats_detr.config import ModelConfig
from ats_detr.data.loader import EvaluationLoader
from ats_detr.distributed import sum_over_processes
from ats_detr.errors import Stopped
from ats_detr.model import Detr
from ats_detr.model.compiled import freeze_weights
from ats_detr.model.output import DetectorOutput, top_detections
from ats_detr.model.selector import TokenSelector
from ats_detr.training.average_precision import image_average_precision
from ats_detr.training.frozen_stages import share_frozen_stages

logger = logging.getLogger(__name__)

# Shapes: B images; S tokens of the pyramid; L levels; C channels.


class DualTeacher:
    """Two frozen detectors and the losses of their student.

    Not a module, so that its weights are not among the student's parameters and in its checkpoints.
    """

    def __init__(
        self,
        weak: Detr,
        strong: Detr,
        *,
        bias: float = 1.0,
        num_budgets: int = 2,
        level_weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
        num_detections: int = 100,
        iou_threshold: float = 0.5,
        cache_difficulty: bool = False,
    ) -> None:
        """Freezes both teachers.

        Args:
            bias: average precision of the weak teacher, in (0, 1], from which an image counts as easy.
            level_weights: weight of each pyramid level in the memory loss.
            num_detections: detections of the weak teacher per image, best first, in its average precision.
            iou_threshold: IoU from which a detection of the weak teacher matches an object.
            cache_difficulty: measure the average precision of each image once only.
        """
        self.weak = weak.eval().requires_grad_(False)
        self.strong = strong.eval().requires_grad_(False)
        self.bias = bias
        self.num_budgets = num_budgets
        self.level_weights = tuple(level_weights)
        self.num_detections = num_detections
        self.iou_threshold = iou_threshold
        self.difficulty = DifficultyCache() if cache_difficulty else None

    def __call__(
        self,
        batch: ImageBatch,
        targets: Sequence[Target],
        student: DetectorOutput,
        *,
        most_of_a_class: int | None = None,
    ) -> dict[str, Tensor]:
        """`loss_budget` (cross entropy of the budget logits) and `loss_memory`, unweighted float32 scalars; and
        `easy_images`, the share of images that the smallest budget is enough for.

        The teachers run on the same augmented batch as the student, whose forward pass must come first.

        Args:
            most_of_a_class: see `image_average_precision`.
        """
        assert student.adapted_memory_BSC is not None, "the student needs an adaption layer"
        assert student.selection is not None and student.selection.budget_logits is not None
        with torch.autocast(batch.images_B3HW.device.type, enabled=False):
            with torch.inference_mode():
                images_B3HW, sizes_B2 = batch.images_B3HW.to(self.strong.level_embed.dtype), batch.sizes_B2
                strong_memory = self.strong.encode(images_B3HW, sizes_B2)
                precision_B = self._precision_of_weak(images_B3HW, sizes_B2, targets, most_of_a_class)
            labels_B = budget_labels(precision_B, self.bias, self.num_budgets)
            loss_budget = F.cross_entropy(student.selection.budget_logits.float(), labels_B)
            loss_memory = memory_loss(
                student.adapted_memory_BSC,
                strong_memory,
                student.padding_mask_BS,
                student.level_shapes,
                self.level_weights,
            )
        easy_images = (labels_B == 0).float().mean()
        return {"loss_budget": loss_budget, "loss_memory": loss_memory, "easy_images": easy_images}

    def _precision_of_weak(
        self, images_B3HW: Tensor, sizes_B2: Tensor, targets: Sequence[Target], most_of_a_class: int | None
    ) -> Tensor:
        """float32 [B] average precision of the weak teacher on each image."""
        image_ids = [target.image_id for target in targets]
        known_B = self.difficulty.get(image_ids) if self.difficulty is not None else None
        if known_B is not None:
            return known_B
        output = self.weak.detect(images_B3HW, sizes_B2)
        sizes = [target.original_size for target in targets]
        detections = top_detections(output.last, sizes, self.num_detections)
        precision_B = image_average_precision(
            detections, targets, self.iou_threshold, most_of_a_class=most_of_a_class
        )
        if self.difficulty is not None:
            self.difficulty.put(image_ids, precision_B)
        return precision_B

    def connect(self, student: Detr, precision: torch.dtype = torch.float32) -> list[str]:
        """Prepare the teachers, in place, for the training of `student`; call it once.

        Their frozen backbone stages are replaced by the student's, where these are equal (see `frozen_stages`), and
        their weights are optimised for passes in `precision` (see `freeze_weights`).

        Returns the names of the teachers that share. From then on the student must run on a batch before its teachers.
        """
        teachers = {"weak": self.weak, "strong": self.strong}
        sharing = [name for name, teacher in teachers.items() if share_frozen_stages(student, teacher)]
        for teacher in teachers.values():
            freeze_weights(teacher, precision)
        return sharing


class SelfTaught:
    """Supervision of the budget head by the annotations, without teachers: images with more objects keep more tokens.

    The logit of a budget learns sqrt(n / num_queries) * log(ratio / min_ratio) of an image with n objects. The budget
    that maximises logit - cost * ratio then has a ratio proportional to the expected sqrt(n), within the budgets, and
    the cost sets the mean over images (`calibrated`). docs/budgets.md compares other rules.
    """

    def __init__(self, selector: TokenSelector, num_queries: int) -> None:
        """
        Args:
            selector: of the model, with several budgets.
            num_queries: of the model, the largest number of objects that it can detect.
        """
        ratio_R = selector.ratio_of_budget(torch.arange(selector.num_budgets))
        self._gain_R = (ratio_R / ratio_R[0]).log()
        self._num_queries = num_queries

    def __call__(self, targets: Sequence[Target], output: DetectorOutput) -> dict[str, Tensor]:
        """`loss_budget`, float32 scalar: half the mean squared error of the budget logits over images and budgets."""
        assert output.selection is not None and output.selection.budget_logits is not None
        logits_BR = output.selection.budget_logits.float()
        count_B = torch.tensor([len(target.labels_N) for target in targets])
        value_BR = (count_B / self._num_queries).sqrt()[:, None] * self._gain_R
        return {"loss_budget": F.mse_loss(logits_BR, value_BR.to(logits_BR.device, non_blocking=True)) / 2}


@contextmanager
def calibrated(
    model: Detr,
    loader: EvaluationLoader,
    mean_ratio: float,
    device: torch.device,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Within the context the budgets that the model chooses have this mean keep ratio on the images of `loader`.

    The bias of each budget logit is reduced by cost * ratio of its budget: the logit becomes a value net of the cost of
    tokens. The cost is found from the logits of all images, in evaluation mode. Collective.

    Args:
        should_stop: called after each batch; where it is true on a process, all of them raise Stopped.
    """
    selector, was_training = model.selector, model.training
    assert selector is not None and selector.budget is not None
    model.eval()
    logits, num_valid, is_stopping = [], [], False
    with torch.no_grad():
        for host_batch, _ in loader:
            batch = host_batch.to(device)
            selection = model.select(model.tokenize(batch.images_B3HW, batch.sizes_B2))
            assert selection is not None and selection.budget_logits is not None
            logits.append(selection.budget_logits.cpu())
            num_valid.append(selection.num_valid_B.cpu())
            if is_stopping := should_stop():
                break
    model.train(was_training)
    shares = distributed.gather((logits, num_valid, is_stopping))
    if any(stopping for *_, stopping in shares):
        raise Stopped
    everything = [torch.cat([part for share in shares for part in share[i]]) for i in (0, 1)]
    cost, mean = Calibration.measure(selector, *everything).closest(mean_ratio)
    if abs(mean - mean_ratio) > 0.1 * mean_ratio:
        logger.warning(
            "the budgets keep %.3g of the tokens on average, not model.selector.mean_ratio = %.3g: the budget head does"
            " not tell the images apart, or model.selector.min_tokens is too large",
            mean,
            mean_ratio,
        )
    ratios_R = selector.ratio_of_budget(torch.arange(selector.num_budgets))
    bias: Any = selector.budget[-1].bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias -= cost * ratios_R.to(bias)
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(before)


def draw_ratios(num_images: int, smallest: float, largest: float) -> Tensor:
    """float32 [num_images] random keep ratios on the CPU, from its default generator: a quarter of the images has the
    smallest ratio and a quarter the largest (sandwich rule, Yu & Huang 2019), the others are log-uniform between.

    Log-uniform, since accuracy changes with the logarithm of the ratio. Stratified draws make these shares as exact as
    the size of the batch allows.
    """
    quantile_B = (torch.randperm(num_images) + torch.rand(num_images)) / num_images
    exponent_B = ((quantile_B - 0.25) * 2).clamp(0, 1)
    return torch.where(exponent_B < 1, smallest * (largest / smallest) ** exponent_B, largest)


def training_ratios(config: ModelConfig, num_images: int) -> Tensor | None:
    """`draw_ratios` within `model.selector.train_ratios`; None where the model keeps its own budgets in training."""
    if config.selector is None or config.selector.train_ratios is None:
        return None
    return draw_ratios(num_images, *config.selector.train_ratios)


class DifficultyCache:
    """The weak teacher's average precision on each image so far; image ids on the host, values on the device."""

    def __init__(self) -> None:
        self._place: dict[int, tuple[int, int]] = {}
        """(index into `_batches`, index into that batch) of each image id."""
        self._batches: list[Tensor] = []

    def get(self, image_ids: Sequence[int]) -> Tensor | None:
        """float32 [B], or None unless all images are known."""
        if not all(image_id in self._place for image_id in image_ids):
            return None
        places = [self._place[image_id] for image_id in image_ids]
        return torch.stack([self._batches[batch][position] for batch, position in places])

    def put(self, image_ids: Sequence[int], precision_B: Tensor) -> None:
        """Add the images that are not known yet. Targets without an image (NO_IMAGE) are ignored."""
        for position, image_id in enumerate(image_ids):
            if image_id != NO_IMAGE:
                self._place.setdefault(image_id, (len(self._batches), position))
        self._batches.append(precision_B)

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint. Synchronises with the device."""
        image_ids = list(self._place)
        precision = self.get(image_ids) if image_ids else None
        return {
            "image_ids": torch.tensor(image_ids, dtype=torch.int64),
            "precision": torch.zeros(0) if precision is None else precision.cpu(),
        }

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Inverse of `state`."""
        self._batches = [state["precision"].to(device)]
        self._place = {image_id: (0, i) for i, image_id in enumerate(state["image_ids"].tolist())}


class BudgetCounts:
    """Budgets that a student chose, and images that are easy for its weak teacher. Without synchronisation."""

    def __init__(self, num_budgets: int, device: torch.device) -> None:
        self.num_budgets = num_budgets
        self._counts = torch.zeros(num_budgets + 1, device=device)

    def reset(self) -> None:
        """Forget all images."""
        self._counts.zero_()

    def add(self, budget_logits: Tensor, easy_images: Tensor) -> None:
        """Add a batch: its logits [B, num_budgets], and the share of images that are easy."""
        budgets = torch.arange(self.num_budgets, device=self._counts.device)
        self._counts[:-1] += (budget_logits.detach().argmax(1)[:, None] == budgets).sum(0)
        self._counts[-1] += easy_images * len(budget_logits)

    def problem(self) -> str | None:
        """A sentence where all images of all processes have the same budget. Collective."""
        *counts, num_easy = sum_over_processes(self._counts).tolist()
        num_images = sum(counts)
        if num_images == 0 or max(counts) < num_images:
            return None
        number = counts.index(num_images) + 1
        return (
            f"the student chose budget {number} of {self.num_budgets} for all {num_images:.0f} images; the weak teacher"
            f" finds {num_easy / num_images:.1%} of them easy: if that is near 0 or 100 %, change"
            " teachers.difficulty_bias or the teachers"
        )


# -------------------------------------------------------------------------------------------- budget of an image
def budget_labels(average_precision_B: Tensor, bias: float = 1.0, num_budgets: int = 2) -> Tensor:
    """int64 [B] budget class of each image, 0 the smallest: the number of thresholds above its average precision.

    With n budgets the thresholds are bias * (1, 1 - 1/(n-1), ..., 1/(n-1)). With two budgets this is the published
    rule: class 0 if the average precision is >= bias, otherwise class 1.
    """
    steps = torch.arange(num_budgets - 1, device=average_precision_B.device)
    thresholds = bias * (1 - steps / max(num_budgets - 1, 1))
    return (average_precision_B[:, None] < thresholds).sum(1)


# ---------------------------------------------------------------------------------------- distillation of the memory
def memory_loss(
    student_BSC: Tensor,
    teacher_BSC: Tensor,
    padding_mask_BS: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    level_weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
) -> Tensor:
    """Distance of two memories [B, S, C] up to scale and offset of each channel, float32 (PKD, Cao et al. 2022).

    Per level, both are normalised by `standardise`; the loss is half the mean squared difference over all elements,
    padding included (as published; both are 0 there).
    """
    sizes = [height * width for height, width in level_shapes]
    both_BSC = torch.cat([student_BSC.float(), teacher_BSC.float()], dim=2)
    student_BSC, teacher_BSC = standardise(both_BSC, ~padding_mask_BS, sizes).chunk(2, dim=2)
    error_BSC = (student_BSC - teacher_BSC).square()
    mean_L = torch.stack([error.mean() for error in error_BSC.split(sizes, dim=1)])
    weights_L = torch.tensor(list(level_weights)).to(mean_L.device, non_blocking=True)
    return (mean_L * weights_L).sum() / 2


def standardise(x_BSC: Tensor, valid_BS: Tensor, sizes: Sequence[int], eps: float = 1e-6) -> Tensor:
    """Normalise each channel of each level to zero mean and unit (population) deviation over the valid positions.

    Padded positions become 0. Mean and deviation are computed over the batches of all processes (in the published code,
    of each process), with two all-reduces for all levels together. A channel that is constant becomes 0 without
    gradient (in the published code, the gradient is NaN).

    Args:
        sizes: number of tokens of each level.
    """
    valid_BS1, zero = valid_BS[..., None], x_BSC.new_zeros(())

    def sums(values_BSC: Tensor) -> Tensor:
        """[L, C]."""
        return torch.stack([level.sum((0, 1)) for level in values_BSC.split(sizes, dim=1)])

    def of_tokens(values_LC: Tensor) -> Tensor:
        """[S, C]."""
        levels = zip(values_LC, sizes, strict=True)
        return torch.cat([value_C.expand(size, -1) for value_C, size in levels])

    totals = torch.cat([sums(torch.where(valid_BS1, x_BSC, zero)), sums(valid_BS1.to(x_BSC))], dim=1)
    sum_LC, num_valid_L1 = sum_over_processes(totals).split([x_BSC.shape[2], 1], dim=1)
    num_valid_L1 = num_valid_L1.clamp(min=1)
    centred_BSC = torch.where(valid_BS1, x_BSC - of_tokens(sum_LC / num_valid_L1), zero)
    variance_LC = sum_over_processes(sums(centred_BSC.square())) / num_valid_L1
    varies_LC = variance_LC > 0
    deviation_LC = torch.where(varies_LC, variance_LC, 1).sqrt() + eps
    return centred_BSC * of_tokens(torch.where(varies_LC, 1 / deviation_LC, zero))
