"""Frozen norms are the published affine maps, and fused convolutions compute the same as the network they replace."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from ats_detr.model.backbone import Backbone
from ats_detr.model.fusion import FrozenNorm, FusedConvolution, freeze_norms, fuse_convolutions

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def backbone(name: str, **arguments: object) -> Backbone:
    """In evaluation, with random statistics."""
    torch.manual_seed(0)
    made = Backbone(name, pretrained=False, frozen_stages=0, **arguments).eval()
    for tensor_name, tensor in made.state_dict().items():
        if tensor_name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor_name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    return made


def published(name: str, own: Backbone) -> nn.Module:
    """timm's frozen norms with the same weights, in float64."""
    other = Backbone(name, pretrained=False, frozen_stages=0, frozen_norm=False).eval()
    missing, unexpected = other.body.load_state_dict(own.body.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return freeze_batch_norm_2d(other.body).double()


def assert_equal_maps(maps: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(maps) == len(expected) == 3
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def num_fused(network: Backbone) -> int:
    modules = network._fused[1].modules() if network._fused and network._fused[1] is not None else ()
    return sum(isinstance(module, FusedConvolution) for module in modules)


# Of each: convolutions that are fused with what follows. Residual networks, aggregation and concatenation (DLA),
# norms before convolutions (ResNet v2), squeeze-excitation, SiLU and hard-swish, shape-dependent
# padding, networks that hooks read (legacy Xception), and without batch norms (ConvNeXt, Swin).
FAMILIES = {
    "resnet10t": 14,
    "dla46x_c": 48,
    "resnetv2_18": 20,
    "regnetz_b16": 112,
    "lcnet_035": 31,
    "tf_efficientnet_lite0": 43,
    "legacy_xception": 0,
    "convnext_atto": 0,
    "swin_tiny_patch4_window7_224": 0,
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_of_timm_compute_the_same(name: str) -> None:
    own = backbone(name)
    maps = own(IMAGES)
    assert num_fused(own) == FAMILIES[name]
    if name.startswith("swin"):
        assert all(map_BCHW.isfinite().all() for map_BCHW in maps)
        return
    expected = published(name, own)(IMAGES.double())
    assert_equal_maps(own.body(IMAGES), expected, 5e-6)
    assert_equal_maps(maps, expected, 5e-6)


@torch.no_grad()
def test_resnet_50_is_53_fused_convolutions() -> None:
    own = backbone("resnet50")
    assert len([m for m in own.body.modules() if isinstance(m, FrozenNorm)]) == 53
    maps = own(IMAGES[:1, :, :32, :32])
    assert_equal_maps(maps, own.body(IMAGES[:1, :, :32, :32]), 5e-6)
    assert all(map_BCHW.is_contiguous(memory_format=torch.channels_last) for map_BCHW in maps)
    counts = Counter(type(module).__name__ for module in own._fused[1].modules())
    assert counts == {"GraphModule": 1, "_Preparation": 1, "FusedConvolution": 53}


@pytest.mark.parametrize("frozen_norm", [True, False])
@torch.no_grad()
def test_the_kernels_compute_the_same(frozen_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = backbone("resnet14t", frozen_norm=frozen_norm, options={"channels": [8, 8, 16, 16]})
    expected = own.body(IMAGES)
    monkeypatch.setenv("ATS_DETR_BACKEND", "triton")
    assert_equal_maps(own(IMAGES), expected, 5e-6)
    assert any(m.pool for m in own._fused[1].modules() if isinstance(m, FusedConvolution))


@torch.no_grad()
def test_each_pass_uses_the_current_weights() -> None:
    own = backbone("test_resnet")
    before = own(IMAGES)[-1]
    for tensor in (own.body.conv1[0].weight.data, own.body.bn1.running_mean):
        tensor.mul_(1.5)
        assert_equal_maps(own(IMAGES), own.body(IMAGES), 5e-6)
    assert not torch.allclose(own(IMAGES)[-1], before)
    own.body.layer1[0].bn1 = copy.deepcopy(own.body.layer1[0].bn1)
    own.body.layer1[0].bn1.weight.mul_(2)
    assert_equal_maps(own(IMAGES), own.body(IMAGES), 5e-6)


@torch.no_grad()
def test_copies_have_their_own_weights() -> None:
    own = backbone("test_resnet")
    expected = own(IMAGES)
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert copied._fused is None
        assert all(torch.equal(*pair) for pair in zip(copied(IMAGES), expected, strict=True))
        copied.body.conv1[0].weight.zero_()
    assert all(torch.equal(*pair) for pair in zip(own(IMAGES), expected, strict=True))


def test_gradients_hooks_and_training_call_the_modules() -> None:
    own = backbone("test_resnet")
    assert own(IMAGES)[-1].requires_grad and own._fused is None
    with torch.no_grad():
        own.train()(IMAGES)
        assert own._fused is None
        called = []
        handle = own.eval().body.layer1.register_forward_hook(lambda *_: called.append(1))
        own(IMAGES)
        assert called and own._fused is None
        handle.remove()
        own(IMAGES)
        assert num_fused(own) == 15


@torch.no_grad()
def test_tracing_leaves_other_threads_alone() -> None:
    own, other = backbone("resnet50"), backbone("test_resnet")
    expected = other.body(IMAGES)
    results: list[list[Tensor]] = []
    stop = threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                results.append(other.body(IMAGES))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            assert fuse_convolutions(own.body) is not None
    finally:
        stop.set()
        thread.join()
    assert results and all(torch.equal(maps[-1], expected[-1]) for maps in results)


class _Overwriting(nn.Module):
    """Overwrites the input of a convolution before its sum, which reads the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.overwrite = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        return torch.relu(y + self.overwrite(x))


@torch.no_grad()
def test_an_overwritten_input_is_read_before() -> None:
    network = _Overwriting().eval()
    fused = fuse_convolutions(network)
    torch.testing.assert_close(fused(IMAGES), network(IMAGES))


class _Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, (64, 96))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.narrow(x))


@torch.no_grad()
def test_a_sum_may_broadcast() -> None:
    network = _Broadcast().eval()
    torch.testing.assert_close(fuse_convolutions(network)(IMAGES), network(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_norm_is_an_affine_map_in_the_activations_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(7, eps=1e-3).eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.2, 2)
    frozen = freeze_norms(copy.deepcopy(norm))
    assert set(frozen.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    frozen.load_state_dict(norm.state_dict())  # num_batches_tracked is ignored
    x = torch.randn(2, 7, 3, 4).to(dtype).requires_grad_()
    result = frozen(x)
    result.sum().backward()
    assert result.dtype == x.grad.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.float(), norm(x.float()), rtol=tolerance, atol=tolerance)
    plain = freeze_norms(nn.BatchNorm2d(7, affine=False).eval())
    torch.testing.assert_close(plain(x), x / (1 + 1e-5) ** 0.5)


@torch.no_grad()
def test_autocast_computes_the_whole_backbone_in_its_dtype() -> None:
    own = backbone("resnet10t")
    expected = own(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        maps = own(IMAGES)
    assert {map_BCHW.dtype for map_BCHW in maps} == {torch.bfloat16}
    assert_equal_maps(maps, expected, 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_the_same_gradients_with_prepared_norms_and_weights(dtype: torch.dtype) -> None:
    own = backbone("test_resnet").train()
    own.body.layer1.requires_grad_(False)
    results = []
    for run in (own, own.body):
        own.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps = run(IMAGES)
        assert {map_BCHW.dtype for map_BCHW in maps} == {dtype}
        sum(map_BCHW.float().square().mean() for map_BCHW in maps).backward()
        results.append([parameter.grad for parameter in own.parameters()])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    for name, ours, expected in zip(dict(own.named_parameters()), *results, strict=True):
        assert (ours is None) == (expected is None) == name.startswith("body.layer1")
        if ours is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, expected, **tolerance)
    assert own.body.bn1.scale is None and own.body.conv1[0].weight.dtype == torch.float32


def test_bfloat16_keeps_half_the_activations_of_float32_for_the_backward_pass() -> None:
    own = backbone("test_resnet").train()
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if tensor.shape[:1] == IMAGES.shape[:1]:  # not a weight
                saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            kept[dtype] = (own(IMAGES), sum(saved.values()))[1]
    assert kept[torch.bfloat16] <= 0.6 * kept[torch.float32]
