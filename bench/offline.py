"""What the compiler makes of every shipped kernel configuration, for GPUs that are not here.

Triton's wheel carries ptxas, cuobjdump and nvdisasm: neither a GPU nor a CUDA toolkit is needed. The launches are the
real ones, caught on their way to the GPU, so that the table cannot drift from what runs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ats_detr.kernels.gpu import (
    attention,
    attention_map,
    convolution,
    geometry,
    linear,
    normalization,
    packing,
    selection,
    tuning,
    value_gradient,
)
from ats_detr.kernels.gpu.problem import prepare

ARCHITECTURES = (80, 90, 100, 120)
LEVELS = ((8, 8), (4, 4), (2, 2), (2, 2))  # the code does not depend on them
HEADS, HEAD_DIM, POINTS = 8, 32, 4
POINTS_OF_LEVELS = (3, 6, 3)  # D-FINE
WIDTH, HIDDEN = 256, 1024
PROJECTED = HEADS * len(LEVELS) * POINTS * 3  # offsets and logits in one product
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)"
)
_NOISE = r"^[A-Z]+\.(E\.)?|\.(FTZ|RN|STRONG|GPU)"
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


@dataclass
class Launch:
    """One launch as the launcher asked for it."""

    kernel: JITFunction
    values: dict
    """Arguments and constants by name."""
    options: dict
    """num_warps and the like."""


def caught(call: Callable[[], object]) -> list[Launch]:
    """Runs `call` and returns its kernel launches instead of making them."""
    launches = []

    def catch(kernel, *args, grid, warmup, **keywords) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values.update({name: value for name, value in keywords.items() if name in kernel.arg_names})
        options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel, values, options))

    with patch.object(JITFunction, "run", catch):
        call()
    return launches


def compile_for(launch: Launch, architecture: int) -> dict:
    """Registers, spills, shared memory and instruction counts of one launch."""
    signature, constants, divisible = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible[(index,)] = [["tt.divisibility", 16]]
        elif launch.kernel.params[index].is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(launch.kernel, signature, constants, divisible)
    options = {"num_stages": 3, "enable_fp_fusion": True, **launch.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    instructions, loops, registers = _disassemble(compiled.asm["cubin"])
    count = collections.Counter(mnemonic.split(".")[0] for _, mnemonic in instructions)
    widths = [_bits(mnemonic) for _, mnemonic in instructions if mnemonic.startswith("LDG")]
    reductions = [mnemonic for _, mnemonic in instructions if mnemonic.startswith(("RED.", "REDG.", "ATOM"))]
    return {
        "registers": registers,
        "spill_bytes": sum(
            _bits(mnemonic) // 8 for _, mnemonic in instructions if mnemonic.startswith("STL")
        ),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "barriers": count["BAR"],
        "load_bits": max(widths, default=0),
        "reductions": dict(collections.Counter(re.sub(_NOISE, "", reduction) for reduction in reductions)),
        "fences": count["MEMBAR"] + count["CCTL"],
        "instructions": len(instructions),
        "loops": [sum(first <= address <= last for address, _ in instructions) for first, last in loops],
    }


def _bits(mnemonic: str) -> int:
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((widths[part] for part in mnemonic.split(".")[1:] if part in widths), 32)


def _disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], list[tuple[int, int]], int]:
    """(address, mnemonic) of every instruction, (first, last) address of every loop, registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run(
                [_TOOLS / tool, flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    instructions, branches, labels, pending = [], [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            pending.append(label[1])
        elif match := _INSTRUCTION.match(line):
            address, mnemonic = int(match[1], 16), match[2]
            labels.update(dict.fromkeys(pending, address))
            pending = []
            if mnemonic != "NOP":
                instructions.append((address, mnemonic))
            if mnemonic.startswith("BRA") and (target := re.search(r"\.L_x_\d+", match[3])):
                branches.append((address, target[0]))
    loops = [
        (labels[target], address) for address, target in branches if labels.get(target, address) < address
    ]
    return instructions, loops, int(re.findall(r"\bREG:(\d+)", usage)[-1])


# ---------------------------------------------------------------------- what is to be compiled
def attention_launches(
    kernel_pass: str,
    dtype: torch.dtype,
    config: dict,
    fused: bool = True,
    points: Sequence[int] = (POINTS,) * len(LEVELS),
) -> list[Launch]:
    """Launches of 'forward', 'backward' (atomic), 'gradients' (no value gradient), 'tiles' or 'sorted'.

    points: of each level.
    """
    levels = LEVELS[: len(points)]
    num_tokens = sum(height * width for height, width in levels)
    num_queries = 64
    value = torch.zeros(2, num_tokens, HEADS, HEAD_DIM, dtype=dtype)
    reference = torch.zeros(num_queries, len(levels), 2) if fused else None
    offsets = torch.zeros(num_queries, HEADS, sum(points), 2, dtype=dtype)
    image = torch.zeros(num_queries, dtype=torch.int32)
    out = torch.zeros(num_queries, HEADS * HEAD_DIM, dtype=dtype)
    problem = prepare(value, levels, reference, offsets, offsets[..., 0].contiguous(), image, points)
    calls = {
        "forward": lambda: attention.forward(problem, None),
        "backward": lambda: attention.backward(problem, out, out, True, False),
        "gradients": lambda: attention.backward(problem, out, out, False, False),
        "tiles": lambda: value_gradient.value_gradient_tiled(problem, out),
        "sorted": lambda: value_gradient.value_gradient_sorted(problem, out),
    }
    with configured(config):
        return caught(calls[kernel_pass])


@contextlib.contextmanager
def configured(config: dict) -> Iterator[None]:
    """Context in which launchers use this configuration."""
    choose = patch.object(tuning, "_choose", lambda *_: (config, "compiled offline"))
    with patch.dict(tuning._chosen, clear=True), choose, patch.object(tuning, "TILES_FROM", 10**9):
        yield


def linear_launches(operator: str, rows: torch.dtype, dtype: torch.dtype, config: dict) -> list[Launch]:
    """Launches of 'linear', 'linear_norm' or 'feedforward' with a capacity."""
    x, wide = torch.zeros(64, WIDTH, dtype=rows), torch.zeros(64, HIDDEN, dtype=dtype)
    count = torch.zeros(1, dtype=torch.int32)
    projection, bias = torch.zeros(PROJECTED, WIDTH, dtype=dtype), torch.zeros(PROJECTED, dtype=rows)
    square, vector = torch.zeros(WIDTH, WIDTH, dtype=dtype), torch.zeros(WIDTH, dtype=rows)
    layers = (torch.zeros(HIDDEN, WIDTH, dtype=dtype), wide[0], wide.new_zeros(WIDTH, HIDDEN), vector)
    norm = (vector, vector, 1e-5, count)
    calls = {
        "linear": lambda: linear.packed_linear(x, projection, bias, count, x, torch.float32, False),
        "linear_norm": lambda: linear.packed_linear_norm(wide[:, :WIDTH], square, vector, x, *norm),
        "feedforward": lambda: linear.fused_feedforward(x, *layers, *norm),
    }
    with configured(config):
        return caught(calls[operator])


def convolution_launches(dtype: torch.dtype, config: dict | None = None) -> list[Launch]:
    """Launches of a 1x1 convolution (with `config`), or of what follows other convolutions."""
    x = torch.zeros(2, WIDTH, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    scale, bias, large = torch.zeros(WIDTH), torch.zeros(WIDTH), x.repeat(1, 1, 8, 8)
    if config is None:
        return [
            *caught(lambda: convolution.affine_relu_(x, scale, bias, x, True)),
            *caught(lambda: convolution.affine_relu_max_pool(x[:, :64], scale[:64], bias[:64])),
            *caught(lambda: normalization.group_norm_(large.flatten(2).mT, large, 32, scale, bias, 1e-5)),
        ]
    weight, residual = torch.zeros(WIDTH, WIDTH, 1, 1, dtype=dtype), x[:, :, ::2, ::2]
    with configured(config):
        return caught(
            lambda: convolution.pointwise_convolution(x, weight, scale, bias, residual, True, (2, 2))
        )


def other_launches(dtype: torch.dtype) -> list[Launch]:
    """Selection, pack, scatter, attention map and geometry."""
    scores, mask = torch.zeros(4, 17821, dtype=dtype), torch.zeros(4, 17821, dtype=torch.bool)
    keep = torch.zeros(4, dtype=torch.int64)
    index = torch.zeros(64, dtype=torch.int32)
    slots, memory = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(4, 64, 256, dtype=dtype)
    plan, square = (index, index, slots), torch.zeros(256, 256, dtype=dtype)
    rows, references = torch.zeros(64, 256, dtype=dtype), torch.zeros(4, 64, 4, 2)
    offsets, logits = torch.zeros(64, 8, 4, 4, 2, dtype=dtype), torch.zeros(64, 8, 4, 4, dtype=dtype)
    sizes = [side for level in LEVELS for side in level]
    raw = (torch.zeros(64, 4, 4), offsets, logits, sizes, None)
    counts, ratios = torch.zeros(2, 4, 2, dtype=torch.int32), torch.zeros(2, 4, 2)
    return [
        *caught(lambda: selection.select(scores, keep, mask, 100)),
        *caught(lambda: selection.select(scores[:, :9000], keep, None, 100)),
        *caught(lambda: packing.pack(*plan, index[:1], [memory, memory, references])),
        *caught(lambda: packing.scatter(memory, rows, *plan, None)),
        *caught(lambda: packing.scatter_(memory, rows, *plan, None)),
        *caught(lambda: linear.packed_linear_(memory, rows, square, rows[0], index[:1], None, *plan)),
        *caught(lambda: packing.zero_padding_(memory, mask[:, :64])),
        *caught(lambda: attention_map.add_attention_map(torch.zeros(4, 84), *raw)),
        *caught(lambda: geometry.token_geometry(keep.view(2, 2), 64, 64, sizes)),
        *caught(
            lambda: geometry.token_rows(counts, ratios, index, index, index[:1], square[:4], sizes, dtype)
        ),
        *caught(lambda: geometry.encode_boxes(ratios, 128)),
        *caught(
            lambda: geometry.refine_boxes(memory[:2, :, :4], references[:2, :, 0].repeat(1, 1, 2), ratios)
        ),
    ]


def jobs(architecture: int, everything: bool = True) -> Iterator[tuple[dict, Launch]]:
    """(labels, launch) of each configuration that is shipped; the default ones only unless `everything`."""

    def job(
        launch: Launch, kernel_pass: str = "", config: dict | None = None, fused: bool = True
    ) -> tuple[dict, Launch]:
        labels = {"kernel": launch.kernel.__name__, "pass": kernel_pass, "dtype": name, "fused": fused}
        return {**labels, "config": config or {}, "arch": f"sm_{architecture}"}, launch

    def chosen(candidates: list[dict]) -> list[dict]:
        return candidates if everything else candidates[:1]

    uniform = (POINTS,) * len(LEVELS)
    passes = (
        ("forward", "msda_forward", True, uniform),
        ("backward", "msda_backward", True, uniform),
        ("gradients", "msda_backward", True, uniform),
        ("tiles", "value_tiles", True, uniform),
        ("forward", "msda_forward", False, uniform),
        ("backward", "msda_backward", False, uniform),
        ("forward", "msda_forward", False, POINTS_OF_LEVELS),
        ("backward", "msda_backward", False, POINTS_OF_LEVELS),
        ("tiles", "value_tiles", False, POINTS_OF_LEVELS),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == torch.float16 and not everything:
            continue
        name = str(dtype).removeprefix("torch.")
        key = (name, HEADS, HEAD_DIM, len(LEVELS), POINTS, True)
        for kernel_pass, operator, fused, points in passes if everything else passes[:4]:
            density = [tuning.density(1, 1)] if operator == "value_tiles" else []
            candidates = tuning.configurations(operator, (*key, *density))
            for config in chosen(candidates) if fused else candidates[:1]:
                for launch in attention_launches(kernel_pass, dtype, config, fused, points):
                    yield job(launch, kernel_pass, config, fused)
        for operator in ("linear", "linear_norm", "feedforward"):
            if operator == "feedforward" and dtype == torch.float32:
                continue  # two launches of the other two
            rows_dtypes = [dtype]
            if everything and dtype != torch.float32:
                rows_dtypes.append(torch.float32)  # as under autocast
            for rows in rows_dtypes:
                for config in chosen(tuning.configurations(operator, (name,))):
                    (launch,) = linear_launches(operator, rows, dtype, config)
                    yield job(launch, "" if rows == dtype else "autocast", config)
        for config in chosen(tuning.configurations("pointwise", (name,))):
            (launch,) = convolution_launches(dtype, config)
            yield job(launch, config=config)
        yield from map(job, convolution_launches(dtype))
        if everything or dtype == torch.float32:
            seen = set()
            for launch in (*attention_launches("sorted", dtype, {}), *other_launches(dtype)):
                if launch.kernel.__name__ not in seen or launch.kernel.__name__ == "find_thresholds":
                    seen.add(launch.kernel.__name__)
                    yield job(launch)


def report(labels: dict, launch: Launch, architecture: int) -> dict:
    """One row of the table."""
    facts = compile_for(launch, architecture)
    per_row = None
    if labels["kernel"] in ("msda_forward", "msda_backward"):
        points, unroll = launch.values["POINTS"], launch.values["UNROLL"]
        trips = [number // step for number, step in zip(points, unroll, strict=True) if number > step]
        assert len(trips) == len(facts["loops"]), "one loop for each level that is not unrolled"
        executed = facts["instructions"]
        executed += sum((trip - 1) * size for trip, size in zip(trips, facts["loops"], strict=True))
        per_row = round(executed * facts["num_warps"] / launch.values["BLOCK"], 1)
    return {**labels, **facts, "instructions_per_query_head": per_row}


def main(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    print(
        f"triton {triton.__version__}; {HEADS} heads x {HEAD_DIM} channels, {len(LEVELS)} levels x {POINTS} points"
    )
    for architecture in ARCHITECTURES:
        for labels, launch in jobs(architecture, everything=not arguments.quick):
            row = report(labels, launch, architecture)
            rows.append(row)
            config = " ".join(f"{name}={value}" for name, value in row["config"].items())
            print(
                f"{row['arch']:6} {row['kernel']:18} {row['pass']:9} {row['dtype']:8} "
                f"{'fused' if row['fused'] else '':5} "
                f"{config:62} warps {row['num_warps']:2} regs {row['registers']:3} spill {row['spill_bytes']:3} "
                f"shared {row['shared_bytes']:5} bar {row['barriers']:2} load {row['load_bits']:3} bit "
                f"per (q,h) {row['instructions_per_query_head'] or '-'}",
                flush=True,
            )
    spilled = [row for row in rows if row["spill_bytes"]]
    print(f"{len(rows)} compiled, {len(spilled)} with spills")
    return rows
