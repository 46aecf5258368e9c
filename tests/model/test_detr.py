"""Behaviour of the model that is not covered by published numbers: batch independence, packing and budgets."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ats_detr.batch import ImageBatch, bucket_size
from ats_detr.config import BackboneConfig, ModelConfig, SelectorConfig
from ats_detr.errors import UserError
from ats_detr.kernels import token_geometry
from ats_detr.model import Detr, build_model, top_detections
from ats_detr.model.output import budget_table
from ats_detr.model.selector import TokenSelector
from tests.small_detector import small_detector

BUCKET = 64


def small_model(**changes) -> Detr:
    """An ATS-DETR of 0.3 M parameters whose random weights give different images different outputs."""
    config = {
        "backbone": BackboneConfig(
            name="resnet10t",
            pretrained=False,
            frozen_stages=0,
            frozen_norm=False,
            options={"channels": (8, 16, 16, 16)},
        ),
        "selector": SelectorConfig(min_ratio=0.1, max_ratio=0.5, min_tokens=4),
        "width": 32,
        "num_heads": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "feedforward_width": 64,
        "num_queries": 10,
        "two_stage": True,
        "box_refine": True,
        "queries_from_memory": True,
        "class_specific_proposals": True,
        "encoder_auxiliary": True,
    }
    torch.manual_seed(0)
    model = build_model(ModelConfig(**(config | changes)), num_classes=5).eval()
    for module in model.modules():  # the zero initialisation of the heads would make all boxes equal
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Contrast differs between images, so budgets differ too.
    return [torch.randn(3, *size, generator=generator) * 3 ** (i % 3 - 1) for i, size in enumerate(sizes)]


@torch.no_grad()
def test_results_of_an_image_do_not_depend_on_its_batch():
    model = small_model()
    pictures = images((128, 120), (100, 128), (128, 128), (90, 70), (128, 65), (97, 128))
    groups = [[0], [1], [2], [3], [4], [5], [2, 1, 0], [5, 4], [0, 5, 1, 2]]
    seen: dict[int, tuple] = {}
    for group in groups:
        assert len({bucket_size(tuple(pictures[i].shape[-2:]), BUCKET) for i in group}) == 1
        batch = ImageBatch.collate([pictures[i] for i in group], BUCKET)
        output = model(batch)
        detections = top_detections(output.last, batch.sizes, 20)
        starts = output.selection.plan.starts_on_host()
        for row, (i, kept) in enumerate(zip(group, map(slice, starts, starts[1:]), strict=True)):
            tokens = output.selection.plan.token_index_K[kept]
            if i in seen:
                assert torch.equal(seen[i][0], tokens)
                torch.testing.assert_close(seen[i][1], detections[row].scores_N, atol=1e-4, rtol=0)
                torch.testing.assert_close(seen[i][2], detections[row].boxes_xyxy_N4, atol=1e-4 * 128, rtol=0)
            seen.setdefault(i, (tokens, detections[row].scores_N, detections[row].boxes_xyxy_N4))
    assert len({len(tokens) for tokens, _, _ in seen.values()}) > 1, (
        "the images should have different budgets"
    )


@torch.no_grad()
def test_the_encoder_computes_kept_tokens_only():
    model = small_model()
    rows: list[int] = []
    model.encoder.layers[0].feedforward.register_forward_hook(
        lambda module, args, out: rows.append(len(args[0]))
    )
    output = model(ImageBatch.collate(images((128, 128), (64, 96), (128, 100))))
    counts = output.selection.num_kept_B.tolist()
    assert rows == [sum(counts)] and len(set(counts)) > 1
    assert output.selection.plan.offsets_B1.diff().tolist() == counts


@torch.no_grad()
def test_only_kept_tokens_change_in_the_encoder():
    model = small_model()
    batch = ImageBatch.collate(images((128, 128), (64, 96)))
    features = model.tokenize(batch.images_B3HW, batch.sizes_B2).features_BSC
    output = model(batch)
    kept = output.selection.plan.slot_BS >= 0
    changed = (output.memory_BSC != features).any(-1)
    assert torch.equal(kept, changed)


@torch.no_grad()
def test_padding_is_never_kept_while_valid_tokens_remain():
    model = small_model(selector=SelectorConfig(keep_ratio=1.0))
    output = model(ImageBatch.collate(images((128, 128), (40, 50))))
    kept = output.selection.plan.slot_BS >= 0
    assert torch.equal(kept, ~output.padding_mask_BS)


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("box_refine", [False, True])
def test_family_without_a_selector(two_stage, box_refine):
    model = small_model(
        selector=None,
        two_stage=two_stage,
        box_refine=box_refine,
        queries_from_memory=False,
        class_specific_proposals=False,
        encoder_auxiliary=False,
    )
    output = model(ImageBatch.collate(images((64, 96), (96, 64))), supervision=True)
    assert output.last.logits.shape == (2, 10, 5) and output.last.boxes.shape == (2, 10, 4)
    assert output.selection is None and output.attention_map_BS is None and output.encoder_auxiliary == []
    assert (output.encoder is not None) == two_stage
    (output.last.logits.sum() + output.last.boxes.sum()).backward()
    assert model.backbone.body.conv1[0].weight.grad.abs().sum() > 0


def test_an_image_smaller_than_the_number_of_queries():
    output = small_model(num_queries=300)(ImageBatch.collate(images((64, 64))))
    assert output.last.boxes.shape[1] == output.padding_mask_BS.shape[1] < 300


@torch.no_grad()
def test_masked_mean_ignores_the_contents_of_padding():
    features, geometry = (
        torch.randn(2, 40, 16),
        token_geometry(torch.tensor([[3, 10]] * 2), (4, 10), [(4, 10)]),
    )
    other = torch.where(geometry.padding_mask_BS[..., None], torch.randn(2, 40, 16) * 9, features)
    for masked_mean in (True, False):
        selector = TokenSelector(16, 0.1, 0.5, 2, masked_mean=masked_mean)
        one, two = selector(features, geometry), selector(other, geometry)
        assert torch.allclose(one.budget_logits, two.budget_logits) == masked_mean


@given(
    num_valid=st.lists(st.integers(1, 30000), min_size=1, max_size=8),
    ratio=st.floats(0.001, 1.0),
    num_budgets=st.integers(2, 5),
    min_tokens=st.integers(0, 500),
)
@settings(max_examples=50, deadline=None)
def test_budgets_stay_within_their_bounds(num_valid, ratio, num_budgets, min_tokens):
    valid = torch.tensor(num_valid)
    fixed = TokenSelector(16, ratio, ratio).num_tokens(valid, ratio)
    assert ((fixed >= 1) & (fixed <= valid)).all()
    assert (fixed <= (valid * ratio).int() + 2).all()
    selector = TokenSelector(16, ratio / 2, ratio, num_budgets, min_tokens)
    for budget in range(num_budgets):
        logits = torch.zeros(len(num_valid), num_budgets)
        logits[:, budget] = 1
        kept = selector.num_tokens(valid, selector.ratio_of_budget(selector.choose_budgets(logits)))
        assert ((kept >= valid.clamp(max=min_tokens)) & (kept <= valid)).all()
        expected = (ratio / 2 + ratio / 2 * budget / (num_budgets - 1)) * valid
        free = (kept > min_tokens) & (kept < valid)
        assert ((kept - expected).abs()[free] <= 2 + 0.01 * valid[free]).all()


@torch.no_grad()
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_given_ratios_replace_the_budgets_of_each_image(is_adaptive: bool) -> None:
    """Each image equals that of a model with this fixed ratio, alone and in the batch."""
    model = small_model(**({} if is_adaptive else {"selector": SelectorConfig(keep_ratio=0.2)}))
    batch, ratios = images((64, 64), (60, 40), (64, 50), (50, 64)), [0.05, 0.3, 0.77, 1.0]
    output = model(ImageBatch.collate(batch), keep_ratio=torch.tensor(ratios))
    assert (output.selection.budget_logits is not None) == is_adaptive
    assert output.selection.budget_B is None and (budget_table(output)[:, 2] == -1).all()
    equal = model(ImageBatch.collate(batch), keep_ratio=0.3).selection.num_kept_B
    assert torch.equal(
        equal, model(ImageBatch.collate(batch), keep_ratio=torch.full((4,), 0.3)).selection.num_kept_B
    )
    for i, ratio in enumerate(ratios):
        fixed = copy.deepcopy(model)
        fixed.selector.fix_ratio(ratio)
        expected = fixed(ImageBatch.collate([batch[i]], 64))
        kept = max(int(expected.selection.num_kept_B), model.selector.min_tokens)
        assert int(output.selection.num_kept_B[i]) == kept
        if kept == int(expected.selection.num_kept_B):
            torch.testing.assert_close(output.last.boxes[i], expected.last.boxes[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(output.selection.plan.slot_BS[i] >= 0, expected.selection.plan.slot_BS[0] >= 0)


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.6, torch.tensor([0.9, 1.0])])
def test_plans_without_synchronisation_hold_all_tokens_of_a_given_ratio(
    keep_ratio: Tensor | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of ratios above the largest budget. No token beyond the capacity is dropped."""
    model = small_model()
    monkeypatch.setattr("ats_detr.model.selector.choose_backend", lambda *_: "triton")
    for batch in (
        ImageBatch.collate(images((64, 64), (64, 64))),
        ImageBatch.collate(images((64, 64), (40, 50))),
    ):
        selection = model(batch, keep_ratio=keep_ratio).selection
        assert not selection.plan.exact
        assert torch.equal(selection.plan.offsets_B1.diff(), selection.num_kept_B.int())
        assert len(selection.plan.token_index_K) <= selection.scores_BS.numel()


