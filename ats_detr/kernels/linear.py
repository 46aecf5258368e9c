"""Linear layers of packed rows, for inference.

If a plan has a capacity (`TokenPlan.num_rows`), a library computes all its rows, the kernels only those in use. With
16-bit weights the kernels then run on CUDA by default; `_kernel_pays` holds the measurements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels import reference
from ats_detr.kernels.dispatch import (
    FLOATS,
    autocast,
    check_tensors,
    check_vectors,
    choose_backend,
    invalid,
    operator,
    product_limitation,
    refuse_gradients,
)
from ats_detr.kernels.packing import check_target, scatter_tokens
from ats_detr.kernels.plan import TokenPlan

_LAYERS = "packed linear layers"
MAX_WIDTH = 256
"""Widest rows that a kernel normalises. PyTorch's operators compute wider ones, for all rows of the capacity."""


def packed_linear(
    x_KC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor,
    num_rows: Tensor | None = None,
    *,
    add_KC: Tensor | None = None,
    relu: bool = False,
    dtype: torch.dtype | None = None,
    memory_BSF: Tensor | None = None,
    plan: TokenPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x + add) W^T + b of the rows in use, [K, F]. For inference only.

    Args:
        x_KC: float32 or 16-bit; may be a slice of a wider matrix. The sum with `add_KC` is cast to the weight's dtype.
        add_KC: like `x_KC`.
        relu: max(result, 0). Only of packed rows, without `memory_BSF`.
        weight_FC: under autocast, cast to the autocast dtype.
        num_rows: integer [1] on the device: rows in use (`TokenPlan.num_rows`); later rows are neither read nor
            written. None: all.
        dtype: of the result. None: the weight's. Use float32 for sampling offsets.
        memory_BSF: with `plan`, write the rows to their tokens of this memory, in its dtype, and return it. May be a
            slice of wider rows.
        plan: the tokens of the rows.
        backend: 'triton' or 'reference', see `choose_backend`. None: the kernel if it is faster, that is, on CUDA with
            16-bit weights and one of `num_rows`, `add_KC`, `relu` and another `dtype`. The kernels need compute
            capability 8.0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, `memory_BSF` without `plan` or the reverse.
        RuntimeError: a gradient would be recorded.
    """
    check_tensors(
        {"add": add_KC, "num_rows": num_rows, "memory": memory_BSF}, x=x_KC, weight=weight_FC, bias=bias_F
    )
    _check_rows("x", x_KC)
    _check_layer("weight", weight_FC, "bias", bias_F, x_KC.shape[1])
    if add_KC is not None:
        _check_rows("add", add_KC)
        if add_KC.shape != x_KC.shape:
            raise invalid("add", add_KC, f"{list(x_KC.shape)} like x")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype {dtype}: must be floating point")
    _check_num_rows(num_rows)
    weight_FC = autocast(weight_FC)
    refuse_gradients(_LAYERS, x_KC, weight_FC, bias_F, add_KC)
    layer = (x_KC, weight_FC, bias_F, num_rows, add_KC)
    wider = dtype is not None and dtype != weight_FC.dtype
    choice: dict[str, Any] = {
        # Of a plain product of all rows, a library's is as fast.
        "kernel_pays": _kernel_pays(weight_FC, num_rows is not None or add_KC is not None or relu or wider),
        "limitation": _limitation(x_KC),
    }
    if memory_BSF is None and plan is None:
        return _packed_linear(*layer, dtype or weight_FC.dtype, relu, backend=backend, **choice)
    if memory_BSF is None or plan is None:
        raise ValueError("memory and plan: pass both or neither")
    if relu:
        raise ValueError("relu with a memory: must be False")
    shape = (*plan.slot_BS.shape, weight_FC.shape[0])
    if not (memory_BSF.shape == shape and memory_BSF.dtype in FLOATS):
        raise invalid("memory", memory_BSF, f"{list(shape)}, floats")
    if x_KC.shape[0] != plan.token_index_K.shape[0]:
        raise invalid("x", x_KC, f"[{plan.token_index_K.shape[0]}, C] like the plan")
    check_target("memory", memory_BSF)
    tensors = [tensor for tensor in (*layer, memory_BSF) if tensor is not None]
    if choose_backend(tensors, backend, **choice) == "reference":
        rows = _packed_linear(*layer, memory_BSF.dtype, False, backend="reference")
        # With the backend as requested: unlike the product, the scatter is always faster with the kernel.
        return scatter_tokens(plan, memory_BSF, rows, in_place=True, backend=backend)
    index = (plan.token_index_K, plan.image_index_K, plan.slot_BS)
    _packed_linear_into(memory_BSF, *layer, *index, backend=backend, **choice)
    return memory_BSF


def packed_linear_norm(
    x_KC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor,
    residual_KF: Tensor,
    norm_weight_F: Tensor,
    norm_bias_F: Tensor,
    eps: float,
    num_rows: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(residual + x W^T + b) of the rows in use, [K, F] in the residual's dtype; sums and norm in float32.
    Rows whose squares overflow float32 are unspecified.

    As `packed_linear`, except that the kernel is also the default without `num_rows`. The kernel normalises at most 256
    channels.
    """
    check_tensors(
        {"num_rows": num_rows}, x=x_KC, weight=weight_FC, bias=bias_F, residual=residual_KF,
        norm_weight=norm_weight_F, norm_bias=norm_bias_F,
    )  # fmt: skip
    _check_rows("x", x_KC)
    _check_layer("weight", weight_FC, "bias", bias_F, x_KC.shape[1])
    width = weight_FC.shape[0]
    _check_rows("residual", residual_KF)
    if residual_KF.shape != (x_KC.shape[0], width):
        raise invalid("residual", residual_KF, f"[{x_KC.shape[0]}, {width}]")
    check_vectors(width, norm_weight=norm_weight_F, norm_bias=norm_bias_F)
    _check_num_rows(num_rows)
    weight_FC = autocast(weight_FC)
    arguments = (x_KC, weight_FC, bias_F, residual_KF, norm_weight_F, norm_bias_F, eps, num_rows)
    refuse_gradients(_LAYERS, *arguments)
    return _packed_linear_norm(
        *arguments,
        backend=backend,
        kernel_pays=_kernel_pays(weight_FC),
        limitation=_limitation(x_KC, width),
    )


