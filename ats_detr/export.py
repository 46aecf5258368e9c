"""Export of a detector as one graph that runs without this package: ONNX, or a torch.export program.

The graph takes batches of any size of images of one padded size, and returns detections. It contains the reference
operators. Adaptive models keep a budget per image, with a static number of rows: rows beyond the budget of an image are
computed and discarded, so the cost is that of the largest budget. A fixed keep ratio as `budget` gives a smaller graph.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ats_detr.batch import bucket_size, padding_mask
from ats_detr.budgets import Budget
from ats_detr.data.transforms import IMAGE_MEAN, IMAGE_STD
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.evaluation import MAX_DETECTIONS
from ats_detr.kernels import TokenPlan, geometry, linear, packing, reference
from ats_detr.kernels.levels import pairs
from ats_detr.model import Detr
from ats_detr.model.output import BudgetOptions, top_pairs

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "kept")
_BATCH = Dim("batch", min=1, max=1024)
_MAX_SIDE = 16_384


class _ExportModule(nn.Module):
    """The model with normalisation and postprocessing, as a function of tensors."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detr, max_detections: int, options: BudgetOptions) -> None:
        super().__init__()
        self.model, self.max_detections, self.options = model, max_detections, options
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None])

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels = (images.float() / 255 - self.mean) / self.std
        pixels = pixels.masked_fill(padding_mask(images, sizes)[:, None], 0.0)
        output = self.model.detect(pixels, sizes, supervision=False, **self.options)
        scores, labels, boxes = top_pairs(output.last, self.max_detections)
        if output.selection is None:
            kept = (~output.padding_mask_BS).sum(1)
        else:
            kept = output.selection.num_kept_B
        return boxes, scores, labels, kept


def export_program(
    detector: Detector,
    size: tuple[int, int] | None = None,
    *,
    max_detections: int = MAX_DETECTIONS,
    budget: Budget | None = None,
) -> ExportedProgram:
    """The detector as a program of aten operators.

    Inputs: `images`, uint8 [B, 3, H, W], RGB, resized as in evaluation and padded at the bottom and right with any
    values; `sizes`, int64 [B, 2], (height, width) of each image without padding.

    Outputs, by descending score, N = max_detections: `boxes`, float32 [B, N, 4], corners in 0..1 of the unpadded image;
    `scores`, float32 [B, N]; `labels`, int64 [B, N], class indices; `kept`, int64 [B], number of kept tokens.

    Args:
        detector: the detector; it is not modified.
        size: (H, W) of the padded images, multiples of data.size_multiple. None: the padded size of a landscape image
            of short_side x long_side. Detections equal those of `predict` for images that evaluation pads to exactly
            this size; images that are padded further have slightly different features.
        max_detections: number of detections per image.
        budget: see `Detector.predict`; it is part of the graph.

    Raises:
        UserError: if the size or number of detections is out of range, or the model cannot have the budget.
    """
    data = detector.config.data
    size = size or bucket_size((data.short_side, data.long_side), data.size_multiple)
    if not 1 <= min(size) <= max(size) <= _MAX_SIDE or size != bucket_size(size, data.size_multiple):
        raise UserError(
            f"export size = {size[0]}x{size[1]}: must be multiples of {data.size_multiple} pixels in 1..{_MAX_SIDE}"
        )
    if max_detections < 1:
        raise UserError(f"max_detections = {max_detections}: must be >= 1")
    model = copy.deepcopy(detector.model).cpu().eval().requires_grad_(False)
    options = detector.budget_options(detector.budget if budget is None else budget)
    exported = _ExportModule(model, max_detections, options).eval()
    # The tracer unifies equal sizes. No other size in the model is three times a power of two, so the batch is 3.
    example = (torch.zeros(3, 3, *size, dtype=torch.uint8), torch.tensor([size] * 3))
    with torch.no_grad():
        program = torch.export.export(
            exported, example, dynamic_shapes={"images": {0: _BATCH}, "sizes": {0: _BATCH}}, strict=False
        )
        return program.run_decompositions(_decompositions())


# ------------------------------------------------------------------------------------------ operators in static shapes
def _decompositions() -> dict[Any, Any]:
    """Replacement of each operator of ats_detr.kernels in the graph."""
    operators = torch.ops.ats_detr
    return {
        **torch.export.default_decompositions(),
        operators.token_geometry.default: _inline(geometry._geometry),
        operators.token_rows.default: _inline(geometry._rows),
        operators.encode_boxes.default: _inline(geometry._encode),
        operators.refine_boxes.default: _inline(geometry._refine),
        operators.packed_linear.default: _inline(linear._packed_linear),
        operators.packed_linear_norm.default: _inline(linear._packed_linear_norm),
        operators.select.default: _select,
        operators.pack.default: _inline(packing._pack),
        operators.scatter.default: _scatter,
        operators.msda.default: _msda,
    }


def _inline(operator: Any) -> Any:
    """The definition of an operator, without the last argument, the backend."""
    return lambda *arguments: operator.definition(*arguments[:-1])


