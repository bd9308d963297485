"""Processes that work together, each on its shard of the data: what they tell each other, by ``torch.distributed``.

In a program with a process group every ``fit`` and every reading of validation data is one of all processes of the
group; ``within`` says which. All they do together begins with an exchange of a small record, in which one that failed
says so: then all raise, and none waits for ever.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laplace.errors import InputError, ProcessError, UnsupportedError

PATIENCE = 60
"""Seconds that a process waits for the others before it says so."""


Sum = TypeVar("Sum")
_EVERYONE = object()
_group: ContextVar[Any] = ContextVar("group", default=_EVERYONE)
_agreeing: ContextVar[bool] = ContextVar("agreeing", default=False)
_summing: ContextVar[Team | None] = ContextVar("summing", default=None)


@contextmanager
def within(group: Any) -> Generator[None]:
    """Let ``fit``, ``tune`` and other reading of data in the body be one of the processes of a group.

    Without it they are one of all processes of the default group, where one was initialized. Each process of the group
    must make the same calls.

    Parameters
    ----------
    group
        A process group of ``torch.distributed``, whose processes hold shards of the same data; ``None``: each process
        is alone, with data and a posterior of its own.

    Examples
    --------
    >>> from laplace import processes
    >>> with processes.within(None):
    ...     pass  # la.fit(loader): of this process alone
    """
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def team() -> Team | None:
    """The processes that data are shared with; ``None`` where this one is alone."""
    group = _group.get()
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is _EVERYONE else group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return None if size < 2 or rank < 0 else Team(group, rank, size)


@dataclass
class Team:
    """Some processes, seen from one of them."""

    group: Any
    rank: int
    size: int
    is_ghost: bool = False
    """Whether this process has no data of its own, so that what it adds up is not counted."""

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be sent."""
        name = str(dist.get_backend(self.group))
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if "gloo" in name or "mpi" in name or accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())

    def gathered(self, value: Any) -> list[Any]:
        """A value of each process, in their order: tensors, which arrive on the CPU, and plain values in containers.

        Nothing is pickled. Each process holds all of them, for a moment twice.

        Raises
        ------
        UnsupportedError
            If one of them holds something else.
        """
        try:
            packed, failed = _packed(value).to(self.device), None
        except Exception as error:  # the others wait: all hear of it
            packed, failed = torch.empty(0, dtype=torch.uint8, device=self.device), error
        size = torch.tensor([-1 if failed else len(packed)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.size)]
        self._wait(dist.all_gather(sizes, size, group=self.group, async_op=True))
        lengths = [int(each) for each in sizes]
        if min(lengths) < 0:
            msg = f"Process {lengths.index(-1)} of {self.size} holds data that cannot be sent to others: {failed or ''}"
            raise UnsupportedError(msg) from failed
        found = []
        for rank, length in enumerate(lengths):
            buffer = packed if rank == self.rank else torch.empty(length, dtype=torch.uint8, device=self.device)
            dist.broadcast(buffer, dist.get_global_rank(self.group, rank), group=self.group)
            found.append(value if rank == self.rank else _unpacked(buffer))
        return found

    def _wait(self, work: Any) -> None:
        """Until the others are there, and say so where that takes long."""
        start, told, pause = time.monotonic(), False, 1e-4
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 1e-2)
            if not told and time.monotonic() - start > PATIENCE:
                told = True
                print(
                    f"laplace: process {self.rank} of {self.size} waits for the others: with a process group fit and "
                    "tune are calls of all its processes. For one process alone make them within "
                    "laplace.processes.within(None).",
                    file=sys.stderr,
                )
        work.wait()

    def exchange(self, step: str, **record: Any) -> list[Mapping[str, Any]]:
        """A record of each process, all of which must be at the same step.

        Raises
        ------
        ProcessError
            If another one failed, or is at another step.
        """
        found = self.gathered({"step": step, **record})
        failed = [(rank, each["error"]) for rank, each in enumerate(found) if "error" in each]
        if failed:
            told = "; ".join(f"process {rank} of {self.size} raised {error}" for rank, error in failed)
            msg = f"Nothing was changed here, since {told}"
            raise ProcessError(msg)
        steps = [each["step"] for each in found]
        if len(set(steps)) > 1:
            msg = (
                f"The processes of the group are at different steps ({', '.join(steps)}): each must make the same "
                "calls, on estimators with the same options. For one process alone make them within "
                "laplace.processes.within(None)."
            )
            raise ProcessError(msg)
        return found

    def tell(self, error: Exception) -> None:
        """Let the others know that this one failed."""
        self.gathered({"step": "error", "error": f"{type(error).__name__}: {error}"})

    def summed(self, tensors: Sequence[Tensor], step: str = "sum") -> list[Tensor]:
        """Sums over processes, the same to the last bit in all of them.

        Raises
        ------
        InputError
            If they have other shapes in another process.
        """
        forms = [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]
        for rank, record in enumerate(self.exchange(step, forms=forms)):
            if record["forms"] != forms:
                msg = (
                    f"The sums of process {rank} have other shapes than those of process {self.rank}: "
                    f"{record['forms']} and {forms}. Each process needs the same model, options, and kinds of batches."
                )
                raise InputError(msg)
        return [self._sum(tensor) for tensor in tensors]

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor, in memory of its own."""
        copy = torch.zeros_like if self.is_ghost else torch.clone
        own = copy(tensor.detach(), memory_format=torch.contiguous_format).to(self.device)
        dist.all_reduce(own, group=self.group)
        return own.to(tensor.device)

    def same(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the first process, where all have made the same but for rounding."""
        found = [tensor.detach().clone(memory_format=torch.contiguous_format).to(self.device) for tensor in tensors]
        for each in found:
            dist.broadcast(each, dist.get_global_rank(self.group, 0), group=self.group)
        return [each.to(tensor.device) for each, tensor in zip(found, tensors, strict=True)]


