"""Private copies of models for packages that leave hooks, attributes and gradients on the modules they work with.

A copy has modules and buffers of its own, and shares the storage of parameters and of other tensors of the model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from laplace.errors import UnsupportedError
from laplace.network.threads import together


def structural_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy modules and buffers; parameters share storage unless converted, and no layer of the copy works in place."""
    with together(model):
        return _copied(model, dtype)


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy, made while no thread has other weights in place."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # For example caches, and weights that a hook computes again before each pass.
        memo.update({id(value): value.detach() for value in vars(module).values() if isinstance(value, Tensor)})
    for buffer in model.buffers():
        memo[id(buffer)] = (buffer.detach().to(dtype) if buffer.is_floating_point() else buffer.detach()).clone()
    for parameter in model.parameters():
        alias = parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
        memo[id(parameter)] = nn.Parameter(alias, requires_grad=parameter.requires_grad)
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        msg = (
            f"{type(model).__name__} has an attribute that cannot be copied ({error}), and this back end works on a "
            "copy to leave the model alone. Remove it while fitting, or use a back end of this library: AutogradGGN, "
            "AutogradEF or AutogradHessian."
        )
        raise UnsupportedError(msg) from error
    for module in twin.modules():
        if vars(module).get("inplace") is True:
            vars(module)["inplace"] = False
    return twin


class Uses(TorchFunctionMode):
    """Counts, while it is active, how often operations take each of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._watched = {id(tensor) for tensor in tensors}
        self.counts: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count the operands, then run the operation."""
        result = func(*args, **(kwargs or {}))
        if any(isinstance(item, Tensor) for item in tree_leaves(result)):  # else a shape or a dtype
            self.counts.update(id(item) for item in tree_leaves((args, kwargs)) if id(item) in self._watched)
        return result
