"""Cross-validation over prior precisions with fixed features: the head alone is trained again for each fold.

For each fold and prior the mode of the head's weights given the other folds is found by Newton's method, its curvature
by the closed forms of the last layer (``tuning/head.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import InputError
from laplace.likelihoods import AbstractLikelihood
from laplace.predictive.pushforward import Options
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature
from laplace.tuning.grouped import numbered
from laplace.tuning.head import HeadData, check_priors, posteriors
from laplace.tuning.scores import Score


def folds(
    data: HeadData, n_folds: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, " train"], Int[Tensor, " held"]]]:
    """For each random fold, equal up to one datum: the rows outside and inside of it. No datum is split."""
    datum, n_data = numbered(torch.arange(len(data.phi), device=data.phi.device) if data.datum is None else data.datum)
    if not 2 <= n_folds <= n_data:
        msg = (
            f"Cross-validation needs at least 2 folds and a datum with a target for each; got n_folds={n_folds} "
            f"for {n_data} data. Pass n_folds between 2 and {n_data}, or more data."
        )
        raise InputError(msg)
    order = torch.randperm(n_data, generator=generator, device=generator.device).to(datum.device)
    for fold in order.tensor_split(n_folds):
        held = torch.zeros(n_data, dtype=torch.bool, device=datum.device).index_fill(0, fold, True)[datum]
        yield (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def cross_validation_scores(
    data: HeadData,
    score: Score,
    priors: Sequence[GaussianPrior],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
    fresh_options: Callable[[], Options],
    *,
    n_folds: int = 5,
    generator: torch.Generator | None = None,
    initial: Float[Tensor, " params"] | None = None,
    **structure_options: Any,
) -> Float[Tensor, " priors"]:
    """Score priors over a last layer by k-fold cross-validation, with the features as they are: ``[priors]``.

    Scores are means over rows, in the unit of ``score`` (by default nats per position), lower is better. All priors see
    the same folds, by default those of a generator with seed 0.

    The features have seen all the data: the network was trained on them, held-out folds included. So the score is
    optimistic, the more the longer the network was trained, and it favors weak priors. Validation data that training
    never saw (``method="gridsearch"``) have no such fault; this is for where there are none, and never the default.

    Exact for the head: each fold's weights are the mode under that prior, its curvature the generalized Gauss–Newton
    matrix there. One fold and prior costs a few Newton steps from the weights of the next stronger prior (see
    ``newton.mode``), one curvature, its factorization, and the prediction of the fold.

    References
    ----------
    Stone (1974), "Cross-validatory choice and assessment of statistical predictions".
    """
    check_priors(data, priors, likelihood)  # before any work
    source = torch.Generator().manual_seed(0) if generator is None else generator
    totals = torch.zeros(len(priors), dtype=torch.float64)
    for train, held in list(folds(data, n_folds, source)):
        others, fold = data.rows(train), data.rows(held)
        found = posteriors(others, priors, likelihood, structure, initial, **structure_options)
        for index, head, theta, precision in found:
            held_out = fold.at(head.outputs(theta, fold.phi))
            (value,) = held_out.scores(score, [precision], [likelihood], fresh_options, fold.phi.dtype)
            totals[index] += len(held) * float(value)
    return totals / len(data.phi)
