"""What a call takes, measured while it runs: passes of the model, memory that it holds, and time by the batch."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace.network.looking import is_transformed

LONG = 2.0
"""Seconds from which a call is not run again to be timed without being counted."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations in its body make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages that it made."""
        del types
        there = {_storage(value) for value in tree_leaves((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            key = _storage(value)
            if key is not None and key not in there and key not in self._seen:
                self._count(key, value.untyped_storage())
        return made

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storage(value: Any) -> int | None:
    """What tells the memory of a tensor from that of others."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    try:
        return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage] - two views share it
    except (RuntimeError, NotImplementedError):  # without values: meta and wrapped tensors
        return None


@dataclass(frozen=True)
class Moment:
    """What was counted when a batch was asked for."""

    forward: float
    backward: float
    live: int
    seconds: float


class Watch:
    """Counts passes of a model and memory; a pass of fewer rows than a batch has is a part of one."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.n_rows, self.device = max(1, n_rows), device
        self.forward = self.backward = 0.0
        self.memory: LiveBytes | None = None

    def now(self) -> Moment:
        """What was counted so far, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        live = 0 if self.memory is None else self.memory.live
        return Moment(self.forward, self.backward, live, time.perf_counter())

    def _passed(self, _module: nn.Module, _inputs: Any, returned: Any) -> None:
        """Count a forward pass, and the backward passes through its first output."""
        first = next((value for value in tree_leaves(returned) if isinstance(value, Tensor)), None)
        rows = 0 if first is None or not first.dim() else len(first)
        share = min(1.0, rows / self.n_rows) if rows else 1.0
        self.forward += share
        # Those of `torch.func` take no hooks.
        if first is None or not first.requires_grad or is_transformed(first):
            return

        def back(_: Tensor) -> None:
            self.backward += share

        first.register_hook(back)

    @contextmanager
    def passes(self, model: nn.Module) -> Generator[None]:
        """Count passes of a model in the body."""
        handle = model.register_forward_hook(self._passed)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def everything(self, model: nn.Module) -> Generator[None]:
        """Count passes and memory in the body; it takes longer than it would alone."""
        self.memory = LiveBytes()
        with self.passes(model), self.memory:
            yield


class Repeated:
    """A loader that yields one batch several times, and notes when it is asked for the next."""

    def __init__(self, batch: Any, times: int, watch: Watch) -> None:
        self.batch, self.times, self.watch = batch, times, watch
        self.readings: list[list[Moment]] = []

    def __len__(self) -> int:
        """Number of batches."""
        return self.times

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch."""
        moments: list[Moment] = []
        self.readings.append(moments)
        for _ in range(self.times):
            moments.append(self.watch.now())
            yield self.batch
        moments.append(self.watch.now())


@dataclass(frozen=True)
class Measured:
    """What a call takes: for each batch of the data, and beside that once."""

    readings: int
    """How often the data are read."""
    forward: tuple[float, float]
    """Forward passes: once, and for each batch."""
    backward: tuple[float, float]
    seconds: tuple[float, float]
    peak: int
    """Largest memory alive at once, in bytes."""
    growth: int
    """Memory that each further batch keeps, in bytes."""
    kept: int
    """Memory that is alive when the call has returned, in bytes."""


Call = Callable[[Repeated], object]


def measured(run: Call, batch: Any, watches: Callable[[], Watch], model: nn.Module) -> Measured:
    """Run a call of a loader twice on a batch that is repeated: once counted, once timed where that is quick.

    The second batch of a reading tells what each takes; what is left of the whole is what comes once.
    """
    watch = watches()
    with watch.everything(model):
        counted = _run(run, batch, watch)
        kept = watch.now().live
    assert watch.memory is not None
    last, (start, end) = counted[-2] if len(counted) > 1 else [], counted[-1]
    clock = counted if end.seconds - start.seconds > LONG else _run(run, batch, watches())
    return Measured(
        sum(1 for moments in counted[:-1] if len(moments) > 2),
        _split(counted, "forward"),
        _split(counted, "backward"),
        _split(clock, "seconds"),
        watch.memory.peak,
        max(0, last[2].live - last[1].live) if len(last) > 2 else 0,
        kept,
    )


def whole(run: Call, batch: Any, watch: Watch, model: nn.Module, times: int = 1) -> Moment:
    """Passes and seconds of a call that reads a batch a number of times."""
    with watch.passes(model):
        start = watch.now()
        run(Repeated(batch, times, watch))
        end = watch.now()
    return Moment(end.forward, end.backward, 0, end.seconds - start.seconds)


def peak_of(run: Call, batch: Any, watch: Watch, model: nn.Module) -> tuple[int, int, float]:
    """The most memory that is alive while a call reads a batch once, what is alive after it, and its seconds."""
    with watch.everything(model):
        start = watch.now()
        kept = run(Repeated(batch, 1, watch))
        end = watch.now()
        del kept
    assert watch.memory is not None
    return watch.memory.peak, end.live, end.seconds - start.seconds


def _run(run: Call, batch: Any, watch: Watch) -> list[list[Moment]]:
    """The moments of every reading in a call, and last those of its start and end."""
    loader = Repeated(batch, 2, watch)
    start = watch.now()
    run(loader)
    return [*loader.readings, [start, watch.now()]]


def _split(found: list[list[Moment]], name: str) -> tuple[float, float]:
    """What comes once and what each batch takes, by the second batch of every reading."""
    *readings, (start, end) = found
    whole = getattr(end, name) - getattr(start, name)
    each = sum(getattr(moments[2], name) - getattr(moments[1], name) for moments in readings if len(moments) > 2)
    return max(0.0, whole - 2 * each), each


# -- leaving no trace -------------------------------------------------------------------------------------------------


@contextmanager
def randomness_kept(device: torch.device, *holders: Any) -> Generator[None]:
    """Give all sources of randomness back the state that they had: those of PyTorch, NumPy, Python and of objects."""
    generators = {id(g): g for holder in holders for g in _generators(holder)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)


def _generators(holder: Any) -> Iterator[torch.Generator]:
    """Those that a loader and its samplers, or a mapping of options, hold."""
    values = holder.values() if isinstance(holder, dict) else [getattr(holder, "generator", None)]
    yield from (value for value in values if isinstance(value, torch.Generator))
    for name in ("sampler", "batch_sampler"):
        inner = getattr(holder, name, None)
        if inner is not None:
            yield from _generators(inner)


__all__ = ["Call", "LiveBytes", "Measured", "Repeated", "Watch", "measured", "peak_of", "randomness_kept", "whole"]
