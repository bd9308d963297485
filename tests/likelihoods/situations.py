"""A tiny network and data for every likelihood, and what its posterior and predictions must be by brute force."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector

from laplace import Laplace
from tests.contracts import generator
from tests.estimators import dense
from tests.likelihood_kinds import KINDS, Kind

N_OUTPUTS = {"regression": 2, "classification": 3, "reward_modeling": 1, "binary": 1, "poisson": 2,
    "multilabel": 3, "negative_binomial": 2, "heteroscedastic_regression": 4,
}  # fmt: skip
DELTA = 1.7
N_TRAIN, N_TEST = 12, 3
CHOSEN = torch.tensor([9, 0, 4, 11])
"""Weights of a subnetwork, the first ones of the output layer among them."""


def network(n_outputs: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n_outputs)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, n_outputs)).double()


def inputs(kind: Kind, n: int, seed: int) -> Tensor:
    return torch.randn(n, *([2] if kind.pairs else []), 2, dtype=torch.float64, generator=generator(seed))


def data(kind: Kind, n: int = N_TRAIN, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = inputs(kind, n, seed)
    with torch.no_grad():
        f = network(N_OUTPUTS[kind.name])(x)
    return x, kind.targets(f.flatten(1), seed)


def build(kind: Kind, subset: str, structure: str, **options: Any) -> Any:
    options = {"prior_precision": DELTA, **options}
    if subset == "last_layer":
        options["last_layer_name"] = "2"
    if subset == "subnetwork":
        options["subnetwork_indices"] = CHOSEN
    if structure == "gp":
        options.setdefault("n_subset", N_TRAIN)
    if structure == "lowrank":
        options["rank"] = 4
    model = options.pop("model", None) or network(N_OUTPUTS[kind.name])
    return Laplace(model, kind.name, subset, structure, **options)


def cut(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def columns(n_outputs: int, subset: str) -> Tensor:
    """Which of all weights are random."""
    sizes = [p.numel() for p in network(n_outputs).parameters()]
    every = torch.arange(sum(sizes))
    return {"all": every, "last_layer": every[sum(sizes[:2]) :], "subnetwork": CHOSEN}[subset]


def at_weights(model: nn.Sequential, theta: Tensor, x: Tensor) -> Tensor:
    """f [B, C], or [B, 2] of pairs, with all weights of the network at theta."""
    weights, start = {}, 0
    for name, p in model.named_parameters():
        weights[name] = theta[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    return functional_call(model, weights, (x,)).flatten(1)


def outputs(n_outputs: int, x: Tensor, subset: str) -> tuple[Tensor, Tensor]:
    """f [B, C] and Jacobian [B, C, P] in the random weights."""
    model = network(n_outputs)
    theta = parameters_to_vector(model.parameters()).detach()
    J = jacrev(lambda theta: at_weights(model, theta, x))(theta)
    return at_weights(model, theta, x).detach(), J.detach()[..., columns(n_outputs, subset)]


@functools.cache
def curvature(name: str, subset: str) -> Tensor:
    """The sum over data of J' Fisher J, the Fisher information by sums over targets of the density."""
    kind = KINDS[name]
    f, J = outputs(N_OUTPUTS[name], data(kind)[0], subset)
    return torch.einsum("ncp,nck,nkq->pq", J, kind.fisher(f), J)


def by_structure(H: Tensor, structure: str, name: str, subset: str) -> Tensor | None:
    """What a structure keeps of a curvature, where that does not depend on how it is factorized."""
    if structure in ("full", "gp"):
        return H
    if structure == "diag":
        return H.diagonal().diag()
    if structure == "blockdiag":
        parts = [p.numel() for p in network(N_OUTPUTS[name]).parameters()][2 if subset == "last_layer" else 0 :]
        group = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
        return H * (group[:, None] == group)
    return None


def posterior(la: Any, kind: Kind, subset: str, structure: str) -> Tensor:
    """The posterior precision [P, P] at the present prior precision and temperature."""
    H = by_structure(curvature(kind.name, subset), structure, kind.name, subset)
    if H is None:
        return dense(la.posterior_precision)
    sigma = float(la.sigma_noise) if kind.noise else 1.0
    return H / (sigma**2 * la.temperature) + float(la.prior_precision) * torch.eye(len(H))


def moments(la: Any, kind: Kind, subset: str, structure: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariances and joint covariance of outputs; of pairs those of (f0 - f1, 0)."""
    f, J = outputs(N_OUTPUTS[kind.name], x, subset)
    return moments_of(kind, f, J, posterior(la, kind, subset, structure).inverse())


def moments_of(kind: Kind, f: Tensor, J: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if kind.pairs:
        gap = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
        f, J = f @ gap.T, torch.einsum("kc,ncp->nkp", gap, J)
    flat = J.flatten(0, 1)
    return f, J @ cov @ J.mT, flat @ cov @ flat.T


def pairwise(axes: Sequence[Sequence[Any]], valid: Callable[..., bool] = lambda *_: True) -> list[tuple]:
    """Few of the valid combinations in which every pair of values that occurs in one occurs, chosen greedily."""
    combinations = [values for values in itertools.product(*axes) if valid(*values)]
    random.Random(0).shuffle(combinations)

    def pairs(values: tuple) -> set:
        return set(itertools.combinations(enumerate(values), 2))

    missing, chosen = set().union(*map(pairs, combinations)), []
    while missing:
        best = max(combinations, key=lambda values: len(pairs(values) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
