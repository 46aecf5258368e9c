"""Complete models with deterministic weights against the outputs of the published implementation.

The tolerance is 1e-4 of the scale of each array: float32 sums in another order differ by up to 2e-5 (float64_check of
each case). Near-ties make the order of queries and tokens arbitrary, so selections are compared as sets, and rows are
aligned by their tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ats_detr.model.output import DetectorOutput, Prediction
from ats_detr.model.tokens import Tokens

TOLERANCE = 1e-4


@pytest.mark.golden("model")
@torch.no_grad()
def test_model(case):
    compare(case, case.model())


def compare(case, model) -> None:
    """Compare every array of the case with the model's output."""
    batch = case.batch()
    seen: dict[str, Tokens] = {}
    tokenize = model.tokenize
    model.tokenize = lambda *batch: seen.setdefault("tokens", tokenize(*batch))
    output = model(batch, supervision=True)
    tokens = seen["tokens"]

    check = Checker(case)
    check_geometry(check, output, tokens, model.level_embed)
    check_memory(check, output, tokens)
    check_selection(check, output)
    check_proposals(check, output)
    check_decoder(check, output)
    compared = check.compared | {"sparse_ratio"}
    assert set(case.arrays) <= compared, f"never compared: {sorted(set(case.arrays) - compared)}"


class Checker:
    """Compares tensors with the arrays of a case and records which arrays were compared."""

    def __init__(self, case) -> None:
        self.case = case
        self.compared: set[str] = set()
        self.scales = {
            name: c["scale"] for name, c in case.info["float64_check"]["max_abs_f64_minus_f32"].items()
        }

    def has(self, name: str) -> bool:
        return name in self.case.arrays

    def golden(self, name: str) -> Tensor:
        self.compared.add(name)
        return self.case.tensor(name)

    def close(self, name: str, ours: Tensor, golden: Tensor | None = None) -> None:
        golden = self.golden(name) if golden is None else golden
        assert ours.shape == golden.shape, f"{name}: {tuple(ours.shape)} != {tuple(golden.shape)}"
        assert torch.equal(ours.isfinite(), golden.isfinite()), f"{name}: other entries are infinite"
        known = [scale for key, scale in self.scales.items() if name == key or name.startswith(f"{key}_")]
        scale = known[0] if known else golden[golden.isfinite()].std().item()
        error = (ours - golden)[golden.isfinite()].abs().max().item()
        assert error <= TOLERANCE * max(scale, 1e-6), f"{name}: error {error:.3g} at scale {scale:.3g}"

    def equal(self, name: str, ours: Tensor) -> None:
        golden = self.golden(name)
        assert torch.equal(ours.to(golden.dtype), golden), f"{name}: {ours} != {golden}"


def check_geometry(check: Checker, output: DetectorOutput, tokens: Tokens, level_embed_LC: Tensor) -> None:
    check.equal("spatial_shapes", torch.tensor(output.level_shapes))
    sizes = [height * width for height, width in output.level_shapes]
    masks = output.padding_mask_BS.split(sizes, 1)
    check.equal("mask_pad_count", torch.stack([mask.sum(1) for mask in masks], 1))
    check.close("valid_ratios", tokens.geometry.valid_ratios_BL2)
    check.close("src_first16", tokens.features_BSC[:, :16])
    positions_BSC = tokens.rows(None)[0].view_as(tokens.features_BSC)
    check.close(
        "pos_first16", positions_BSC[:, :16] - level_embed_LC[0]
    )  # stored without the level embedding


def check_memory(check: Checker, output: DetectorOutput, tokens: Tokens) -> None:
    check.close("memory_first64", output.memory_BSC[:, :64])
    check.close("memory_last64", output.memory_BSC[:, -64:])
    for name, tensor in (("memory", output.memory_BSC), ("src", tokens.features_BSC)):
        mean, std = level_statistics(tensor, output)
        check.close(f"{name}_level_mean_valid", mean)
        check.close(f"{name}_level_std_valid", std)
    if check.has("memory_enc_first64"):
        assert output.adapted_memory_BSC is not None
        check.close("memory_enc_first64", output.adapted_memory_BSC[:, :64])


