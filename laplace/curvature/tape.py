"""Watch a forward pass: which functions use the random weights, with which inputs, and where their outputs are.

Functions are watched only while the model runs; no hook is set on it and nothing is stored.
Tensors made of weights and constants alone (a slice of positions, an embedding of ``arange``) are *derived*: they play
the role in place of the weight, and their derivatives are pulled back to it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from laplace.curvature.layers import READERS, bind
from laplace.curvature.recurrent import CELLS, SINGLE, unrolled
from laplace.curvature.roles import Role

REORDERING = {
    "argsort", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_",
    "index_select", "masked_select", "nonzero", "scatter", "scatter_", "scatter_add", "scatter_add_", "sort",
    "take_along_dim", "topk",
}  # fmt: skip
"""Functions that may put the rows of a batch into an order that depends on data, as indexing by tensors may."""
PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device, slice}
"""Types of most arguments that are no tensors."""
MUTATING = {"__setitem__", "set_", "copy_"}
"""Functions that write into their first argument, besides those whose name ends with an underscore."""


@dataclass(frozen=True)
class Call:
    """One call of a function in which random weights meet data."""

    name: str
    """Name of the function."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    edge: GradientEdge
    """Node of the graph at which gradients of its output are taken."""
    roles: list[tuple[Tensor, Role]]
    """Each tensor that is, or is derived from, random weights, with its role."""
    inputs: list[tuple[Tensor, int]]
    """The other tensors with their versions at the call: they must not be written to afterwards."""


