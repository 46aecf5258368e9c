"""Linear layers of packed rows, for inference: the public functions and the custom operators behind them.

Where a plan has a capacity (`TokenPlan.num_rows`) a library computes all its rows, the kernels only those in use: with
16-bit weights they are what CUDA runs then. `_kernel_pays` says what was measured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ats_detr.kernels import reference
from ats_detr.kernels.backend import choose_backend, runs_inside_graph
from ats_detr.kernels.packing import is_evenly_spaced, scatter_tokens
from ats_detr.kernels.plan import TokenPlan

MAX_WIDTH = 256
"""Widest rows that a kernel normalises; wider ones are left to PyTorch's operators, all rows of the capacity."""


def packed_linear(
    x_KC: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_rows: Tensor | None = None,
    *,
    add_KC: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    memory_BSN: Tensor | None = None,
    plan: TokenPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x + add) W^T + b of the rows in use, [K, N]. For inference: raises where a gradient would be recorded.

    Args:
        x_KC: float32 or 16-bit, a slice of a wider matrix too. The sum with `add_KC` is cast to the weight's dtype.
        add_KC: as `x_KC`.
        weight: [N, C]. Under autocast it is cast to the autocast dtype.
        num_rows: int32 [1] on the device: rows in use (`TokenPlan.num_rows`); later rows are neither read nor
            written. None: all.
        activation: None or 'relu'.
        dtype: of the result. None: the weight's. Sampling offsets want float32.
        memory_BSN: with `plan`, write the rows to their tokens of this memory instead, in its dtype, and return it;
            the memory may be a slice of wider rows.
        plan: the tokens of the rows.
        backend: 'triton' or 'reference', see `choose_backend`. None: the kernel where it is faster, that is, on CUDA
            with 16-bit weights and `num_rows`.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation {activation!r}: None or 'relu'")
    _check_layer(x_KC.shape[1], weight, bias)
    _check_target(x_KC.shape[0], weight.shape[0], memory_BSN, plan)
    _refuse_gradients(x_KC, weight, bias, add_KC, memory_BSN)
    weight, relu = _autocast(weight), activation == "relu"
    chosen = choose_backend(x_KC, backend, kernel_pays=_kernel_pays("packed_linear", weight, num_rows))
    arguments = (x_KC, weight, bias, num_rows, add_KC, relu)
    if memory_BSN is not None and chosen == "triton" and is_evenly_spaced(memory_BSN):
        torch.ops.ats_detr.packed_linear_(
            memory_BSN, *arguments, plan.token_index_K, plan.image_index_K, chosen
        )
        return memory_BSN
    if dtype is None:
        dtype = weight.dtype if memory_BSN is None else memory_BSN.dtype
    if chosen == "reference" and not runs_inside_graph():
        rows = reference.packed_linear(*arguments).to(dtype)
    else:
        rows = torch.ops.ats_detr.packed_linear(*arguments, dtype, chosen)
    if memory_BSN is None:
        return rows
    # As asked, not as chosen for the product: to scatter pays on CUDA always, and the definition would wait there.
    return scatter_tokens(plan, memory_BSN, rows, in_place=True, backend=backend)


