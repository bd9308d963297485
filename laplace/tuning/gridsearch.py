"""Validation loss over a logarithmic grid of prior precisions (``method="gridsearch"``, ``"loo"``, ``"cv"``)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace.errors import InputError, warn


def log_grid(low: float, high: float, size: int, base: float) -> Tensor:
    """Grid of prior precisions ``base^low … base^high``, ascending, evenly spaced in the exponent."""
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and base > 1 and size >= 1):
        msg = (
            "The grid needs log_prior_prec_min <= log_prior_prec_max, both finite, log_prior_prec_base > 1 and "
            f"grid_size >= 1; got {low}, {high}, {base}, {size}."
        )
        raise InputError(msg)
    return torch.logspace(low, high, size, base=base, dtype=torch.float64)


def search(
    score: Callable[[Tensor], Tensor], grid: Tensor, *, at_once: int = 128, progress_bar: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the point of an ascending grid with the lowest finite score; return it with all scores ``[grid]``."""
    parts = tqdm(grid.split(at_once), desc="[Grid search]", disable=not progress_bar)
    scores = torch.cat([score(points).detach().cpu().double() for points in parts])
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        msg = (
            f"The validation loss is not finite at any of the {len(grid)} prior precisions from {float(grid[0]):.3g} "
            f"to {float(grid[-1]):.3g}. Check the validation data and the loss; the prior precision was not changed."
        )
        raise InputError(msg)
    best = int(torch.where(finite, scores, torch.inf).argmin())
    if len(grid) > 1 and bool((scores[finite] == scores[best]).all()):
        warn("The validation loss is the same at every prior precision: it does not depend on the prior.", UserWarning)
    else:
        warn_at_end(grid, best)
    return grid[best], scores


def warn_at_end(grid: Tensor, best: int) -> None:
    """Warn if the best point of a grid is its first or last."""
    if len(grid) > 1 and best in (0, len(grid) - 1):
        side, keyword = ("lower", "log_prior_prec_min") if best == 0 else ("upper", "log_prior_prec_max")
        msg = (
            f"The best prior precision, {float(grid[best]):.3g}, is at the {side} end of the grid; the optimum may lie "
            f"beyond it. Move {keyword}."
        )
        warn(msg, UserWarning)
