"""Fitted subnetworks of the networks, and what they must be, as dense matrices."""

from __future__ import annotations

import functools

import pytest
import torch

from laplace import Laplace
from tests import reference
from tests.contracts import generator
from tests.estimators import PREDICTIONS
from tests.networks import Network, named

SIGMA, DELTA = 0.7, 1.3
NAMES = ("mlp", "mlp_regression", "conv2d", "positions", "embedding", "tied_layers")
networks = pytest.mark.parametrize("name", NAMES)
basic = pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
structures = pytest.mark.parametrize("structure", ["full", "diag"])
CHOICES = ("few", "many", "shuffled")
choices = pytest.mark.parametrize("choice", CHOICES)


def chosen(network: Network, choice: str) -> torch.Tensor:
    """Indices into all weights of a network without frozen ones."""
    n_params = sum(parameter.numel() for parameter in network.model().parameters())
    order = torch.randperm(n_params, generator=generator(n_params))
    some = order[: max(2, n_params // 15)] if choice == "few" else order[: n_params // 2]
    return some if choice == "shuffled" else some.sort().values


def subnet(network: Network, structure: str, index: torch.Tensor, model=None, **options):
    model = network.model() if model is None else model
    noise = {"sigma_noise": SIGMA} if network.likelihood == "regression" else {}
    options = {"prior_precision": DELTA, **noise, **options}
    return Laplace(model, network.likelihood, "subnetwork", structure, subnetwork_indices=index, **options)


def fitted(network: Network, structure: str, index: torch.Tensor, model=None, **options):
    la = subnet(network, structure, index, model, **options)
    x, y = network.data()
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    return la


@functools.cache
def truth(name: str, matrix: str) -> torch.Tensor:
    """The curvature of all weights, by brute force."""
    problem = named(name).problem()
    return {"GGN": problem.ggn, "EF": problem.empirical_fisher, "Hessian": problem.true_hessian}[matrix]()


def restricted(name: str, structure: str, index: torch.Tensor, matrix: str = "GGN") -> torch.Tensor:
    H = truth(name, matrix)[index][:, index]
    return H if structure == "full" else H.diagonal().diag()


def precision(name: str, structure: str, index: torch.Tensor, delta: torch.Tensor | float = DELTA) -> torch.Tensor:
    scale = SIGMA**-2 if named(name).likelihood == "regression" else 1.0
    return scale * restricted(name, structure, index) + (torch.as_tensor(delta) * torch.ones(len(index))).diag()


def as_matrix(H: torch.Tensor) -> torch.Tensor:
    return H.diag() if H.dim() == 1 else H


def evidence(name: str, P: torch.Tensor, index: torch.Tensor, delta=DELTA, mean=0.0) -> torch.Tensor:
    network, problem = named(name), named(name).problem()
    sigma, scale = (SIGMA, SIGMA**-2) if network.likelihood == "regression" else (None, 1.0)
    n_values, P0 = problem.n_positions() * network.n_outputs, (torch.as_tensor(delta) * torch.ones(len(index))).diag()
    return reference.log_evidence(problem.nll(), scale, sigma, n_values, P, P0, problem.theta()[index] - mean)


def all_that_is_seen(la, network: Network) -> list[torch.Tensor]:
    x, likelihood = network.data(shift=2, n_rows=3)[0], network.likelihood
    found = [la.log_marginal_likelihood(), as_matrix(la.posterior_precision), la.mean, la.scatter]
    for options in PREDICTIONS[likelihood]:
        result = la(x, n_samples=5, generator=generator(0), **options)
        found += [result] if isinstance(result, torch.Tensor) else result
    return found
