"""Sums over the batches of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace import pending, processes
from laplace.errors import InputError, numbered, warn

Summand = TypeVar("Summand")
SAME = 1e-3
"""Relative difference up to which two sums of the same numbers, in other order or precision, are equal."""


def add_up(
    batches: Iterable[tuple[Any, Tensor]],
    of_batch: Callable[[Any, Tensor], tuple[Tensor, Summand]],
    merge: Callable[[Summand, Summand], Summand],
) -> tuple[Tensor, Summand] | None:
    """Negative log-likelihood and something else that adds up, over a whole data set; ``None`` when it is empty.

    Where processes fit together the data set is that of all of them.

    Raises
    ------
    InputError
        If a batch cannot be used, or its negative log-likelihood is not finite.
    """
    total: tuple[Tensor, Summand] | None = None
    with pending.gathered() as checks:
        for index, (x, y) in enumerate(batches):
            with numbered(index, x):
                nll, summand = of_batch(x, y)
            check_loss(nll, index)
            total = (nll, summand) if total is None else (total[0] + nll, merge(total[1], summand))
            checks.next_batch()
    return None if total is None else processes.total(*total)


def check_loss(nll: Tensor, index: int) -> None:
    """Raise unless the loss of a batch is finite."""
    pending.refuse(
        ~torch.isfinite(nll).all(),
        InputError,
        lambda total: (
            f"The negative log-likelihood of batch {index} (counting from 0) is {total}. Its inputs or targets, or the "
            "outputs of the model for them, are NaN or infinite (or overflow when squared): look for them in the data."
        ),
        lambda: [nll.sum()],
    )


def check_same_data(first: Tensor, now: Tensor) -> None:
    """Warn if a later pass saw other data than the first, by their negative log-likelihoods."""
    if bool((now - first).abs().sum() > SAME * first.abs().sum()):
        msg = (
            "This structure reads the training data several times, and they are not the same each time: their "
            f"negative log-likelihood was {float(first.sum()):.6g} and is {float(now.sum()):.6g}. A loader that drops "
            "rows after shuffling (drop_last=True) or that augments does that; the curvature is that of the last "
            "pass. Pass a loader that does neither."
        )
        warn(msg, UserWarning)


def require_finite(finite: bool) -> None:
    """Raise unless a curvature is finite."""
    if not finite:
        msg = (
            "The curvature of the training data is not finite: derivatives (for a last layer its features) "
            "overflow when squared. Scale the inputs, or pass curvature_dtype=torch.float64."
        )
        raise InputError(msg)