def packed_feedforward(
    x_KC: Tensor,
    weight1_FC: Tensor,
    bias1_F: Tensor,
    weight2_CF: Tensor,
    bias2_C: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    eps: float,
    num_rows: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x + relu(x W1^T + b1) W2^T + b2) of the rows in use, [K, C] in x's dtype; sums and norm in float32.

    As `packed_linear`. With 16-bit weights the F hidden channels are never stored in memory. The kernel normalises at
    most 256 channels.
    """
    check_tensors(
        {"num_rows": num_rows}, x=x_KC, weight1=weight1_FC, bias1=bias1_F, weight2=weight2_CF, bias2=bias2_C,
        norm_weight=norm_weight_C, norm_bias=norm_bias_C,
    )  # fmt: skip
    _check_rows("x", x_KC)
    width = x_KC.shape[1]
    _check_layer("weight1", weight1_FC, "bias1", bias1_F, width)
    _check_layer("weight2", weight2_CF, "bias2", bias2_C, weight1_FC.shape[0])
    if weight2_CF.shape[0] != width:
        raise invalid("weight2", weight2_CF, f"[{width}, {weight1_FC.shape[0]}]")
    if weight1_FC.dtype != weight2_CF.dtype:
        raise invalid("weight2", weight2_CF, f"of weight1's {weight1_FC.dtype}")
    check_vectors(width, norm_weight=norm_weight_C, norm_bias=norm_bias_C)
    _check_num_rows(num_rows)
    weight1_FC, weight2_CF = autocast(weight1_FC), autocast(weight2_CF)
    layers = (weight1_FC, bias1_F, weight2_CF, bias2_C)
    arguments = (x_KC, *layers, norm_weight_C, norm_bias_C, eps, num_rows)
    refuse_gradients(_LAYERS, *arguments)
    return _packed_feedforward(
        *arguments,
        backend=backend,
        kernel_pays=_kernel_pays(weight1_FC, num_rows is not None),
        limitation=_limitation(x_KC, width),
    )


# ------------------------------------------------------------------------------------------------ checks of arguments
def _check_rows(name: str, rows: Tensor) -> None:
    if not (rows.ndim == 2 and rows.dtype in FLOATS):
        raise invalid(name, rows, "[K, C], floating point")


def _check_layer(weight_name: str, weight: Tensor, bias_name: str, bias: Tensor, width: int) -> None:
    if not (weight.ndim == 2 and weight.shape[1] == width and weight.dtype in FLOATS):
        raise invalid(weight_name, weight, f"[F, {width}], floating point")
    check_vectors(weight.shape[0], **{bias_name: bias})


def _check_num_rows(num_rows: Tensor | None) -> None:
    if num_rows is not None and not (num_rows.numel() == 1 and num_rows.dtype in (torch.int32, torch.int64)):
        raise invalid("num_rows", num_rows, "one int32 or int64")


def _limitation(x: Tensor, normalised_width: int = 0) -> str | None:
    """Why the kernels cannot compute a layer."""
    if normalised_width > MAX_WIDTH:
        return f"rows of {normalised_width} channels exceed the maximum of {MAX_WIDTH}"
    return product_limitation(x.device)


def _kernel_pays(weight: Tensor, fused: bool = True) -> bool:
    """Measured on an H200 for 21,384 rows of capacity, against PyTorch on all of them: with bfloat16 weights 1.0 to 2.3
    times as fast if every row is in use, 1.5 to 3.6 times with half of them. float32 weights have no tensor cores to
    use: 0.3 to 0.6 times, and 0.7 to 1.1 times.
    """
    return fused and weight.element_size() == 2


# ------------------------------------------------------------------------------------------------ the custom operators
_packed_linear = operator("linear.packed_linear")(reference.packed_linear)
_packed_linear_norm = operator("linear.packed_linear_norm")(reference.packed_linear_norm)
_packed_feedforward = operator("linear.packed_feedforward")(reference.packed_feedforward)
_packed_linear.register_fake(
    lambda x, weight, bias, num_rows, add, dtype, relu: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
)
_packed_linear_norm.register_fake(lambda x, weight, bias, residual, *_: residual.new_empty(residual.shape))
_packed_feedforward.register_fake(lambda x, *_: x.new_empty(x.shape))


# Not an optional argument of `packed_linear`: Inductor cannot lower an optional argument that is mutated.
@operator("linear.packed_linear_", mutates_args=("memory",))
def _packed_linear_into(
    memory: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_rows: Tensor | None, add: Tensor | None,
    token_index: Tensor, image_index: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    rows = reference.packed_linear(x, weight, bias, num_rows, add, memory.dtype, False)
    reference.scatter_(memory, rows, token_index, image_index, slots, num_rows)


# A multiplication and an addition per weight and row of the capacity; norms are not counted, as in PyTorch.
def _flops(x: torch.Size, weight: torch.Size, *_: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]


_packed_linear.register_flops(_flops)
_packed_linear_norm.register_flops(_flops)
_packed_linear_into.register_flops(lambda memory, *layer: _flops(*layer))
_packed_feedforward.register_flops(lambda *layers: 2 * _flops(*layers))
