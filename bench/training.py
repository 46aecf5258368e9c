"""What a training step spends beside the network: python -m bench.training [--repeat 7]

Two tables. Matching, losses and labels against their definitions (those of tests/training/definitions.py), side by side
in one process, alternating, medians; a synthetic batch of 4 as the R50 configurations have them: 300 queries, about
10,000 tokens of which a tenth is kept, 10 to 30 objects. Then whole steps (losses and gradients) of ATS-DETR R50 on a
batch of 2 small images: the student alone, with the weak teacher, with both, and with both on what the student's
frozen stages made of the batch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ats_detr.batch import ImageBatch, Target, most_of_a_class
from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.config import SelectorConfig, load_config
from ats_detr.kernels import TokenPlan
from ats_detr.model import Detections, DetectorOutput, Prediction, TokenScores, build_model, top_detections
from ats_detr.training.average_precision import image_average_precision
from ats_detr.training.criterion import SetCriterion, build_criterion, compute_losses
from ats_detr.training.distillation import DualTeacher, budget_labels
from tests.training.definitions import nested_loops_ap, set_losses

ROOT = Path(__file__).parents[1]
IMAGE_SIZE = (320, 416)
LEVEL_SHAPES = ((76, 100), (38, 50), (19, 25), (10, 13))
"""Of an image of about 600 x 800 pixels: 10,105 tokens."""
NUM_CLASSES = 91
NUM_OBJECTS = (10, 17, 23, 30)
CLASSES_OF_AN_IMAGE = 3
"""COCO's images show 2.9 on average."""


def r50_output(seed: int = 0, device: str = "cpu") -> tuple[DetectorOutput, list[Target]]:
    """Random predictions and objects of one batch, shapes of the published R50 models (10 % of the tokens kept)."""
    g = torch.Generator().manual_seed(seed)
    batch, num_tokens = len(NUM_OBJECTS), sum(h * w for h, w in LEVEL_SHAPES)

    def prediction(*shape: int) -> Prediction:
        logits = torch.randn(*shape, NUM_CLASSES, generator=g) - 4
        size = torch.rand(*shape, 2, generator=g) * 0.3 + 0.02
        boxes = torch.cat([torch.rand(*shape, 2, generator=g), size], -1)
        return Prediction(logits.to(device).requires_grad_(), boxes.to(device).requires_grad_())

    scores = torch.randn(batch, num_tokens, generator=g)
    kept = scores > scores.quantile(0.9, dim=1, keepdim=True)
    plan = TokenPlan.from_mask(kept.to(device))
    num_kept = kept.sum(1).to(device)
    padding = torch.zeros(batch, num_tokens, dtype=torch.bool, device=device)
    output = DetectorOutput(
        last=prediction(batch, 300),
        level_shapes=LEVEL_SHAPES,
        padding_mask_BS=padding,
        memory_BSC=torch.zeros(batch, num_tokens, 1, device=device),
        decoder_auxiliary=[prediction(batch, 300) for _ in range(5)],
        encoder=prediction(batch, num_tokens),
        encoder_auxiliary=[prediction(int(kept.sum())) for _ in range(5)],
        selection=TokenScores(scores.to(device).requires_grad_(), (~padding).sum(1), num_kept, None, plan),
        attention_map_BS=torch.rand(batch, num_tokens, generator=g).to(device),
    )
    targets = []
    for image, count in enumerate(NUM_OBJECTS):
        size = torch.rand(count, 2, generator=g) * 0.3 + 0.02
        centre = torch.rand(count, 2, generator=g) * (1 - size) + size / 2
        labels = torch.randint(CLASSES_OF_AN_IMAGE, (count,), generator=g)
        targets.append(Target(image, (480, 640), labels, torch.cat([centre, size], 1)).to(device))
    return output, targets