class Tape(TorchFunctionMode):
    """The calls of one forward pass; ``constants`` are buffers and frozen weights, which depend on no data."""

    def __init__(self, parameters: Sequence[Tensor], constants: Iterable[Tensor], n_rows: int) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.tracked: dict[int, tuple[Tensor, frozenset[int]]] = {
            id(parameter): (parameter, frozenset({group})) for group, parameter in enumerate(parameters)
        }
        # Tensors are kept, so that their ids are not used again.
        self.constants: dict[int, Tensor] = {id(tensor): tensor for tensor in constants}
        self.lookups: dict[int, Tensor] = {}
        """For each derived tensor that consists of rows of a weight, the indices of these."""
        self.reorders = False
        """Whether data were indexed by tensors."""
        self.calls: list[Call] = []
        self.opaque: dict[int, str] = {}
        """Groups of weights that met data in a function without a reader, with its name."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function and record what it does with weights."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside(func, args, kwargs)
        if (func in CELLS or func in SINGLE) and not kwargs and (out := self._unrolled(func, args)) is not None:
            return out
        tensors = tensors_in((args, kwargs))
        weights = [tensor for tensor in tensors if id(tensor) in self.tracked]
        data = [t for t in tensors if id(t) not in self.tracked and id(t) not in self.constants]
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        by_tensor = name in {"__getitem__", "__setitem__"} and bool(tensors_in(args[1]))
        self.reorders |= bool(data) and (name in REORDERING or by_tensor)
        made = tensors_in(out)
        if weights and (data or self._spreads(func, weights, made)):
            self._meet(func, name, args, kwargs, weights, data, made)
        elif not data:
            groups = frozenset().union(*(self.tracked[id(weight)][1] for weight in weights))
            for tensor in made:
                if id(tensor) in self.tracked:
                    continue
                if groups and tensor.requires_grad:
                    self.tracked[id(tensor)] = (tensor, groups)
                    self._look_up(func, args, kwargs, tensor)
                else:
                    self.constants[id(tensor)] = tensor
        if data and tensors and (name in MUTATING or (name.endswith("_") and not name.startswith("__"))):
            self.constants.pop(id(tensors[0]), None)
        return out

    def _look_up(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        """Record a look-up of rows that are the same for all data, such as an embedding of positions."""
        if func is F.embedding:
            call = bind(READERS[func][1], args, kwargs)
            if call["weight"].is_leaf and call.get("padding_idx") is None:
                self.lookups[id(out)] = call["input"]

    def _spreads(self, func: Any, weights: list[Tensor], made: list[Tensor]) -> bool:
        """Whether a weight is repeated for each datum, before it meets any."""
        if func not in {Tensor.expand, F.embedding} or self.n_rows == 1:
            return False
        (weight,), (out,) = weights, made
        if out.shape[0] != self.n_rows:
            return False
        if func is F.embedding:  # a look-up by constants for each datum, such as the types of tokens
            return out.dim() > 2
        return out.dim() > weight.dim() or weight.shape[0] == 1

    def _meet(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: list[Tensor],
        data: list[Tensor],
        made: list[Tensor],
    ) -> None:
        """Record a call in which weights meet data."""
        differentiable = [tensor for tensor in made if tensor.requires_grad]
        if not differentiable and name not in MUTATING:
            return
        roles: list[tuple[Tensor, Role]] = []
        if func in READERS and len(made) == 1 and differentiable:
            read, names = READERS[func]
            roles = [(t, role) for t, role in read(made[0], bind(names, args, kwargs)) if id(t) in self.tracked]
        known = {id(tensor) for tensor, _ in roles}
        for weight in weights:
            if id(weight) not in known:
                self.opaque.update(dict.fromkeys(self.tracked[id(weight)][1], name))
        if roles:
            out = made[0]
            inputs = [(tensor, tensor._version) for tensor in data if tensor is not out]
            self.calls.append(
                Call(name, tuple(out.shape), out.dtype, get_gradient_edge(seen_whole(out)), roles, inputs)
            )

    def _unrolled(self, func: Any, args: Sequence[Any]) -> Any:
        """Run a recurrent layer step by step and record what its weights do; ``None`` where that cannot be."""
        # After inputs, lengths and state come the weights: a list, or of a cell one by one.
        first = next((n for n in (2, 3) if n < len(args) and isinstance(args[n], (tuple, list))), 2)
        weights = {id(tensor) for tensor in tensors_in(args[first:])}
        others = [t for t in tensors_in(args) if id(t) not in weights]
        is_data = any(id(t) not in self.tracked and id(t) not in self.constants for t in others)
        found = unrolled(func, args) if weights & self.tracked.keys() and is_data else None
        if found is None:
            return None
        name: str = func.__name__
        for tensor in others:  # an initial state that is learned
            if id(tensor) in self.tracked:
                self.opaque.update(dict.fromkeys(self.tracked[id(tensor)][1], name))
        inputs = [(tensor, tensor._version) for tensor in others]
        for product, roles in found.calls:
            known = [(tensor, role) for tensor, role in roles if id(tensor) in self.tracked]
            if known:
                edge = get_gradient_edge(product)
                self.calls.append(Call(name, tuple(product.shape), product.dtype, edge, known, inputs))
        return found.outputs

    def _inside(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the Python body of a function so that the functions it calls are watched in turn."""
        code = getattr(func, "__code__")  # noqa: B009 - a function of Python, not a built-in one
        scope = {**getattr(func, "__globals__"), "has_torch_function": lambda *_: False}  # noqa: B009
        body = types.FunctionType(code, scope, code.co_name, getattr(func, "__defaults__"))  # noqa: B009
        body.__kwdefaults__ = getattr(func, "__kwdefaults__")  # noqa: B009
        with self:
            return body(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) in PLAIN:
        return []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [tensor for item in value.values() for tensor in tensors_in(item)] if isinstance(value, Mapping) else []


def seen_whole(out: Tensor) -> Tensor:
    """The tensor that ``out`` is a view of, if the view shows all of it in order; else ``out`` itself.

    Later writes into a view rebuild the graph of the view, but keep that of the tensor it shows.
    """
    base = out._base
    if base is None or base.grad_fn is None or base.numel() != out.numel():
        return out
    return base if base.is_contiguous() and out.is_contiguous() else out


def row_view(view: Tensor, parameter: Tensor) -> int | None:
    """Index of the first row, if ``view`` shows consecutive rows of a parameter; else ``None``."""
    if view._base is not parameter or view.dim() != parameter.dim() or view.shape[1:] != parameter.shape[1:]:
        return None
    if view.stride() != parameter.stride() or not parameter.is_contiguous():
        return None
    size = parameter[0].numel() if parameter.dim() > 1 else 1
    offset = view.storage_offset() - parameter.storage_offset()
    return int(offset // size) if offset % size == 0 else None


def transposed_view(view: Tensor, parameter: Tensor) -> bool:
    """Whether ``view`` is the transpose of the matrix ``parameter``."""
    if view._base is not parameter or view.dim() != 2 or parameter.dim() != 2:
        return False
    same = view.storage_offset() == parameter.storage_offset()
    turned = tuple(view.stride()) == tuple(reversed(parameter.stride())) and view.shape == parameter.shape[::-1]
    return bool(same and turned)
