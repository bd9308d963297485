"""Layers that are watched in a forward pass, by hooks that live for its length."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_HOOKS = threading.RLock()
"""Held while hooks are set and removed: PyTorch numbers them without a lock, so that two could get one number."""


@dataclass
class Pass:
    """What one forward pass showed."""

    calls: Counter[str | None] = field(default_factory=Counter)
    seen: dict[str | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Input and output of layers, in the order in which they ran last."""
    f: Tensor = field(default_factory=lambda: torch.empty(0))
    """Outputs, in the layout of the model."""


@contextmanager
def watched(layers: dict[str | None, nn.Module], *, keep: bool = False) -> Generator[Pass]:
    """Watch layers in a pass that the body runs."""
    here, passed = threading.get_ident(), Pass()

    def watch(name: str | None) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], *others: Any) -> None:
            if threading.get_ident() != here:
                return  # the pass of another thread; it may find half of a hook that is just removed
            kwargs, output = others
            passed.calls[name] += 1
            if not keep:
                passed.seen.clear()
            passed.seen.pop(name, None)
            passed.seen[name] = (args[0] if args else next(iter(kwargs.values())), output)

        return hook

    handles: list[RemovableHandle] = []
    try:
        with _HOOKS:
            for name, layer in layers.items():
                handles.append(layer.register_forward_hook(watch(name), with_kwargs=True))
        yield passed
    finally:
        with _HOOKS:
            for handle in handles:
                handle.remove()
