"""Replaces the deformable attention in models of other projects by `multi_scale_deformable_attention`.

What is replaced is in `FUNCTIONS`, `AUTOGRAD_FUNCTIONS` and the class `LAYER` of transformers. A module that calls one
of them gets another class, as `torch.nn.utils.parametrize` does: a subclass of its own whose methods read other names.
`core(...)` becomes `_ats_detr_triton_core(...)`, a name that is added beside `core`. So the methods keep their globals,
other models of the same class and file keep their code, and copies of a module keep its new class. An operator that a
module holds as an attribute is replaced there.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import gc
import inspect
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import (
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    NoneType,
    new_class,
)
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from ats_detr.kernels.attention import multi_scale_deformable_attention
from ats_detr.kernels.dispatch import BACKENDS
from ats_detr.kernels.levels import LevelShapes, read_level_shapes


class Adaptation:
    """The modules that `adapt` changed. As a context manager, it restores them on exit.

    A copy of an adapted model, also a pickled one, is adapted, and cannot be undone.
    """

    names: tuple[str, ...]
    """Qualified names of the changed modules; '' is the model itself."""
    skipped: dict[str, str]
    """Qualified name and reason of every module with a deformable attention that is unchanged; empty if `strict`."""

    def __init__(self, changes: dict[str, tuple[nn.Module, dict[str, Any]]], skipped: dict[str, str]) -> None:
        self.names, self.skipped = tuple(changes), skipped
        self._changes = [
            (name, module, new, {key: _read(module, key) for key in new})
            for name, (module, new) in changes.items()
        ]
        for module, new in changes.values():
            _set(module, new)

    def undo(self) -> None:
        """Restores the model; without effect if that has been done.

        Raises RuntimeError, and restores nothing, if something else has replaced what `adapt` set.
        """
        lost = [
            f"{key} of {name or 'the model'}"
            for name, module, new, _ in self._changes
            for key in (*new, *_hidden_methods(module, new))
            if _read(module, key) is not new.get(key)
        ]
        if lost:
            raise RuntimeError(f"cannot undo: {', '.join(lost)} was replaced after adapt; undo that first")
        for _, module, _, old in self._changes:
            _set(module, old)
        self._changes = []

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Adaptation({len(self.names)} modules, {len(self.skipped)} skipped)"


def _read(module: nn.Module, key: str) -> Any:
    return type(module) if key == "__class__" else vars(module).get(key)


def _set(module: nn.Module, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        object.__setattr__(module, key, value)


def _hidden_methods(module: nn.Module, new: dict[str, Any]) -> frozenset[str]:
    """Methods of the new class that an attribute of the module hides, although `new` has none of that name."""
    methods: frozenset[str] = getattr(new.get("__class__"), "_ats_detr_methods", frozenset())
    return methods & (vars(module).keys() - new.keys())


def adapt(model: nn.Module, *, backend: str | None = None, strict: bool = True) -> Adaptation:
    """Computes every deformable attention of `model` with `multi_scale_deformable_attention`, in place.

    Covers transformers (every model that has the operator), rfdetr, mmcv and mmdet, detectron2's Mask2Former,
    GroundingDINO, detrex, BEVFormer, and the modules of Deformable DETR that other projects copy. Parameters, state
    dict and other models of the same classes are unchanged.

    The operator is found where any method of a module reads it from a global, a module, a closure, a default or an
    attribute, directly or in a function that it calls. Code that builds its name while it runs, or creates an object
    that calls it, is not found: `explain` shows what ran.

    Call it before `torch.compile`. Two results may differ from the original: under autocast the operator returns the
    autocast dtype (PyTorch's grid_sample float32), and samples at NaN coordinates are NaN.

    Args:
        backend: 'triton' or 'reference' for all of them, see `choose_backend`.
        strict: raise if any deformable attention of the model cannot be replaced; False: leave it unchanged.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no deformable attention was found, one cannot be replaced (if `strict`), or the model is adapted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: must be a torch.nn.Module; pass the module in it"
        )
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend {backend!r}: must be one of {', '.join(BACKENDS)}")
    adapter = _Adapter(backend, model.modules())
    changes, skipped = {}, {}
    for name, module in model.named_modules():
        try:
            attributes = adapter.changes_of(module)
        except _NotAdaptable as error:
            skipped[name] = str(error)
        else:
            if attributes:
                changes[name] = (module, attributes)
    if skipped and strict:
        reasons = "\n".join(f"  {name or type(model).__name__}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"{len(skipped)} deformable attentions cannot be replaced (strict=False omits them):\n{reasons}"
        )
    if not changes and not skipped:
        raise ValueError(
            f"no deformable attention in {type(model).__name__}: looked for modules of class {LAYER} and for modules "
            f"that call {', '.join([*FUNCTIONS, *AUTOGRAD_FUNCTIONS])}"
        )
    return Adaptation(changes, skipped)