def _select(
    scores: Tensor, num_keep: Tensor, padding_mask: Tensor | None, capacity: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference operator, with a single sort."""
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept_by_rank = torch.arange(scores.shape[1], device=scores.device) < num_keep[:, None]
    plan = TokenPlan.from_mask(torch.zeros_like(kept_by_rank).scatter(1, order, kept_by_rank), capacity)
    return plan.token_index_K, plan.image_index_K, plan.offsets_B1, plan.slot_BS


def _scatter(
    memory: Tensor, rows: Tensor, token_index: Tensor, image_index: Tensor, slots: Tensor, num_rows: Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    return reference.merge(slots, rows, memory)


def _msda(
    value: Tensor, sizes: Sequence[int], shapes_L2: Tensor | None, reference_points: Tensor | None, offsets: Tensor,
    weights: Tensor, image_index: Tensor | None, num_rows: Tensor | None, deterministic: bool | None,
    points_of_levels: Sequence[int], backend: str,
) -> Tensor:  # fmt: skip
    """Deformable attention [K, H * D] of packed queries, with equally many points on each level.

    The maps of all images of a level are stacked into one tall map, so one call samples the packed queries of all
    images for any number of queries per image. Each image has a row of zeros above and below it; samples further
    outside are moved there.
    """
    shapes = pairs(sizes)
    batch, num_queries, num_points = value.shape[0], weights.shape[0], weights.shape[-1]
    if reference_points is not None:
        weights = reference.attention_weights(weights)
    if image_index is None:
        image_index = torch.arange(num_queries, device=value.device) // (num_queries // batch)
    image_K = image_index.to(offsets.dtype)[:, None, None]
    samples = []
    for level, maps in enumerate(value.float().split([h * w for h, w in shapes], dim=1)):
        height, width = shapes[level]
        x, y = offsets[:, :, level].unbind(-1)  # [K, H, P]
        if reference_points is not None:
            # Like `reference.sampling_locations`, without its constant tensors.
            box = reference_points[:, level, None, None]
            centre, side = box[..., :2], box[..., 2:]
            if side.shape[-1]:
                x, y = (z * side[..., i] * (0.5 / num_points) for i, z in enumerate((x, y)))
            else:
                x, y = x / width, y / height
            x, y = x + centre[..., 0], y + centre[..., 1]
        maps = F.pad(maps.unflatten(1, (height, width)), (0, 0, 0, 0, 0, 0, 1, 1))  # [B, h + 2, w, H, D]
        tall = maps.permute(3, 4, 0, 1, 2).flatten(2, 3)  # [H, D, B * (h + 2), w]
        row = (y * height - 0.5).clamp(-1, height) + 1 + image_K * (height + 2)
        grid = torch.stack([2 * x - 1, (2 * row + 1) / (batch * (height + 2)) - 1], -1)
        grid = grid.transpose(0, 1)  # [H, K, P, 2]
        samples.append(F.grid_sample(tall, grid, padding_mode="zeros", align_corners=False))
    weights = weights.flatten(2).transpose(0, 1)[:, None]  # [H, 1, K, L * P]
    gathered = (torch.cat(samples, -1) * weights).sum(-1)  # [H, D, K]
    return gathered.permute(2, 0, 1).flatten(1).to(value.dtype)


# -------------------------------------------------------------------------------------------------------------- files
def export_file(
    detector: Detector, path: str | Path, size: tuple[int, int] | None = None, **options: Any
) -> None:
    """Write `export_program(detector, size, **options)` to a file: .onnx for onnxruntime, .pt2 for `torch.export.load`.

    The file also contains the classes and the preprocessing sizes as JSON: under `ats_detr` in the metadata of an ONNX
    file, in the extra file `ats_detr.json` of a .pt2 file.

    Raises:
        UserError: if the suffix is another one, ONNX is not installed, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path}: unknown suffix {path.suffix!r}, must be .onnx or .pt2")
    if path.suffix == ".onnx":
        _import_onnx()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            program = export_program(detector, size, **options)
            padded = program.example_inputs[0][0].shape[-2:]
            facts = json.dumps({**_preprocessing(detector), "padded_size": list(padded)})
            temporary = Path(folder) / path.name
            if path.suffix == ".pt2":
                torch.export.save(program, temporary, extra_files={"ats_detr.json": facts})
            else:
                _as_onnx(program, facts).save(temporary)
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror or error})") from error


def _preprocessing(detector: Detector) -> dict[str, Any]:
    classes, data = detector.classes, detector.config.data
    return {
        "classes": dict(zip(classes.rows, classes.names, strict=True)),
        "short_side": data.short_side,
        "long_side": data.long_side,
    }


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("ONNX export needs onnx and onnxscript: pip install 'ats_detr[export]'") from None


def _sort(
    values: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """A stable sort by ONNX's TopK, which orders equal values by index."""
    return values.topk(values.shape[dim], dim=dim, largest=descending)


def _as_onnx(program: ExportedProgram, facts: str) -> torch.onnx.ONNXProgram:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs every operator that it does not fold
    program = program.run_decompositions({torch.ops.aten.sort.stable: _sort})
    converted = torch.onnx.export(
        program, (), input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False
    )
    assert converted is not None
    converted.model.metadata_props["ats_detr"] = facts
    return converted
