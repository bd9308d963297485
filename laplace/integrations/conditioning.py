"""What ``LaplaceModel`` computes of posteriors over weights: copies that share a network, and more data.

Nothing here knows BoTorch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace import linalg
from laplace.baselaplace import ParametricLaplace
from laplace.errors import InputError, UnsupportedError
from laplace.network import evaluating, full_precision
from laplace.predictive import Linearization, NetworkLinearization
from laplace.structures import AbstractPrecision


@dataclass(frozen=True)
class Observations:
    """Observations that condition the posterior in function space, in the units of the network."""

    X: Tensor
    """``[*batch, n, d]``."""
    Y: Tensor
    """``[*batch, n, m]``."""
    noise: Tensor
    """Covariance of their noise, ``[*batch, n·m, n·m]``."""

    def followed_by(self, other: Observations) -> Observations:
        """With other ones after these."""
        batch = torch.broadcast_shapes(self.Y.shape[:-2], other.Y.shape[:-2])
        X, Y = (
            torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)
            for parts in ((self.X, other.X), (self.Y, other.Y))
        )
        first, second = (part.noise.expand(*batch, *part.noise.shape[-2:]) for part in (self, other))
        n, k = first.shape[-1], second.shape[-1]
        noise = first.new_zeros(*batch, n + k, n + k)
        noise[..., :n, :n], noise[..., n:, n:] = first, second
        return Observations(X, Y, noise)


def own(given: Any) -> Any:
    """A copy of a posterior that this model can use, which keeps graphs to the inputs; the network is shared."""
    if not isinstance(given, ParametricLaplace):
        msg = (
            f"LaplaceModel takes a fitted posterior over weights, such as Laplace(model, 'regression', 'last_layer', "
            f"'full'); got a {type(given).__name__}."
        )
        raise UnsupportedError(msg)
    la: Any = given
    la._fitted  # noqa: B018 - raises before fit
    if "sigma_noise" not in la.likelihood_.hyperparameters:
        msg = (
            f"BoTorch models targets with Gaussian noise: LaplaceModel takes likelihood='regression', got "
            f"{la.likelihood_.name!r}."
        )
        raise UnsupportedError(msg)
    if not la.weight_uncertainty:
        msg = "la.weight_uncertainty=False predicts without the variance that an acquisition function needs: set it."
        raise UnsupportedError(msg)
    return shared(la)


def check_learned(transform: nn.Module) -> nn.Module:
    """An affine transform of inputs, with others around it or not; raise if it is to learn and has not."""
    part: Any
    for part in transform.modules():
        learns = getattr(part, "learn_coefficients", False)
        if learns and bool((part.coefficient == 1).all() and (part.offset == 0).all()):
            msg = (
                f"{type(part).__name__} learns from data, and leaves inputs as they are: it has seen none. Pass its "
                "bounds, call it on the training inputs before (input_transform(X)), or leave it out."
            )
            raise InputError(msg)
    return transform


def shared(la: Any) -> Any:
    """A copy that shares the network, and what was learned."""
    twin = copy.copy(la)
    vars(twin).pop("_random_weights", None)
    if la._weights_type.of_head:
        vars(twin)["model"] = copy.copy(la.model)
    twin.enable_backprop = True
    return twin


def with_data(la: Any, x: Tensor, y: Tensor, noise: Tensor) -> Any:
    """A posterior of a last layer with more data, at the mean to which they move it."""
    before, first = la, la._random_weights.first
    la, x, y = shared(la), x.detach().to(first), y.detach().to(first)
    la.fit([(x, y)], override=False)
    with torch.no_grad(), evaluating(la.model), full_precision(la._device):
        inputs = la._checked_linearization(x)
        gap = (y.to(la._dtype) - inputs.mean(la._dtype)).reshape(1, -1)
        covariance = torch.kron(torch.eye(len(y)).to(gap), noise.to(gap)) * float(la.temperature)
        moved = move(before._frozen_posterior, rows(inputs, la._dtype), covariance, gap).squeeze(0)
    fit = la._fitted
    la._fit = replace(fit.at(fit.mean + moved), trained=fit.mean if fit.trained is None else fit.trained)
    la._hyperparameters_changed()
    return la


def move(posterior: AbstractPrecision, J: Tensor, noise: Tensor, gap: Tensor) -> Tensor:
    """How far observations move weights, ``Σ Jᵀ (J Σ Jᵀ + N)⁻¹ gap`` for gaps ``[samples, n·C]``: ``[samples, P]``."""
    factor = linalg.cholesky(J @ posterior.solve(J).T + noise, "covariance of the observations")
    return posterior.solve(torch.cholesky_solve(gap.T, factor).T @ J)


def rows(inputs: Linearization, dtype: torch.dtype) -> Tensor:
    """Derivatives in all random weights, ``[rows·C, P]``, row by row."""
    assert isinstance(inputs, NetworkLinearization), "of a posterior over weights"
    return torch.cat([block.dense() for block in inputs.blocks(dtype)], -1).transpose(0, 1).flatten(0, 1)


__all__ = ["Observations", "check_learned", "move", "own", "rows", "shared", "with_data"]