def test_frozen_parts_of_the_published_backbone_stay_fixed():
    with torch.device("meta"):
        model = build_model(ModelConfig(backbone=BackboneConfig(pretrained=False)), num_classes=91)
    trainable = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.split(".")[1] in {"layer2", "layer3", "layer4"} for name in trainable)
    assert not [name for name, _ in model.backbone.named_parameters() if ".bn" in name]


@pytest.mark.parametrize(("name", "options"), [("resnet5000", {}), ("resnet18", {"colour": "red"})])
def test_an_impossible_backbone_is_named(name, options):
    with pytest.raises(UserError, match=name):
        build_model(
            ModelConfig(backbone=BackboneConfig(name=name, pretrained=False, options=options)), num_classes=3
        )


def test_random_backbone_weights_are_an_error_only_if_they_would_be_frozen(monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"resnet10t.c3_in1k: .*frozen_stages = 1 .*model.backbone.weights"):
        build_model(ModelConfig(backbone=BackboneConfig(name="resnet10t.c3_in1k")), num_classes=3)
    assert "NO PRETRAINED WEIGHTS" not in caplog.text
    backbone = BackboneConfig(name="resnet10t.c3_in1k", frozen_stages=0)
    build_model(ModelConfig(backbone=backbone), num_classes=3)
    assert "NO PRETRAINED WEIGHTS" in caplog.text
    build_model(ModelConfig(backbone=BackboneConfig(name="resnet10t", pretrained=False)), num_classes=3)


