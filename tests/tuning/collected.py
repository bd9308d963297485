"""Training data of the cases after their one pass, and what leaving a datum out must give, by brute force."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.network import evaluating, iterate
from laplace.predictive import Options
from laplace.tuning import CachedData, choose_score
from tests import reference


def collected(la: Any, batches: Any) -> CachedData:
    """The training data of an estimator."""
    with evaluating(la.model):
        rows = iterate(batches, dict_key_y=la.dict_key_y, device=torch.device("cpu"))
        return CachedData.collect(rows, la._linearize, la._frozen_likelihood)


def nll(likelihood: Any, loss: Any = None) -> Any:
    """The negative log predictive density, or a loss, as a score."""
    return choose_score(loss, likelihood, Options().pred_type)


def without_each(
    problem: reference.Problem, precision: Tensor, scale: float, structure: str, *, fisher: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Means [T·C] and covariances [T·C, T·C] of each datum's outputs, its own term removed from the precision.

    `fisher` is the scale of the outer products of gradients where the precision holds those.
    """
    means, covariances = [], []
    for datum, gradient in zip(problem.data, problem.gradients(), strict=True):
        term = (
            fisher * torch.outer(gradient, gradient) if fisher else scale * datum.J.T @ datum.output_hessian @ datum.J
        )
        cov = (precision - (term if structure == "full" else term.diagonal().diag())).inverse()
        means.append(datum.f.flatten() + scale * datum.J @ cov @ gradient)
        covariances.append(datum.J @ cov @ datum.J.T)
    return means, covariances


def against_zero(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """From the scores of a pair to the logits (f0 - f1, 0)."""
    to_gap = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    return to_gap @ mean, to_gap @ cov @ to_gap.T


def own_blocks(cov: Tensor, n_outputs: int) -> Tensor:
    """[T·C, T·C] -> [T, C, C]."""
    return torch.stack([cov[i : i + n_outputs, i : i + n_outputs] for i in range(0, len(cov), n_outputs)])
