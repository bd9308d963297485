"""``plan``: what ``fit``, ``predict`` and ``tune`` will take, said before the work."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import checks, processes
from laplace.baselaplace.costs import Cost, Planner
from laplace.baselaplace.measured import randomness_kept
from laplace.errors import InputError, UnsupportedError, quiet
from laplace.free_memory import amount
from laplace.gp.subset import expected_rows
from laplace.network.batches import split


@dataclass(frozen=True)
class Plan:
    """What ``fit``, ``predict`` and ``tune`` will take; ``print`` shows a table.

    Attributes
    ----------
    fit, predict, tune
        The cost of each: of calls for all batches of the data, or where their number is not known for one batch.
        ``predict`` is ``la(x)``; that of an object which is not fitted, and ``tune``, which reads validation data, are
        for as many batches as these.
    n_batches, n_rows
        Of the loader; ``None`` where it does not say.
    batch_rows
        Rows of the batch that was measured.
    free
        Bytes that are free on the device of the model; ``None`` where it is not known.
    limited_by
        What limits them: the machine, a container, the process, or the GPU.
    structure, n_params
        How the curvature is stored, and of how many weights.

    Examples
    --------
    >>> from laplace import Laplace
    >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    >>> plan = Laplace(model, "classification").plan([(x, y)] * 5, tune=False)
    >>> plan.n_batches, plan.fit.forward_passes, plan.fit.fits
    (5, 5.0, True)
    """

    fit: Cost
    predict: Cost
    tune: Cost
    n_batches: int | None
    n_rows: int | None
    batch_rows: int
    free: int | None
    limited_by: str | None
    structure: str
    n_params: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of nested dictionaries.

        Returns
        -------
        One entry for each attribute.
        """
        return asdict(self)

    def __str__(self) -> str:
        """A short table."""
        of = f"{self.n_batches} batches of {self.batch_rows} rows" if self.n_batches else "one batch of "
        of += "" if self.n_batches else f"{self.batch_rows} rows (the loader does not say how many there are)"
        room = "" if self.free is None else f"; {amount(self.free)} are free (limited by {self.limited_by})"
        lines = [f"{self.structure}, {self.n_params:,} weights, {of}{room}"]
        lines += [f"{'':8}{'passes':36}{'memory':>10}{'time':>10}  fits"]
        costs = {"fit": self.fit, "predict": self.predict, "tune": self.tune}
        for name, cost in costs.items():
            size = "?" if cost.bytes is None else amount(cost.bytes)
            fits = {None: "?", True: "yes", False: "no"}[cost.fits]
            lines.append(f"{name:8}{_passes(cost):36}{size:>10}{_duration(cost.seconds):>10}  {fits}")
        lines += [f"{name}: {text}" for name, cost in costs.items() for text in cost.instead]
        return "\n".join(lines)


def _passes(cost: Cost) -> str:
    """Passes, to read."""
    if cost.forward_passes is None or cost.backward_passes is None:
        return "?"
    text = f"{cost.forward_passes:,.0f} forward"
    return f"{text}, {cost.backward_passes:,.0f} backward" if cost.backward_passes else text


def _duration(seconds: float | None) -> str:
    """A time, to read."""
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan(self: Any, data: Iterable[Any] | Any, *, tune: bool = True) -> Plan:
    """Say what ``fit``, ``predict`` and ``tune`` will take: passes, memory and time, and whether there is room.

    Nothing is changed: neither the model, nor this object, nor random numbers that are drawn afterwards.

    Parameters
    ----------
    data
        A loader as ``fit`` takes it, of which one batch is read, or one batch: ``(x, y)`` or a mapping.
    tune
        Measure ``tune``, too, which takes most of the time of a plan.

    Returns
    -------
    A ``Plan``: print it, or read its attributes.

    Raises
    ------
    InputError
        If there is no batch, it is none that ``fit`` takes, or the loader is an iterator, which would lose the batch.
    UnsupportedError
        If model, likelihood and structure do not fit together, or the posterior is one over functions.

    Notes
    -----
    The fit, predictions and ``tune`` run on the batch, four times each; memory is first measured on few of its rows,
    and what does not fit is not run. Memory is that of tensors; libraries take some more while they factorize.
    Times are those of now: of the second of two equal batches, times their number, and of what comes once. Time to
    load data is not among them. ``tune`` is measured with the batch for training and validation data.
    """
    _refuse_functions(self)
    tune = checks.flag("tune", tune)
    n_batches, n_rows = _sizes(data, self.dict_key_y)
    holders = (data, getattr(self, "_backend_kwargs", {}))
    alone = processes.within(None)  # how often a call is run depends on its time, which differs between processes
    unsaid = quiet(""), redirect_stderr(io.StringIO())  # what each fit of a user's would print
    with alone, randomness_kept(self._device, *holders), unsaid[0], unsaid[1], torch.inference_mode(False):
        batch = _one_batch(data)
        known = split(batch, self.dict_key_y, self._device)
        planner = Planner(self, batch, known.x, max(1, len(known.y)), n_batches, n_rows)
        costs = planner.costs(tune=tune)
    memory = planner.memory
    free, limit = (None, None) if memory is None else (memory.free, memory.limit)
    sizes = n_batches, n_rows, planner.rows
    return Plan(*costs, *sizes, free, limit, self.curvature_type.name.value, planner.known.n_params)


def _refuse_functions(la: Any) -> None:
    """Raise of a posterior that is not one over weights."""
    if not hasattr(la, "_training"):
        msg = (
            f"{type(la).__name__} is a posterior over functions, of which there is no plan: its costs depend on the "
            "subset of the data (docs/function_space.md says how)."
        )
        raise UnsupportedError(msg)


def _is_batch(data: Any) -> bool:
    """Whether something is one batch and not a loader of some."""
    return isinstance(data, (Mapping, tuple)) or (
        isinstance(data, list) and bool(data) and isinstance(data[-1], Tensor)
    )


def _sizes(data: Any, dict_key_y: str) -> tuple[int | None, int | None]:
    """Numbers of batches and rows, as far as they are known."""
    if _is_batch(data):
        return 1, None
    if isinstance(data, Iterator):
        msg = (
            f"The data are an iterator ({type(data).__name__}): a plan would read a batch of it, which fit would then "
            "miss. Pass a loader that can be read again, or one batch, (x, y)."
        )
        raise InputError(msg)
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, str)) or hasattr(data, "__array__"):
        msg = f"Expected a loader, or one batch (x, y); got {type(data).__name__}."
        raise InputError(msg)
    if isinstance(getattr(data, "dataset", None), Iterator):
        msg = (
            f"The dataset of the loader is an iterator ({type(getattr(data, 'dataset', None)).__name__}): a plan would "
            "read a batch of it, which fit would then miss. Pass one batch, (x, y)."
        )
        raise InputError(msg)
    try:
        return len(data) if isinstance(data, Sized) else None, expected_rows(data, dict_key_y)
    except TypeError:  # a loader of a stream
        return None, None


def _one_batch(data: Any) -> Any:
    """One batch of a loader."""
    if _is_batch(data):
        return data
    for batch in data:
        return batch
    msg = "The loader is empty: there is no batch to measure."
    raise InputError(msg)


__all__ = ["Plan", "plan"]
