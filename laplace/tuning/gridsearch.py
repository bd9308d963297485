"""Validation loss over a logarithmic grid of prior precisions (``method="gridsearch"``).

What does not depend on the prior, the outputs and features of the validation data, is computed once; each point of the
grid then costs a few matrix products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace.errors import InputError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.predictive.linearization import Linearization
from laplace.predictive.pairs import compare
from laplace.predictive.pushforward import Options, moments, predict
from laplace.structures import AbstractPrecision

Loss = Callable[..., Any]
"""``loss(probabilities, targets)``, or ``loss(means, covariances, targets)`` for regression → a number to minimize."""


KEPT_ELEMENTS = 2**29
"""Numbers kept of the derivatives of validation data: 2 GB in float32."""


@dataclass(frozen=True)
class Validation:
    """Validation data after their one forward pass.

    Attributes
    ----------
    batches
        How to get the linearized inputs of each batch, and its unmasked positions.
    """

    batches: Sequence[tuple[Callable[[], Linearization], Positions]]

    @classmethod
    def collect(
        cls,
        batches: Iterable[tuple[Any, Tensor]],
        linearize: Callable[[Any], Linearization],
        likelihood: AbstractLikelihood,
    ) -> Validation:
        """Run the model over the validation data, once; keep what predictions are made of while memory allows.

        Parameters
        ----------
        batches
            Inputs and targets.
        linearize
            Runs the model on inputs.
        likelihood
            Checks and flattens the targets.

        Notes
        -----
        Features of a last layer are always few. Derivatives of a whole network are kept for as many batches as fit
        ``KEPT_ELEMENTS`` numbers; the batches after those are run again at every point of the grid.

        Raises
        ------
        InputError
            If there are none, or all are masked.
        """
        collected: list[tuple[Callable[[], Linearization], Positions]] = []
        left = KEPT_ELEMENTS

        def compared(x: Any) -> Linearization:
            # Targets of reward modeling are preferences between items.
            return compare(linearize(x)) if likelihood.n_items > 1 else linearize(x)

        for x, y in batches:
            inputs = compared(x)
            positions = likelihood.flatten(inputs.f, y)
            found = inputs.kept(left)
            if found is None:
                collected.append((partial(compared, x), positions))
            else:
                kept, size = found
                left -= size
                collected.append((partial(_same, kept), positions))
        if not any(len(positions.f) for _, positions in collected):
            empty = "every target is masked" if collected else "it is empty"
            msg = f"The validation loader has nothing to score prior precisions on: {empty}. Pass labeled batches."
            raise InputError(msg)
        return cls(collected)

    def score(
        self,
        precision: AbstractPrecision,
        likelihood: AbstractLikelihood,
        options: Options,
        loss: Loss | None,
        dtype: torch.dtype,
    ) -> float:
        """Loss at one posterior: by default the mean negative log predictive density, in nats a position.

        Parameters
        ----------
        precision
            Posterior precision at a grid point.
        likelihood, options, dtype
            As in ``predict``.
        loss
            Of predictions and targets; ``None`` for the default.

        Returns
        -------
        The number to minimize.
        """
        if loss is not None:
            return float(loss(*self._predictions(precision, likelihood, options, dtype)))
        total, count = 0.0, 0
        for get, positions in self.batches:
            inputs = get()
            mean, cov, link = moments(inputs, precision, likelihood, options, dtype)
            y = positions.y.to(dtype) if positions.y.is_floating_point() else positions.y
            nll = likelihood.predictive_nll(_select(positions, mean), _select(positions, cov), y, link)
            total, count = total + float(nll), count + len(positions.f)
        return total / count

    def _predictions(
        self, precision: AbstractPrecision, likelihood: AbstractLikelihood, options: Options, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Predictions and targets of all unmasked positions."""
        parts = []
        for get, positions in self.batches:
            inputs = get()
            result = predict(inputs, precision, likelihood, options, dtype)
            rows = (result,) if isinstance(result, Tensor) else result
            flat = [_select(positions, part.flatten(0, inputs.f.dim() - 2)) for part in rows]
            parts.append((*flat, positions.y))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _same(inputs: Linearization) -> Linearization:
    """What was kept."""
    return inputs


def _select(positions: Positions, rows: Tensor) -> Tensor:
    """The unmasked among flattened rows."""
    return rows if positions.kept is None else rows[positions.kept]


def log_grid(low: float, high: float, size: int, base: float) -> Tensor:
    """Grid of prior precisions ``base^low … base^high``, evenly spaced in the exponent.

    Parameters
    ----------
    low, high
        Exponents of the ends.
    size
        Number of points.
    base
        Of the exponents.

    Returns
    -------
    ``[size]``, ascending, float64, in 1/weight².

    Raises
    ------
    InputError
        If the bounds are reversed or not finite, the base is not above 1, or there is no point.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and base > 1 and size >= 1):
        msg = (
            "The grid needs log_prior_prec_min <= log_prior_prec_max, both finite, log_prior_prec_base > 1 and "
            f"grid_size >= 1; got {low}, {high}, {base}, {size}."
        )
        raise InputError(msg)
    return torch.logspace(low, high, size, base=base, dtype=torch.float64)


def search(score: Callable[[Tensor], float], grid: Tensor, *, progress_bar: bool = False) -> tuple[Tensor, Tensor]:
    """Find the point of a grid with the lowest score.

    Parameters
    ----------
    score
        Grid point → number to minimize.
    grid
        The points, ascending.
    progress_bar
        Show a progress bar.

    Returns
    -------
    The best point ``[]`` and all scores ``[grid]``. Points whose score is not finite are skipped.

    Raises
    ------
    InputError
        If no score is finite.

    Warns
    -----
    UserWarning
        If the best point is at an end of the grid, unless all scores are equal.
    """
    scores = torch.tensor(
        [score(point) for point in tqdm(grid, desc="[Grid search]", disable=not progress_bar)], dtype=torch.float64
    )
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        msg = (
            f"The validation loss is not finite at any of the {len(grid)} prior precisions from {float(grid[0]):.3g} "
            f"to {float(grid[-1]):.3g}. Check the validation data and the loss; the prior precision was not changed."
        )
        raise InputError(msg)
    best = int(torch.where(finite, scores, torch.inf).argmin())
    if len(grid) > 1 and best in (0, len(grid) - 1):
        flat = bool((scores[finite] == scores[best]).all())
        side, keyword = ("lower", "log_prior_prec_min") if best == 0 else ("upper", "log_prior_prec_max")
        msg = (
            "The validation loss is the same at every prior precision: it does not depend on the prior."
            if flat
            else f"The best prior precision, {float(grid[best]):.3g}, is at the {side} end of the grid; the optimum "
            f"may lie beyond it. Move {keyword}."
        )
        warnings.warn(msg, UserWarning, stacklevel=2)
    return grid[best], scores
