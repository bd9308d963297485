"""Context managers that put a model into evaluation or training mode and leave it exactly as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, enable_backprop: bool = False) -> Generator[None, None, None]:
    """Run the body with ``model`` in evaluation mode and, unless ``enable_backprop``, without building a graph.

    Modes are restored on every exit. ``torch.inference_mode`` is left for the duration, so that what is computed can
    take part in autograd later; ``torch.no_grad`` is not.
    """
    build_graph = enable_backprop and torch.is_grad_enabled()

    def evaluate() -> None:
        if any(module.training for module in model.modules()):
            model.eval()

    with _modes_restored(model, evaluate), torch.inference_mode(False), torch.set_grad_enabled(build_graph):
        yield


@contextmanager
def training(model: nn.Module) -> Generator[None, None, None]:
    """Run the body with ``model`` in training mode and with gradients.

    Modes are restored on every exit; ``torch.no_grad`` and ``torch.inference_mode`` are left for the duration. A model
    that is in training mode already stays as it is, with the submodules that are kept in evaluation mode.
    """

    def train() -> None:
        if not model.training:
            model.train()

    with _modes_restored(model, train), torch.inference_mode(False), torch.enable_grad():
        yield


Holder = tuple[int, object]


@dataclass
class _Held:
    """A module that runs in another mode than its own at present."""

    module: nn.Module
    """Referenced so that its id is not used again."""
    flag: bool
    """Its own ``training`` flag."""
    holders: list[Holder] = field(default_factory=list)
    """The calls that run it, with their threads; the first of them found its own mode."""


_HELD: dict[int, _Held] = {}
"""Modules by their ids. Several threads may evaluate one model: the last one to leave restores its mode."""
_LOCK = threading.RLock()


def _after_fork() -> None:
    """Forget the threads of the parent process: in a forked one they never run again, nor leave modules or the lock."""
    globals()["_LOCK"] = threading.RLock()  # another thread may have held it
    me = threading.get_ident()
    for key, held in list(_HELD.items()):
        held.holders = [holder for holder in held.holders if holder[0] == me]
        if not held.holders:
            held.module.training = _HELD.pop(key).flag


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _modes_restored(model: nn.Module, mode: Callable[[], object]) -> Generator[None, None, None]:
    """Set a mode for the body, then restore that of each module which no other call holds."""
    this: Holder = threading.get_ident(), object()
    found: list[tuple[nn.Module, bool]] = []
    try:
        with _LOCK:
            found = [(module, module.training) for module in model.modules()]
            for module, flag in found:
                _HELD.setdefault(id(module), _Held(module, flag)).holders.append(this)
            mode()
        yield
    finally:
        with _LOCK:
            modes = [(module, _released(module, flag, this)) for module, flag in found]
            _restore([(module, flag) for module, flag in modes if flag is not None], this[0])


def _released(module: nn.Module, flag: bool, holder: Holder) -> bool | None:
    """The mode to restore when a call no longer holds a module; ``None`` if another call still decides."""
    held = _HELD.get(id(module))
    if held is None or holder not in held.holders:
        return None  # interrupted before it was held
    first = held.holders[0] is holder
    held.holders.remove(holder)
    if not held.holders:
        del _HELD[id(module)]
        return held.flag
    # A call within another restores what it found; the first one may leave while others go on.
    return None if first else flag


def _restore(modes: Sequence[tuple[nn.Module, bool]], me: int) -> None:
    """Put modules back into their modes."""
    # A module may do more in train() than set its flag (merge adapters, say): undo it the same way, unless it reaches
    # children that other threads run. The flags below are then set one by one, since it reaches the children, too.
    for module, flag in modes:
        if module.training is not flag and not any(_is_busy(child, me) for child in module.modules()):
            module.train(flag)
    for module, flag in modes:
        if module.training is not flag:
            module.training = flag


def _is_busy(module: nn.Module, me: int) -> bool:
    """Whether another thread runs a module."""
    held = _HELD.get(id(module))
    return held is not None and any(thread != me for thread, _ in held.holders)


@contextmanager
def attributes_restored(model: nn.Module) -> Generator[None, None, None]:
    """Run a functional call in the body, and undo on every exit what the modules assigned to themselves.

    A functional call puts back parameters and buffers. Other tensors that a module or a hook assigns were made of the
    weights of the call, as by ``torch.nn.utils.weight_norm``, which makes ``weight`` before each forward pass.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        # One by one: other threads never see a module without its attributes.
        for attributes, kept in before:
            for name in [name for name in attributes if name not in kept]:
                del attributes[name]
            for name in [name for name, value in kept.items() if attributes.get(name) is not value]:
                attributes[name] = kept[name]


def full_precision(device: torch.device) -> torch.autocast:
    """Switch autocasting off for the body: it is for the model's forward pass, not for curvature and variances."""
    return torch.autocast(device.type, enabled=False)
