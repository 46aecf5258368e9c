"""Cost of the parts of a training step other than the student's network.

    python -m bench.training [--rounds 7] [--json rows.jsonl]
    python -m bench.training --config quickstart [--rounds 7] [overrides]

Matching, losses and labels are compared with the plain definitions of tests/training/definitions.py, on a synthetic
batch of 4 like those of the R50 configurations: 300 queries, about 10,000 tokens of which 10 % are kept, 10 to 30
objects. Whole steps (losses and gradients) of ATS-DETR R50 on 2 small images are compared with the student alone: with
the weak teacher, with both teachers, and with both teachers sharing the student's frozen stages. On a GPU the elapsed
time of such a step on 2 images of 800x1333 in bfloat16 is compared with that of its kernels.

With `--config`, the images per second of each stage of a training are measured instead, on its own images, from loading
a batch to the optimiser step, with the threads that OMP_NUM_THREADS sets. No stage starts from another one: weights are
those before the first training, also those of teachers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ats_detr.batch import ImageBatch, Target, most_of_a_class
from ats_detr.boxes import cxcywh_to_xyxy
from ats_detr.config import SelectorConfig, TeachersConfig, load_config
from ats_detr.console import run_cli
from ats_detr.kernels import TokenPlan
from ats_detr.model import (
    Detections,
    DetectorOutput,
    Detr,
    Prediction,
    TokenScores,
    build_model,
    top_detections,
)
from ats_detr.training.average_precision import image_average_precision
from ats_detr.training.criterion import SetCriterion, build_criterion, compute_losses
from ats_detr.training.distillation import DualTeacher, budget_labels
from ats_detr.training.setup import Run, Teachers, prepare
from ats_detr.training.stages import plan_stages
from ats_detr.training.trainer import train_step
from bench.measure import (
    CONFIGS,
    Row,
    append_rows,
    environment,
    new_parser,
    operator_times,
    percentile,
    positive,
    row_file,
    take_turns,
    timed,
)
from bench.tables import plain_table, to_markdown
from tests.training.definitions import nested_loops_ap, set_losses

IMAGE_SIZE = (320, 416)
LEVEL_SHAPES = ((76, 100), (38, 50), (19, 25), (10, 13))
"""Of an image of about 600 x 800 pixels: 10,105 tokens."""
NUM_CLASSES = 91
NUM_OBJECTS = (10, 17, 23, 30)
CLASSES_OF_AN_IMAGE = 3
"""COCO's images show 2.9 classes on average."""


def r50_output(seed: int = 0, device: str = "cpu") -> tuple[DetectorOutput, list[Target]]:
    """Random predictions and objects of one batch, with the shapes of the published R50 models (10 % kept)."""
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
    """Detections like a teacher's: scattered around the objects, several for each, 20 % of them of another class."""
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


def median_times(
    functions: dict[str, Callable[[], object]], rounds: int, device: str, clock: str = "cpu"
) -> dict[str, float]:
    """Median milliseconds of each: elapsed time on a GPU or of the clock `wall`, otherwise CPU time of the process."""
    passes = {name: timed(function) for name, function in functions.items()}
    take_turns(passes, torch.device(device), 1)  # warm-up
    samples = take_turns(passes, torch.device(device), rounds, clock, least_ms=50)
    return {name: percentile(stages["total"], 50) for name, stages in samples.items()}


