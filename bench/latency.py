"""How long a pass takes, stage by stage: packed against padded against dense, and against other detectors.

    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --ratios 0.1,0.2,0.3
    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --batch 4 --images mixed --budgets 0.3,0.05,0.05,0.05
    python -m bench.latency --config configs/ats_r50_0.1_0.2.yaml --ratios 0.1 --modes packed,peer:deformable-detr
    python -m bench.latency --cpu-targets         the three ratios that this package promises on a CPU
    python -m bench.latency --quick               tiny images and few rounds, to check this script

Modes: `packed` is what this package does; `padded` is the encoder as published (bench/padded.py); `dense` is the same
model without token selection; `captured` is the whole model in one piece (`Detector.compile`), on a GPU as CUDA graphs,
and `fused` is that with a compiled backbone (`Detector.compile(fuse=True)`);
`peer:NAME` is another detector (bench/peers).
Weights are random without a checkpoint, and random weights choose budgets at random: `--ratios` gives every image the
same budget, `--budgets` one to each image of a batch. All modes run in one process and take turns.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.config import Config, load_config
from ats_detr.data.synthetic import draw_image
from ats_detr.data.transforms import image_to_tensor
from ats_detr.distributed import choose_device
from ats_detr.errors import UserError, run_cli
from ats_detr.model import CompiledDetr, Detr
from ats_detr.model.output import TokenScores
from bench.flops import CONFIGS, given_subject, read_folder
from bench.measure import (
    CLOCK_HELP,
    CLOCKS,
    Contender,
    Row,
    Stopwatch,
    append_rows,
    environment,
    peak_memory,
    percentile,
    positive,
    progress_bar,
    row_file,
    take_turns,
)
from bench.padded import encode_padded
from bench.peers import PEERS, Peer, load_peer

STAGES = ("backbone", "select", "encoder", "decoder", "total")
OWN_MODES = ("packed", "padded", "dense", "captured", "fused")
IMAGE_SIZE = (800, 1066)
"""(height, width): a 640x480 photograph as evaluation resizes it."""
QUICK_SIZE = (128, 160)
TABLE_WIDTH = 140
"""Columns of the printed table."""
MIXED_SCALES = (1.0, 0.98, 0.99, 0.965)
"""Sides of mixed images: all in one size bucket of evaluation, which batches no others together."""
MIXED_OBJECTS = (25, 1, 3, 2)
"""Objects on mixed images: a hard one, and easy ones."""
PEER = "peer:deformable-detr"
"""The detector of the same architecture that users compare with."""
UNEVEN = (0.3, 0.05, 0.05, 0.05)
"""Budgets of a batch of one hard and three easy images."""
Budgets = tuple[float, ...] | None
"""Share of its tokens that each image of a batch keeps, repeated; None: as the model decides."""


@dataclass(frozen=True)
class Setting:
    """What all contenders of one comparison have in common."""

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
    """One of bench.measure.CLOCKS."""


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    device = choose_device(arguments.device)
    rounds = arguments.rounds or (2 if arguments.quick else 30 if device.type == "cuda" else 5)
    if arguments.cpu_targets:
        rows = cpu_targets(rounds, QUICK_SIZE if arguments.quick else IMAGE_SIZE, arguments.clock, console)
        show(rows, console)
        if arguments.json:
            append_rows(rows, arguments.json)
        targets = targets_of(rows)
        for target in targets:
            console.print(target.sentence, soft_wrap=True)
        if not arguments.quick and not all(target.met for target in targets):
            raise UserError("not every target is met: were other programs running?")
        return

    config = load_config(arguments.config, arguments.overrides)
    model = given_subject(config, arguments.checkpoint).model
    modes = chosen_modes(arguments.modes, model)
    peers = load_peers([mode for mode in modes if mode.startswith("peer:")], console)
    trained = arguments.checkpoint is not None
    setting = Setting(config.name, model, peers, device, arguments.dtype, rounds, trained, arguments.clock)
    rows = []
    for batch_size, kind in itertools.product(arguments.batch, arguments.images):
        if kind == "mixed" and batch_size == 1 and "same" in arguments.images:
            continue  # one image is one image
        if arguments.folder:
            batch = photographs(arguments.folder, batch_size, kind, config)
        else:
            size = QUICK_SIZE if arguments.quick else arguments.image_size
            batch = generated_images(batch_size, kind, size)
        rows += measure(setting, batch, kind, modes, arguments.budgets or arguments.ratios or [None], console)
    if not rows:
        raise UserError("nothing to measure: none of these modes can run here")
    show(rows, console)
    if arguments.json:
        append_rows(rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=str(CONFIGS / "ats_r50_0.1_0.2.yaml"), help="one YAML file")
    parser.add_argument(
        "--checkpoint", help="weights (what predict takes), for the budgets they really choose"
    )
    parser.add_argument("--cpu-targets", action="store_true", help="print the three ratios promised on a CPU")
    peers = ", ".join(f"peer:{name}" for name in PEERS)
    parser.add_argument("--modes", type=words, default=["packed", "padded", "dense"], metavar="A,B",
                        help=f"of {', '.join(OWN_MODES)}, {peers}, peers (all of them)")  # fmt: skip
    parser.add_argument("--ratios", type=lambda text: [(share,) for share in shares(text)], metavar="A,B",
                        help="keep ratios, one after another, every image the same")  # fmt: skip
    parser.add_argument("--budgets", type=lambda text: [shares(text)], metavar="A,B",
                        help="keep ratio of each image of a batch, repeated")  # fmt: skip
    parser.add_argument("--batch", type=batch_sizes, default=[1], metavar="1,4,8")
    parser.add_argument("--images", type=words, default=["same", "mixed"], metavar="same,mixed",
                        help="one image repeated, or images of different sizes and contents")  # fmt: skip
    parser.add_argument("--folder", type=Path, metavar="DIR", help="images to use instead of generated ones")
    parser.add_argument("--image-size", type=image_size, default=IMAGE_SIZE, metavar="HxW")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--rounds", type=positive, help="passes of each contender; default 30 on a GPU, 5 on a CPU"
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=CLOCK_HELP)
    parser.add_argument("--quick", action="store_true", help="tiny images, two rounds")
    parser.add_argument("--json", type=row_file, help="append the rows here, one JSON object a line")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.num_queries=100")
    arguments = parser.parse_args()
    if arguments.ratios and arguments.budgets:
        raise UserError("give --ratios (the same for every image) or --budgets (one for each), not both")
    for kind in arguments.images:
        if kind not in ("same", "mixed"):
            raise UserError(f"--images {kind}: give same, mixed, or both")
    return arguments


def words(text: str) -> list[str]:
    """An argument such as a,b."""
    return [word.strip() for word in text.split(",") if word.strip()]


def shares(text: str) -> tuple[float, ...]:
    """An argument such as 0.1,0.3."""
    try:
        numbers = tuple(float(word) for word in words(text))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give shares above 0 and up to 1, such as 0.1,0.3")
    return numbers


def batch_sizes(text: str) -> list[int]:
    """An argument such as 1,4,8."""
    if not words(text) or not all(word.isdigit() and int(word) > 0 for word in words(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of images above 0, such as 1,4,8")
    return [int(word) for word in words(text)]


def image_size(text: str) -> tuple[int, int]:
    """An argument such as 800x1066."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r}: give height and width, such as 800x1066")
    return int(height), int(width)