def detections_near(targets: list[Target], seed: int = 0, num_detections: int = 100) -> list[Detections]:
    """Detections of a teacher: scattered around the objects, several for each, one in five of another class."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for target in targets:
        labels, boxes = target.labels_N.cpu(), target.boxes_N4.cpu()
        source = torch.randint(len(labels), (num_detections,), generator=g)
        around = boxes[source] + torch.randn(num_detections, 4, generator=g) * 0.02
        other = torch.randint(CLASSES_OF_AN_IMAGE, (num_detections,), generator=g)
        own = torch.where(torch.rand(num_detections, generator=g) < 0.2, other, labels[source])
        pixels = cxcywh_to_xyxy(around) * torch.tensor([640, 480, 640, 480])
        scores = torch.rand(num_detections, generator=g).sort(descending=True).values
        device = target.labels_N.device
        found.append(Detections(scores.to(device), own.to(device), pixels.to(device)))
    return found


def losses_and_gradients(losses_of: Callable[[], dict[str, torch.Tensor]]) -> None:
    losses = losses_of()
    sum(value for value in losses.values() if value.requires_grad).backward()


def side_by_side(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median milliseconds of each, in turn: elapsed on a GPU; on the CPU, where others may work too, of its time.

    In its turn a function is called until it has had 50 ms: called once between long others, short ones would be timed
    on cold caches.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeat + 1):
        for name, function in functions.items():
            started, calls = clock(), 0
            while calls == 0 or clock() - started < 0.05:
                function()
                calls += 1
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            if turn:  # the first turn warms up
                samples[name].append(1000 * (clock() - started) / calls)
    return {name: statistics.median(values) for name, values in samples.items()}


def compare_with_definitions(repeat: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """(median ms of the definition, of the package) of `losses`, `losses and gradients` and `labels`."""
    output, targets = r50_output(device=device)
    criterion = SetCriterion(NUM_CLASSES, class_specific_proposals=True)
    num_boxes = float(sum(NUM_OBJECTS))
    found, most = detections_near(targets), most_of_a_class([target.to("cpu") for target in targets])

    def own() -> dict[str, torch.Tensor]:
        return criterion(output, targets, num_boxes)

    def definition() -> dict[str, torch.Tensor]:
        return set_losses(output, targets, num_boxes)

    times = side_by_side(
        {
            "definition of losses": definition,
            "losses": own,
            "definition of losses and gradients": lambda: losses_and_gradients(definition),
            "losses and gradients": lambda: losses_and_gradients(own),
            "definition of labels": lambda: [
                nested_loops_ap(d, t, 0.5) for d, t in zip(found, targets, strict=True)
            ],
            "labels": lambda: budget_labels(image_average_precision(found, targets, most_of_a_class=most)),
        },
        repeat,
    )
    return {name: (times[f"definition of {name}"], times[name]) for name in times if "definition" not in name}


def step_times(repeat: int, device: str = "cpu") -> dict[str, float]:
    """Median ms of the losses and gradients of one ATS-DETR R50 step, by what teaches it."""
    config = load_config(ROOT / "configs" / "ats_r50_0.1_0.2.yaml", ["model.backbone.pretrained=false"])
    torch.manual_seed(0)
    student, weak, strong = (
        build_model(dataclasses.replace(config.model, selector=selector, adaption=adaption), NUM_CLASSES).to(
            device
        )
        for selector, adaption in (
            (config.model.selector, True),
            (SelectorConfig(keep_ratio=0.1), False),
            (SelectorConfig(keep_ratio=0.2), False),
        )
    )
    for teacher in (weak, strong):
        teacher.backbone.load_state_dict(student.backbone.state_dict())
    criterion = build_criterion(config, NUM_CLASSES)
    g = torch.Generator().manual_seed(0)
    batch = ImageBatch.collate([torch.randn(3, *IMAGE_SIZE, generator=g) for _ in range(2)]).to(device)
    targets = [target.to("cpu") for target in r50_output()[1][:2]]
    student.train()

    def step(teachers: DualTeacher | None) -> Callable[[], None]:
        def run() -> None:
            compute_losses(student, criterion, teachers, batch, targets, metrics=False)[1]["loss"].backward()
            student.zero_grad()

        return run

    def only_weak() -> None:
        with torch.inference_mode():
            found = top_detections(weak(batch).last, [target.original_size for target in targets])
            budget_labels(image_average_precision(found, [target.to(device) for target in targets]))
        step(None)()

    shared = DualTeacher(copy.deepcopy(weak), copy.deepcopy(strong))
    assert shared.share_frozen_stages(student) == ["weak", "strong"]
    return side_by_side(
        {
            "student alone": step(None),
            "+ weak teacher": only_weak,
            "+ both": step(DualTeacher(weak, strong)),
            "+ both, frozen stages shared": step(shared),
        },
        repeat,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("", "definition, ms", "here, ms", "times faster")
    for name, (slow, fast) in compare_with_definitions(arguments.repeat, arguments.device).items():
        table.add_row(name, f"{slow:.1f}", f"{fast:.2f}", f"{slow / fast:.1f}")
    Console().print(table)
    table = Table("ATS-DETR R50, 2 images of {} x {}".format(*IMAGE_SIZE), "ms a step", "of the student's")
    times = step_times(arguments.repeat, arguments.device)
    for name, milliseconds in times.items():
        table.add_row(name, f"{milliseconds:.0f}", f"{milliseconds / times['student alone']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