def compare_with_definitions(rounds: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """(median ms of the definition, of the package) of `losses`, `losses and gradients` and `labels`."""
    output, targets = r50_output(device=device)
    criterion = SetCriterion(NUM_CLASSES, class_specific_proposals=True)
    num_boxes = float(sum(NUM_OBJECTS))
    found, most = detections_near(targets), most_of_a_class([target.to("cpu") for target in targets])

    def own() -> dict[str, torch.Tensor]:
        return criterion(output, targets, num_boxes)

    def definition() -> dict[str, torch.Tensor]:
        return set_losses(output, targets, num_boxes)

    times = median_times(
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
        rounds,
        device,
    )
    return {name: (times[f"definition of {name}"], times[name]) for name in times if "definition" not in name}


SHARED = "+ both, frozen stages shared"


def steps_of(
    device: str, size: tuple[int, int] = IMAGE_SIZE, precision: torch.dtype = torch.float32
) -> dict[str, Callable[[], None]]:
    """Functions that compute the losses and gradients of one ATS-DETR R50 step, without and with teachers."""
    config = load_config(CONFIGS / "ats_r50_0.1_0.2.yaml", ["model.backbone.pretrained=false"])
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
    batch = ImageBatch.collate([torch.randn(3, *size, generator=g) for _ in range(2)]).to(device)
    targets = [target.to("cpu") for target in r50_output()[1][:2]]
    student.train()

    def step(teachers: DualTeacher | None) -> Callable[[], None]:
        def run() -> None:
            losses = compute_losses(
                student, criterion, teachers, batch, targets, precision=precision, metrics=False
            )[1]
            losses["loss"].backward()
            student.zero_grad()

        return run

    def only_weak() -> None:
        with torch.inference_mode():
            found = top_detections(weak(batch).last, [target.original_size for target in targets])
            budget_labels(image_average_precision(found, [target.to(device) for target in targets]))
        step(None)()

    shared = DualTeacher(copy.deepcopy(weak), copy.deepcopy(strong))
    assert shared.connect(student, precision) == ["weak", "strong"]
    return {
        "student alone": step(None),
        "+ weak teacher": only_weak,
        "+ both": step(DualTeacher(weak, strong)),
        SHARED: step(shared),
    }


def stage_rows(source: str, overrides: Sequence[str], rounds: int, device: str = "cpu") -> list[Row]:
    """Images per second of each stage of a configuration, and the median milliseconds of a step."""
    steps: dict[str, Callable[[], object]] = {}
    models: dict[str, Detr] = {}
    images: dict[str, int] = {}
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        for name, planned in plan_stages(load_config(source, overrides), overrides).items():
            stage = dataclasses.replace(planned, folder=folder / name, init_from=None)
            teachers = None
            if isinstance(stage.config.teachers, TeachersConfig):
                bias = stage.config.teachers.difficulty_bias
                supervision = DualTeacher(models["weak"], models["strong"], bias=bias)
                teachers = Teachers(supervision, weights={}, classes={})
            run = prepare(stage, torch.device(device), teachers)
            resources.enter_context(run.resources)
            resources.callback(run.loaders.close)
            models[name] = copy.deepcopy(run.state.model)
            steps[name] = steps_from_images(run)
            images[name] = stage.config.data.batch_size * stage.config.train.accumulate
        times = median_times(steps, rounds, device, "wall")
    return [
        {"kind": "stages", "config": source, "part": name, "images": images[name], "p50_ms": ms,
         "images_per_second": round(1e3 * images[name] / ms, 1)}
        for name, ms in times.items()
    ]  # fmt: skip


def steps_from_images(run: Run) -> Callable[[], object]:
    """A function that loads the next images of a training and makes an optimiser step."""
    batches = itertools.chain.from_iterable(map(run.loaders.train.epoch, itertools.count()))

    def step() -> None:
        train_step(run, 0, list(itertools.islice(batches, run.config.train.accumulate)), metrics=False)

    return step


def main() -> None:
    parser = new_parser("training", __doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--config", help="measure the stages of this configuration instead")
    parser.add_argument("overrides", nargs="*", help="settings of the configuration")
    parser.add_argument("--json", type=row_file, help="append rows to this file, one JSON object a line")
    arguments = parser.parse_args()
    if arguments.overrides and not arguments.config:
        parser.error(f"{arguments.overrides[0]}: settings need --config")
    if arguments.config:
        rows = stage_rows(arguments.config, arguments.overrides, arguments.rounds, arguments.device)
        measured = {"overrides": " ".join(arguments.overrides), "rounds": arguments.rounds, "clock": "wall"}
        facts = {**measured, **environment(torch.device(arguments.device))}
        report([{**row, **facts} for row in rows], arguments.json)
        return
    torch.set_num_threads(1)
    steps = median_times(steps_of(arguments.device), arguments.rounds, arguments.device)
    compared = compare_with_definitions(arguments.rounds, arguments.device)
    figures = [(name, fast, "definition", slow) for name, (slow, fast) in compared.items()]
    figures += [(f"step, {name}", ms, "student alone", steps["student alone"]) for name, ms in steps.items()]
    if arguments.device != "cpu":
        step = steps_of(arguments.device, (800, 1333), torch.bfloat16)[SHARED]
        times = operator_times(step, torch.device(arguments.device))
        figures.append(("step at 800x1333, bfloat16", times["wall_ms"], "its kernels", times["device_ms"]))
    facts = {"rounds": arguments.rounds, "clock": "cpu", **environment(torch.device(arguments.device))}
    rows = [
        {"kind": "training", "part": part, "p50_ms": ms, "baseline": baseline, "baseline_ms": baseline_ms,
         "ratio": round(ms / baseline_ms, 3), **facts}
        for part, ms, baseline, baseline_ms in figures
    ]  # fmt: skip
    report(rows, arguments.json)


def report(rows: Sequence[Row], path: Path | None) -> None:
    print(to_markdown(plain_table(rows)))
    append_rows(rows, path)


if __name__ == "__main__":
    run_cli(main)