def packed_linear_norm(
    x_KC: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_KN: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    num_rows: Tensor | None = None,
    *,
    memory_BSN: Tensor | None = None,
    plan: TokenPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(residual + x W^T + b) of the rows in use, [K, N] in the residual's dtype; sums and norm in float32.

    With `memory_BSN` and `plan` the rows are also written to their tokens of the memory. The rest as in
    `packed_linear`, but that the kernel is taken without `num_rows` too.
    """
    _check_layer(x_KC.shape[1], weight, bias)
    if residual_KN.shape != (x_KC.shape[0], weight.shape[0]):
        raise ValueError(f"residual {tuple(residual_KN.shape)}: want [{x_KC.shape[0]}, {weight.shape[0]}]")
    arguments = (x_KC, _autocast(weight), bias, residual_KN, norm_weight, norm_bias, eps, num_rows)
    return _with_norm("packed_linear_norm", arguments, memory_BSN, plan, backend)


def packed_feedforward(
    x_KC: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    num_rows: Tensor | None = None,
    *,
    memory_BSC: Tensor | None = None,
    plan: TokenPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x + relu(x W1^T + b1) W2^T + b2) of the rows in use, [K, C] in x's dtype; sums and norm in float32.

    weight1 is [M, C], weight2 [C, M]. With 16-bit weights the M hidden channels are never in memory. With
    `memory_BSC` and `plan` the rows are also written to their tokens of the memory. The rest as in `packed_linear`.
    """
    _check_layer(x_KC.shape[1], weight1, bias1)
    _check_layer(weight1.shape[0], weight2, bias2)
    if weight2.shape[0] != x_KC.shape[1]:
        raise ValueError(f"weight2 {tuple(weight2.shape)}: want [{x_KC.shape[1]}, {weight1.shape[0]}]")
    arguments = (
        x_KC,
        _autocast(weight1),
        bias1,
        _autocast(weight2),
        bias2,
        norm_weight,
        norm_bias,
        eps,
        num_rows,
    )
    return _with_norm("packed_feedforward", arguments, memory_BSC, plan, backend)


def _with_norm(
    operator: str,
    arguments: tuple,
    memory_BSN: Tensor | None,
    plan: TokenPlan | None,
    backend: str | None,
) -> Tensor:
    """Runs an operator that ends in a norm, by kernel or by definition, and writes its rows to the memory."""
    x_KC, weight, norm_bias, num_rows = *arguments[:2], arguments[-3], arguments[-1]
    _check_target(x_KC.shape[0], norm_bias.shape[0], memory_BSN, plan)
    _refuse_gradients(*arguments, memory_BSN)
    pays = norm_bias.shape[0] <= MAX_WIDTH and _kernel_pays(operator, weight, num_rows)
    chosen = choose_backend(x_KC, backend, kernel_pays=pays)
    if chosen == "triton" and norm_bias.shape[0] > MAX_WIDTH:
        raise ValueError(f"backend 'triton': rows of {norm_bias.shape[0]} channels, at most {MAX_WIDTH}")
    by_kernel = chosen == "triton" and memory_BSN is not None and is_evenly_spaced(memory_BSN)
    if chosen == "reference" and not runs_inside_graph():
        rows = getattr(reference, operator)(*arguments)
    elif by_kernel:
        into_memory = getattr(torch.ops.ats_detr, f"{operator}_")
        rows = into_memory(memory_BSN, *arguments, plan.token_index_K, plan.image_index_K, chosen)
    else:
        rows = getattr(torch.ops.ats_detr, operator)(*arguments, chosen)
    if memory_BSN is not None and not by_kernel:
        scatter_tokens(plan, memory_BSN, rows, in_place=True, backend=backend)
    return rows


def _check_layer(width: int, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}: want [N, {width}] and [N]"
        )


def _check_target(num_rows: int, width: int, memory_BSN: Tensor | None, plan: TokenPlan | None) -> None:
    if (memory_BSN is None) != (plan is None):
        raise ValueError("memory and plan: give both or neither")
    if memory_BSN is not None and (
        memory_BSN.shape != (*plan.slot_BS.shape, width) or plan.token_index_K.shape[0] != num_rows
    ):
        raise ValueError(
            f"memory {tuple(memory_BSN.shape)} and {num_rows} rows for a plan of {tuple(plan.slot_BS.shape)} tokens "
            f"and {plan.token_index_K.shape[0]} rows, {width} channels"
        )


def _refuse_gradients(*arguments: object) -> None:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise RuntimeError(
            "packed linear layers have no gradient: call them under torch.no_grad(), or train with "
            "torch.nn.functional on an exact plan's rows"
        )


def _kernel_pays(operator: str, weight: Tensor, num_rows: Tensor | None) -> bool:
    """Measured on an H200 for 21,384 rows of capacity, against PyTorch on all of them: with bfloat16 weights 1.0 to 2.3
    times as fast with every row in use, 1.5 to 3.6 times with half of them. float32 weights have no tensor cores to
    use: 0.3 to 0.6 times, and 0.7 to 1.1 times.
    """
    fused = num_rows is not None or operator == "packed_linear_norm"  # else a library's product is as fast
    return fused and weight.element_size() == 2


def _autocast(weight: Tensor) -> Tensor:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return weight.to(torch.get_autocast_dtype(device))
    return weight


