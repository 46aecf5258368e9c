"""GroupNorm into token rows: the Triton kernels against the definition in float64, and the arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.kernels import group_norm_

from .cases import DEVICE, TOLERANCE, relative_error

pytest.importorskip("triton")


def tensors(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A map whose channels have different means and deviations, weight and bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.rand(shape[1], 1, 1, generator=generator)
    x += torch.randn(shape[1], 1, 1, generator=generator) + offset
    weight, bias = torch.randn(2, shape[1], generator=generator).to(DEVICE)
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last), weight, bias


def definition(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.group_norm(x.double(), num_groups, weight.double(), bias.double(), 1e-5)
    return normed.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 32, 3, 5), 4), ((1, 256, 40, 30), 32), ((3, 8, 1, 1), 2), ((1, 16, 7, 2), 1), ((0, 32, 2, 2), 4)],
    ids=str,
)
def test_the_tokens_are_the_definition_and_no_others_change(
    shape: tuple[int, int, int, int], num_groups: int, dtype: torch.dtype, backend: str
) -> None:
    x, weight, bias = tensors(shape, dtype)
    length = shape[2] * shape[3]
    tokens = torch.full((shape[0], length + 5, shape[1]), 7.0, device=DEVICE, dtype=dtype)
    level = tokens[:, 2 : 2 + length]
    assert group_norm_(level, x, num_groups, weight, bias, 1e-5, backend=backend) is level
    if tokens.numel():
        assert relative_error(level, definition(x, num_groups, weight, bias)) < TOLERANCE[dtype]
    assert (tokens[:, :2] == 7).all()
    assert (tokens[:, 2 + length :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_far_above_the_deviation_costs_no_accuracy(dtype: torch.dtype) -> None:
    """Also for maps that are not channels-last, in float32 tokens of a 16-bit map."""
    x, weight, bias = tensors((2, 32, 50, 90), dtype, offset=1000.0)
    x = x.contiguous()
    tokens = torch.empty(2, 4500, 32, device=DEVICE)
    group_norm_(tokens, x, 4, weight, bias, 1e-5, backend="triton")
    assert relative_error(tokens, definition(x, 4, weight, bias)) < 2e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("special", [torch.nan, torch.inf, 1e30], ids=str)
def test_special_values_change_their_group_as_in_pytorch(special: float) -> None:
    """Not finite: the group is NaN. A variance beyond float32: it is 0 before the bias."""
    x, weight, bias = tensors((2, 16, 40, 50))
    x[0, 3, 2, 1] = special
    tokens = torch.empty(2, 2000, 16, device=DEVICE)
    group_norm_(tokens, x, 4, weight, bias, 1e-5, backend="triton")
    # PyTorch's channels-last norm on a CPU makes NaN of 1e30: it subtracts squares.
    expected = torch.group_norm(x.contiguous(), 4, weight, bias, 1e-5).flatten(2).mT
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_image_has_the_same_bits_in_every_batch() -> None:
    x, weight, bias = tensors((3, 32, 20, 30))
    tokens = torch.empty(3, 600, 32, device=DEVICE)
    group_norm_(tokens, x, 4, weight, bias, 1e-5, backend="triton")
    alone = group_norm_(torch.empty_like(tokens[1:2]), x[1:2], 4, weight, bias, 1e-5, backend="triton")
    assert torch.equal(alone, tokens[1:2])


def test_arguments_that_do_not_fit_are_errors() -> None:
    x, weight, bias = tensors((2, 24, 3, 5))
    tokens = torch.empty(2, 15, 24, device=DEVICE)
    for arguments, message in (
        ((tokens[:, 1:], x, 4, weight, bias), r"tokens .* must be \[2, 15, 24\]"),
        ((tokens, x[0], 4, weight, bias), r"map .* must be \[B, C, H, W\]"),
        ((tokens, x, 5, weight, bias), "num_groups 5: must be >= 1 and divide the 24 channels"),
        ((tokens, x, 4, weight[1:], bias), r"weight .* must be \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_(*arguments, 1e-5)
    with pytest.raises(ValueError, match="must be powers of 2"):
        group_norm_(tokens, x, 4, weight, bias, 1e-5, backend="triton")
    with pytest.raises(RuntimeError, match="no gradient"):
        group_norm_(tokens, x.requires_grad_(), 4, weight, bias, 1e-5)
