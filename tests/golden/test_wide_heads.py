"""Operator cases with heads of any width, from a folder: the published operator's own test uses 1,025 channels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from . import test_operators
from .cases import Case

RECIPE = """
import numpy as np

def msda_inputs(seed, shapes, N, M, D, Lq, P, special):
    random = np.random.default_rng(seed)
    weights = random.uniform(0.05, 1.0, (N, Lq, M, len(shapes), P))
    return dict(
        value=random.standard_normal((N, sum(h * w for h, w in shapes), M, D)),
        loc=random.uniform(-0.25, 1.25, (N, Lq, M, len(shapes), P, 2)),
        attn=weights / weights.sum((3, 4), keepdims=True),
        grad_out=random.standard_normal((N, Lq, M * D)),
    )

def msda_kinks(shapes, loc):
    nowhere = np.zeros(loc.shape[:-1], bool)
    return nowhere, nowhere
"""


def published_operator(value, shapes, locations, weights):
    """Deformable DETR, eq. 3, level by level with `grid_sample`: not with code of this project."""
    num_images, _, num_heads, head_dim = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    out = value.new_zeros(num_images * num_heads, head_dim, num_queries)
    for level, maps in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = maps.permute(0, 2, 3, 1).reshape(num_images * num_heads, head_dim, *shapes[level])
        grid = locations[:, :, :, level].transpose(1, 2).reshape(-1, num_queries, num_points, 2) * 2 - 1
        share = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, num_queries, num_points)
        out = out + (F.grid_sample(maps, grid, align_corners=False) * share).sum(-1)
    return out.view(num_images, num_heads * head_dim, num_queries).transpose(1, 2)


def write_case(folder: Path, subs: list[dict]) -> None:
    """`wide.json`, `wide.npz` and `recipe.py`, in the format of the published cases."""
    (folder / "recipe.py").write_text(RECIPE)
    recipe: dict = {}
    exec(RECIPE, recipe)
    arrays = {}
    for index, sub in enumerate(subs):
        shapes = [tuple(shape) for shape in sub["shapes"]]
        made = recipe["msda_inputs"](
            sub["seed"], shapes, sub["N"], sub["M"], sub["D"], sub["Lq"], sub["P"], sub["special"]
        )
        inputs = {name: torch.from_numpy(array) for name, array in made.items()}
        value, locations, weights = (inputs[name].requires_grad_() for name in ("value", "loc", "attn"))
        out = published_operator(value, shapes, locations, weights)
        out.backward(inputs["grad_out"])
        results = dict(
            out=out.detach(), grad_value=value.grad, grad_loc=locations.grad, grad_attn=weights.grad
        )
        arrays.update({f"s{index}_{name}": tensor.numpy() for name, tensor in results.items()})
    np.savez(folder / "wide.npz", **arrays)
    (folder / "wide.json").write_text(json.dumps({"kind": "msda", "case": "wide", "subs": subs}))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    sizes = dict(shapes=[[6, 4], [3, 2]], N=1, M=2, Lq=2, P=2, special=0)
    write_case(tmp_path, [dict(sizes, seed=seed, D=width) for seed, width in enumerate((30, 257, 1025))])
    return Case(tmp_path / "wide.json", json.loads((tmp_path / "wide.json").read_text()))


def test_the_reference_computes_wide_heads(case: Case, request: pytest.FixtureRequest) -> None:
    test_operators.test_deformable_attention(case, request)


def test_the_kernels_compute_wide_heads_of_cases_in_another_folder(case: Case) -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
        "--backend",
        "triton",
    ]
    run = subprocess.run(
        [
            *command,
            "--golden",
            str(case.path.parent),
            str(root / "tests/golden/test_operators.py"),
            "-k",
            "wide",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout[-3000:]