class _NotAdaptable(ValueError):
    """A deformable attention that this file cannot replace; the message is the reason."""


# ------------------------------------------------------------------------------------------------ what is replaced
# Parameter names are those of the other projects: they are compared.
def _classical(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor, *,
    backend: str | None,
) -> Tensor:  # fmt: skip
    shapes = read_level_shapes(value_spatial_shapes)
    return multi_scale_deformable_attention(
        value, shapes, sampling_locations, attention_weights, backend=backend
    )


def _channels_first(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
    value_spatial_shapes_hw: LevelShapes | None = None, *, backend: str | None,
) -> Tensor:  # fmt: skip
    """Values [B, H, D, S] and weights [B, Q, H, L*P]; locations may have L*P in one dimension too."""
    shapes = value_spatial_shapes_hw or read_level_shapes(value_spatial_shapes)
    samples = (len(shapes), attention_weights.shape[-1] // len(shapes))
    if sampling_locations.ndim == 5:
        sampling_locations = sampling_locations.unflatten(3, samples)
    return multi_scale_deformable_attention(
        value.permute(0, 3, 1, 2), shapes, sampling_locations, attention_weights.unflatten(-1, samples),
        backend=backend,
    )  # fmt: skip


def _either_layout(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor, *,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """Deformable DETR's function, and the one that LW-DETR and early versions of rfdetr have under its name."""
    function = _channels_first if attention_weights.ndim == 4 else _classical
    return function(value, value_spatial_shapes, sampling_locations, attention_weights, backend=backend)


def _points_per_level(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
    num_points_list: list[int], method: str = "default", *, backend: str | None,
) -> Tensor:  # fmt: skip
    return multi_scale_deformable_attention(
        value, read_level_shapes(value_spatial_shapes), sampling_locations, attention_weights,
        num_points=num_points_list, method=method, backend=backend,
    )  # fmt: skip


def _apply(
    value: Tensor, value_spatial_shapes: Any, value_level_start_index: Any, sampling_locations: Tensor,
    attention_weights: Tensor, im2col_step: int, *, backend: str | None,
) -> Tensor:  # fmt: skip
    shapes = read_level_shapes(value_spatial_shapes, value_level_start_index)
    return multi_scale_deformable_attention(
        value, shapes, sampling_locations, attention_weights, backend=backend
    )


def _layer_forward(backend: str | None) -> FunctionType:
    def forward(
        self: nn.Module, value: Tensor, value_spatial_shapes: Any, value_spatial_shapes_list: LevelShapes,
        level_start_index: Any, sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
    ) -> Tensor:  # fmt: skip
        return multi_scale_deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights, backend=backend
        )

    return forward  # type: ignore[return-value]


LAYER = "MultiScaleDeformableAttention"
"""The class of transformers that is the operator; other projects give this name to modules with projections."""
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "multi_scale_deformable_attention": (_classical,),  # transformers: Mask2Former, OneFormer
    "multi_scale_deformable_attention_v2": (_points_per_level,),  # RT-DETRv2, D-FINE, DEIMv2
    "multi_scale_deformable_attn_pytorch": (_classical,),  # mmcv, GroundingDINO, detrex
    "ms_deform_attn_core_pytorch": (_either_layout, _channels_first),  # Deformable DETR; rfdetr
}
"""By name, the known versions."""
AUTOGRAD_FUNCTIONS = (
    "MSDeformAttnFunction",  # Deformable DETR, DINO, MaskDINO, Mask2Former
    "MultiScaleDeformableAttnFunction",  # mmcv, GroundingDINO, detrex
    "MultiScaleDeformableAttentionFunction",  # transformers before 4.48
    "MultiScaleDeformableAttnFunction_fp32",  # BEVFormer and what is built on it
    "MultiScaleDeformableAttnFunction_fp16",
)
_NAMES = {*FUNCTIONS, *AUTOGRAD_FUNCTIONS, "ms_deform_attn_forward"}
"""Code that reads one of these names in a way that is not followed here is reported."""
_SIMILAR = re.compile(r"deform\w*att", re.IGNORECASE)
"""Names of functions that suggest this operator: a version that is not known is reported, not passed over."""


