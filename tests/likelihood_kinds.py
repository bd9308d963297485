"""What every name of `likelihood=` means: one density each, written from its definition. Does not import the library.

A new likelihood gets a row here, and then everything in `tests/likelihoods` and `contracts.check_likelihood` applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, NegativeBinomial, Normal, Poisson

PROBABILITY_LINKS = ("probit", "mc", "mf1", "mf2", "bridge", "bridge_norm")
MOMENT_LINKS = ("probit", "mc")


@dataclass(frozen=True)
class Kind:
    """p(y|f) of a row, at unit noise and temperature; f is [..., C], y the targets of the same rows."""

    name: str
    log_density: Callable[[Tensor, Tensor], Tensor]
    """log p(y|f), [...]."""
    mean: Callable[[Tensor], Tensor]
    """E[y|f], [..., K]: of classes their probabilities."""
    numbers: Callable[[Tensor, int], Tensor]
    """Targets as what the mean is a mean of, [..., K], from y and C."""
    support: Callable[[Tensor], tuple[Tensor, Tensor]]
    """For one f [C]: targets [S, ...] and weights [S] with which sums over them are means under p(y|f)."""
    n_outputs: tuple[int, ...]
    """Every C that is tried; of pairs the two scores."""
    links: dict[str, float]
    """The links that there are, and by how much their predictions may be off: 0 where they are exact."""
    classes: Callable[[Tensor], Tensor] | None = None
    """The class of a target, [...], where predictions are probabilities; of several labels one after the other."""
    of_logits: bool = False
    """Whether an output temperature has a meaning."""
    noise: bool = False
    """Whether an observation noise has one."""
    joint: tuple[str, ...] = MOMENT_LINKS
    """The links with which predictions may be joint."""
    diagonal: tuple[str, ...] = ("probit", "mc", "mf1", "mf2")
    """Those with which variances may be asked for."""
    each_output: int = 0
    """How many outputs a target has whose marginal densities are summed; 0: those of a row are one density."""
    exclusive: bool = True
    """Whether one class of a row is right, where predictions are probabilities."""
    canonical: bool = True
    """Whether the second derivative of the density in the outputs is the same for every target."""
    variance: Callable[[Tensor], Tensor] | None = None
    """Var[y|f], [..., K], where it is said."""
    energy_error: float = 0.0
    """By how much the closed form of energies may be off, of a tenth of the covariance; 0 where it is exact."""
    pairs: bool = False
    """Whether a row holds two scores that are compared."""
    refitted: bool = True
    """Whether a head is fitted again: its loss is convex, and a target belongs to one row of features."""
    size: float = 1.0
    """Of outputs and of their standard deviations that are tried."""
    sampled_energy: bool = False
    """Whether energies may be sampled."""

    def __str__(self) -> str:
        return self.name

    def n_classes(self, n_outputs: int) -> int:
        """Of which one is right."""
        return max(n_outputs, 2) if self.exclusive else 2

    def outputs(self, rows: int, n_outputs: int, seed: int = 0) -> Tensor:
        """Random f, [rows, C]."""
        return self.size * torch.randn(rows, n_outputs, generator=torch.Generator().manual_seed(seed))

    def targets(self, f: Tensor, seed: int = 0) -> Tensor:
        """One target per row, drawn from the model (of a continuous one, from the nodes of a quadrature)."""
        noise = torch.Generator().manual_seed(seed)
        drawn = []
        for row in f:
            y, weights = self.support(row)
            drawn.append(y[torch.multinomial(weights, 1, generator=noise)[0]])
        return torch.stack(drawn)

    def moments(self, rows: int, n_outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A random mean [rows, C] and covariance [rows, C, C] of outputs; of pairs that of (f0 - f1, 0)."""
        noise = torch.Generator().manual_seed(seed + 100)
        root = self.size * torch.randn(rows, n_outputs, n_outputs, generator=noise) / n_outputs**0.5
        mean, cov = self.outputs(rows, n_outputs, seed), root @ root.mT + 0.05 * torch.eye(n_outputs)
        if self.pairs:
            mean[:, 1], cov[:, 1], cov[:, :, 1] = 0.0, 0.0, 0.0
        return mean, cov

    def gradients(self, f: Tensor, y: Tensor) -> Tensor:
        """Of -log p(y|f) in f, [rows, C], by automatic differentiation."""
        f = f.detach().clone().requires_grad_()
        return -torch.autograd.grad(self.log_density(f, y).sum(), f)[0]

    def expect(self, f: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """E[function(f, y)] over targets of each row of f [rows, C]; it is given [S, C] and [S, ...]."""
        result = []
        for row in f:
            y, weights = self.support(row)
            result.append(torch.tensordot(weights, function(row.expand(len(weights), -1), y), 1))
        return torch.stack(result)

    def fisher(self, f: Tensor) -> Tensor:
        """E[g g'] over targets, [rows, C, C]."""
        return self.expect(f, lambda f, y: torch.einsum("sc,sk->sck", g := self.gradients(f, y), g))


def one_hot(y: Tensor, n_classes: int) -> Tensor:
    return y if y.is_floating_point() else torch.nn.functional.one_hot(y, n_classes).double()


def categorical_log_density(f: Tensor, y: Tensor) -> Tensor:
    """Of a class; of a soft label the mean over classes."""
    if y.is_floating_point():
        every = torch.arange(f.shape[-1]).expand(*f.shape[:-1], -1)
        return (y * Categorical(logits=f.unsqueeze(-2)).log_prob(every)).sum(-1)
    return Categorical(logits=f).log_prob(y)


def bradley_terry_log_density(f: Tensor, y: Tensor) -> Tensor:
    """Strengths exp(f): the preferred item wins with its share of the strength of both."""
    strength = (f - f.detach().amax(-1, keepdim=True)).exp()
    preferred = (strength * one_hot(y, 2)).sum(-1)
    return (preferred / strength.sum(-1)).log()


def every_class(f: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(len(f))
    return y, categorical_log_density(f.expand(len(f), -1), y).exp()


def zero_and_one(f: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tensor([[0.0], [1.0]])
    return y, Bernoulli(logits=f.expand(2, 1)).log_prob(y).sum(-1).exp()


def every_labeling(f: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(f)).reshape(-1, len(f))
    return y, Bernoulli(logits=f.expand(len(y), -1)).log_prob(y).sum(-1).exp()


def negative_binomial(f: Tensor) -> NegativeBinomial:
    """Of mean e^f and variance e^f + e^2f: the number of successes of probability p before the first failure."""
    return NegativeBinomial(1.0, f.exp() / (1 + f.exp()))


def dispersed_counts(f: Tensor, largest: int = 150) -> tuple[Tensor, Tensor]:
    y = torch.cartesian_prod(*[torch.arange(largest + 1.0)] * len(f)).reshape(-1, len(f))
    weights = negative_binomial(f).log_prob(y).sum(-1).exp()
    assert float(weights.sum()) > 1 - 1e-13, "larger counts have a weight, too"
    kept = weights > 1e-17
    return y[kept], weights[kept]


def noisy_nodes(f: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = f.chunk(2)
    deviation, mass = hermite_grid(len(mean), 6)
    return mean + (log_variance / 2).exp() * deviation, mass


def counts(f: Tensor, largest: int = 40) -> tuple[Tensor, Tensor]:
    """All counts, where rates are small enough for those above to have no weight."""
    y = torch.cartesian_prod(*[torch.arange(largest + 1.0)] * len(f)).reshape(-1, len(f))
    weights = Poisson(f.exp()).log_prob(y).sum(-1).exp()
    assert float(weights.sum()) > 1 - 1e-13, "larger counts have a weight, too"
    kept = weights > 1e-16
    return y[kept], weights[kept]


def normal_nodes(f: Tensor, order: int = 6) -> tuple[Tensor, Tensor]:
    """Exact for polynomials up to the eleventh degree."""
    deviation, mass = hermite_grid(len(f), order)
    return f + deviation, mass


def hermite_grid(n: int, order: int) -> tuple[Tensor, Tensor]:
    """A tensor grid of Gauss-Hermite nodes [order^n, n] of standard normal numbers, and its weights."""
    nodes, weights = (torch.as_tensor(values) for values in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * n).reshape(-1, n)
    return grid, torch.cartesian_prod(*[weights / weights.sum()] * n).reshape(-1, n).prod(-1)


def gaussian_grid(mean: Tensor, cov: Tensor, order: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes [S, rows, C] and weights [S] of N(mean, cov), a variance or a (possibly singular) covariance."""
    cov = cov.diag_embed() if cov.dim() == mean.dim() else cov
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    grid, mass = hermite_grid(mean.shape[-1], order)
    return mean + torch.einsum("rck,sk->src", root, grid), mass


ROWS = (
    Kind(
        "regression",
        log_density=lambda f, y: Normal(f, 1.0).log_prob(y).sum(-1),
        mean=lambda f: f,
        numbers=lambda y, _: y,
        support=normal_nodes,
        n_outputs=(1, 2, 3),
        links=dict.fromkeys(MOMENT_LINKS, 0.0),
        noise=True,
        size=0.7,
        variance=torch.ones_like,
    ),
    Kind(
        "classification",
        log_density=categorical_log_density,
        mean=lambda f: f.softmax(-1),
        numbers=one_hot,
        support=every_class,
        n_outputs=(2, 3),
        links={"probit": 0.05, "mc": 0.0, "mf1": 0.05, "mf2": 0.05, "bridge": 0.12, "bridge_norm": 0.12},
        classes=lambda y: y,
        of_logits=True,
        joint=("mc",),
        energy_error=0.05,
        size=0.6,
        sampled_energy=True,
    ),
    Kind(
        "reward_modeling",
        log_density=bradley_terry_log_density,
        mean=lambda f: f.softmax(-1),
        numbers=one_hot,
        support=every_class,
        n_outputs=(2,),
        links={"probit": 0.02, "mc": 0.0},
        classes=lambda y: y,
        of_logits=True,
        joint=("mc",),
        diagonal=(),
        energy_error=0.05,
        pairs=True,
        refitted=False,
        sampled_energy=True,
    ),
    Kind(
        "binary",
        log_density=lambda f, y: Bernoulli(logits=f).log_prob(y).sum(-1),
        mean=lambda f: 1 / (1 + (-f).exp()),
        numbers=lambda y, _: y,
        support=zero_and_one,
        n_outputs=(1,),
        links={"probit": 0.02, "mc": 0.0},
        classes=lambda y: y[..., 0].long(),
        of_logits=True,
        joint=("mc",),
        sampled_energy=True,
    ),
    Kind(
        "poisson",
        log_density=lambda f, y: Poisson(f.exp()).log_prob(y).sum(-1),
        mean=lambda f: f.exp(),
        numbers=lambda y, _: y,
        support=counts,
        n_outputs=(1, 2, 3),
        links=dict.fromkeys(MOMENT_LINKS, 0.0),
        each_output=1,
        size=0.6,
        variance=lambda f: f.exp(),
    ),
    Kind(
        "multilabel",
        log_density=lambda f, y: Bernoulli(logits=f).log_prob(y).sum(-1),
        mean=lambda f: 1 / (1 + (-f).exp()),
        numbers=lambda y, _: y,
        support=every_labeling,
        n_outputs=(1, 3),
        links={"probit": 0.02, "mc": 0.0},
        classes=lambda y: y.flatten().long(),
        of_logits=True,
        joint=("mc",),
        sampled_energy=True,
        each_output=1,
        exclusive=False,
    ),
    Kind(
        "negative_binomial",
        log_density=lambda f, y: negative_binomial(f).log_prob(y).sum(-1),
        mean=lambda f: f.exp(),
        numbers=lambda y, _: y,
        support=dispersed_counts,
        n_outputs=(1, 2),
        links=dict.fromkeys(MOMENT_LINKS, 0.0),
        each_output=1,
        size=0.4,
        canonical=False,
        variance=lambda f: f.exp() * (1 + f.exp()),
    ),
    Kind(
        "heteroscedastic_regression",
        log_density=lambda f, y: Normal(f.chunk(2, -1)[0], f.chunk(2, -1)[1].exp().sqrt()).log_prob(y).sum(-1),
        mean=lambda f: f.chunk(2, -1)[0],
        numbers=lambda y, _: y,
        support=noisy_nodes,
        n_outputs=(2,),
        links=dict.fromkeys(MOMENT_LINKS, 0.0),
        each_output=2,
        refitted=False,
        size=0.4,
        canonical=False,
        variance=lambda f: f.chunk(2, -1)[1].exp(),
    ),
)
KINDS = {kind.name: kind for kind in ROWS}
"""One row a likelihood."""
EVERY = [(kind, n_outputs) for kind in ROWS for n_outputs in kind.n_outputs]
"""Every row at every number of outputs."""
