"""Latency of each stage of a pass: packed, padded and dense, and other detectors as baselines.

    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --ratios 0.1,0.2,0.3
    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --batch 4 --images mixed --budgets 0.3,0.05,0.05,0.05
    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --ratios 0.1 --modes packed,peer:deformable-detr
    python -m bench.latency --cpu-targets         the three ratios with targets on a CPU
    python -m bench.latency --quick               tiny images and few rounds, to check the command

Modes: `packed` is this package's model by stages; `padded` has the encoder as published (bench/padded.py); `dense` has
no token selection; `captured` is `Detector.compile`, on a GPU as CUDA graphs, and `fused` is
`Detector.compile(fuse=True)`, with a compiled backbone; `captured-stages` is the compiled model by stages, one CUDA
graph each, and `captured-dense` the same without token selection; `peer:NAME` is another detector (bench/peers).
Without a checkpoint the weights are random, and so are the budgets they choose: `--ratios` sets one keep ratio for all
images, `--budgets` one for each image of a batch. All modes run in one process and in turns.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.config import Config, load_config
from ats_detr.console import run_cli
from ats_detr.data.synthetic import draw_image
from ats_detr.data.transforms import image_to_tensor
from ats_detr.distributed import choose_device
from ats_detr.errors import UserError
from ats_detr.model import CompiledDetr, Detr
from ats_detr.model.compiled import GraphPool
from ats_detr.model.output import TokenScores
from bench.flops import given_subject, read_folder
from bench.measure import (
    CONFIGS,
    Pass,
    Row,
    Stopwatch,
    add_model_options,
    append_rows,
    environment,
    new_parser,
    peak_memory,
    percentile,
    progress_bar,
    row_file,
    shares,
    take_turns,
    words,
)
from bench.padded import encode_padded
from bench.peers import PEERS, Peer, load_peer
from bench.tables import CPU_TIME, STAGES, distinct, latency_table, print_table, source

Result = TypeVar("Result")

OWN_MODES = ("packed", "padded", "dense", "captured", "fused", "captured-stages", "captured-dense")
DENSE_MODES = ("dense", "captured-dense")
"""Modes without token selection."""
IMAGE_SIZE = (800, 1066)
"""(height, width): a 640x480 photograph as evaluation resizes it."""
QUICK_SIZE = (128, 160)
TABLE_WIDTH = 140
"""Columns of the printed table."""
MIXED_SCALES = (1.0, 0.98, 0.99, 0.965)
"""Relative sides of mixed images, which all fall into one size bucket of evaluation."""
MIXED_OBJECTS = (25, 1, 3, 2)
"""Number of objects on mixed images: one hard image, then easy ones."""
PEER = "peer:deformable-detr"
"""The baseline of the CPU targets: the same architecture without token selection."""
UNEVEN = (0.3, 0.05, 0.05, 0.05)
"""Budgets of a batch of one hard and three easy images."""
Budgets = tuple[float, ...] | None
"""Keep ratio of each image of a batch, repeated; None: as the model decides."""


@dataclass(frozen=True)
class Setting:
    """What all modes of one comparison have in common."""

    config: str
    model: Detr
    peers: dict[str, Peer]
    """By mode."""
    device: torch.device
    dtype: str
    """`float32`, or `bfloat16` by autocast."""
    rounds: int
    trained: bool = False
    """Whether the weights are from a checkpoint."""
    clock: str = "wall"
    """A key of bench.measure.CLOCKS."""


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    device = choose_device(arguments.device)
    rounds = arguments.rounds or (2 if arguments.quick else 30 if device.type == "cuda" else 5)
    if arguments.cpu_targets:
        rows = cpu_targets(rounds, QUICK_SIZE if arguments.quick else IMAGE_SIZE, arguments.clock, console)
        show(rows, console)
        append_rows(rows, arguments.json)
        targets = targets_of(rows)
        for target in targets:
            console.print(target.sentence, soft_wrap=True)
        if not arguments.quick and not all(target.met for target in targets):
            raise UserError("a target is not met: check that no other program uses the processor")
        return

    config = load_config(arguments.config, arguments.overrides)
    model = given_subject(config, arguments.checkpoint).model
    modes = chosen_modes(arguments.modes, model)
    peers = load_peers([mode for mode in modes if mode.startswith("peer:")], console)
    trained = arguments.checkpoint is not None
    setting = Setting(config.name, model, peers, device, arguments.dtype, rounds, trained, arguments.clock)
    size = QUICK_SIZE if arguments.quick else arguments.image_size
    rows = []
    for batch_size, kind in itertools.product(arguments.batch, arguments.images):
        if kind == "mixed" and batch_size == 1 and "same" in arguments.images:
            continue  # equal to `same`
        batch = images_of(arguments.folder, config, size, batch_size, kind)
        rows += measure(setting, batch, kind, modes, arguments.budgets or arguments.ratios or [None], console)
    if not rows:
        raise UserError("--modes: none of these modes can run on this machine")
    show(rows, console)
    append_rows(rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = new_parser("latency", __doc__)
    parser.add_argument(
        "--cpu-targets", action="store_true", help="only the three ratios with targets on a CPU"
    )
    peers = ", ".join(f"peer:{name}" for name in PEERS)
    parser.add_argument("--modes", type=words, default=["packed", "padded", "dense"], metavar="A,B",
                        help=f"of {', '.join(OWN_MODES)}, {peers}, peers (all of them)")  # fmt: skip
    parser.add_argument("--ratios", type=lambda text: [(share,) for share in shares(text)], metavar="A,B",
                        help="keep ratios, each for all images")  # fmt: skip
    parser.add_argument("--budgets", type=lambda text: [shares(text)], metavar="A,B",
                        help="keep ratio of each image of a batch, repeated")  # fmt: skip
    parser.add_argument("--images", type=words, default=["same", "mixed"], metavar="same,mixed",
                        help="one image repeated, or images of different sizes and contents")  # fmt: skip
    parser.add_argument("--folder", type=Path, metavar="DIR", help="images to use instead of generated ones")
    add_model_options(parser, IMAGE_SIZE, "30 on a GPU, 5 on a CPU")
    parser.add_argument("--json", type=row_file, help="append rows to this file, one JSON object a line")
    arguments = parser.parse_args()
    if arguments.ratios and arguments.budgets:
        raise UserError(
            "--ratios (one for all images) and --budgets (one for each) exclude each other: give one"
        )
    for kind in arguments.images:
        if kind not in ("same", "mixed"):
            raise UserError(f"--images {kind}: must be same, mixed, or same,mixed")
    return arguments


# ------------------------------------------------------------------------------------------------------------- subjects
def chosen_modes(asked: Sequence[str], model: Detr) -> list[str]:
    """The requested modes, with `peers` expanded; a model without a selector has only `dense`."""
    known = [*OWN_MODES, *(f"peer:{name}" for name in PEERS)]
    modes = []
    for mode in asked:
        if mode not in (*known, "peers"):
            raise UserError(f"--modes {mode}: must be of {', '.join(known)}, or peers for all peers")
        modes += known[len(OWN_MODES) :] if mode == "peers" else [mode]
    if model.selector is None:
        dense = {"packed": "dense", "padded": "dense", "captured-stages": "captured-dense"}
        modes = [dense.get(mode, mode) for mode in modes]
    return list(dict.fromkeys(modes))


def load_peers(modes: Sequence[str], console: Console) -> dict[str, Peer]:
    """The peers by mode; prints which of them are not installed."""
    peers = {}
    for mode in modes:
        peer = load_peer(mode.removeprefix("peer:"))
        if isinstance(peer, Peer):
            peers[mode] = peer
        else:
            console.print(peer)
    return peers


@contextmanager
def forced_budgets(model: Detr, budgets: Sequence[float] | None) -> Iterator[None]:
    """Sets the keep ratio of image i of a batch to `budgets[i % len(budgets)]`; None leaves it to the selector."""
    selector = model.selector
    if selector is None or budgets is None:
        yield
        return

    # Copied to the device here: a captured graph cannot contain a copy from the host.
    shares_given = torch.tensor(budgets).to(model.level_embed.device)

    def num_tokens(num_valid_B: Tensor, keep_ratio: Tensor | float) -> Tensor:
        num_images = len(num_valid_B)
        share_B = shares_given.to(num_valid_B.device).repeat(-(-num_images // len(budgets)))[:num_images]
        return ((num_valid_B * share_B).long() + 1).minimum(num_valid_B)

    capacity = patch.object(selector, "max_ratio", max(budgets))  # of plans on a GPU
    with patch.object(selector, "num_tokens", num_tokens), capacity:
        yield


def generated_images(
    count: int,
    kind: str,
    size: tuple[int, int] = IMAGE_SIZE,
    *,
    seed: int = 0,
    num_objects: int | None = None,
) -> ImageBatch:
    """Synthetic images. `same`: one image repeated; `mixed`: one hard image, then easy ones of other sizes.

    num_objects: of every image; None: MIXED_OBJECTS.
    """
    images = []
    for index in range(count if kind == "mixed" else 1):
        height, width = (round(side * MIXED_SCALES[index % len(MIXED_SCALES)]) for side in size)
        objects = num_objects or MIXED_OBJECTS[index % len(MIXED_OBJECTS)]
        drawn = draw_image(np.random.default_rng([seed, index]), (height, width), objects, num_classes=8)
        images.append(image_to_tensor(Image.fromarray(drawn.pixels)))
    return ImageBatch.collate(images if kind == "mixed" else images * count)


def images_of(
    folder: Path | None, config: Config, size: tuple[int, int], count: int, kind: str
) -> ImageBatch:
    """The first images of a folder, resized as in evaluation, repeated if there are fewer than `count`. Without a
    folder, `generated_images` of `size`."""
    if folder is None:
        return generated_images(count, kind, size)
    images = read_folder(folder, count if kind == "mixed" else 1, config)
    return ImageBatch.collate(list(itertools.islice(itertools.cycle(images), count)))


# ------------------------------------------------------------------------------------------------------------ measuring
def measure(
    setting: Setting,
    batch: ImageBatch,
    kind: str,
    modes: Sequence[str],
    budgets: Sequence[Budgets],
    console: Console,
) -> list[Row]:
    """Rows of every mode on one batch; of modes that select tokens, with every choice of budgets."""
    device = setting.device
    batch = batch.to(device)
    for module in (setting.model, *(peer.model for peer in setting.peers.values())):
        module.eval().to(device)
    passes: dict[tuple[str, Budgets], Pass] = {}
    for mode in modes:
        if mode.startswith("peer:") and mode not in setting.peers:
            continue  # not installed
        for choice in [None] if mode in DENSE_MODES or mode in setting.peers else budgets:
            if mode in setting.peers:
                passes[mode, choice] = peer_pass(setting.peers[mode], batch)
            elif mode in ("captured", "fused"):
                passes[mode, choice] = captured_pass(setting, batch, choice, fuse=mode == "fused")
            elif mode.startswith("captured-"):
                passes[mode, choice] = staged_pass(setting, batch, choice, dense=mode in DENSE_MODES)
            else:
                passes[mode, choice] = own_pass(setting.model, mode, batch, choice)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.dtype == "bfloat16")
    # On a GPU the first passes compile and tune. The last pass before the timed ones measures memory.
    warmup = 3 if device.type == "cuda" else 0
    num_passes = len(passes) * (warmup + setting.rounds)
    with torch.inference_mode(), autocast, progress_bar(console, num_passes) as advance:
        take_turns(passes, device, warmup, after_pass=lambda key: advance(key[0]))
        untimed = {key: peak_memory(run, device) for key, run in passes.items()}
        samples = take_turns(passes, device, setting.rounds, setting.clock, lambda key: advance(key[0]))

    facts = environment(device)
    rows = []
    for (mode, choice), stages in samples.items():
        selection, peak = untimed[mode, choice]
        if device.type == "cuda" and mode.startswith(("captured", "fused")):
            peak = None  # the memory of a CUDA graph is allocated at capture, not at replay
        keep_ratio = 1.0 if selection is None else round(selection.keep_ratio_B.mean().item(), 4)
        for stage in STAGES:
            if stage not in stages:
                continue
            row: Row = {
                "kind": "latency",
                "config": mode.removeprefix("peer:") if mode in setting.peers else setting.config,
                "device": device.type,
                "dtype": setting.dtype,
                "keep_ratio": keep_ratio,
                "budgets": None if choice is None else list(choice),
                "kept": None if selection is None else selection.num_kept_B.tolist(),
                "batch": len(batch),
                "images": kind,
                "image_size": list(batch.images_B3HW.shape[-2:]),
                "mode": mode,
                "stage": stage,
                "p50_ms": percentile(stages[stage], 50),
                "p95_ms": percentile(stages[stage], 95),
                "rounds": setting.rounds,
                "clock": setting.clock,
            }
            if stage == "total":
                row |= {"images_per_s": round(len(batch) / row["p50_ms"] * 1e3, 3), "peak_mb": peak}
            rows.append({**row, **facts})
    return rows


def own_pass(model: Detr, mode: str, batch: ImageBatch, budgets: Budgets) -> Pass:
    """One of the modes of this package by stages; returns its selection."""

    def run(watch: Stopwatch) -> TokenScores | None:
        tokens = model.tokenize(batch.images_B3HW, batch.sizes_B2)
        watch.mark("backbone")
        selection = None
        if mode != "dense":
            with forced_budgets(model, budgets):
                selection = model.select(tokens)
            watch.mark("select")
        if selection is not None and mode == "padded":
            memory_BSC = encode_padded(model.encoder, tokens, selection)
        else:
            memory_BSC, _ = model.encoder(tokens, selection.plan if selection else None)
        watch.mark("encoder")
        model.decode(tokens, selection, memory_BSC, supervision=False)
        watch.mark("decoder")
        return selection

    return run


def captured_pass(setting: Setting, batch: ImageBatch, budgets: Budgets, *, fuse: bool) -> Pass:
    """The model of `Detector.compile`, as one stage; returns its selection."""
    with forced_budgets(setting.model, budgets):
        # Copies the model, with its budgets.
        compiled = CompiledDetr(setting.model, dtype=getattr(torch, setting.dtype), fuse=fuse)

    def run(watch: Stopwatch) -> TokenScores | None:
        output = compiled(batch)
        watch.mark("total")
        return output.selection

    return run


def staged_pass(setting: Setting, batch: ImageBatch, budgets: Budgets, *, dense: bool) -> Pass:
    """The model of `Detector.compile` by stages; returns its selection."""
    dtype = getattr(torch, setting.dtype)
    with forced_budgets(setting.model, budgets):
        model = CompiledDetr(setting.model, dtype=dtype).model
    if dense:
        model.selector = None
    images_B3HW = batch.images_B3HW.to(dtype, memory_format=torch.channels_last)
    sizes_B2, stages, graphs = batch.sizes_B2, {}, GraphPool()

    def add(stage: str, function: Callable[[], Result]) -> Result:
        if images_B3HW.is_cuda:
            graph, result = graphs.capture(function, images_B3HW.device)
            stages[stage] = graph.replay
        else:
            result, stages[stage] = function(), function
        return result

    with torch.inference_mode():
        tokens = add("backbone", lambda: model.tokenize(images_B3HW, sizes_B2))
        selection = None if dense else add("select", lambda: model.select(tokens))
        plan = selection.plan if selection else None
        memory_BSC, _ = add("encoder", lambda: model.encoder(tokens, plan))
        add("decoder", lambda: model.decode(tokens, selection, memory_BSC, supervision=False))

    def run(watch: Stopwatch) -> TokenScores | None:
        with torch.autocast(setting.device.type, enabled=False):
            for stage, replay in stages.items():
                replay()
                watch.mark(stage)
        return selection

    return run


def peer_pass(peer: Peer, batch: ImageBatch) -> Pass:
    """Another detector; the beginning and the end of its encoder divide its stages."""

    def run(watch: Stopwatch) -> None:
        hooks = []
        if peer.encoder is not None:
            hooks = [
                peer.encoder.register_forward_pre_hook(lambda *_: watch.mark("backbone")),
                peer.encoder.register_forward_hook(lambda *_: watch.mark("encoder")),
            ]
        try:
            peer.run(batch)
        finally:
            for hook in hooks:
                hook.remove()
        watch.mark("total" if peer.encoder is None else "decoder")

    return run


# ------------------------------------------------------------------------------------------------------------- results
def show(rows: Sequence[Row], console: Console) -> None:
    """Prints `latency_table`."""
    config = ", ".join(distinct([row for row in rows if not row["mode"].startswith("peer:")], "config"))
    title = f"{config}, median milliseconds{CPU_TIME if rows[0]['clock'] == 'cpu' else ''}"
    print_table(latency_table(rows), console, title, source(rows), TABLE_WIDTH)


TARGETS: tuple[tuple[str, tuple[str, str, Budgets], tuple[str, str, Budgets], float, str], ...] = (
    (
        "encoder at 10 % of the tokens / dense encoder",
        ("packed", "encoder", (0.1,)),
        ("dense", "encoder", None),
        0.30,
        "at most",
    ),
    (
        "encoder for one image at 30 % and three at 5 %, packed / padded as published",
        ("packed", "encoder", UNEVEN),
        ("padded", "encoder", UNEVEN),
        0.70,
        "at most",
    ),
    (
        "transformers' Deformable DETR / this detector at 10 % of the tokens, whole pass",
        (PEER, "total", None),
        ("packed", "total", (0.1,)),
        1.25,
        "at least",
    ),
)
"""CPU targets: name, (mode, stage, budgets) above and below the fraction line, bound of the ratio of medians."""


@dataclass(frozen=True)
class Target:
    """A measured ratio and its bound."""

    what: str
    measured: float
    bound: float
    relation: str = "at most"
    """`at most` or `at least`."""

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.relation == "at most" else self.measured >= self.bound

    @property
    def sentence(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        return f"{self.what}: {self.measured:.2f} ({self.relation} {self.bound:.2f}: {verdict})"


def cpu_targets(rounds: int, size: tuple[int, int], clock: str, console: Console) -> list[Row]:
    """The rows that `targets_of` needs."""
    config = load_config(CONFIGS / "ats_r50_0.1_0.2.yaml")
    model = given_subject(config, None).model
    peers = load_peers([PEER], console)
    setting = Setting(config.name, model, peers, torch.device("cpu"), "float32", rounds, clock=clock)
    single, mixed = generated_images(1, "same", size), generated_images(len(UNEVEN), "mixed", size)
    rows = measure(setting, single, "same", ["packed", "dense", PEER], [(0.1,)], console)
    return rows + measure(setting, mixed, "mixed", ["packed", "padded"], [UNEVEN], console)


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """The TARGETS for which there are rows, of modes that ran in turns."""
    times = {
        (row["mode"], row["stage"], row["budgets"] and tuple(row["budgets"])): row["p50_ms"]
        for row in reversed(rows)  # the first of equal ones counts
        if row["device"] == "cpu"
    }
    return [
        Target(what, times[over] / times[under], bound, relation)
        for what, over, under, bound, relation in TARGETS
        if over in times and under in times
    ]


if __name__ == "__main__":
    run_cli(main)
