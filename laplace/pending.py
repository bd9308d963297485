"""What is checked of values that lie on a device: gathered there and read together, so that nobody waits in a loop.

To read one number of an accelerator, the host waits until all that it asked for is done, and the accelerator then waits
for the host. So a check says what is to happen if a flag is set (an error, a warning); within ``gathered`` flags stay
where they are and are read after the first batch, every ``EVERY`` batches, and at the end. In the memory of the host
reading costs nothing, and flags are read at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from laplace.errors import InputError, ProcessError, current_batch, of_batch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

EVERY = 64
"""After how many batches flags are read: an error comes at most so many batches late."""
FREE = {"cpu"}
"""Types of devices whose numbers are read without waiting."""


def is_free(device: torch.device) -> bool:
    """Whether the host reads numbers of a device without waiting, or nobody gathers flags; never while tracing."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and (
        device.type in FREE or _GATHERED.get() is None
    )


class Gathered:
    """Flags on devices, with what is to happen if they are set."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Callable[..., None], tuple[int, int | None] | None]] = []
        self._n_batches = 0

    def add(self, numbers: Tensor, then: Callable[..., None]) -> None:
        """A flag and details of it, ``[1 + details]``."""
        self._found.append((numbers, then, current_batch()))

    def next_batch(self) -> None:
        """One batch is done."""
        self._n_batches += 1
        if self._n_batches == 1 or self._n_batches % EVERY == 0:
            self.read()

    def read(self) -> None:
        """Wait for all flags, and do what they say in their order; what is raised drops those after it."""
        found, self._found = self._found, []
        for place in dict.fromkeys(numbers.device for numbers, _, _ in found):
            here = [entry for entry in found if entry[0].device == place]
            read = iter(torch.cat([numbers for numbers, _, _ in here]).tolist())
            for numbers, then, batch in here:
                flag, *details = (next(read) for _ in range(len(numbers)))
                if not flag:
                    continue
                try:
                    then(*details)
                except InputError as error:
                    if batch is None:
                        raise
                    raise of_batch(error, *batch) from error


_GATHERED: ContextVar[Gathered | None] = ContextVar("_GATHERED", default=None)


@contextmanager
def gathered() -> Generator[Gathered]:
    """Gather flags in the body and read them at its end; of a body within another, at the end of that.

    Where the body raises, an earlier flag may say why: its error comes instead, but not of what another process raised,
    which all know already.
    """
    outer = _GATHERED.get()
    if outer is not None:
        yield outer
        return
    here = Gathered()
    token = _GATHERED.set(here)
    try:
        yield here
    except Exception as error:
        if not isinstance(error, ProcessError):
            here.read()
        raise
    finally:
        _GATHERED.reset(token)
    here.read()


def gathers(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose flags are gathered and read at its end; while it is compiled nothing is looked at."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with gathered():
            return function(*args, **kwargs)

    return run


_UNCHECKED: ContextVar[bool] = ContextVar("_UNCHECKED", default=False)


@contextmanager
def unchecked() -> Generator[None]:
    """Gather no flags in the body, as those of the same values are gathered already; what is read at once still is."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def when(flag: bool | Tensor, then: Callable[..., None], details: Callable[[], Sequence[Tensor]] = tuple) -> None:
    """Raise or warn if a flag is set: now, or when the flags of ``gathered`` are read.

    Parameters
    ----------
    flag
        ``[]``.
    then
        What to do, given the details as numbers. It must not hold tensors of the size of a batch.
    details
        Numbers on the same device that the message needs, ``[]`` each.

    Notes
    -----
    Nothing is looked at while a function is compiled.
    """
    if torch.compiler.is_compiling():
        return
    checks = _GATHERED.get()
    if checks is None or isinstance(flag, bool) or is_free(flag.device):
        if flag:
            then(*(value.item() for value in details()))
        return
    if _UNCHECKED.get():
        return
    dtype = torch.float32 if flag.device.type == "mps" else torch.float64
    checks.add(torch.stack([value.detach().to(dtype) for value in (flag, *details())]), then)


def refuse(
    flag: Tensor, error: type[Exception], message: Callable[..., str], details: Callable[[], Sequence[Tensor]] = tuple
) -> None:
    """Raise an error if a flag is set, see ``when``; its message is made of the details."""

    def then(*numbers: Any) -> None:
        raise error(message(*numbers))

    when(flag, then, details)


def count(number: Tensor) -> int | Tensor:
    """A whole number: as one of Python where reading it is free, else where it is, to be read with others."""
    return int(number) if is_free(number.device) else number


def differ(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool | Tensor:
    """Whether tensors of one shape, dtype and device differ in some pair, ``[]`` where reading it would wait."""
    found: list[Tensor] = []
    for first, second in pairs:
        if not is_free(first.device):
            found.append((first != second).any())
        elif not torch.equal(first, second):
            return True
    return torch.stack(found).any() if found else False


__all__ = ["EVERY", "FREE", "Gathered", "count", "differ", "gathered", "is_free", "refuse", "unchecked", "when"]