# ------------------------------------------------------------------------------------------------------------- subjects
def chosen_modes(asked: Sequence[str], model: Detr) -> list[str]:
    """The modes asked for, `peers` spelled out; without a selector there is nothing to pack or to pad."""
    known = [*OWN_MODES, *(f"peer:{name}" for name in PEERS)]
    modes = []
    for mode in asked:
        if mode not in (*known, "peers"):
            raise UserError(f"--modes {mode}: there are {', '.join(known)}, and peers for all of them")
        modes += known[len(OWN_MODES) :] if mode == "peers" else [mode]
    if model.selector is None:
        modes = ["dense" if mode in ("packed", "padded") else mode for mode in modes]
    return list(dict.fromkeys(modes))


def load_peers(modes: Sequence[str], console: Console) -> dict[str, Peer]:
    """The peers by mode; says which are not there."""
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
    """Image i of a batch keeps the share `budgets[i % len(budgets)]` of its tokens, whatever its selector decides."""
    selector = model.selector
    if selector is None or budgets is None:
        yield
        return

    # On the device beforehand: a copy from the host cannot be part of a captured graph.
    shares_given = torch.tensor(budgets).to(model.level_embed.device)

    def num_tokens(num_valid_B: Tensor, budget_logits_BR: Tensor | None) -> Tensor:
        num_images = len(num_valid_B)
        share_B = shares_given.to(num_valid_B.device).repeat(-(-num_images // len(budgets)))[:num_images]
        return ((num_valid_B * share_B).long() + 1).minimum(num_valid_B)

    largest = selector.max_ratio
    selector.num_tokens = num_tokens  # type: ignore[method-assign]  # hides the method of the class
    selector.max_ratio = max(budgets)  # from which the capacity of plans on a GPU follows
    try:
        yield
    finally:
        del selector.num_tokens
        selector.max_ratio = largest


def generated_images(
    count: int,
    kind: str,
    size: tuple[int, int] = IMAGE_SIZE,
    *,
    seed: int = 0,
    num_objects: int | None = None,
) -> ImageBatch:
    """Drawn shapes; `same`: one image repeated, `mixed`: first a hard image, then easy ones, of other sizes.

    num_objects: on every image; None: MIXED_OBJECTS.
    """
    images = []
    for index in range(count if kind == "mixed" else 1):
        height, width = (round(side * MIXED_SCALES[index % len(MIXED_SCALES)]) for side in size)
        objects = num_objects or MIXED_OBJECTS[index % len(MIXED_OBJECTS)]
        drawn = draw_image(np.random.default_rng([seed, index]), (height, width), objects, num_classes=8)
        images.append(image_to_tensor(Image.fromarray(drawn.pixels)))
    return ImageBatch.collate(images if kind == "mixed" else images * count)


def photographs(folder: Path, count: int, kind: str, config: Config) -> ImageBatch:
    """The first images of a folder as evaluation resizes them; repeated if there are too few."""
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
    """Rows of every mode and, where tokens are selected, of every choice of budgets, on one batch."""
    device = setting.device
    batch = batch.to(device)
    for module in (setting.model, *(peer.model for peer in setting.peers.values())):
        module.eval().to(device)
    selections: dict[str, TokenScores] = {}
    contenders: dict[str, Contender] = {}
    described: dict[str, tuple[str, Budgets]] = {}
    for mode in modes:
        if mode.startswith("peer:") and mode not in setting.peers:
            continue  # load_peers has said so
        sparse = mode in ("packed", "padded", "captured", "fused")
        for choice in budgets if sparse else [None]:
            name = f"{mode} {_spelled(choice)}" if sparse else mode
            described[name] = mode, choice
            if mode in setting.peers:
                contenders[name] = peer_contender(setting.peers[mode], batch)
            elif mode in ("captured", "fused"):
                fuse = mode == "fused"
                contenders[name] = captured_contender(setting, batch, choice, selections, name, fuse=fuse)
            else:
                contenders[name] = own_contender(setting.model, mode, batch, choice, selections, name)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.dtype == "bfloat16")
    # On a GPU the first passes compile and tune; the last pass before the timed ones is also weighed.
    warmup = 3 if device.type == "cuda" else 0
    passes = len(contenders) * (warmup + 1 + setting.rounds)
    with torch.inference_mode(), autocast, progress_bar(console, passes) as advance:
        take_turns(contenders, device, warmup, after_pass=advance)
        peaks = {}
        for name, run in contenders.items():
            # A graph's activations were allocated when it was captured: a replay shows nothing of them.
            replayed = device.type == "cuda" and described[name][0] in ("captured", "fused")
            peaks[name] = None if replayed else peak_memory(run, device)
            advance(name)
        samples = take_turns(contenders, device, setting.rounds, setting.clock, advance)

    facts = environment(device)
    rows = []
    for name, stages in samples.items():
        mode, choice = described[name]
        selection = selections.get(name)
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
                row |= {"images_per_s": round(len(batch) / row["p50_ms"] * 1e3, 3), "peak_mb": peaks[name]}
            rows.append({**row, **facts})
    return rows


def _spelled(choice: Budgets) -> str:
    return "as decided" if choice is None else ",".join(f"{share:g}" for share in choice)


def own_contender(
    model: Detr, mode: str, batch: ImageBatch, budgets: Budgets, selections: dict[str, TokenScores], name: str
) -> Contender:
    """One of our own modes. `selections[name]` will hold which tokens each image kept."""

    def run(watch: Stopwatch) -> None:
        tokens = model.tokenize(batch.images_B3HW, batch.padding_mask_BHW)
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
        if selection is not None:
            selections[name] = selection

    return run


def captured_contender(
    setting: Setting,
    batch: ImageBatch,
    budgets: Budgets,
    selections: dict[str, TokenScores],
    name: str,
    *,
    fuse: bool,
) -> Contender:
    """The whole model in one piece, as `Detector.compile` makes it."""
    with forced_budgets(setting.model, budgets):
        # Of a copy, which keeps the budgets.
        compiled = CompiledDetr(setting.model, dtype=getattr(torch, setting.dtype), fuse=fuse)

    def run(watch: Stopwatch) -> None:
        output = compiled(batch)
        watch.mark("total")
        if output.selection is not None:
            selections[name] = output.selection

    return run


def peer_contender(peer: Peer, batch: ImageBatch) -> Contender:
    """Another detector; its stages are told apart by where its encoder begins and ends."""

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
    """A table with a line for each contender: median milliseconds of the stages."""
    first = rows[0]
    height, width = first["image_size"]
    ours = next((row["config"] for row in rows if not row["mode"].startswith("peer:")), "")
    versions = ", ".join(
        f"{name} {first[name]}" for name in ("torch", "triton", "transformers") if name in first
    )
    times = "milliseconds of CPU time" if first["clock"] == "cpu" else "milliseconds"
    table = Table(
        title=f"{ours} on {height}x{width}, {first['dtype']}: median {times}",
        caption=f"{first['machine']}; {versions}; {first['date']}, commit {first['commit']}",
    )
    for heading in ("mode", "kept", "batch", "images"):
        table.add_column(heading, no_wrap=True)
    for heading in (*STAGES, "total p95", "images/s", "peak MB"):
        table.add_column(heading, justify="right")
    keys = ("mode", "keep_ratio", "budgets", "batch", "images")
    for key, group in itertools.groupby(rows, lambda row: [row[name] for name in keys]):
        stages = {row["stage"]: row for row in group}
        mode, keep_ratio, budgets, batch, kind = key
        total = stages["total"]
        decided = not mode.startswith(("dense", "peer:")) and budgets is None
        table.add_row(
            f"{mode}, as decided" if decided else mode,
            "" if mode.startswith("peer:") else f"{keep_ratio:.1%}",
            str(batch),
            kind,
            *(f"{stages[stage]['p50_ms']:.1f}" if stage in stages else "" for stage in STAGES),
            f"{total['p95_ms']:.1f}",
            f"{total['images_per_s']:.2f}",
            "" if total["peak_mb"] is None else f"{total['peak_mb']:.0f}",
        )
    # Long lines serve better than squeezed numbers in a file or a narrow window.
    Console(width=max(console.width, TABLE_WIDTH), highlight=False).print(table, crop=False)


@dataclass(frozen=True)
class Target:
    """A promise: `measured` stays on the right side of `bound`."""

    what: str
    measured: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def sentence(self) -> str:
        relation = "at most" if self.at_most else "at least"
        verdict = "met" if self.met else "NOT MET"
        return f"{self.what}: {self.measured:.2f} ({relation} {self.bound:.2f}: {verdict})"


def cpu_targets(rounds: int, size: tuple[int, int], clock: str, console: Console) -> list[Row]:
    """The rows from which `targets_of` finds what packing buys on a CPU."""
    config = load_config(CONFIGS / "ats_r50_0.1_0.2.yaml")
    model = given_subject(config, None).model
    peers = load_peers([PEER], console)
    setting = Setting(config.name, model, peers, torch.device("cpu"), "float32", rounds, clock=clock)
    single, mixed = generated_images(1, "same", size), generated_images(len(UNEVEN), "mixed", size)
    rows = measure(setting, single, "same", ["packed", "dense", PEER], [(0.1,)], console)
    return rows + measure(setting, mixed, "mixed", ["packed", "padded"], [UNEVEN], console)


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """The promises for a CPU that these rows can be held to; ratios of medians of contenders that took turns."""
    rows = [row for row in rows if row["device"] == "cpu"]

    def median(mode: str, stage: str, budgets: Budgets = None) -> float | None:
        wanted = (mode, stage, None if budgets is None else list(budgets))
        return next((r["p50_ms"] for r in rows if (r["mode"], r["stage"], r["budgets"]) == wanted), None)

    ratios = (
        (
            "encoder at 10 % of the tokens / dense encoder",
            median("packed", "encoder", (0.1,)),
            median("dense", "encoder"),
            0.30,
            True,
        ),
        (
            "encoder for one image at 30 % and three at 5 %, packed / padded as published",
            median("packed", "encoder", UNEVEN),
            median("padded", "encoder", UNEVEN),
            0.70,
            True,
        ),
        (
            "transformers' Deformable DETR / this detector at 10 % of the tokens, whole pass",
            median(PEER, "total"),
            median("packed", "total", (0.1,)),
            1.25,
            False,
        ),
    )
    return [
        Target(what, over / under, bound, most) for what, over, under, bound, most in ratios if over and under
    ]


if __name__ == "__main__":
    run_cli(main)