@dataclass(frozen=True)
class _Operator:
    """One of these functions for one backend. `apply` is that of an autograd function in whose place it is."""

    function: Callable[..., Tensor]
    backend: str | None

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self.function(*arguments, **keywords, backend=self.backend)

    apply = __call__


_operator = functools.cache(_Operator)
"""torch.compile recompiles for another object."""


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "backend")


# ------------------------------------------------------------------------------------------------ how it is replaced
_LIBRARIES = {"torch", *sys.stdlib_module_names}
"""Packages whose functions call the operator only where they decorate one that does."""
_ADAPTED = (
    "the model is adapted already: call undo() of its adaptation first (a copy of an adapted model has none: copy the "
    "model before adapt)"
)


class _Adapter:
    """What takes the place of functions and classes, for one backend. Each is made once: torch.compile depends on it.

    Copies of an adapted module refer to the adapter, and those within the process share it.
    """

    def __init__(self, backend: str | None, registered: Iterable[nn.Module] = ()) -> None:
        self.backend = backend
        self._functions: dict[FunctionType, FunctionType | None] = {}
        self._classes: dict[type, type] = {}
        self._in_progress: set[Any] = set()
        self._recursive: set[Any] = set()
        self._registered = frozenset(map(id, registered))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Adapter:
        return self

    def __reduce__(self) -> tuple:
        return _Adapter, (self.backend,)

    def changes_of(self, module: nn.Module) -> dict[str, Any]:
        """New attributes of one module, `__class__` included; none if it has no deformable attention."""
        if isinstance(module, _Adapted):
            raise ValueError(_ADAPTED)
        for name, value in vars(module).items():
            if not isinstance(value, nn.Module) and self.adapted_class(type(value)) is not type(value):
                raise _NotAdaptable(f"its {name}, a {type(value).__name__}, calls it, and is no module")
        changes = {name: self._found(value) for name, value in vars(module).items()}
        changes = {name: new for name, new in changes.items() if new is not None}
        cls = self.adapted_class(type(module))
        if cls is not type(module):
            changes["__class__"] = cls
        for name in _hidden_methods(module, changes):
            own = vars(module)[name]
            raise _NotAdaptable(f"its {name} was replaced by {own!r}: call adapt before what did that")
        if not changes and LAYER in (cls.__name__ for cls in type(module).__mro__):
            parameters = ", ".join(_parameters(type(module).forward))
            raise _NotAdaptable(f"{LAYER}.forward({parameters}) is not a known version")
        method = getattr(module, "method", None), getattr(module, "decoder_method", None)
        if changes and "discrete" in method:  # of RT-DETRv2, D-FINE and DEIMv2
            raise _NotAdaptable(
                "method 'discrete' reads the nearest pixel: another operator, without a kernel here"
            )
        return changes

    def adapted_class(self, cls: type) -> type:
        """A subclass of `cls` with other methods; `cls` itself if no method calls the operator."""
        if cls not in self._classes and not self._is_entered(cls):
            known = self._known_so_far()
            with self._entered(cls):
                new = self._adapt_class(cls)
                if new is not cls and cls in self._recursive:
                    self._forget(known)
                self._classes[cls] = new
        return self._classes.get(cls, cls)

    @contextmanager
    def _entered(self, key: Any) -> Iterator[None]:
        """What is read again while it is read calls nothing, for the time being; an error reverts what follows."""
        known = self._known_so_far()
        self._in_progress.add(key)
        try:
            yield
        except ValueError:
            self._forget(known)
            raise
        finally:
            self._in_progress.remove(key)

    def _is_entered(self, key: Any) -> bool:
        if key in self._in_progress:
            self._recursive.add(key)
        return key in self._in_progress

    def _known_so_far(self) -> tuple[int, int]:
        return len(self._functions), len(self._classes)

    def _forget(self, known: tuple[int, int]) -> None:
        """Drops what was found out since then."""
        functions, classes = known
        while len(self._functions) > functions:
            self._functions.popitem()
        while len(self._classes) > classes:
            self._classes.popitem()

    def _adapt_class(self, cls: type) -> type:
        changed: dict[type, dict[str, Any]] = {}
        for owner, name, value in _resolved(cls):
            new = self.replaced(value)
            if new is not None:
                changed.setdefault(owner, {})[name] = new
        if not changed:
            return cls
        # The new methods are in a subclass of each class that has the old ones. In the order in which methods are
        # resolved, it comes right before that class: `super()` of the classes before it finds them.
        bases = [_new_class(owner, (owner,), changed[owner]) for owner in cls.__mro__ if owner in changed]
        if cls not in changed:
            bases = [cls, *bases]
        origin = {
            "_ats_detr_adapter": self,
            "_ats_detr_class": cls,
            "_ats_detr_methods": frozenset().union(*changed.values()),
        }
        return _new_class(cls, (_Adapted, *bases), origin)

    def replaced(self, value: Any) -> Any | None:
        """`value` with this operator in the place of the one that it is or calls; None if it is and calls none."""
        if isinstance(value, _Operator):
            raise ValueError(_ADAPTED)
        if isinstance(value, FunctionType):
            return self._known(value) or self._rebuilt(value)
        if isinstance(value, type):
            return self._known(value) if issubclass(value, Function) else None
        if isinstance(value, MethodType):
            new = self.replaced(value.__func__)
            return new and MethodType(new, value.__self__)
        if isinstance(value, staticmethod | classmethod):
            new = self.replaced(value.__func__)
            return new and type(value)(new)
        if isinstance(value, partial):
            new = self.replaced(value.func)
            return new and partial(new, *value.args, **value.keywords)
        if isinstance(value, _PLAIN) or id(value) in self._registered or self._is_entered(id(value)):
            return None
        with self._entered(id(value)):
            self._reject_held(value)
        return None

    def _reject_held(self, value: Any) -> None:
        """Raises _NotAdaptable if an object, its class or what it holds calls the operator."""
        if isinstance(value, nn.Module):
            if not isinstance(value, _Adapted) and self.changes_of(value):
                raise _NotAdaptable(
                    f"a {type(value).__name__} calls it, and is no registered module: adapt it first"
                )
            return
        for part in _functions_in(value):
            if self.replaced(part):
                raise _NotAdaptable(f"a {type(value).__name__} holds {getattr(part, '__qualname__', part)}")
        if self.adapted_class(type(value)) is not type(value):
            raise _NotAdaptable(f"a {type(value).__name__} calls it, and is no module")

    def _known(self, found: Any) -> Any | None:
        """What takes the place of a function or class that is a known version of the operator."""
        if isinstance(found, type):
            is_known = found.__name__ in AUTOGRAD_FUNCTIONS
            is_known = is_known and _parameters(found.forward)[-6:] == _parameters(_apply)  # type: ignore[attr-defined]
            return _operator(_apply, self.backend) if is_known else None
        if f".{found.__qualname__}".endswith(f".{LAYER}.forward"):
            new = _layer_forward(self.backend)
            return new if _parameters(found) == _parameters(new) else None
        for known in FUNCTIONS.get(found.__name__, ()):
            if _parameters(found) == _parameters(known):
                return _operator(known, self.backend)
        return None

    def _found(self, value: Any) -> Any | None:
        """`replaced` of what is found by its name. Raises _NotAdaptable if only the name suggests the operator."""
        new = self.replaced(value)
        while isinstance(value, partial):
            value = value.func
        is_autograd = isinstance(value, type) and issubclass(value, Function)
        if (
            new is None
            and (is_autograd or isinstance(value, FunctionType))
            and _SIMILAR.search(value.__name__)
        ):
            function = value.forward if is_autograd else value
            parameters = ", ".join(_parameters(function))
            raise _NotAdaptable(f"{function.__qualname__}({parameters}) is not a known version")
        return new

    def _rebuilt(self, function: FunctionType) -> FunctionType | None:
        if function not in self._functions and not self._is_entered(function):
            with self._entered(function):
                new = self._rebuild(function)
                if new is not None and function in self._recursive:
                    raise _NotAdaptable(
                        f"{function.__qualname__} calls itself, directly or in a function that it calls"
                    )
                self._functions[function] = new
        return self._functions.get(function)

    def _rebuild(self, function: FunctionType) -> FunctionType | None:
        """`function` with other names and another closure; None if it does not call the operator."""
        code, scope, cells = function.__code__, function.__globals__, function.__closure__ or ()
        if str(scope.get("__name__")).partition(".")[0] not in _LIBRARIES:
            code = self._renamed(code, scope)
        contents = [self.replaced(next(iter(gc.get_referents(cell)), None)) for cell in cells]
        for held in (function.__defaults__, function.__kwdefaults__):
            self.replaced(held)  # raises if it holds the operator
        wrapped = vars(function).get("__wrapped__")
        if code is function.__code__ and not any(contents):
            if self.replaced(wrapped):
                raise _NotAdaptable(
                    f"the decorator of {function.__qualname__} does not hold the function it decorates"
                )
            return None
        code = code.replace()  # torch.compile keeps what it compiled by the code object
        closure = tuple(CellType(new) if new else cell for new, cell in zip(contents, cells, strict=True))
        copy = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
        functools.update_wrapper(copy, function)
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__wrapped__ = self.replaced(wrapped) or wrapped  # type: ignore[attr-defined]
        if wrapped is None:
            del copy.__wrapped__  # type: ignore[attr-defined]
        return copy

    def _renamed(self, code: CodeType, scope: dict[str, Any]) -> CodeType:
        """`code` with other names for what is replaced, which are added beside the names; unchanged if nothing is."""
        names: dict[str, str] = {}
        kept = set()
        found: Any = None
        for instruction, problem in _reads(code, scope):
            operation, name, owner = instruction.opname, instruction.argval, None
            if operation == "LOAD_GLOBAL":
                found = scope.get(name)
            elif operation in _ATTRIBUTE and isinstance(found, ModuleType | type):
                owner, found = found, inspect.getattr_static(found, name, None)
            else:
                found = None
            new = self._found(found)
            if new is not None:
                names[name] = f"_ats_detr_{self.backend or 'default'}_{name}"
                if owner is None:
                    scope[names[name]] = new
                else:
                    setattr(owner, names[name], new)
            elif problem:
                raise _NotAdaptable(f"{code.co_name} reads {name} {problem}")
            elif instruction.opcode in dis.hasname:
                kept.add(name)
        if kept & names.keys():
            raise _NotAdaptable(
                f"{code.co_name} uses the name {', '.join(kept & names.keys())} for two things"
            )
        constants = tuple(
            self._renamed(part, scope) if isinstance(part, CodeType) else part for part in code.co_consts
        )
        if not names and all(new is old for new, old in zip(constants, code.co_consts, strict=True)):
            return code
        renamed = tuple(names.get(name, name) for name in code.co_names)
        return code.replace(co_names=renamed, co_consts=constants)


