"""User-facing inference: `Detector.from_checkpoint("final.pt").predict("holiday/")`."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ats_detr.batch import ImageBatch, bucket_size
from ats_detr.budgets import CALIBRATION, Budget, Calibration, MeanBudget, budget_options
from ats_detr.checkpoint import (
    CHECKPOINT_SUFFIXES,
    config_of,
    load_model,
    resolve_checkpoint,
    save_checkpoint,
    save_folder,
)
from ats_detr.config import Config
from ats_detr.data.coco import ClassMap
from ats_detr.data.images import ImageFileError, ImageSource, image_sources, read_image
from ats_detr.data.transforms import evaluation_transform
from ats_detr.distributed import choose_device
from ats_detr.errors import UserError
from ats_detr.evaluation import MAX_DETECTIONS
from ats_detr.model import CompiledDetr, Detr
from ats_detr.model.compiled import MAX_GRAPHS, GraphCache, can_capture, model_state, order_weights, scalars
from ats_detr.model.output import BatchDetections, BudgetOptions, TokenBudget, token_budgets
from ats_detr.model.self_check import self_check
from ats_detr.model_card import write_card
from ats_detr.precompile import compile_kernels
from ats_detr.visualize import KeptTokens, draw_boxes

if TYPE_CHECKING:
    import supervision

T = TypeVar("T")

THRESHOLD = 0.4
"""Default minimum score of `predict`; evaluation has no threshold."""
_MAX_NUMBER = 1_000_000
"""Bound on numbers of images and detections."""
_NUM_READERS = 4
"""Threads that read and resize images ahead of the model; Pillow releases the GIL."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The detections of one image, by descending score."""

    source: ImageSource = field(repr=False)
    """The image as passed to `predict`; `draw` reads it again."""
    name: str
    """File name or URL; `image 3` for the fourth image if it was passed as pixels."""
    size: tuple[int, int]
    """(height, width) in pixels of the image that the boxes refer to."""
    boxes_xyxy: np.ndarray
    """float32 [N, 4] corners in pixels, not clipped to the image (as in evaluation)."""
    scores: np.ndarray
    """float32 [N] probabilities."""
    labels: np.ndarray
    """int64 [N] class indices of the model."""
    category_ids: np.ndarray
    """int64 [N] category ids of the annotation files."""
    names: tuple[str, ...]
    """Class names of the N objects."""
    budget: TokenBudget
    """Number of tokens, and how many of them the encoder updated."""
    kept_tokens: KeptTokens | None = field(default=None, repr=False)
    """The kept tokens, with `keep_tokens=True` and a model that selects tokens."""
    upright: bool = True
    """Whether the image was rotated according to its EXIF orientation."""

    def __len__(self) -> int:
        return len(self.scores)

    def image(self) -> Image.Image:
        """The image as RGB, read again from its source.

        Raises:
            ImageFileError: if it can no longer be read.
        """
        return read_image(self.source, self.name, upright=self.upright, allow_urls=True)

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """The image with boxes, class names and scores. Small images are enlarged by an integer factor."""
        shown = np.flatnonzero(self.scores >= min_score)
        captions = [f"{self.names[i]} {self.scores[i]:.2f}" for i in shown]
        return draw_boxes(self.image(), self.boxes_xyxy[shown], self.labels[shown].tolist(), captions)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The detections as COCO results: a list of JSON-serialisable dictionaries."""
        boxes = self.boxes_xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(self.category_ids.tolist(), boxes.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for category_id, box, score in rows
        ]

    def to_supervision(self) -> supervision.Detections:
        """The detections as `supervision.Detections`: `class_id` is the label, `data["class_name"]` the class name.

        Raises:
            UserError: if supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("supervision is not installed: pip install 'ats_detr[supervision]'") from None
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary: name, size, budget, and a list of objects."""
        height, width = self.size
        columns = (self.names, self.category_ids.tolist(), self.scores.tolist(), self.boxes_xyxy.tolist())
        return {
            "image": self.name,
            "height": height,
            "width": width,
            "kept_tokens": self.budget.num_kept_tokens,
            "valid_tokens": self.budget.num_valid_tokens,
            "budget": self.budget.budget_class,
            "objects": [
                {
                    "name": name,
                    "category_id": category_id,
                    "score": round(score, 4),
                    "box_xyxy": [round(x, 2) for x in box],
                }
                for name, category_id, score, box in zip(*columns, strict=True)
            ],
        }


@dataclass(frozen=True)
class _Prepared:
    """A preprocessed image, with the properties that its result needs."""

    source: ImageSource
    name: str
    pixels: Tensor
    size: tuple[int, int]


class Detector:
    """A trained model with its preprocessing and classes. Threads may share it.

    Args:
        model: the model, on the device on which it runs. It is put into evaluation mode, on CUDA with weights of
            convolutions in channels-last memory.
        config: the configuration of the model; its evaluation sizes are used for preprocessing.
        classes: category ids and names of the class indices.
        facts: further plain values of the checkpoint (epochs, metrics, ...), which `save` writes.
        capture: on CUDA, capture passes as CUDA graphs and replay them: `auto` when a combination of padded size and
            number of images occurs for the second time, True for the first time, False never. At most 32 graphs are
            kept. Weights may be changed in place; other changes of the model discard its graphs.
        budget: default of `predict`: `auto`, a keep ratio, or a `MeanBudget`; see docs/budgets.md.

    Raises:
        ValueError: for another value of `capture`.
        UserError: if the model cannot have this budget.
    """

    def __init__(
        self,
        model: Detr,
        config: Config,
        classes: ClassMap,
        facts: dict[str, Any] | None = None,
        *,
        capture: bool | Literal["auto"] = "auto",
        budget: Budget = "auto",
    ) -> None:
        if capture not in (True, False, "auto"):
            raise ValueError(f"capture = {capture!r}: must be 'auto', True or False")
        self.model, self.config, self.classes = model.eval(), config, classes
        if self.device.type == "cuda":
            order_weights(model)
        self.facts = facts or {}
        self.capture = capture
        self._graphs = GraphCache(MAX_GRAPHS if capture else 0, capture_at=2 if capture == "auto" else 1)
        self.compiled: CompiledDetr | None = None
        """The compiled model after `compile`. Its `warm_up_seconds` has the time of the first batch of each shape."""
        self._transform = evaluation_transform(config.data.short_side, config.data.long_side)
        self.budget = budget
        self.budget_options(budget)

    @staticmethod
    def from_checkpoint(
        source: str | Path,
        *,
        device: str = "auto",
        capture: bool | Literal["auto"] = "auto",
        budget: Budget = "auto",
    ) -> Detector:
        """A detector from a checkpoint file, a model folder, or a finished run.

        Args:
            source: a file (of this package, the published code or transformers), a folder written by `save` or by
                transformers, the folder of a run, the name of a run in `runs/`, `hf://owner/repo`,
                `hf://owner/repo@revision/file`, or a name that `ats-detr models` lists. The last three are fetched
                unless they are cached. For a run with teachers, the student is loaded.
            device: `auto` (CUDA if available, otherwise the CPU), `cpu`, `cuda` or `cuda:1`.
            capture: see `Detector`.
            budget: see `Detector`.

        Raises:
            UserError: if the checkpoint does not exist or cannot be read, or its model cannot have this budget.
        """
        chosen = choose_device(device)
        path = resolve_checkpoint(source)
        model, checkpoint = load_model(path)
        dropped = ("model", "optimizer", "rng")
        return Detector(
            model.to(chosen),
            config_of(checkpoint, path),
            ClassMap.from_dict(checkpoint["classes"]),
            {key: value for key, value in checkpoint.items() if key not in dropped},
            capture=capture,
            budget=budget,
        )

    def compile(
        self, *, dtype: torch.dtype = torch.float32, fuse: bool = False, max_graphs: int = MAX_GRAPHS
    ) -> Detector:
        """Optimise the model for repeated prediction, in place, and return the detector.

        On CUDA the kernels are compiled first, in parallel processes, unless Triton's cache has them. Batch norms are
        folded, and on CUDA each input shape is captured as a CUDA graph, with a warm-up at its first batch (unless the
        detector has `capture=False`). Padded sizes are those of the evaluation. Later changes of `model` have no
        effect. See `ats_detr.model.CompiledDetr` for the arguments, and docs/inference.md for the effect of bfloat16
        on AP. A copy of a compiled detector is compiled, too, and repeats the warm-up.
        """
        compile_kernels(
            self.config, self.device, ["compile"], dtype=dtype, num_classes=self.model.num_classes
        )
        max_graphs = max_graphs if self.capture else 0
        self.compiled = CompiledDetr(self.model, dtype=dtype, fuse=fuse, max_graphs=max_graphs)
        return self

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write weights, configuration and classes, without the training state.

        Args:
            path: a folder, in which `model.safetensors`, `config.json` and a model card (README.md) are written; or a
                file, .safetensors or .pt.
            dtype: of the weights in the file, such as bfloat16 for half of the size; they are loaded as float32 again.
                None: unchanged.

        Raises:
            UserError: if it cannot be written.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        if dtype is not None:
            state = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in state.items()
            }
        path, checkpoint = Path(path), {**self.facts, "model": state}
        if path.suffix in CHECKPOINT_SUFFIXES:
            save_checkpoint(checkpoint, path)
        else:
            save_folder(checkpoint, path)
            write_card(path, self.config, self.classes, self.facts)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        threshold: float = THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        batch_size: int = 1,
        budget: Budget | None = None,
        keep_tokens: bool = False,
        upright: bool | None = None,
        allow_urls: bool = False,
        on_bad_image: Callable[[ImageFileError], object] | None = None,
    ) -> list[Result]:
        """The detections of each image, in the order of the images.

        Preprocessing equals that of the evaluation. The detections of an image do not depend on the other images or on
        `batch_size`.

        Args:
            images: one image or several, of any types in `ImageSource` and of any sizes. A folder stands for the images
                in it, ordered by name.
            threshold: minimum score of a detection, 0..1.
            max_detections: maximum number of detections per image.
            batch_size: maximum number of images per forward pass; only images of equal padded size share a pass.
            budget: `auto`: as trained. A number in (0, 1]: this keep ratio for every image. A `MeanBudget`: a mean over
                images, which needs a calibrated model (see `calibrate`). None: the budget of the detector.
            keep_tokens: return the kept tokens in `Result.kept_tokens`.
            upright: rotate files according to their EXIF orientation, as viewers do. None: unless the detector was
                trained with `data.exif=stored`.
            allow_urls: download images from http(s) URLs. False: a URL raises UserError.
            on_bad_image: called with the error of each image that cannot be read; the image has no result.

        Raises:
            ImageFileError: if an image cannot be read and `on_bad_image` is None.
            UserError: if a folder has no images, an array has an unsupported shape or dtype, an argument is out of
                range, the model cannot have the budget, or its outputs are not finite.
        """
        return list(
            self.stream(
                images,
                threshold=threshold,
                max_detections=max_detections,
                batch_size=batch_size,
                budget=budget,
                keep_tokens=keep_tokens,
                upright=upright,
                allow_urls=allow_urls,
                on_bad_image=on_bad_image,
            )
        )

    def stream(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        threshold: float = THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        batch_size: int = 1,
        budget: Budget | None = None,
        keep_tokens: bool = False,
        upright: bool | None = None,
        allow_urls: bool = False,
        on_bad_image: Callable[[ImageFileError], object] | None = None,
    ) -> Iterator[Result]:
        """Like `predict`, but yields one result at a time, for more images than fit into memory.

        A few images are read in advance.
        """
        _check_number("max_detections", max_detections)
        if not 0 <= threshold <= 1:  # also true for NaN
            raise UserError(f"threshold = {threshold}: must be in [0, 1]")
        if upright is None:
            upright = self.config.data.exif != "stored"
        options = self.budget_options(self.budget if budget is None else budget)
        predict_batch = functools.partial(
            self._predict_batch,
            threshold=threshold,
            max_detections=max_detections,
            options=options,
            keep_tokens=keep_tokens,
            upright=upright,
        )
        yield from self._map(predict_batch, images, batch_size, upright, allow_urls, on_bad_image)

    def budget_options(self, budget: Budget) -> BudgetOptions:
        """The arguments of `Detr.detect` for a budget. Raises UserError if the model cannot have it."""
        calibration = self.calibration if isinstance(budget, MeanBudget) else None
        return budget_options(budget, self.model.selector, calibration)

    @property
    def calibration(self) -> Calibration | None:
        """The mean keep ratios that a `MeanBudget` needs; None before `calibrate`."""
        return Calibration.of(self.facts)

    def calibrate(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = 1,
        upright: bool | None = None,
        on_bad_image: Callable[[ImageFileError], object] | None = None,
    ) -> Calibration:
        """Measure the mean keep ratio at each cost of tokens, which a `MeanBudget` needs; `save` stores it.

        Runs the model up to the choice of the budget. Use images like those of the application, without annotations,
        and other ones than those of an evaluation.

        Args:
            images: see `predict`; likewise the other arguments.

        Raises:
            ImageFileError: if an image cannot be read and `on_bad_image` is None.
            UserError: if the model has a single budget, or there are no images.
        """
        selector = self.model.selector
        if selector is None or selector.budget is None:
            raise UserError(
                "this model has no choice of budgets; only a model with several budgets is calibrated"
            )
        if upright is None:
            upright = self.config.data.exif != "stored"
        rows = list(self._map(self._score, images, batch_size, upright, False, on_bad_image))
        if not rows:
            raise UserError("no images to calibrate with")
        logits, num_valid = zip(*rows, strict=True)
        calibration = Calibration.measure(selector, torch.stack(logits), torch.stack(num_valid))
        self.facts[CALIBRATION] = calibration.to_dict()
        return calibration

    def _score(self, images: list[_Prepared]) -> Iterable[tuple[Tensor, Tensor]]:
        """Budget logits and number of valid tokens of each image, on the CPU."""
        pixels = [image.pixels for image in images]
        batch = ImageBatch.collate(pixels, self.config.data.size_multiple).to(self.device)
        with torch.inference_mode():
            selection = self.model.select(self.model.tokenize(batch.images_B3HW, batch.sizes_B2))
        assert selection is not None and selection.budget_logits is not None
        return zip(selection.budget_logits.float().cpu(), selection.num_valid_B.cpu(), strict=True)

    def _map(
        self,
        function: Callable[[list[_Prepared]], Iterable[T]],
        images: ImageSource | Iterable[ImageSource],
        batch_size: int,
        upright: bool,
        allow_urls: bool,
        on_bad_image: Callable[[ImageFileError], object] | None,
    ) -> Iterator[T]:
        """What `function` returns for each image, in order; it is called with images of equal padded size."""
        _check_number("batch_size", batch_size)

        def prepare(numbered: tuple[int, ImageSource]) -> _Prepared | ImageFileError:
            number, source = numbered
            name = str(source) if isinstance(source, (str, Path)) else f"image {number}"
            try:
                image = read_image(source, name, upright=upright, allow_urls=allow_urls)
            except ImageFileError as error:
                if on_bad_image is None:
                    raise
                return error
            pixels, _, _ = self._transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
            return _Prepared(source, name, pixels, (image.height, image.width))

        def readable() -> Iterator[_Prepared]:
            for prepared in _prefetch(
                prepare, enumerate(image_sources(images)), depth=_NUM_READERS + batch_size
            ):
                if isinstance(prepared, _Prepared):
                    yield prepared
                elif on_bad_image is not None:
                    on_bad_image(prepared)

        # Batches contain images of equal padded size, which are collected from a window of several batches.
        images_read, window_size = readable(), batch_size if batch_size == 1 else 4 * batch_size
        while window := list(islice(images_read, window_size)):
            buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
            for place, prepared in enumerate(window):
                size = (prepared.pixels.shape[1], prepared.pixels.shape[2])
                buckets[bucket_size(size, self.config.data.size_multiple)].append(place)
            results: dict[int, T] = {}
            for places in buckets.values():
                for chosen in self._batches(places, batch_size):
                    results.update(zip(chosen, function([window[i] for i in chosen]), strict=True))
            yield from (results[place] for place in range(len(window)))

    def _batches(self, places: list[int], batch_size: int) -> Iterator[list[int]]:
        """`places` in batches. With a graph for every shape, incomplete batches are split into single images.

        Otherwise every number of images would need its own graph.
        """
        has_graphs = self.compiled is not None and self.capture and self.device.type == "cuda"
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            yield from [[place] for place in batch] if has_graphs and len(batch) < batch_size else [batch]

    def _predict_batch(
        self,
        images: list[_Prepared],
        *,
        threshold: float,
        max_detections: int,
        options: BudgetOptions,
        keep_tokens: bool,
        upright: bool,
    ) -> list[Result]:
        """The results of images of equal padded size, by one pass."""
        batch = ImageBatch.collate([image.pixels for image in images], self.config.data.size_multiple)
        scale_B4 = torch.tensor([image.size[::-1] * 2 for image in images])
        with torch.inference_mode():
            found = self._pass(
                batch.to(self.device), scale_B4.to(self.device, non_blocking=True), max_detections, **options
            )
        detections_BN6, budgets = found.detections_BN6.cpu().numpy(), token_budgets(found.budgets_B3)
        finite_B = np.isfinite(detections_BN6).all((1, 2))
        if not finite_B.all():
            raise UserError(
                f"{images[int(finite_B.argmin())].name}: the scores or boxes of the model are not finite: its numbers"
                " overflow; use another checkpoint"
            )
        kept = _kept_tokens(found, batch) if keep_tokens else [None] * len(images)
        return [
            Result(
                source=image.source,
                name=image.name,
                size=image.size,
                budget=budget,
                kept_tokens=tokens,
                upright=upright,
                **self._fields_of(detections_N6, threshold),
            )
            for image, detections_N6, budget, tokens in zip(
                images, detections_BN6, budgets, kept, strict=True
            )
        ]

    def _pass(
        self,
        batch: ImageBatch,
        scale_B4: Tensor,
        max_detections: int,
        *,
        keep_ratio: float | None = None,
        cost: float | None = None,
    ) -> BatchDetections:
        """One pass over a batch: by the compiled model, by a CUDA graph of the model, or by the model itself."""
        if self.compiled is not None:
            return self.compiled.detect(batch, scale_B4, max_detections, keep_ratio=keep_ratio, cost=cost)
        model = self.model

        def detect(
            images_B3HW: Tensor, sizes_B2: Tensor, scale_B4: Tensor, cost: Tensor | None = None
        ) -> BatchDetections:
            output = model.detect(images_B3HW, sizes_B2, supervision=False, keep_ratio=keep_ratio, cost=cost)
            return BatchDetections.from_output(output, scale_B4, max_detections)

        def detect_eagerly() -> BatchDetections:  # calls the model, for its hooks
            output = model(batch, supervision=False, keep_ratio=keep_ratio, cost=cost)
            return BatchDetections.from_output(output, scale_B4, max_detections)

        dtype = model.level_embed.dtype
        if not self.capture or not can_capture(self.device, dtype, warn=False):
            return detect_eagerly()
        images_B3HW = batch.images_B3HW
        sizes_B2 = batch.sizes_B2
        return self._graphs.run(
            (max_detections, images_B3HW.shape, images_B3HW.dtype, keep_ratio, cost is not None),
            detect,
            images_B3HW,
            sizes_B2,
            scale_B4,
            *scalars(cost, self.device),
            eager=detect_eagerly,
            prepare=functools.partial(self_check, model, images_B3HW, sizes_B2),
            state=functools.partial(model_state, model),
            tensors=itertools.chain(model.parameters(), model.buffers()),
        )

    def _fields_of(self, detections_N6: np.ndarray, threshold: float) -> dict[str, Any]:
        """The fields of a result: detections of named classes with scores >= `threshold`."""
        scores, labels = detections_N6[:, 4], detections_N6[:, 5].astype(np.int64)
        category_ids = self.classes.category_ids_of(labels)
        shown = (scores >= threshold) & (category_ids >= 0)  # ten of COCO's 91 class indices have no category
        return {
            "boxes_xyxy": detections_N6[shown, :4],
            "scores": scores[shown],
            "labels": labels[shown],
            "category_ids": category_ids[shown],
            "names": tuple(map(self.classes.name_of_row, labels[shown].tolist())),
        }


def _check_number(setting: str, value: int) -> None:
    if not 1 <= value <= _MAX_NUMBER:
        raise UserError(f"{setting} = {value}: must be in 1..{_MAX_NUMBER}")


def _kept_tokens(found: BatchDetections, batch: ImageBatch) -> list[KeptTokens | None]:
    """The kept tokens of each image; None for a dense encoder."""
    if found.kept_BS is None:
        return [None] * len(batch)
    padded_size = (batch.images_B3HW.shape[2], batch.images_B3HW.shape[3])
    return [
        KeptTokens.from_flat(kept_S, found.level_shapes, resized_size=size, padded_size=padded_size)
        for kept_S, size in zip(found.kept_BS.cpu(), batch.sizes, strict=True)
    ]


def _prefetch(function: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """Yield `function(item)` for each item, in order, while threads compute the next `depth` results."""
    items = iter(items)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="ats_detr-read") as pool:
        waiting: deque[Future[Any]] = deque(pool.submit(function, item) for item in islice(items, depth))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            for future in waiting:
                future.cancel()
