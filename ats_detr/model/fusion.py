"""Batch norms with fixed statistics, which are affine maps, and their fusion with convolutions, sums and ReLUs."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ats_detr.kernels import affine_relu_max_pool, fused_convolution
from ats_detr.kernels.convolution import convolution_shape
from ats_detr.kernels.dispatch import autocast, choose_backend
from ats_detr.model.casting import cast, cast_weights

logger = logging.getLogger(__name__)

Constants = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight, scale and bias of a convolution with its norm."""


class FrozenNorm(nn.Module):
    """A batch norm with fixed statistics and affine parameters: act(x * scale + shift), in x's dtype.

    scale = weight / sqrt(running_var + eps) and shift = bias - running_mean * scale. The buffers have the names of
    PyTorch's batch norm; `num_batches_tracked` of a checkpoint is ignored.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, norm: Any) -> None:
        """The same map as a batch norm of PyTorch or timm in evaluation; timm's include an activation."""
        super().__init__()
        tensors = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
        ones = torch.ones_like(tensors["running_var"])
        for name, default in (("weight", ones), ("bias", ones * 0)):
            tensors[name] = default if tensors[name] is None else tensors[name].detach().clone()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.eps: Any = norm.eps
        self.act = activation_of(norm)
        # Set by `training_constants` for a pass.
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scale_C, shift_C = self.scale, self.shift
        if scale_C is None or shift_C is None:
            scale_C = self.weight * (self.running_var + self.eps).rsqrt()
            shift_C = self.bias - self.running_mean * scale_C
        scale, shift = (vector.to(x_BCHW.dtype)[:, None, None] for vector in (scale_C, shift_C))
        return self.act(torch.addcmul(shift, x_BCHW, scale))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_norms(network: nn.Module) -> nn.Module:
    """The network with every batch norm replaced by its FrozenNorm, in place (unless it is a batch norm itself)."""
    if isinstance(network, nn.modules.batchnorm._BatchNorm) and network.running_mean is not None:
        return FrozenNorm(network)
    for name, child in network.named_children():
        setattr(network, name, freeze_norms(child))
    return network


