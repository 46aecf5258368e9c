"""The model card of a saved detector: README.md with classes, budgets, metrics and how to use it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ats_detr.config import Config, ModelConfig
from ats_detr.console import printable
from ats_detr.data.classes import ClassMap
from ats_detr.errors import UserError
from ats_detr.evaluation import METRICS
from ats_detr.files import replaced_file

CARD = "README.md"
_MARK = "<!-- written by ats_detr; remove this line to keep your changes -->"


def name_of_model(config: ModelConfig) -> str:
    """Model family, share of tokens and backbone in one line."""
    selector = config.selector
    if selector is None:
        name = "Efficient DETR" if config.queries_from_memory else "Deformable DETR"
        name += ", two-stage" * config.two_stage + ", box refinement" * config.box_refine
    elif selector.adaptive:
        name = f"ATS-DETR, {selector.min_ratio:.0%} to {selector.max_ratio:.0%} of the tokens"
        name += f" in {selector.num_budgets} budgets" if selector.num_budgets > 2 else ""
    else:
        family = "Sparse DETR" if selector.scores == "proposals" else "ATS-DETR's teacher"
        name = f"{family}, {selector.keep_ratio:.0%} of the tokens"
    return f"{name}, {config.backbone.name}"


def write_card(folder: Path, config: Config, classes: ClassMap, facts: Mapping[str, Any]) -> None:
    """Write the card of a model folder, unless there is one that was changed by hand.

    Args:
        facts: entries of the checkpoint: `epoch`, `train_seconds`, `metrics`, `training_images`, where known.

    Raises UserError where it cannot be written.
    """
    path = folder / CARD
    try:
        if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return
        with replaced_file(path) as file:
            file.write("\n".join(_lines(config, classes, facts)).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot write this file ({error.strerror})") from error


def _lines(config: Config, classes: ClassMap, facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ("---", "library_name: ats_detr", "pipeline_tag: object-detection")
    yield from ("tags:", "- object-detection", "- ats-detr", "---", _MARK)
    count = len(classes.names)
    summary = f"{name_of_model(config.model)}; {count} class{'es' * (count != 1)}."
    yield from (f"# {_text(config.name)}", "", summary, "")
    yield from ("## Use", "", "```sh", "pip install ats_detr", "```", "", "```python")
    yield "from ats_detr import Detector"
    yield ""
    yield 'detector = Detector.from_checkpoint("FOLDER")  # this folder, or hf://owner/repo'
    yield 'for result in detector.predict("images/"):'
    yield "    print(result.name, result.names, result.scores, result.boxes_xyxy)"
    yield from ("```", "", "```sh", "ats-detr predict images/ --checkpoint FOLDER", "```", "")
    yield from ("## Budget", "", *_budget(config.model), "")
    data = config.data
    yield f"Input: images with a short side of {data.short_side} and a long side of at most {data.long_side} pixels."
    yield ""
    yield from _metrics(facts.get("metrics"))
    yield from _training(config, facts)
    yield from ("## Classes", "", "| category id | name |", "|---|---|")
    for category_id, name in zip(classes.category_ids, classes.names, strict=True):
        yield f"| {category_id} | {_text(name)} |"
    yield ""


def _budget(model: ModelConfig) -> Iterator[str]:
    selector = model.selector
    if selector is None:
        yield "The encoder updates all tokens of an image."
    elif selector.adaptive:
        assert selector.min_ratio is not None and selector.max_ratio is not None
        yield (
            f"The encoder updates {selector.min_ratio:.0%} to {selector.max_ratio:.0%} of the tokens of an image:"
            f" one of {selector.num_budgets} budgets, which the model chooses by the image."
        )
    else:
        yield f"The encoder updates {selector.keep_ratio:.0%} of the tokens of each image."


def _metrics(metrics: Any) -> Iterator[str]:
    values = {key: metrics.get(key) for key in METRICS} if isinstance(metrics, Mapping) else {}
    known = {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    if not known:
        return
    yield from ("## Metrics", "", "On the validation images, when the training was finished:", "")
    yield from ("| | |", "|---|---|")
    for key, value in known.items():
        yield f"| {key} ({METRICS[key]}) | {value:.3f} |"
    ratio = metrics.get("mean_keep_ratio")
    if isinstance(ratio, (int, float)) and math.isfinite(ratio):
        yield f"| mean share of tokens updated | {ratio:.1%} |"
    yield ""


def _training(config: Config, facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts.get("epoch"):
        return
    images = facts.get("training_images")
    number = f" on {images['number']} images" if isinstance(images, Mapping) and "number" in images else ""
    minutes = facts.get("train_seconds", 0) / 60
    took = f", in {minutes:.0f} minutes" if minutes >= 1 else ""
    source = f", starting from {_text(str(config.train.init_from))}" if config.train.init_from else ""
    yield from ("## Training", "", f"{facts['epoch']} epochs{number}{took}{source}.", "")


def _text(text: str) -> str:
    """Text without effect in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", printable(text))
