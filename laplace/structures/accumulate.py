"""Sums over the batches of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace.errors import InputError

Summand = TypeVar("Summand")


def add_up(
    batches: Iterable[tuple[Any, Tensor]],
    of_batch: Callable[[Any, Tensor], tuple[Tensor, Summand]],
    merge: Callable[[Summand, Summand], Summand],
) -> tuple[Tensor, Summand] | None:
    """Negative log-likelihood and something else that adds up, over a whole data set; ``None`` when it is empty.

    Parameters
    ----------
    batches
        Inputs and targets.
    of_batch
        Both for one batch.
    merge
        Adds the second.

    Raises
    ------
    InputError
        If a batch cannot be used, or its negative log-likelihood is not finite; the message numbers it.
    """
    total: tuple[Tensor, Summand] | None = None
    for index, (x, y) in enumerate(batches):
        try:
            nll, summand = of_batch(x, y)
        except InputError as error:
            msg = f"Batch {index} of the loader (counting from 0): {error}"
            raise type(error)(msg) from error
        if not bool(torch.isfinite(nll).all()):
            msg = (
                f"The negative log-likelihood of batch {index} (counting from 0) is {float(nll.sum())}. Its inputs or "
                "targets, or the outputs of the model for them, are NaN or infinite (or overflow when squared): "
                "look for them in the data."
            )
            raise InputError(msg)
        total = (nll, summand) if total is None else (total[0] + nll, merge(total[1], summand))
    return total


def require_finite(finite: bool) -> None:
    """Raise unless a curvature is finite.

    Parameters
    ----------
    finite
        Whether it is.

    Raises
    ------
    InputError
        If it is not.
    """
    if not finite:
        msg = (
            "The curvature of the training data is not finite: derivatives (for a last layer its features) "
            "overflow when squared. Scale the inputs, or pass curvature_dtype=torch.float64."
        )
        raise InputError(msg)