class _Adapted:
    """Base of the classes of adapted modules: copies are adapted in the same way."""

    _ats_detr_adapter: _Adapter
    _ats_detr_class: type
    _ats_detr_methods: frozenset[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *rest = reduced
        is_own = "_ats_detr_class" in vars(type(self))  # not a subclass that someone else made
        if is_own and function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = _new_module
            arguments = (self._ats_detr_adapter, self._ats_detr_class, *arguments[1:])
        return function, arguments, *rest


def _new_module(adapter: _Adapter, cls: type, *arguments: Any) -> Any:
    cls = adapter.adapted_class(cls)
    return cls.__new__(cls, *arguments)


def _new_class(like: type, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    names = {"__module__": like.__module__, "__qualname__": like.__qualname__, "__doc__": like.__doc__}
    # Classes that register their subclasses, or ask for arguments, are not to know of this one.
    silent = type("_Silent", (), {"__init_subclass__": classmethod(lambda cls: None)})
    return new_class(
        like.__name__, (silent, *bases), {}, lambda namespace: namespace.update(names, **attributes)
    )


# ------------------------------------------------------------------------------------------------ where it is found
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_PLAIN = (NoneType, str, bytes, int, float, Tensor, ModuleType)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, MappingProxyType)


def _resolved(cls: type) -> Iterator[tuple[type, str, Any]]:
    """(class, name, value) of what an instance of `cls` finds in its classes, and `super()` from there."""
    owners = [owner for owner in cls.__mro__ if owner.__module__.partition(".")[0] not in _LIBRARIES]
    names = {name for owner in owners for name in vars(owner) if not name.startswith("_ats_detr_")}
    pending = [(name, 0) for name in names - {"__init__", "__new__"}]
    seen = set()
    while pending:
        name, first = pending.pop()
        found = next((item for item in enumerate(owners[first:], first) if name in vars(item[1])), None)
        if found is None or (name, found) in seen:
            continue
        seen.add((name, found))
        position, owner = found
        value = vars(owner)[name]
        yield owner, name, value
        for function in _layers(getattr(value, "__func__", value)):
            pending += [(other, position + 1) for other in _names_after_super(function.__code__)]


def _layers(function: Any, *outer: Any) -> Iterator[FunctionType]:
    """A function, and those that it decorates."""
    if isinstance(function, FunctionType) and function not in outer:
        yield function
        for part in gc.get_referents(*function.__closure__ or ()):
            yield from _layers(part, function, *outer)


def _names_after_super(code: CodeType, found: bool = False) -> Iterator[str]:
    """Names that code with `super()` may read from it: each one that it contains."""
    found = found or "super" in code.co_names
    if found:
        yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names_after_super(part, found)
        elif found and isinstance(part, str):
            yield part


def _reads(code: CodeType, scope: dict[str, Any]) -> Iterator[tuple[dis.Instruction, str]]:
    """Instructions of `code`, each with what is wrong with it if it reads one of `_NAMES`."""
    instructions = [x for x in dis.get_instructions(code) if x.opname != "EXTENDED_ARG"]
    variables = [_variables(instruction) for instruction in instructions]
    loaded = {name for names in variables for name in names}
    for position, instruction in enumerate(instructions):
        operation, name = instruction.opname, instruction.argval
        problem = ""
        if isinstance(name, str) and name in _NAMES:
            if operation == "LOAD_GLOBAL" and scope.get(name) is not None:
                problem = f"which is a {type(scope[name]).__name__}: not a known version"
            elif operation in _ATTRIBUTE and variables[position - 1][-1:] != code.co_varnames[:1]:
                problem = "of an object that is known only when it runs: read it from its module"
            elif operation == "IMPORT_FROM" and instructions[position + 1].argval in loaded:
                problem = "by an import within the function: import it at the top of the file"
            elif operation == "LOAD_CONST":
                problem = "as a string: read it from its module"
        yield instruction, problem


def _variables(instruction: dis.Instruction) -> tuple[str, ...]:
    """Local variables that an instruction loads."""
    if "LOAD" not in instruction.opname or instruction.opcode not in (*dis.haslocal, *dis.hasfree):
        return ()
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return names[1:] if instruction.opname.startswith("STORE") else names


def _functions_in(value: Any) -> Iterator[Any]:
    """Items of a container; functions that a property or another object holds."""
    for part in (*gc.get_referents(value), *getattr(value, "__dict__", {}).values()):
        if (
            isinstance(value, _CONTAINERS)
            or isinstance(part, FunctionType | MethodType)
            or (isinstance(part, type) and issubclass(part, Function))
        ):
            yield part