# ------------------------------------------------------------------------------------------------ the custom operators
@torch.library.custom_op("ats_detr::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor, num_rows: Tensor | None, add: Tensor | None, relu: bool,
    dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    if backend == "triton":
        from ats_detr.kernels.gpu import linear

        with torch.cuda.device_of(x):
            out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
            linear.linear(x, weight, bias, num_rows, add, relu, out)
            return out
    return reference.packed_linear(x, weight, bias, num_rows, add, relu).to(dtype)


@_packed_linear.register_fake
def _(x, weight, bias, num_rows, add, relu, dtype, backend):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("ats_detr::packed_linear_", mutates_args=("memory",))
def _packed_linear_into(
    memory: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_rows: Tensor | None, add: Tensor | None, relu: bool,
    token_index: Tensor, image_index: Tensor, backend: str,
) -> None:  # fmt: skip
    """Triton only: `memory` evenly spaced."""
    from ats_detr.kernels.gpu import linear

    with torch.cuda.device_of(x):
        linear.linear(x, weight, bias, num_rows, add, relu, memory, token_index, image_index)


@_packed_linear_into.register_fake
def _(memory, x, weight, bias, num_rows, add, relu, token_index, image_index, backend):
    return None


# An operator that writes to the memory is another one than that which does not: Inductor cannot lower an argument that
# is mutated if it is there.
@torch.library.custom_op("ats_detr::packed_linear_norm", mutates_args=())
def _packed_linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_rows: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    arguments = (x, weight, bias, residual, norm_weight, norm_bias, eps, num_rows)
    if backend == "triton":
        from ats_detr.kernels.gpu import linear

        with torch.cuda.device_of(x):
            return linear.linear_norm(*arguments, None, None, None)
    return reference.packed_linear_norm(*arguments)


@_packed_linear_norm.register_fake
def _(x, weight, bias, residual, norm_weight, norm_bias, eps, num_rows, backend):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("ats_detr::packed_linear_norm_", mutates_args=("memory",))
def _packed_linear_norm_into(
    memory: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, num_rows: Tensor | None, token_index: Tensor, image_index: Tensor, backend: str,
) -> Tensor:  # fmt: skip
    """Triton only: `memory` evenly spaced."""
    from ats_detr.kernels.gpu import linear

    with torch.cuda.device_of(x):
        return linear.linear_norm(
            x, weight, bias, residual, norm_weight, norm_bias, eps, num_rows, memory, token_index, image_index
        )


@_packed_linear_norm_into.register_fake
def _(
    memory,
    x,
    weight,
    bias,
    residual,
    norm_weight,
    norm_bias,
    eps,
    num_rows,
    token_index,
    image_index,
    backend,
):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("ats_detr::packed_feedforward", mutates_args=())
def _packed_feedforward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, num_rows: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    arguments = (x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, eps, num_rows)
    if backend == "triton":
        from ats_detr.kernels.gpu import linear

        with torch.cuda.device_of(x):
            return linear.feedforward(*arguments, None, None, None)
    return reference.packed_feedforward(*arguments)


@_packed_feedforward.register_fake
def _(x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, eps, num_rows, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("ats_detr::packed_feedforward_", mutates_args=("memory",))
def _packed_feedforward_into(
    memory: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, eps: float, num_rows: Tensor | None, token_index: Tensor, image_index: Tensor, backend: str,
) -> Tensor:  # fmt: skip
    """Triton only: `memory` evenly spaced."""
    from ats_detr.kernels.gpu import linear

    arguments = (x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, eps, num_rows)
    with torch.cuda.device_of(x):
        return linear.feedforward(*arguments, memory, token_index, image_index)


@_packed_feedforward_into.register_fake
def _(memory, x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, eps, num_rows, token_index, image_index,
      backend):  # fmt: skip
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.ats_detr.packed_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """A multiplication and an addition per weight and row of the capacity; norms are not counted, as in PyTorch."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.ats_detr.packed_linear_)
def _linear_into_flops(memory_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _linear_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.ats_detr.packed_linear_norm)
def _linear_norm_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _linear_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.ats_detr.packed_linear_norm_)
def _linear_norm_into_flops(memory_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _linear_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.ats_detr.packed_feedforward)
def _feedforward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _linear_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.ats_detr.packed_feedforward_)
def _feedforward_into_flops(memory_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _linear_flops(x_shape, weight_shape)
