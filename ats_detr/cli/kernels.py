"""Compile the GPU kernels of a configuration: `ats-detr kernels compile CONFIG`.

Training and `Detector.compile` do this automatically; here it is done in advance, also on a machine without a GPU
(`--arch`). The kernels are compiled in parallel processes into Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace

import torch

from ats_detr.cli.options import CONFIG, add_overrides, image_size
from ats_detr.config import load_config
from ats_detr.console import say, track
from ats_detr.errors import UserError
from ats_detr.kernels.dispatch import HAS_TRITON
from ats_detr.precompile import COCO_CLASSES, COMMON_SIZE, MODES, find_variants


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("compile",))
    parser.add_argument("config", help=CONFIG)
    add_overrides(parser, "train.precision=bfloat16")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=MODES,
        help="passes of Detector.predict and Detector.compile, and training; default: all",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of Detector.compile; default: %(default)s",
    )
    parser.add_argument(
        "--image-sizes",
        nargs="+",
        type=image_size,
        default=[COMMON_SIZE],
        metavar="HEIGHTxWIDTH",
        help="before resizing; kernels depend little on them; default: 480x640",
    )
    parser.add_argument(
        "--num-classes", type=int, default=COCO_CLASSES, help="class indices; default: %(default)s"
    )
    parser.add_argument(
        "--arch", type=int, help="compute capability times 10, such as 90; default: that of the GPU"
    )
    parser.add_argument(
        "--gpu", help="name of the GPU, whose tuning results are used; default: this GPU, with --arch none"
    )
    parser.add_argument(
        "--jobs", type=int, help="number of processes; default: number of CPU cores, at most 16"
    )


def run(arguments: Namespace) -> None:
    """Compile what is missing, and print the numbers and the time."""
    config = load_config(arguments.config, arguments.overrides)
    if not HAS_TRITON:
        raise UserError("the package triton is not installed: pip install triton")
    for name in ("num_classes", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be >= 1")
    if any(side > 99_999 for size in arguments.image_sizes for side in size):
        raise UserError("--image-sizes: sides must be <= 99999 pixels")
    architecture, gpu = arguments.arch, arguments.gpu
    if architecture is None:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device: pass its compute capability, such as --arch 90")
        major, minor = torch.cuda.get_device_capability()
        architecture, gpu = 10 * major + minor, gpu or torch.cuda.get_device_name()
    if not 80 <= architecture <= 129:
        raise UserError(f"--arch {architecture}: must be in 80..129, the compute capability times 10")
    from ats_detr.kernels.gpu import compilation, tuning

    if tuning.INTERPRETING:
        raise UserError("TRITON_INTERPRET = 1: unset it, kernels are not compiled for the interpreter")

    started = time.monotonic()
    variants = find_variants(
        config,
        arguments.modes,
        dtype=getattr(torch, arguments.dtype),
        image_sizes=arguments.image_sizes,
        num_classes=arguments.num_classes,
        gpu=gpu,
    )
    jobs = min(arguments.jobs or min(len(os.sched_getaffinity(0)), 16), len(variants))
    num_compiled, errors = 0, {}
    outcomes = compilation.compile_variants(variants, architecture, jobs)
    for variant, is_new, error in track(outcomes, f"compiling kernels for sm_{architecture}", len(variants)):
        num_compiled += is_new
        if error is not None:
            errors[variant.kernel] = error
    seconds = time.monotonic() - started
    cached = len(variants) - num_compiled
    say(f"sm_{architecture}: {num_compiled} kernels compiled, {cached} cached, {seconds:.0f} s")
    if errors:
        kernel, error = next(iter(errors.items()))
        raise UserError(
            f"{len(errors)} kernels cannot be compiled for sm_{architecture}, such as {kernel}: {error}"
        )
