"""COCO average precision of a detector, and the number of tokens it kept for each image."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track
from scipy.stats import spearmanr

from ats_detr import distributed
from ats_detr.batch import ImageBatch, Target
from ats_detr.config import SelectorConfig
from ats_detr.data.coco import ClassMap, CocoAnnotations, CocoDetection
from ats_detr.data.loader import EvaluationLoader
from ats_detr.errors import Stopped, UserError
from ats_detr.files import replaced_file
from ats_detr.model import CompiledDetr, Detr
from ats_detr.model.output import (
    BudgetOptions,
    Detections,
    DetectorOutput,
    TokenBudget,
    budget_table,
    token_budgets,
    top_detections,
)

logger = logging.getLogger(__name__)

Evaluator = Literal["auto", "pycocotools", "hotcoco"]

MAX_DETECTIONS = 100
"""Default number of detections per image, the best over all classes."""
METRICS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, area below 32² pixels",
    "APm": "medium",
    "APl": "large, area above 96² pixels",
    "AR": "average recall, IoU 0.50:0.95",
}
"""COCO's metrics by their keys in metrics.json, and what they mean."""
HISTOGRAM_BINS = 20
"""Bins of the keep ratio over 0..1."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord(TokenBudget):
    """Token budget and number of objects of an image of a dataset."""

    image_id: int
    num_objects: int
    """Annotated objects, crowds not counted."""


@dataclass(frozen=True, kw_only=True)
class ClassPrecision:
    """COCO's metrics of one class, each 0..1; NaN where no object of the class is annotated."""

    category_id: int
    name: str
    num_objects: int
    """Annotated objects in the evaluated images, crowds not counted."""
    ap: float
    """Mean over IoU 0.50:0.95."""
    ap50: float
    ar: float
    """Average recall: mean over IoU 0.50:0.95."""


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's summary, each 0..1; NaN where there is no ground truth to measure it on."""

    ap: float
    """Mean over IoU 0.50:0.95."""
    ap50: float
    ap75: float
    ap_small: float
    """Area below 32² pixels."""
    ap_medium: float
    ap_large: float
    """Area above 96² pixels."""
    ar: float = math.nan
    """Average recall: mean over IoU 0.50:0.95 and classes."""
    classes: tuple[ClassPrecision, ...] = ()
    """The same of each class, by ascending category id."""


