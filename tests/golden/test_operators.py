"""Operators and geometry against numbers of the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.batch import ImageBatch
from ats_detr.data.transforms import resized_size
from ats_detr.kernels import (
    deformable_attention_map,
    encode_boxes,
    multi_scale_deformable_attention,
    token_geometry,
)
from ats_detr.model.output import Prediction, top_detections


def assert_close(name: str, ours: Tensor, golden: Tensor, tolerance: float) -> None:
    """The largest error is within `tolerance` times the standard deviation of `golden`."""
    assert ours.shape == golden.shape, name
    finite = golden.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: different entries are infinite"
    ours, golden = ours[finite].double(), golden[finite].double()
    error, scale = (ours - golden).abs().max().item(), golden.std().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


@pytest.mark.golden("msda")
def test_deformable_attention(case, request):
    # The kernels compute in float32; rounding of the locations alone moves a sample by 1e-5 pixels.
    kernel = request.config.getoption("--backend", "reference") == "triton"
    dtype, tolerance = (torch.float32, 1e-4) if kernel else (torch.float64, 1e-9)
    for index, sub in enumerate(case.info["subs"]):
        shapes = [tuple(shape) for shape in sub["shapes"]]
        arrays = case.recipe.msda_inputs(
            sub["seed"], shapes, sub["N"], sub["M"], sub["D"], sub["Lq"], sub["P"], sub["special"]
        )
        inputs = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
        value, locations, weights = (inputs[name].requires_grad_() for name in ("value", "loc", "attn"))
        out = multi_scale_deformable_attention(value, shapes, locations, weights)
        out.backward(inputs["grad_out"])
        assert_close("out", out.detach(), case.tensor(f"s{index}_out"), tolerance)
        assert_close("grad_value", value.grad, case.tensor(f"s{index}_grad_value"), tolerance)
        assert_close("grad_attn", weights.grad, case.tensor(f"s{index}_grad_attn"), tolerance)
        # At integer pixel coordinates the gradient is one-sided, and rounding determines the side; exactly at -1,
        # implementations differ by design.
        kink, minus_one = case.recipe.msda_kinks(shapes, arrays["loc"])
        smooth = torch.from_numpy(~(kink | minus_one))
        golden = case.tensor(f"s{index}_grad_loc")
        if smooth.any():
            assert_close("grad_loc", locations.grad[smooth], golden[smooth], tolerance)


@pytest.mark.golden("dam")
def test_attention_map(case):
    for index, sub in enumerate(case.info["subs"]):
        shapes = [tuple(shape) for shape in sub["shapes"]]
        arrays = case.recipe.dam_inputs(
            sub["seed"], shapes, sub["N"], sub["layers"], sub["Lq"], sub["M"], sub["P"]
        )
        locations, weights = (torch.from_numpy(array).flatten(1, 2) for array in arrays)
        width_height = torch.tensor(shapes).flip(-1)[:, None]
        offsets, logits = (locations * width_height).flatten(0, 1), weights.log().flatten(0, 1)
        origin = torch.zeros(len(logits), len(shapes), 2)
        ours = deformable_attention_map(origin, offsets, logits, shapes, len(weights))
        assert_close("attn_map", ours, case.tensor(f"s{index}_attn_map"), 1e-4)


@pytest.mark.golden("geometry")
def test_positions_references_and_proposals(case, request):
    kernel = request.config.getoption("--backend", "reference") == "triton"
    for index, sub in enumerate(case.info["subs"]):
        golden = {
            name: case.tensor(f"s{index}_{name}")
            for name in ("mask", "valid_ratios", "proposals", "prop_pos")
        }
        shapes, width = [tuple(shape) for shape in sub["shapes"]], 2 * sub["feats"]
        batch = ImageBatch.collate([torch.zeros(3, *size) for size in sub["sizes"]])
        geometry = token_geometry(batch.sizes_B2, batch.images_B3HW.shape[-2:], shapes)
        positions, references = geometry.rows(None, torch.zeros(len(shapes), width))

        assert torch.equal(geometry.padding_mask_BS, golden["mask"].bool())
        assert torch.equal(geometry.num_valid_B, case.tensor(f"s{index}_valid_token_nums"))
        assert_close("valid_ratios", geometry.valid_ratios_BL2, golden["valid_ratios"], 1e-6)
        references = references.unflatten(0, (len(batch), -1))
        assert_close("reference_points", references, case.tensor(f"s{index}_reference_points"), 1e-5)
        allowed = geometry.allowed_BS
        assert_close("proposals", geometry.proposals_BS4, golden["proposals"], 1e-5)
        sizes = [height * width for height, width in shapes]
        for level, ours in enumerate(positions.unflatten(0, (len(batch), -1)).split(sizes, 1)):
            ours = ours.unflatten(1, shapes[level]).permute(0, 3, 1, 2)
            expected = case.tensor(f"s{index}_pos{level}")
            if kernel:  # leaves those of padded tokens unspecified
                padding = geometry.padding_mask_BS.split(sizes, 1)[level].unflatten(1, shapes[level])
                ours = torch.where(padding[:, None], expected, ours)
            assert_close(f"pos{level}", ours, expected, 1e-5)

        recipe, seed, num_images = case.recipe, sub["seed"], len(batch)
        boxes = recipe.rng(seed, "geo_box").standard_normal((num_images, 20, 4)).astype(np.float32)
        encoded = encode_boxes(torch.from_numpy(boxes).sigmoid(), golden["prop_pos"].shape[-1] // 2)
        assert_close("prop_pos", encoded, golden["prop_pos"], 1e-5)

        memory = (
            recipe.rng(seed, "geo_mem").standard_normal((num_images, sum(sizes), sub["C"])).astype(np.float32)
        )
        weight = {
            name: torch.from_numpy(recipe.make(f"transformer.{name}", shape, seed))
            for name, shape in (
                ("enc_output.weight", (sub["C"], sub["C"])),
                ("enc_output.bias", (sub["C"],)),
                ("enc_output_norm.weight", (sub["C"],)),
                ("enc_output_norm.bias", (sub["C"],)),
            )
        }
        masked = torch.from_numpy(memory).masked_fill(~allowed[..., None], 0)
        embedded = F.linear(masked, weight["enc_output.weight"], weight["enc_output.bias"])
        embedded = F.layer_norm(
            embedded, (sub["C"],), weight["enc_output_norm.weight"], weight["enc_output_norm.bias"]
        )
        assert_close("output_memory", embedded, case.tensor(f"s{index}_output_memory"), 1e-5)


@pytest.mark.golden("postprocess")
def test_top_detections(case):
    for index, sub in enumerate(case.info["subs"]):
        shape, recipe = (sub["N"], sub["Q"]), case.recipe
        logits = sub["scale"] * recipe.rng(sub["seed"], "pp_logits").standard_normal((*shape, sub["C"])) - 3
        boxes = recipe.rng(sub["seed"], "pp_boxes").uniform(0.02, 0.98, (*shape, 4))
        prediction = Prediction(*(torch.from_numpy(array.astype(np.float32)) for array in (logits, boxes)))
        detections = top_detections(prediction, [tuple(size) for size in sub["orig_size"]])
        assert_close(
            "scores", torch.stack([d.scores_N for d in detections]), case.tensor(f"s{index}_scores"), 1e-6
        )
        assert torch.equal(torch.stack([d.labels_N for d in detections]), case.tensor(f"s{index}_labels"))
        assert_close(
            "boxes", torch.stack([d.boxes_xyxy_N4 for d in detections]), case.tensor(f"s{index}_boxes"), 1e-6
        )


@pytest.mark.golden("resize")
def test_evaluation_resize(case):
    sizes = [tuple(wh[::-1]) for wh in case.arrays["wh_in"].tolist()]
    ours = [resized_size(size, 800, 1333) for size in sizes]
    assert ours == [tuple(hw) for hw in case.arrays["hw_out"].tolist()]
