"""Copies of a model whose last layer shows what enters it: by a hook that stays, since what is traced is the copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ORIGINAL = "_orig_mod"
"""Under which name a module of ``torch.compile`` holds what it was made from."""
Entered = tuple[Tensor, Tensor]
"""What entered the last layer, and what it made."""


def twin_of(model: nn.Module, name: str, show: Callable[[Entered], None], *, shared: bool) -> nn.Module:
    """Modules of their own, in evaluation mode; the layer of that name shows what it sees.

    Their tensors are those of the model where they are ``shared``, else copies.
    """
    memo: dict[int, Any] = {}
    for module in model.modules() if shared else ():
        values = (*vars(module).values(), *module.parameters(recurse=False), *module.buffers(recurse=False))
        memo.update({id(value): value for value in values if isinstance(value, Tensor)})
    for module in model.modules():
        if hasattr(module, ORIGINAL) and id(module) not in memo:  # compiled as a part of the whole
            memo[id(module)] = copy.deepcopy(getattr(module, ORIGINAL), memo)
    twin = copy.deepcopy(model, memo).eval()
    name = ".".join(part for part in name.split(".") if part != ORIGINAL)
    twin.get_submodule(name).register_forward_hook(_Showing(show), with_kwargs=True)
    return twin


class _Showing:
    """A hook that can be copied and pickled."""

    def __init__(self, show: Callable[[Entered], None]) -> None:
        self.show = show

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.show((args[0] if args else next(iter(kwargs.values())), output))


__all__ = ["ORIGINAL", "Entered", "twin_of"]