@dataclass(frozen=True)
class DetectionTable:
    """The detections of many images in a few arrays. Ids are never stored as floating point."""

    image_indices: np.ndarray
    """int64 [n] position of the image in the dataset."""
    category_ids: np.ndarray
    """int64 [n]"""
    boxes_xywh: np.ndarray
    """float64 [n, 4] in pixels of the image that the annotations refer to."""
    scores: np.ndarray
    """float64 [n]"""

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def from_batch(
        image_indices: Sequence[int], detections: Sequence[Detections], class_map: ClassMap
    ) -> DetectionTable:
        """The detections of a batch. Rows that no category uses (ten of COCO's 91) are omitted."""
        columns = [
            torch.cat([d.boxes_xyxy_N4, d.scores_N[:, None], d.labels_N[:, None].to(d.scores_N)], dim=1)
            for d in detections
        ]
        table = torch.cat(columns).cpu().double().numpy()  # one transfer for the batch
        rows = table[:, 5].astype(np.int64)
        used = np.isin(rows, class_map.rows)
        indices = np.repeat(np.array(image_indices, np.int64), [len(d.scores_N) for d in detections])
        boxes_xywh = np.column_stack([table[:, :2], table[:, 2:4] - table[:, :2]])
        return DetectionTable(
            indices[used], class_map.category_ids_of(rows[used]), boxes_xywh[used], table[used, 4]
        )

    @staticmethod
    def concatenate(tables: Sequence[DetectionTable]) -> DetectionTable:
        empty = DetectionTable(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        columns = zip(*(vars(table).values() for table in (empty, *tables)), strict=True)
        return DetectionTable(*map(np.concatenate, columns))

    def to_coco(self, annotations: CocoAnnotations) -> list[dict[str, Any]]:
        """COCO results, ready for JSON, with the image ids of the annotation file."""
        columns = (self.image_indices, self.category_ids, self.boxes_xywh, self.scores)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            {
                "image_id": annotations.result_id(index),
                "category_id": category_id,
                "bbox": box,
                "score": score,
            }
            for index, category_id, box, score in rows
        ]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Results of an evaluation."""

    precision: AveragePrecision
    images: tuple[ImageRecord, ...]
    """By ascending image id."""
    num_budgets: int
    """Number of budgets of the model; 0 where the budget is fixed or one ratio was given."""
    num_skipped: int
    """Unreadable images (`on_bad_image="skip"`), which no metric includes."""

    @property
    def mean_keep_ratio(self) -> float:
        """Share of valid tokens that are kept, averaged over images."""
        return float(np.mean([record.keep_ratio for record in self.images]))

    @property
    def budget_histogram(self) -> list[int]:
        """Images per budget, smallest budget first; empty where the budget is fixed."""
        chosen = [record.budget_class for record in self.images if record.budget_class is not None]
        return np.bincount(np.array(chosen, np.int64), minlength=self.num_budgets).tolist()

    @property
    def keep_ratio_histogram(self) -> list[int]:
        """Images per interval of the keep ratio, HISTOGRAM_BINS equal ones over 0..1."""
        ratios = [record.keep_ratio for record in self.images]
        return np.histogram(ratios, bins=HISTOGRAM_BINS, range=(0, 1))[0].tolist()

    @property
    def budget_object_spearman(self) -> float:
        """Rank correlation of budget and number of objects; NaN if either is constant or the budget is fixed."""
        budgets = [record.budget_class for record in self.images]
        objects = [record.num_objects for record in self.images]
        if None in budgets or len(set(budgets)) < 2 or len(set(objects)) < 2:
            return math.nan
        return float(spearmanr(objects, budgets).statistic)

    def per_class(self) -> list[dict[str, Any]]:
        """JSON-ready metrics of each class; None for undefined values."""
        return [
            {
                "category_id": entry.category_id,
                "name": entry.name,
                "num_objects": entry.num_objects,
                "AP": _or_none(entry.ap),
                "AP50": _or_none(entry.ap50),
                "AR": _or_none(entry.ar),
            }
            for entry in self.precision.classes
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without single images; None for undefined values."""
        numbers = {
            "AP": self.precision.ap,
            "AP50": self.precision.ap50,
            "AP75": self.precision.ap75,
            "APs": self.precision.ap_small,
            "APm": self.precision.ap_medium,
            "APl": self.precision.ap_large,
            "AR": self.precision.ar,
            "mean_keep_ratio": self.mean_keep_ratio,
            "budget_object_spearman": self.budget_object_spearman,
        }
        return {
            **{key: _or_none(value) for key, value in numbers.items()},
            "budget_histogram": self.budget_histogram,
            "keep_ratio_histogram": self.keep_ratio_histogram,
            "num_images": len(self.images),
            "num_skipped": self.num_skipped,
            "per_class": self.per_class(),
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def evaluate(
    model: Detr | CompiledDetr,
    loader: EvaluationLoader,
    device: torch.device | str,
    *,
    budget: BudgetOptions | None = None,
    detections_file: Path | None = None,
    **options: Any,
) -> Metrics:
    """Metrics of `model` at one budget (None: as trained), see `evaluate_budgets`.

    Args:
        detections_file: the main process writes all detections here as COCO results (JSON).

    Raises also, on every process, UserError if `detections_file` cannot be written.
    """
    ((metrics, detections),) = evaluate_budgets(model, loader, device, [budget or {}], **options)
    failure = None
    if detections_file is not None:
        if detections is not None:
            failure = _write_results(detections.to_coco(loader.dataset.annotations), detections_file)
        failure = distributed.broadcast(failure)
    if failure is not None:
        raise UserError(failure)
    return metrics


@torch.no_grad()
def evaluate_budgets(
    model: Detr | CompiledDetr,
    loader: EvaluationLoader,
    device: torch.device | str,
    budgets: Sequence[BudgetOptions],
    *,
    evaluator: Evaluator = "auto",
    max_detections: int = MAX_DETECTIONS,
    show_progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[tuple[Metrics, DetectionTable | None]]:
    """Metrics of `model` at each budget on all images of `loader`, the same on every process.

    The main process also has the detections. Images are read once for all budgets, and the backbone runs once, except
    in a compiled model.

    With torch.distributed initialised, each process calls it with its own share of the images
    (`EvaluationLoader` with rank and world_size) and the processes wait for each other once, at the end. The
    model is put in evaluation mode and back. Pass the bare or the compiled model, not DistributedDataParallel.

    Args:
        budgets: arguments of `Detr.detect`, from `budget_options`.
        max_detections: detections of an image that count, the best over all classes.
        should_stop: called after each batch; where it is true on a process, all of them raise Stopped.

    Raises, on every process, ImageFileError if one of them meets an image that cannot be read, and UserError if there
    is no image that can be, or the model's output is not finite.
    """
    bare = model.model if isinstance(model, CompiledDetr) else model
    was_training = bare.training
    bare.eval()
    found, error = [_Found(max_detections) for _ in budgets], None
    try:
        batches = track(loader, "evaluating", total=len(loader), transient=True, disable=not show_progress)
        for batch, targets in batches:
            for one, output in zip(found, _outputs(model, batch.to(device), budgets), strict=True):
                one.add(output, targets, loader.dataset)
            if should_stop():
                raise Stopped
    except (UserError, Stopped) as raised:
        error = raised  # raised after the processes have met: the others wait for this one
    finally:
        bare.train(was_training)

    shares = distributed.gather((found, error))
    for _, error in shares:
        if error is not None:
            raise error
    if not any(one.records for one, *_ in (found for found, _ in shares)):
        raise UserError(f"{loader.dataset.annotations.file}: none of its images can be read")
    tables: list[DetectionTable | None] = [None] * len(budgets)
    metrics: list[Metrics] = []
    if distributed.is_main():
        for number in range(len(budgets)):
            share = [found[number] for found, _ in shares]
            summary, tables[number] = _summarise(share, loader, evaluator, max_detections)
            metrics.append(summary)
    return list(zip(distributed.broadcast(metrics), tables, strict=True))


def _outputs(
    model: Detr | CompiledDetr, batch: ImageBatch, budgets: Sequence[BudgetOptions]
) -> Iterator[DetectorOutput]:
    """The predictions for a batch at each budget."""
    if isinstance(model, CompiledDetr):
        yield from (model(batch, **budget) for budget in budgets)
    elif len(budgets) == 1:
        yield model(batch, supervision=False, **budgets[0])
    else:
        tokens = model.tokenize(batch.images_B3HW, batch.sizes_B2)
        for budget in budgets:
            yield model.detect_from_tokens(tokens, supervision=False, **budget)


def _write_results(results: list[dict[str, Any]], file: Path) -> str | None:
    """Write COCO results; returns an error message, if any."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as output:
            output.write(json.dumps(results).encode())
    except OSError as error:
        return f"cannot write the detections to {file} ({error.strerror})"
    return None


def warn_of_limits(dataset: CocoDetection, num_queries: int, max_detections: int | None = None) -> None:
    """Warn where images hold more objects than the model can detect or the evaluation counts."""
    counts = dataset.num_objects
    limits = {f"model.num_queries = {num_queries}": num_queries}
    if max_detections is not None:
        limits[f"evaluation.max_detections = {max_detections}"] = max_detections
    for setting, limit in limits.items():
        num_crowded = int((counts > limit).sum())
        if num_crowded:
            logger.warning(
                "%s: %d of %d images hold more than %s objects (at most %d); those beyond it count as missed; raise it",
                dataset.annotations.file,
                num_crowded,
                len(counts),
                setting,
                counts.max(),
            )


def warn_of_minimum(metrics: Metrics, selector: SelectorConfig | None) -> None:
    """Warn where most images keep `min_tokens` tokens, so that the budgets have no effect."""
    if selector is None or not selector.adaptive:
        return
    at_minimum = sum(record.num_kept_tokens <= selector.min_tokens for record in metrics.images)
    if 2 * at_minimum > len(metrics.images):
        logger.warning(
            "%d of %d images keep model.selector.min_tokens = %d tokens, or all they have, for any budget:"
            " lower it, or use larger images",
            at_minimum,
            len(metrics.images),
            selector.min_tokens,
        )


class _Found:
    """Results of one process on its share of the images."""

    def __init__(self, max_detections: int) -> None:
        self.max_detections = max_detections
        self.detections: list[DetectionTable] = []
        self.records: list[ImageRecord] = []
        self.num_budgets = 0

    def add(self, output: DetectorOutput, targets: Sequence[Target], dataset: CocoDetection) -> None:
        sizes = [target.original_size for target in targets]
        found = top_detections(output.last, sizes, self.max_detections)
        indices = dataset.annotations.indices_of([target.image_id for target in targets])
        table = DetectionTable.from_batch(indices, found, dataset.class_map)
        finite = np.isfinite(table.scores) & np.isfinite(table.boxes_xywh).all(1)
        if not finite.all():
            image = dataset.path(table.image_indices[~finite][0])
            raise UserError(
                f"{image}: the scores or boxes of the model are not finite, so its training has diverged; lower"
                " train.learning_rate and train again, or use an earlier checkpoint"
            )
        self.detections.append(table)
        if output.selection is not None and output.selection.budget_B is not None:
            assert output.selection.budget_logits is not None
            self.num_budgets = output.selection.budget_logits.shape[1]
        for target, budget in zip(targets, token_budgets(budget_table(output)), strict=True):
            self.records.append(
                ImageRecord(image_id=target.image_id, num_objects=len(target.labels_N), **vars(budget))
            )


def _summarise(
    shares: Sequence[_Found], loader: EvaluationLoader, evaluator: Evaluator, max_detections: int
) -> tuple[Metrics, DetectionTable]:
    annotations = loader.dataset.annotations
    records = sorted((r for share in shares for r in share.records), key=lambda record: record.image_id)
    indices = annotations.indices_of([record.image_id for record in records])
    assert len(set(indices)) == len(indices), "an image was evaluated twice"
    detections = DetectionTable.concatenate([table for share in shares for table in share.detections])
    metrics = Metrics(
        precision=average_precision(
            annotations, detections, indices=indices, evaluator=evaluator, max_detections=max_detections
        ),
        images=tuple(records),
        num_budgets=max(share.num_budgets for share in shares),
        num_skipped=sum(map(len, loader.global_batches)) - len(records),
    )
    return metrics, detections


def average_precision(
    annotations: CocoAnnotations,
    detections: DetectionTable,
    *,
    indices: Sequence[int] | None = None,
    evaluator: Evaluator = "auto",
    max_detections: int = MAX_DETECTIONS,
) -> AveragePrecision:
    """COCO box AP and AR of `detections` on the images at `indices` (default: all).

    The evaluators see images and categories by position: their tables hold ids as float64, which is exact only up to
    2^53, and hotcoco rejects negative ids.

    Args:
        evaluator: pycocotools is the reference; hotcoco (pip install hotcoco) computes the same numbers about 150
            times faster (17.6 s against 0.12 s on 1000 images with 100 detections each, one core; its threads do not
            survive a fork). "auto" uses hotcoco where it is installed.
        max_detections: detections that count, per image and class. COCO's summary uses 100.

    Without any detection every AP is 0.
    """
    category_ids = sorted(annotations.categories)
    chosen = range(len(annotations)) if indices is None else indices
    truth = annotations.by_position(chosen)
    with contextlib.redirect_stdout(io.StringIO()):  # both print progress
        run = _evaluator(truth, _results(annotations, detections), evaluator)
        params = run.params
        params.maxDets = [max_detections]
        run.params = params
        run.evaluate()
        run.accumulate()
    precision, recall = (np.asarray(run.eval[key])[..., 0] for key in ("precision", "recall"))
    places = [entry["category_id"] for entry in truth["annotations"] if not entry["iscrowd"]]
    counts = np.bincount(np.array(places, np.int64), minlength=len(category_ids))
    return AveragePrecision(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[0, ..., 0]),
        ap75=_mean(precision[5, ..., 0]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        ar=_mean(recall[..., 0]),
        classes=tuple(
            ClassPrecision(
                category_id=category_id,
                name=annotations.categories[category_id],
                num_objects=int(counts[place]),
                ap=_mean(precision[:, :, place, 0]),
                ap50=_mean(precision[0, :, place, 0]),
                ar=_mean(recall[:, place, 0]),
            )
            for place, category_id in enumerate(category_ids)
        ),
    )


def average_precision_without(
    groups: np.ndarray,
    annotations: CocoAnnotations,
    detections: DetectionTable,
    indices: Sequence[int],
    max_detections: int = MAX_DETECTIONS,
) -> list[float]:
    """COCO AP on all images but those of a group, for each group: replicates of a jackknife.

    Detections are matched once for all groups, by pycocotools.

    Args:
        groups: int [n] group of each image, 0..number of groups - 1.
        indices: ascending positions of the n images.
    """
    aps = []
    with contextlib.redirect_stdout(io.StringIO()):
        run = _evaluator(annotations.by_position(indices), _results(annotations, detections), "pycocotools")
        run.params.maxDets = [max_detections]
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.evaluate()
        matched = run.evalImgs  # for each category, each image
        for group in range(groups.max() + 1):
            is_used = np.tile(groups != group, len(matched) // len(groups))
            run.evalImgs = [found if used else None for found, used in zip(matched, is_used, strict=True)]
            run.accumulate()
            aps.append(_mean(run.eval["precision"]))
    return aps


def _results(annotations: CocoAnnotations, detections: DetectionTable) -> np.ndarray:
    """The table of detections of known categories that both evaluators load."""
    category_ids = sorted(annotations.categories)
    return np.column_stack(
        [
            detections.image_indices,
            detections.boxes_xywh,
            detections.scores,
            np.searchsorted(category_ids, detections.category_ids),
        ]
    )[np.isin(detections.category_ids, category_ids)]


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are defined; -1 means no ground truth."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else math.nan


def _evaluator(truth: dict[str, Any], results: np.ndarray, evaluator: Evaluator) -> Any:
    """A COCOeval of pycocotools or hotcoco; their interfaces agree."""
    has_hotcoco = importlib.util.find_spec("hotcoco") is not None
    nothing = {**truth, "annotations": []}  # loadRes rejects an empty table
    if evaluator == "pycocotools" or (evaluator == "auto" and not has_hotcoco):
        coco = _pycocotools(truth)
        return COCOeval(coco, coco.loadRes(results) if len(results) else _pycocotools(nothing), "bbox")
    if not has_hotcoco:
        raise UserError("the evaluator hotcoco is not installed: pip install hotcoco, or use pycocotools")
    import hotcoco  # type: ignore[import-not-found,unused-ignore]

    coco = hotcoco.COCO(truth)
    found = coco.loadRes(results) if len(results) else hotcoco.COCO(nothing)
    return hotcoco.COCOeval(coco, found, "bbox")


def _pycocotools(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco
