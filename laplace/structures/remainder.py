"""What is left of sums of squares when the part of some data is taken away again."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace.errors import InputError

ROUNDING = 1e4
"""How many units of rounding sums of the same numbers, in other order or batches, may differ by."""


def remainder(here: Tensor, there: Tensor, *, squares: bool, resolution: float = 0.0) -> Tensor:
    """``here − there``: vectors of diagonals, or symmetric matrices.

    Parameters
    ----------
    here, there
        Of all data, and of those to remove.
    squares
        Whether they are sums of squares, whose diagonal cannot become negative by more than rounding.
    resolution
        Relative precision that they were computed in, where it is coarser than that of their dtype.

    Raises
    ------
    InputError
        If a diagonal becomes negative.
    """
    left = here - there
    if not squares:
        return left
    before, diagonal = (part if part.dim() == 1 else part.diagonal() for part in (here, left))
    level = ROUNDING * max(torch.finfo(left.dtype).eps, resolution)
    short = diagonal < -level * before
    if bool(short.any()):
        index = int(short.nonzero()[0])
        msg = (
            f"The curvature to remove is larger than what is there: entry {index} of a diagonal is "
            f"{float(before[index]):.4g}, and {float(before[index] - diagonal[index]):.4g} were to be removed. Only "
            "data that were fitted, with the same inputs, can be."
        )
        raise InputError(msg)
    diagonal.clamp_(min=0)  # a view: what is left below zero is rounding
    return left


def lost(here: Tensor, left: Tensor) -> float:
    """How many times larger the rounding of a remainder is, relative to itself, than that of what it was taken from."""
    sizes = [float(part.abs().max()) if part.numel() else 0.0 for part in (here, left)]
    return sizes[0] / sizes[1] if sizes[1] > 0 else 1.0


__all__ = ["lost", "remainder"]
