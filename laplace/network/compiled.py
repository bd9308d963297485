"""Models with parts that ``torch.compile`` made faster: where functions or layers are watched, these run as written.

A compiled graph calls no function that could be watched, and a hook makes it compile anew. Elsewhere it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LOCK = threading.RLock()
_HELD: list[Any] = []
"""What set the stance of the compiler, which is one for all threads, and an entry for each call that wants it."""


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run a compiled graph: one of ``torch.compile``, or compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def any_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether some of them do."""
    return any(is_compiled(module) for module in modules)


def around(model: nn.Module, names: Iterable[str | None]) -> list[nn.Module]:
    """The modules of some names, and those that they are parts of."""
    found = [model]
    for name in filter(None, names):
        module = model
        for part in name.split("."):
            module = getattr(module, part)
            found.append(module)
    return found


@contextmanager
def as_written(modules: Iterable[nn.Module]) -> Generator[None]:
    """Run compiled modules as they were written, where some of these are compiled."""
    if torch.compiler.is_compiling() or not any_compiled(modules) or not _hold():
        yield
        return
    try:
        yield
    finally:
        _release()


def _hold() -> bool:
    """Ask for the code as written; whether it can be asked for here."""
    with _LOCK:
        if not _HELD:
            try:
                _HELD.append(torch.compiler.set_stance("force_eager"))
            except RuntimeError:  # within a function of the user that is compiled in pieces
                return False
        _HELD.append(None)
    return True


def _release() -> None:
    """Put back what was before, when the last call ends."""
    with _LOCK:
        _HELD.pop()
        if len(_HELD) == 1:
            _HELD.pop().__exit__(None, None, None)


__all__ = ["any_compiled", "around", "as_written", "is_compiled"]
