"""The detector as a user meets it: `Detector.from_checkpoint("final.pt").predict("holiday/")`."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ats_detr.batch import ImageBatch, bucket_size
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
from ats_detr.model.output import Detections, DetectorOutput, TokenBudget, token_budgets, top_detections
from ats_detr.visualize import KeptTokens, draw_boxes

if TYPE_CHECKING:
    import supervision

THRESHOLD = 0.4
"""Default of the smallest score that is shown; evaluation has none."""
_NUM_READERS = 4
"""Threads that read and resize ahead of the model: Pillow works without the interpreter's lock."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What was found in one image, best first."""

    source: ImageSource = field(repr=False)
    """As it was given; `draw` reads it again."""
    name: str
    """The file or URL, or `image 3` for the fourth of those given as pixels."""
    size: tuple[int, int]
    """(height, width) in pixels that the boxes refer to."""
    boxes_xyxy: np.ndarray
    """float32 [N, 4] corners in pixels, not clipped to the image (as they are evaluated)."""
    scores: np.ndarray
    """float32 [N] probabilities."""
    labels: np.ndarray
    """int64 [N] rows of the classification head."""
    category_ids: np.ndarray
    """int64 [N] ids of the same classes in annotation files."""
    names: tuple[str, ...]
    """Names of the same classes."""
    budget: TokenBudget
    """How many tokens the encoder updated."""
    kept_tokens: KeptTokens | None = field(default=None, repr=False)
    """Which tokens these were, where it was asked for and the model selects any."""
    upright: bool = True
    """Whether the file was turned as its EXIF orientation says."""

    def __len__(self) -> int:
        return len(self.scores)

    def image(self) -> Image.Image:
        """The image as RGB, read again. Raises ImageFileError where it is gone."""
        return read_image(self.source, self.name, upright=self.upright, allow_urls=True)

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """The image with boxes, names and scores; small images are enlarged by a whole factor."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        shown = self.scores >= min_score
        return draw_boxes(
            self.image(),
            self.boxes_xyxy[shown],
            self.labels[shown].tolist(),
            [caption for caption, is_shown in zip(captions, shown, strict=True) if is_shown],
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The detections as COCO results, ready for JSON and for COCO's evaluators."""
        boxes = self.boxes_xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(self.category_ids.tolist(), boxes.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for category_id, box, score in rows
        ]

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`: class_id is the row, data["class_name"] the name. Needs that package."""
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
        """Ready for JSON: name, size, budget, and a list of objects."""
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
    """An image as the model sees it, and what its result needs."""

    source: ImageSource
    name: str
    pixels: Tensor
    size: tuple[int, int]


class Detector:
    """A trained model together with its preprocessing and its classes. Safe to use from several threads.

    Args:
        model: in evaluation mode, on the device it shall run on.
        config: the model's own; of it, the sizes of the evaluation are read.
        classes: what the rows of the classification head mean.
        facts: other plain values of the checkpoint (epochs, metrics, ...), which `save` writes again.
    """

    def __init__(
        self, model: Detr, config: Config, classes: ClassMap, facts: dict[str, Any] | None = None
    ) -> None:
        self.model, self.config, self.classes = model.eval(), config, classes
        self.facts = facts or {}
        self.compiled: CompiledDetr | None = None
        """What `compile` made; its `warm_up_seconds` tell how long the first batch of each size took."""
        self._transform = evaluation_transform(config.data.short_side, config.data.long_side)

    @staticmethod
    def from_checkpoint(source: str | Path, *, device: str = "auto") -> Detector:
        """The detector of a checkpoint file, of a model's folder, or of a finished run by its folder or name.

        Args:
            source: a file (ours or of the published code), a folder that `save` wrote, a run's folder, or the name of
                a run under `runs/`. Of a run with teachers it is the student.
            device: `auto` (CUDA if there is any), `cpu`, `cuda`, `cuda:1`.

        Raises UserError where there is no such thing or it cannot be read.
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
        )

    def compile(
        self, *, dtype: torch.dtype = torch.float32, fuse: bool = False, max_graphs: int = 32
    ) -> Detector:
        """Prepare the model for many predictions, with a warm-up for every padded size of images; returns itself.

        Batch norms are folded, and on CUDA the whole pass is captured as a CUDA graph per size: the sizes are those
        of the evaluation, and so are the detections. See `ats_detr.model.CompiledDetr` for the arguments, and
        docs/inference.md for what bfloat16 did to the AP of the quickstart. A copy of the detector is compiled too, but
        warms up again.
        """
        self.compiled = CompiledDetr(self.model, dtype=dtype, fuse=fuse, max_graphs=max_graphs)
        return self

    def save(self, path: str | Path) -> None:
        """Write the weights, the configuration and the classes: what inference needs, without the training's state.

        Args:
            path: a folder, which gets `model.safetensors` and `config.json`; or one file, .safetensors or .pt.

        Raises UserError where it cannot be written.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        path, checkpoint = Path(path), {**self.facts, "model": state}
        if path.suffix in CHECKPOINT_SUFFIXES:
            save_checkpoint(checkpoint, path)
        else:
            save_folder(checkpoint, path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        threshold: float = THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        batch_size: int = 1,
        keep_tokens: bool = False,
        upright: bool = True,
        allow_urls: bool = False,
        on_bad_image: Callable[[ImageFileError], object] | None = None,
    ) -> list[Result]:
        """The objects in each image, in the order given.

        Preprocessing is that of the evaluation, and so are the detections: an image gets the same ones alone or among
        others, whatever `batch_size`.

        Args:
            images: one or many of `ImageSource`, of any sizes; a folder stands for the images in it, by name.
            threshold: detections of at least this probability.
            max_detections: at most so many of an image, the best.
            batch_size: images that run together, if they are padded to the same size.
            keep_tokens: tell which tokens were kept (`Result.kept_tokens`).
            upright: turn files as their EXIF orientation says. Evaluation does not; boxes then refer to stored pixels.
            allow_urls: fetch images from http(s) URLs. Otherwise a URL is refused.
            on_bad_image: called with the error of each image that cannot be read, which then has no result.

        Raises:
            ImageFileError: an image cannot be read and there is no `on_bad_image`.
            UserError: a folder without images, an array of another shape or type, a URL without `allow_urls`, a setting
                that is out of range.
        """
        return list(
            self.stream(
                images,
                threshold=threshold,
                max_detections=max_detections,
                batch_size=batch_size,
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
        keep_tokens: bool = False,
        upright: bool = True,
        allow_urls: bool = False,
        on_bad_image: Callable[[ImageFileError], object] | None = None,
    ) -> Iterator[Result]:
        """`predict`, result by result: for more images than fit into memory. Images are read a little ahead."""
        for setting, value in (("batch size", batch_size), ("max detections", max_detections)):
            if value < 1:
                raise UserError(f"{setting} {value}: give at least 1")
        if not 0 <= threshold <= 1:  # also where it is not a number
            raise UserError(f"threshold {threshold}: scores are probabilities, give 0..1")

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
            for prepared in _ahead(
                prepare, enumerate(image_sources(images)), depth=_NUM_READERS + batch_size
            ):
                if isinstance(prepared, _Prepared):
                    yield prepared
                elif on_bad_image is not None:
                    on_bad_image(prepared)

        # Batches hold images of one padded size; a window of several batches is searched for them.
        windows, window_size = readable(), batch_size if batch_size == 1 else 4 * batch_size
        while window := list(islice(windows, window_size)):
            buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
            for place, prepared in enumerate(window):
                size = (prepared.pixels.shape[1], prepared.pixels.shape[2])
                buckets[bucket_size(size, self.config.data.size_multiple)].append(place)
            results: dict[int, Result] = {}
            for places in buckets.values():
                for chosen in self._batches(places, batch_size):
                    found = self._detect(
                        [window[i] for i in chosen], threshold, max_detections, keep_tokens, upright
                    )
                    results.update(zip(chosen, found, strict=True))
            yield from (results[place] for place in range(len(window)))

    def _batches(self, places: list[int], batch_size: int) -> Iterator[list[int]]:
        """`places` in batches; compiled for a GPU, what does not fill one goes image by image: of every number of
        images there would be a graph."""
        has_graphs = self.compiled is not None and self.device.type == "cuda"
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            yield from [[place] for place in batch] if has_graphs and len(batch) < batch_size else [batch]

    def _detect(
        self, images: list[_Prepared], threshold: float, max_detections: int, keep_tokens: bool, upright: bool
    ) -> list[Result]:
        batch = ImageBatch.collate([image.pixels for image in images], self.config.data.size_multiple)
        with torch.inference_mode():
            output = self._run(batch.to(self.device))
            detections = top_detections(output.last, [image.size for image in images], max_detections)
            budgets = token_budgets(output)
        kept = _kept_tokens(output, batch) if keep_tokens else [None] * len(images)
        return [
            Result(
                source=image.source,
                name=image.name,
                size=image.size,
                budget=budget,
                kept_tokens=tokens,
                upright=upright,
                **self._above(found, threshold),
            )
            for image, found, budget, tokens in zip(images, detections, budgets, kept, strict=True)
        ]

    def _run(self, batch: ImageBatch) -> DetectorOutput:
        """The one place where the model is called."""
        if self.compiled is not None:
            return self.compiled(batch)
        return self.model(batch, supervision=False)

    def _above(self, detections: Detections, threshold: float) -> dict[str, Any]:
        """The fields of a result: detections of known classes of at least `threshold`."""
        labels = detections.labels_N.cpu().numpy()
        scores = detections.scores_N.cpu().numpy()
        category_ids = self.classes.category_ids_of(labels)
        shown = (scores >= threshold) & (category_ids >= 0)  # ten rows of COCO's 91 are no class
        return {
            "boxes_xyxy": detections.boxes_xyxy_N4.cpu().numpy()[shown],
            "scores": scores[shown],
            "labels": labels[shown],
            "category_ids": category_ids[shown],
            "names": tuple(map(self.classes.name_of_row, labels[shown].tolist())),
        }


def _kept_tokens(output: DetectorOutput, batch: ImageBatch) -> list[KeptTokens | None]:
    if output.selection is None:
        return [None] * len(batch)
    kept_BS = (output.selection.plan.slot_BS >= 0).cpu()
    padded_size = (batch.images_B3HW.shape[2], batch.images_B3HW.shape[3])
    return [
        KeptTokens.from_flat(kept_S, output.level_shapes, resized_size=size, padded_size=padded_size)
        for kept_S, size in zip(kept_BS, batch.sizes, strict=True)
    ]


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """function(item) of each item, in order, the next `depth` ones computed by threads in the meantime."""
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