def test_proposals_of_equal_score_are_selected_in_token_order() -> None:
    """Invalid tokens all have the same score; the choice of queries among them is deterministic."""
    detector = small_detector()
    torch.nn.init.zeros_(detector.model.proposal_head.classify.weight)
    with torch.no_grad():
        output = detector.model(ImageBatch.collate([torch.randn(3, 64, 64)] * 3), supervision=False)
    assert output.query_index_BQ.tolist() == [list(range(20))] * 3


@torch.no_grad()
def test_budgets_of_a_float16_model_do_not_overflow():
    """Sums over tens of thousands of tokens exceed the range of float16; infinite means give wrong budgets."""
    torch.manual_seed(0)
    selector = TokenSelector(16, 0.1, 0.5, 5)
    selector.embed[1].bias += 20.0
    features_BSC = torch.randn(1, 8000, 16)
    geometry = token_geometry(torch.tensor([[80, 100]]), (80, 100), [(80, 100)])
    expected = selector(features_BSC, geometry).budget_logits
    logits = selector.half()(features_BSC.half(), geometry).budget_logits
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("num_levels", [4, 6])
def test_levels_written_to_their_tokens_equal_concatenated_ones(num_levels: int) -> None:
    """By the kernels; also of levels that are projected from the tokens of the level before."""
    pytest.importorskip("triton")
    model = small_model(num_levels=num_levels)
    generator = torch.Generator().manual_seed(2)
    for norm in (projection[1] for projection in model.input_proj):
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    maps = model.backbone(torch.randn(2, 3, 96, 160, generator=generator))
    (expected, shapes), (features, own_shapes) = model._project(maps), model._project_to_rows(maps)
    assert own_shapes == shapes
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATS_DETR_BACKEND", "triton")
        by_kernels, _ = model._project_to_rows(maps)
    torch.testing.assert_close(by_kernels, expected, rtol=1e-4, atol=1e-5)
