"""Which threads may run a model: many together if its weights stay, one alone if a pass puts others in their place.

A functional call swaps the weights of the modules for its length, and some layers make a weight again in each pass:
other threads would see those.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from enum import Enum

from torch import nn


class _State(Enum):
    """What a pass does with a module."""

    TOGETHER, ALONE, WAITS = "runs it together with others", "runs it alone", "waits to run it alone"


_PASSES: dict[int, dict[object, tuple[int, _State]]] = {}
"""For each module, by its id, the passes that run it: their threads, and what they do."""
_CHANGED = threading.Condition(threading.RLock())


@contextmanager
def together(model: nn.Module) -> Generator[None, None, None]:
    """Run a model and its submodules as they are in the body, while other threads may do the same."""
    with _running(model, _State.TOGETHER):
        yield


@contextmanager
def alone(model: nn.Module) -> Generator[None, None, None]:
    """Run a model in a pass that changes what other threads would see of it and of its submodules."""
    with _running(model, _State.ALONE):
        yield


@contextmanager
def _running(model: nn.Module, state: _State) -> Generator[None, None, None]:
    """Wait until no other thread is in the way; one that is in a pass already goes on, or it would wait for itself."""
    me = threading.get_ident()
    if state is _State.TOGETHER and _inside((id(model),), me):
        yield  # within a pass of this thread, which has marked all modules
        return
    keys, this = [id(module) for module in model.modules()], object()
    in_the_way = {_State.ALONE, _State.TOGETHER if state is _State.ALONE else _State.WAITS}
    try:
        with _CHANGED:
            # Nearly always there is no other thread: then there is nothing to wait for.
            if _PASSES and _blocked(keys, me, in_the_way) and not _inside(keys, me):
                if state is _State.ALONE:
                    _mark(keys, this, me, _State.WAITS)  # no other thread begins meanwhile
                _CHANGED.wait_for(lambda: not _blocked(keys, me, in_the_way))
            _mark(keys, this, me, state)
        yield
    finally:
        with _CHANGED:
            for key in keys:
                _PASSES.get(key, {}).pop(this, None)
                if not _PASSES.get(key, {this: None}):
                    del _PASSES[key]
            _CHANGED.notify_all()


def _blocked(keys: Sequence[int], me: int, in_the_way: Collection[_State]) -> bool:
    """Whether another thread is in the way in one of some modules."""
    passes = (found for key in keys for found in _PASSES.get(key, {}).values())
    return any(thread != me and state in in_the_way for thread, state in passes)


def _inside(keys: Sequence[int], me: int) -> bool:
    """Whether a thread is in a pass of one of some modules."""
    return any(thread == me for key in keys for thread, _ in list(_PASSES.get(key, {}).values()))


def _mark(keys: Sequence[int], this: object, me: int, state: _State) -> None:
    """Note what a pass of a thread does with some modules."""
    for key in keys:
        _PASSES.setdefault(key, {})[this] = me, state


def _after_fork() -> None:
    """Forget the threads of the parent process: in a forked one they never run again, nor leave passes or locks."""
    globals()["_CHANGED"] = threading.Condition(threading.RLock())  # another thread may have held it
    me = threading.get_ident()
    for key, passes in list(_PASSES.items()):
        _PASSES[key] = {this: found for this, found in passes.items() if found[0] == me}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
