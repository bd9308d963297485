"""Which axis of the outputs holds the C outputs (classes): read from the functions that made them.

Outputs are ``[batch, *positions, C]``. Convolutions put channels after the batch instead, and where sizes agree no
shape tells the two apart. Linear layers put them last; permutations and functions of each entry are followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace.errors import UnsupportedError

CONVOLUTIONS = {f"conv{kind}{n}d": n for kind in ("", "_transpose") for n in (1, 2, 3)}
"""Functions that put channels before their spatial axes, and how many of those there are."""
LAST = {"bilinear", "embedding", "linear", "multi_head_attention_forward"}
"""Functions that put channels last."""
PRODUCTS = {"__matmul__", "matmul", "mm"}
"""Functions that put channels last where their second factor is a weight, as linear layers do."""
MOVES = {"__get__", "moveaxis", "movedim", "permute", "swapaxes", "swapdims", "transpose"}
"""Functions that change the order of axes; ``__get__`` is that of properties, such as ``mT``."""
VIEWS = {"flatten", "reshape", "unflatten", "view"}
"""Functions that join and split axes."""


class Axes(TorchFunctionMode):
    """Follows the axis of channels through a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def of(self, tensor: Tensor) -> int | None:
        """The axis of channels of a tensor, if it is known."""
        reference, axis = self._found.get(id(tensor), (None, None))
        return axis if reference is not None and reference() is tensor else None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function and note where its channels are."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and made.dim() > 1:
                axis = self._made(func, args, kwargs, made)
                if axis is not None:
                    self._found[id(made)] = (weakref.ref(made), axis)
                else:
                    self._found.pop(id(made), None)
        return out

    def _made(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int | None:
        """The axis of channels of what a function made."""
        name = getattr(func, "__name__", "")
        if name in CONVOLUTIONS:
            return out.dim() - 1 - CONVOLUTIONS[name]
        if name in LAST or (name in PRODUCTS and _is_matrix((*args, *kwargs.values())[1])):
            return out.dim() - 1
        if name in MOVES and args and isinstance(args[0], Tensor):
            return _moved(func, args, kwargs, self.of(args[0]))
        if name == "einsum":
            return None
        items = (*args, *kwargs.values())
        inputs = [item for item in items if isinstance(item, Tensor)]
        inputs += [part for item in items[:1] if isinstance(item, (tuple, list)) for part in item]  # of cat
        for tensor in inputs:
            axis = self.of(tensor) if isinstance(tensor, Tensor) else None
            if axis is None:
                continue
            if name not in VIEWS and tensor.dim() == out.dim():
                return axis
            if axis == tensor.dim() - 1:
                return out.dim() - 1 if tensor.shape[-1] == out.shape[-1] else None
            return axis if name in VIEWS and tensor.shape[: axis + 1] == out.shape[: axis + 1] else None
        return None


def _is_matrix(factor: Any) -> bool:
    """Whether a factor is a weight ``[..., inputs, outputs]``."""
    return isinstance(factor, nn.Parameter) and factor.dim() > 1


def _moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int | None) -> int | None:
    """Where a function that changes the order of axes puts one; moving an axis to itself says that it is the one."""
    n_axes = args[0].dim()
    if getattr(func, "__name__", "") in {"moveaxis", "movedim"}:
        source, destination = (*args[1:], *kwargs.values())[:2]
        if isinstance(source, int) and source == destination:
            return source % n_axes
    if axis is None:
        return None
    order = func(torch.empty(tuple(range(2, 2 + n_axes)), device="meta"), *args[1:], **kwargs)
    sizes = tuple(order.shape) if isinstance(order, Tensor) else ()
    return sizes.index(axis + 2) if axis + 2 in sizes else None


def check_last(shape: Sequence[int], axis: int | None, *, classes: bool) -> None:
    """Raise unless C is surely last: channels were seen there, or (``axis`` is ``None``) no other axis fits targets."""
    n_axes = len(shape)
    if n_axes < 3 or axis == n_axes - 1:
        return
    if axis is not None:
        msg = (
            f"The outputs of the model are {list(shape)} with their channels on axis {axis}, where convolutions put "
            "them. Outputs are read as [batch, *positions, C]: the last axis holds classes, or outputs of a "
            f"regression. Wrap the model in a module that returns outputs.movedim({axis}, -1), and give soft labels or "
            "regression targets the same order of axes."
        )
        raise UnsupportedError(msg)
    if len(set(shape[1:])) == 1 if classes else n_axes > 3:
        msg = (
            f"The outputs of the model are {list(shape)}, and neither their shape nor the functions that made them "
            "tell which axis holds the classes or the outputs of a regression. Outputs are read as [batch, *positions, "
            "C]. Wrap the model in a module that returns outputs.movedim(1, -1) if channels come after the batch, and "
            "outputs.movedim(-1, -1) if they are last: that says so."
        )
        raise UnsupportedError(msg)