def _packed(value: Any) -> Tensor:
    """A value as bytes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    """A value from bytes; nothing in it is executed."""
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


@contextmanager
def agreed() -> Generator[Team | None]:
    """Run the body in all processes of the team or in none: where one raises, all do."""
    here = team()
    if here is None or _agreeing.get():
        yield here
        return
    token = _agreeing.set(True)
    try:
        try:
            yield here
        except ProcessError:
            raise  # all know
        except Exception as error:
            here.tell(error)
            raise
        here.exchange("end")
    finally:
        _agreeing.reset(token)


@contextmanager
def summing() -> Generator[Team | None]:
    """Let sums over data that are made in the body be those of all processes; yields their team."""
    here = team()
    token = _summing.set(here)
    try:
        yield here
    finally:
        _summing.reset(token)


def summed_over() -> Team | None:
    """The team over which sums are made at present."""
    return _summing.get()


def refuse(name: str) -> None:
    """Raise where an estimator that needs all data in one process was called in several.

    Raises
    ------
    UnsupportedError
        If this process is not alone.
    """
    if team() is not None:
        msg = (
            f"{name} learns from all data in one process, and there are several, each with its shard. Give each all "
            "data and fit it alone, within laplace.processes.within(None), or use a posterior over weights "
            '(hessian_structure="kron", ...) or over functions of a last layer ("gp"), which share the work.'
        )
        raise UnsupportedError(msg)


def total(nll: Tensor, summand: Sum) -> tuple[Tensor, Sum]:
    """A negative log-likelihood and what adds up beside it, over all processes where sums are made together.

    What adds up is a list of tensors, or says its tensors (``summands``) and takes others in their place
    (``with_summands``).

    Raises
    ------
    InputError
        If all processes had the same data, which would count several times.
    """
    here = _summing.get()
    if here is None:
        return nll, summand
    additive: Any = summand
    parts = additive if isinstance(additive, list) else additive.summands()
    _check_shards(here, nll)
    nll, *parts = here.summed([nll, *parts])
    found: Any = parts if isinstance(additive, list) else additive.with_summands(parts)
    return nll, found


def shared(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that all processes made of the same sums: those of the first, without differences by rounding."""
    here = _summing.get()
    return list(tensors) if here is None else here.same(tensors)


def _check_shards(here: Team, nll: Tensor) -> None:
    """Raise if every process had all data."""
    loss = nll.detach().double().cpu().tolist()
    losses = [record["nll"] for record in here.exchange("loss", nll=None if here.is_ghost else loss)]
    if losses.count(losses[0]) == here.size and losses[0] is not None and bool(nll.any()):
        msg = (
            f"Each of the {here.size} processes had the same data, to the last digit of their loss; they would count "
            f"{here.size} times. Give each its shard (DataLoader(..., sampler=DistributedSampler(dataset))), or fit in "
            "each process alone, within laplace.processes.within(None)."
        )
        raise InputError(msg)


__all__ = ["Team", "agreed", "refuse", "shared", "summed_over", "summing", "team", "total", "within"]