def level_statistics(tensor_BSC: Tensor, output: DetectorOutput) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the valid tokens of each image and level, [B, L, C]."""
    sizes = [height * width for height, width in output.level_shapes]
    means, stds = [], []
    for rows_BSC, mask_BS in zip(
        tensor_BSC.split(sizes, 1), output.padding_mask_BS.split(sizes, 1), strict=True
    ):
        valid = [rows[~mask] for rows, mask in zip(rows_BSC, mask_BS, strict=True)]
        means.append(torch.stack([rows.mean(0) for rows in valid]))
        stds.append(torch.stack([rows.std(0, correction=0) for rows in valid]))
    return torch.stack(means, 1), torch.stack(stds, 1)


def check_selection(check: Checker, output: DetectorOutput) -> None:
    selection = output.selection
    if selection is None:
        assert not check.has("enc_topk_idx")
        return
    check.equal("sparse_token_nums", selection.num_kept_B)
    check.close("mask_pred", selection.scores_BS)
    if check.has("learnable_rate"):
        assert selection.budget_logits is not None
        check.close("learnable_rate", selection.budget_logits)
    assert output.attention_map_BS is not None
    check.close("dec_attn_map", output.attention_map_BS)

    # The first k_b published rows of image b belong to its kept tokens; the surplus rows are not computed here.
    indices = check.golden("enc_topk_idx").long()
    boxes = check.golden("enc_aux_boxes")
    stats = check.golden("enc_aux_logits_stats")
    logits = check.golden("enc_aux_logits_first64")
    starts = selection.plan.starts_on_host()
    for image, rows in enumerate(map(slice, starts, starts[1:])):
        own = indices[image, : selection.num_kept_B[image]]
        kept = selection.plan.token_index_K[rows].long()
        assert torch.equal(own.sort().values, kept), f"image {image} keeps different tokens"
        slots = selection.plan.slot_BS[image, own].long()
        num_rows = len(own)
        for layer, auxiliary in enumerate(output.encoder_auxiliary):
            check.close("enc_aux_boxes", auxiliary.boxes[slots], boxes[layer, image, :num_rows])
            check.close(
                "enc_aux_logits_stats", statistics(auxiliary.logits[slots]), stats[layer, image, :num_rows]
            )
            first = min(64, num_rows)
            check.close(
                "enc_aux_logits_first64", auxiliary.logits[slots[:first]], logits[layer, image, :first]
            )


def check_proposals(check: Checker, output: DetectorOutput) -> None:
    if output.encoder is None:
        return
    if check.has("enc_out_score"):
        score = output.encoder.logits.amax(-1)
        if not check.case.info["argv"].count("--eff_specific_head"):
            score = output.encoder.logits[..., 0]
        check.close("enc_out_score", score)
    index = check.golden("enc_out_idx").long()
    check.close("enc_out_logits", output.encoder.logits[:, index])
    check.close("enc_out_boxes", output.encoder.boxes[:, index])


def check_decoder(check: Checker, output: DetectorOutput) -> None:
    layers = [*output.decoder_auxiliary, output.last]
    if check.has("dec_topk_idx"):
        golden_index = check.golden("dec_topk_idx").long()
        assert output.query_index_BQ is not None
        ours = output.query_index_BQ.sort(1)
        assert torch.equal(ours.values, golden_index.sort(1).values), (
            "the queries have different initial tokens"
        )
        # Position of each published query in our order.
        order = ours.indices.gather(1, golden_index.argsort(1).argsort(1))
        layers = [Prediction(take(layer.logits, order), take(layer.boxes, order)) for layer in layers]
    check.close("pred_logits", layers[-1].logits)
    check.close("pred_boxes", layers[-1].boxes)
    check.close("aux_boxes", torch.stack([layer.boxes for layer in layers[:-1]]))
    auxiliary = torch.stack([layer.logits for layer in layers[:-1]])
    if check.has("aux_logits"):
        check.close("aux_logits", auxiliary)
    else:
        check.close("aux_logits_first100", auxiliary[:, :, :100])
        check.close("aux_logits_stats", statistics(auxiliary))


def statistics(logits: Tensor) -> Tensor:
    """Maximum, mean and population standard deviation over classes, [..., 3]."""
    return torch.stack([logits.amax(-1), logits.mean(-1), logits.std(-1, correction=0)], -1)


def take(tensor_BQF: Tensor, order_BQ: Tensor) -> Tensor:
    return tensor_BQF.gather(1, order_BQ[..., None].expand(-1, -1, tensor_BQF.shape[-1]))
