"""A closed form as a graph of tensor operations, for any number of rows: what other programs can run.

The function is traced once; everything that does not depend on its arguments is computed and becomes a buffer, so that
what is left is a module that knows nothing of this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg

from laplace.errors import UnsupportedError

CHECKS = ("_assert", "_check", "sym_constrain")
"""Beginnings of the names of operations that look at values, and compute none."""


def graph_of(function: Callable[[Tensor, Tensor], Any], f: Tensor, phi: Tensor) -> fx.GraphModule:
    """A function of outputs ``[rows, C]`` and features ``[rows, D]``, as a module of operations and buffers.

    Raises
    ------
    UnsupportedError
        If the function does more than compute with tensors, or cannot do so for any number of rows.
    """
    rows = torch.export.Dim("rows")
    try:
        with torch.no_grad():
            traced = torch.export.export(_Rows(function), (f, phi), dynamic_shapes=({0: rows}, {0: rows}), strict=False)
    except Exception as error:  # of many kinds; the cause says which
        first = str(error).strip().partition("\n")[0]
        msg = (
            "This prediction cannot be written as a graph for batches of any size: its formulas look at the values of "
            f"tensors, or at how many rows there are. PyTorch says: {first} Compile the object instead, "
            "torch.compile(la), or choose another link_approx or likelihood."
        )
        raise UnsupportedError(msg) from error
    return _Flattened(traced).module()


class _Rows(nn.Module):
    """A function as a module, which is what PyTorch traces."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, f: Tensor, phi: Tensor) -> Any:
        """Its value."""
        return self.function(f, phi)


class _Flattened:
    """What was traced, with constants computed and sizes asked for when it runs."""

    def __init__(self, traced: torch.export.ExportedProgram) -> None:
        self.traced, self.graph, self.root = traced, fx.Graph(), nn.Module()
        self.now: dict[fx.Node, Any] = {}
        """Nodes of the new graph, or values of constants, by the nodes that were traced."""
        self.names: dict[int, tuple[str, Tensor]] = {}
        """Names of buffers, by the constants that they were made from."""

    def module(self) -> fx.GraphModule:
        """The module."""
        constants = {**self.traced.constants, **self.traced.state_dict}
        kinds = {spec.arg.name: spec for spec in self.traced.graph_signature.input_specs}
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                spec = kinds[node.name]
                given = spec.kind is InputKind.USER_INPUT
                self.now[node] = self.graph.placeholder(node.name) if given else constants[str(spec.target)]
            elif node.op == "output":
                found = map_arg(node.args[0], lambda old: self._written(self.now[old]))
                self.graph.output(found[0] if len(found) == 1 else tuple(found))
            elif node.op == "call_function" and not _looks(node.target):
                self._compute(node)
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    def _compute(self, node: fx.Node) -> None:
        """Now, where all arguments are constants; else when the graph runs."""
        target: Any = node.target
        given: Any = (node.args, dict(node.kwargs))
        if not any(isinstance(self.now[old], fx.Node) for old in node.all_input_nodes):
            args, kwargs = map_arg(given, self.now.__getitem__)
            self.now[node] = target(*args, **kwargs)
            return
        sizes = [old for old in node.all_input_nodes if not isinstance(old.meta.get("val"), (Tensor, tuple, list))]
        args, kwargs = map_arg(given, lambda old: self._written(self.now[old]))
        self.now[node] = self._asked(node, args, dict(kwargs), bool(sizes))

    def _asked(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], sized: bool) -> fx.Node:
        """An operation of the new graph: wherever its tensors are, of whatever size."""
        target: Any = node.target
        name = _name(target).rpartition("::")[2]
        if name == "sym_size":
            return self.graph.call_method("size", args)
        if name in ("to", "_to_copy"):  # to a dtype: the device is that of the module
            before, after = (each.meta["val"].dtype for each in (node.all_input_nodes[0], node))
            return args[0] if before is after else self.graph.call_method("to", (args[0], after))
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        if not sized or "::" not in _name(target):
            return self.graph.call_function(target, args, kwargs)
        # Numbers of rows are tensors while `torch.jit` traces, which methods take and operators do not.
        if hasattr(Tensor, name):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(getattr(torch, name), args, kwargs)

    def _written(self, value: Any) -> Any:
        """A node, or of a constant the node that reads the buffer; numbers stay as they are."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.names:
            name = f"constant_{len(self.names)}"
            self.root.register_buffer(name, value.detach().clone().contiguous())
            self.names[id(value)] = name, value
        return self.graph.get_attr(self.names[id(value)][0])


def _name(target: Any) -> str:
    """Of an operation, with its library."""
    return getattr(getattr(target, "_schema", None), "name", getattr(target, "__name__", ""))


def _looks(target: Any) -> bool:
    """Whether an operation only checks values."""
    return _name(target).rpartition("::")[2].startswith(CHECKS)


__all__ = ["graph_of"]