def norm_constants(norms: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """(scale, shift) of each norm in evaluation, such that its result is x * scale + shift.

    A constant number of operations: small launches would take longer than their work.
    """
    if not norms:
        return []
    scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    affine = [(scale, norm) for scale, norm in zip(scales, norms, strict=True) if norm.weight is not None]
    if affine:
        torch._foreach_mul_([scale for scale, _ in affine], [norm.weight for _, norm in affine])
    shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    torch._foreach_neg_(shifts)
    biased = [(shift, norm) for shift, norm in zip(shifts, norms, strict=True) if norm.bias is not None]
    if biased:
        torch._foreach_add_([shift for shift, _ in biased], [norm.bias for _, norm in biased])
    return list(zip(scales, shifts, strict=True))


def activation_of(norm: nn.Module) -> nn.Module:
    """The activation that a timm batch norm applies after normalising (its dropout is the identity in evaluation)."""
    return getattr(norm, "act", nn.Identity())


# ----------------------------------------------------------------------------------------------------------- training
def training_constants(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a training pass that computes in `dtype`, by name, for `torch.func.functional_call`.

    The constants of frozen norms, and the weights of each child of the network (see `cast_weights`), by few operations.
    """
    norms = {name: module for name, module in network.named_modules() if isinstance(module, FrozenNorm)}
    constants = norm_constants(list(norms.values()))
    vectors = cast([vector for pair in constants for vector in pair], dtype)
    tensors = {
        f"{name}.{key}": vectors[2 * index + offset]
        for index, name in enumerate(norms)
        for offset, key in enumerate(("scale", "shift"))
    }
    for name, child in network.named_children():
        tensors |= cast_weights(child, f"{name}.", dtype)
    return tensors


# --------------------------------------------------------------------------------------------------- fusing a network
class FusedConvolution(nn.Module):
    """A convolution with what follows it: norm, residual sum, ReLU, and 3x3 max pooling with stride 2.

    Without gradients. It computes with constants that `_Preparation` made from the modules it replaces.
    """

    def __init__(self, convolution: nn.Conv2d, relu: bool, pool: bool) -> None:
        super().__init__()
        self.layout: dict[str, Any] = {
            name: getattr(convolution, name) for name in ("stride", "padding", "dilation", "groups")
        }
        self.relu, self.pool = relu, pool

    def forward(self, x_BCHW: Tensor, constants: Constants, residual_BFHW: Tensor | None = None) -> Tensor:
        """[B, F, H', W']; `residual_BFHW` may have any shape that can be added to it."""
        weight, scale, bias = constants
        x_BCHW = x_BCHW.to(weight.dtype)
        if self.pool and choose_backend(x_BCHW) == "triton":
            out = F.conv2d(x_BCHW, weight, None, **self.layout)
            return affine_relu_max_pool(out, bias, scale_C=scale)
        if residual_BFHW is not None and residual_BFHW.shape != convolution_shape(
            x_BCHW, weight, **self.layout
        ):
            out = fused_convolution(x_BCHW, weight, bias, scale_F=scale, **self.layout) + residual_BFHW
            return out.relu_() if self.relu else out
        out = fused_convolution(
            x_BCHW,
            weight,
            bias,
            scale_F=scale,
            residual_BFHW=residual_BFHW,
            relu=self.relu,
            **self.layout,
        )
        return F.max_pool2d(out, 3, 2, 1) if self.pool else out


class _Preparation(nn.Module):
    """Computes the constants of all fused convolutions at the start of a pass, from the weights at that time.

    The weights are cast once, for autocast. On the GPU a norm's scale is part of the epilogue; the reference multiplies
    the weights by it, which are fewer than the pixels.
    """

    def __init__(self, layers: list[tuple[nn.Conv2d, Any]]) -> None:
        super().__init__()
        self.layers = layers  # a list: not as submodules, whose names they have already

    def forward(self, x_BCHW: Tensor) -> list[Constants]:
        dtype = autocast(x_BCHW).dtype
        convolutions = [convolution for convolution, _ in self.layers]
        weights: list[Tensor] = [convolution.weight for convolution in convolutions]
        biases: list[Tensor | None] = [convolution.bias for convolution in convolutions]
        scales: list[Tensor | None] = [None] * len(weights)
        normed = [index for index, (_, norm) in enumerate(self.layers) if norm is not None]
        for index, (scale, shift) in zip(
            normed, norm_constants([self.layers[index][1] for index in normed]), strict=True
        ):
            bias = biases[index]
            scales[index], biases[index] = scale, shift if bias is None else torch.addcmul(shift, bias, scale)
        if choose_backend(x_BCHW) == "reference":
            factors = [scales[index][:, None, None, None] for index in normed]  # type: ignore[index]
            folded = torch._foreach_mul([weights[index] for index in normed], factors) if normed else []
            for index, weight in zip(normed, folded, strict=True):
                weights[index], scales[index] = weight, None
        return list(zip(cast(weights, dtype), scales, biases, strict=True))


def fuse_convolutions(network: nn.Module) -> fx.GraphModule | None:
    """The network in evaluation with fused convolutions, for passes without gradients; it shares the weights.

    None if nothing can be fused, torch.fx cannot trace the network, or its operations may depend on the input's shape,
    of which a trace knows nothing. Weights and statistics may change between passes; modules may not. Hooks of modules
    are not called.
    """
    graph = _trace(network)
    modules = dict(network.named_modules())
    if graph is None or not all(_is_shape_independent(node) for node in graph.nodes):
        return None
    _drop_identities(graph, modules)
    taken: set[fx.Node] = set()
    chains = [_Chain(node, modules, taken) for node in graph.nodes if _is_plain_convolution(node, modules)]
    if not chains:
        return None
    image = next(node for node in graph.nodes if node.op == "placeholder")
    leaves = {node.target: modules[node.target] for node in graph.nodes if node.op == "call_module"}
    leaves["preparation"] = _Preparation([(chain.convolution, chain.norm) for chain in chains])
    with graph.inserting_after(image):
        constants = graph.call_module("preparation", (image,))
    for number, chain in enumerate(chains):
        name = f"fused_{number}"
        leaves[name] = FusedConvolution(chain.convolution, chain.relu, chain.pool)
        with graph.inserting_after(chain.last):
            own = graph.call_function(operator.getitem, (constants, number))
        with graph.inserting_after(own):
            arguments = (chain.first.args[0], own, *([chain.residual] if chain.residual is not None else []))
            fused = graph.call_module(name, arguments)
        result = fused
        if chain.activation is not None:
            leaves[f"{name}_activation"] = chain.activation
            with graph.inserting_after(fused):
                result = graph.call_module(f"{name}_activation", (fused,))
        chain.last.replace_all_uses_with(result)
        for other in chains[number + 1 :]:
            if other.residual is chain.last:
                other.residual = result
    fused_network = fx.GraphModule(leaves, graph)
    fused_network.graph.eliminate_dead_code()
    fused_network.delete_all_unused_submodules()
    fused_network.recompile()
    return fused_network.eval()


class _Chain:
    """A convolution node and the nodes after it that are computed with it, as far as each is the only user."""

    def __init__(self, first: fx.Node, modules: dict[str, nn.Module], taken: set[fx.Node]) -> None:
        """`taken`: the nodes of earlier chains, to which this one's are added."""
        self.first, self.modules, self.taken = first, modules, taken
        self.last = first
        self.convolution: Any = modules[str(first.target)]
        self.norm: nn.Module | None = None
        self.activation: nn.Module | None = None
        """Of the norm, if it is not a ReLU."""
        self.residual: fx.Node | None = None
        self.relu = self.pool = False
        if (module := self._next_module()) is not None and is_norm(module) and self._extend():
            self.norm = module
            activation = activation_of(module)
            self.relu = type(activation) is nn.ReLU
            if not self.relu and type(activation) is not nn.Identity:
                self.activation = activation
                return
        user = self._next()
        if not self.relu and user is not None and user.target is operator.add:
            others = [argument for argument in user.args if argument is not self.last]
            if len(others) == 1 and isinstance(others[0], fx.Node) and self._extend(others[0]):
                self.residual = others[0]
        user = self._next()
        if not self.relu and user is not None and _is_relu(user, modules):
            self.relu = self._extend()
        module = self._next_module()
        if self.relu and self.residual is None and isinstance(module, nn.MaxPool2d) and _is_halving(module):
            self.pool = self._extend()

    def _next(self) -> fx.Node | None:
        """The only user of the last node."""
        return next(iter(self.last.users)) if len(self.last.users) == 1 else None

    def _next_module(self) -> nn.Module | None:
        user = self._next()
        return self.modules[str(user.target)] if user is not None and user.op == "call_module" else None

    def _extend(self, residual: fx.Node | None = None) -> bool:
        """Include the next node, unless an input of the chain is overwritten before it."""
        following = self._next()
        assert following is not None
        if following in self.taken:  # a sum of two convolutions
            return False
        inputs = [node for node in (self.first.args[0], self.residual, residual) if node is not None]
        node = self.first.next
        while node is not following:
            if _overwrites(node, self.modules) and any(node.args[0] is read for read in inputs):
                return False
            node = node.next
        self.taken.add(following)
        self.last = following
        return True


def fold_batch_norms(network: nn.Module) -> int:
    """Fold batch norms in evaluation mode into the preceding convolutions, in place. Returns the number folded.

    A convolution whose output has another user is not folded. A network that torch.fx cannot trace is not changed.
    """
    graph = _trace(network)
    modules = dict(network.named_modules())
    num_folded = 0
    for node in graph.nodes if graph is not None else ():
        norm = modules.get(node.target) if node.op == "call_module" else None
        if norm is None or not is_norm(norm) or node.args[0].op != "call_module":
            continue
        convolution: Any = modules[node.args[0].target]
        # Subclasses may use their weights differently, and a module may be called more than once.
        if type(convolution) is not nn.Conv2d or len(node.args[0].users) > 1:
            continue
        if sum(other.target == node.args[0].target for other in graph.nodes) > 1:
            continue
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, *statistics
        )
        parent, _, name = node.target.rpartition(".")
        setattr(network.get_submodule(parent), name, activation_of(norm))
        num_folded += 1
    return num_folded


# ------------------------------------------------------------------------------------------------------------- tracing
_tracing = threading.Lock()


class _Tracer(fx.Tracer):
    """A tracer that leaves the modules of other threads alone: while it traces, torch.fx intercepts all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        return is_leaf or is_norm(m) or next(m.children(), None) is None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _trace(network: nn.Module) -> fx.Graph | None:
    with _tracing:
        try:
            return _Tracer().trace(network)
        except Exception as error:  # tracing may raise any exception
            logger.info("convolutions are not fused: the network cannot be traced (%s)", error)
            return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with fixed statistics."""
    is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training
    return isinstance(module, FrozenNorm) or (is_batch_norm and module.running_mean is not None)


def _is_plain_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None  # type: ignore[index]
    # Subclasses may use their weights differently.
    return (
        type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


_FUNCTIONS = (operator.add, operator.mul, torch.add, torch.cat, F.relu, torch.relu)
_METHODS = ("add", "add_", "mean", "mul", "mul_", "relu", "relu_", "sigmoid")


def _is_shape_independent(node: fx.Node) -> bool:
    """Whether a node certainly computes the same for inputs of any shape."""
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op in ("placeholder", "output", "call_module") or (
        node.op == "call_method" and node.target in _METHODS
    )


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU  # type: ignore[index]
    return node.target in (F.relu, torch.relu, "relu", "relu_")


def _is_halving(pool: nn.MaxPool2d) -> bool:
    """Whether a pooling is that of `affine_relu_max_pool`."""
    sizes = [
        value if isinstance(value, tuple) else (value, value) for value in (pool.kernel_size, pool.stride)
    ]
    return (
        sizes == [(3, 3), (2, 2)]
        and pool.padding in (1, (1, 1))
        and pool.dilation in (1, (1, 1))
        and not (pool.ceil_mode or pool.return_indices)
    )


def _overwrites(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node may write its result to its first input."""
    if node.op == "call_module":
        module = modules[node.target]  # type: ignore[index]
        activation = getattr(module, "act", module)
        return bool(getattr(activation, "inplace", False))
    return node.op == "call_method" and str(node.target).endswith("_")


def _drop_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Removes the modules that return their input in evaluation."""
    for node in list(graph.nodes):
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd, DropPath, DropBlock2d)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
