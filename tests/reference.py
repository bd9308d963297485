"""The truth, by brute force: float64, one datum at a time, dense matrices, `torch.func`, straight from the definitions.

Shares no code with the library and does not import it. Weights are in the order of
`torch.nn.utils.parameters_to_vector`; H, gradients and losses are at sigma = 1 and T = 1 unless a scale is passed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORED = -100


def rows_of(x: Any, index: Any) -> Any:
    """The rows `index` (a slice or a list) of a nested structure of tensors."""
    if isinstance(x, Tensor):
        return x[index]
    if isinstance(x, Mapping):
        return {key: rows_of(value, index) for key, value in x.items()}
    return type(x)(rows_of(value, index) for value in x)


def datum_nll(likelihood: str, f: Tensor, y: Tensor) -> Tensor:
    """-log p(y|f) of one datum at sigma = 1 without constants; f [T, C], y any shape of T targets."""
    if likelihood == "regression":
        return 0.5 * ((f - y.reshape(f.shape)) ** 2).sum()
    if likelihood == "reward_modeling":  # the strengths exp(f) of two items in the Bradley-Terry model
        preferred, other = f.reshape(2)[[int(y), 1 - int(y)]]
        return (1 + (other - preferred).exp()).log()
    if y.is_floating_point():
        return -(y.reshape(f.shape) * f.log_softmax(-1)).sum()
    terms = [-f[t].log_softmax(-1)[label] for t, label in enumerate(map(int, y.reshape(-1))) if label != IGNORED]
    return sum(terms, f.sum() * 0)


@dataclass(frozen=True)
class Datum:
    """One row of the data: outputs f [T, C], Jacobian J [T·C, P], target, which positions count."""

    f: Tensor
    J: Tensor
    y: Tensor
    kept: tuple[int, ...]
    likelihood: str

    @cached_property
    def gradient(self) -> Tensor:
        """Of the nll in f, [T·C]."""
        return jacrev(lambda f: datum_nll(self.likelihood, f, self.y))(self.f).reshape(-1)

    @cached_property
    def output_hessian(self) -> Tensor:
        """Of the nll in f, [T·C, T·C]."""
        return jacrev(jacrev(lambda f: datum_nll(self.likelihood, f, self.y)))(self.f).reshape(self.f.numel(), -1)

    def at(self, t: int) -> slice:
        """Where position t lies among the T·C outputs."""
        return slice(t * self.f.shape[1], (t + 1) * self.f.shape[1])


@dataclass(frozen=True)
class Problem:
    """A model, which of its parameters are random, and data."""

    model: nn.Module
    forward: Callable[[nn.Module, Any], Tensor]
    names: tuple[str, ...]
    x: Any
    y: Tensor
    likelihood: str
    n_outputs: int

    def theta(self) -> Tensor:
        return torch.cat([self.model.get_parameter(name).detach().reshape(-1) for name in self.names])

    def outputs(self, theta: Tensor, x: Any) -> Tensor:
        """f [rows, T, C] with the random weights at theta."""
        holder, weights, start = _Holder(self.model, self.forward), {}, 0
        for name in self.names:
            old = self.model.get_parameter(name)
            weights["model." + name] = theta[start : start + old.numel()].reshape(old.shape)
            start += old.numel()
        f = functional_call(holder, weights, (x,))
        return f.reshape(f.shape[0], -1, self.n_outputs)

    def jacobian(self, x: Any) -> Tensor:
        """[rows, T, C, P], row by row."""

        def row(b: int) -> Tensor:
            return jacrev(lambda theta: self.outputs(theta, rows_of(x, slice(b, b + 1)))[0])(self.theta())

        return torch.stack([row(b) for b in range(len(self.outputs(self.theta(), x)))]).detach()

    @cached_property
    def data(self) -> list[Datum]:
        f, J, rows = self.outputs(self.theta(), self.x).detach(), self.jacobian(self.x).flatten(1, 2), []
        for b, y in enumerate(self.y):
            labels = [0] * f.shape[1] if y.is_floating_point() else y.reshape(-1).tolist()
            kept = tuple(t for t, label in enumerate(labels) if label != IGNORED)
            rows.append(Datum(f[b], J[b], y, kept, self.likelihood))
        return rows

    @property
    def pairs(self) -> bool:
        """Whether a datum is a pair of items with one target."""
        return self.likelihood == "reward_modeling"

    def n_positions(self) -> int:
        return sum(len(datum.kept) for datum in self.data)

    def nll(self) -> Tensor:
        return sum(datum_nll(self.likelihood, datum.f, datum.y) for datum in self.data)

    def ggn(self) -> Tensor:
        """Sum over data of J' Lambda J."""
        return sum(datum.J.T @ datum.output_hessian @ datum.J for datum in self.data)

    def true_hessian(self) -> Tensor:
        """Second derivative of the nll in the weights."""

        def total(theta: Tensor) -> Tensor:
            f = [self.outputs(theta, rows_of(self.x, slice(b, b + 1)))[0] for b in range(len(self.y))]
            return sum(datum_nll(self.likelihood, row, y) for row, y in zip(f, self.y, strict=True))

        # Two backward passes: jacrev of jacrev is wrong (not even symmetric) for layer_norm. Attention in a form that has
        # second derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(total, self.theta())

    def gradients(self) -> Tensor:
        """[rows, P], summed over the positions of a row."""
        return torch.stack([datum.J.T @ datum.gradient for datum in self.data])

    def empirical_fisher(self) -> Tensor:
        return sum(torch.outer(g, g) for g in self.gradients())

    def sampled_fisher(self) -> tuple[Tensor, Tensor]:
        """Exact mean and variance, entry by entry, of the Fisher with one label drawn a position."""
        mean, variance = 0.0, 0.0
        for datum in self.data:
            for t in datum.kept:
                J, f = (datum.J, datum.f[:, 0]) if self.pairs else (datum.J[datum.at(t)], datum.f[t])
                if self.likelihood == "regression":  # gradients J'e, e ~ N(0, I): fourth moments of a Gaussian
                    M = J.T @ J
                    mean, variance = mean + M, variance + torch.outer(M.diagonal(), M.diagonal()) + M**2
                else:
                    p = f.softmax(-1)
                    outer = [torch.outer(g, g) for g in (p - torch.eye(len(p)).to(p)) @ J]
                    first, second = (sum(p[k] * M**power for k, M in enumerate(outer)) for power in (1, 2))
                    mean, variance = mean + first, variance + second - first**2
        return mean, variance

    def factors(self, *, fisher: bool = False) -> tuple[Tensor, Tensor]:
        """Last layer only: G = sum of Lambda (or of g g'), A = mean of phi phi', both over unmasked positions.

        A pair counts once, with its margin for an output and the difference of its features.
        """
        C, D = self.n_outputs, self.model.get_parameter(self.names[0]).numel() // self.n_outputs
        G, A = torch.zeros(C, C).to(self.theta()), torch.zeros(D, D).to(self.theta())
        for datum in self.data:
            g, Lambda = datum.gradient, datum.output_hessian
            if self.pairs:
                d = datum.J[0, :D] - datum.J[1, :D]
                G, A = G + (g[0] ** 2 if fisher else Lambda[0, 0]), A + torch.outer(d, d)
                continue
            for t in datum.kept:
                phi = datum.J[t * C, :D]  # the first output's weights meet the features alone
                G += torch.outer(g[datum.at(t)], g[datum.at(t)]) if fisher else Lambda[datum.at(t), datum.at(t)]
                A += torch.outer(phi, phi)
        return G, A / self.n_positions()

    def kron(self, *, fisher: bool = False) -> Tensor:
        """The Kronecker approximation as a dense matrix: weight block G x A, bias block G."""
        G, A = self.factors(fisher=fisher)
        return torch.block_diag(torch.kron(G, A), *self.bias_blocks(G))

    def bias_blocks(self, G: Tensor) -> list[Tensor]:
        """Of the Kronecker approximation: G, or 0 where the bias cancels in the difference of two scores."""
        return [torch.zeros_like(G) if self.pairs else G] * (len(self.names) - 1)

    def curvature(self, structure: str, *, fisher: bool = False) -> Tensor:
        """Dense [P, P] of what a structure stores."""
        if structure == "kron":
            return self.kron(fisher=fisher)
        H = self.empirical_fisher() if fisher else self.ggn()
        if structure == "blockdiag":
            return torch.block_diag(*self.groups(H))
        if structure == "ekfac":
            return self.ekfac(H, fisher=fisher)
        return H if structure in ("full", "lowrank") else H.diagonal().diag()

    def groups(self, H: Tensor) -> list[Tensor]:
        """The diagonal blocks of a matrix, one per parameter."""
        sizes, start, blocks = [self.model.get_parameter(name).numel() for name in self.names], 0, []
        for size in sizes:
            blocks.append(H[start : start + size, start : start + size])
            start += size
        return blocks

    def ekfac(self, H: Tensor, *, fisher: bool = False) -> Tensor:
        """Last layer only: the diagonal of H in the eigenbasis of its Kronecker factors, as a dense matrix."""
        G, A = (torch.linalg.eigh(factor)[1] for factor in self.factors(fisher=fisher))
        bases = [torch.kron(G, A), *[G] * (len(self.names) - 1)]
        pairs = zip(bases, self.groups(H), strict=True)
        return torch.block_diag(*(Q @ (Q.T @ block @ Q).diagonal().diag() @ Q.T for Q, block in pairs))

    def damped_kron_precision(self, scale: float, deltas: Tensor, *, fisher: bool = False) -> Tensor:
        """Weight block (sqrt(s) G + sqrt(d)) x (sqrt(s) A + sqrt(d)), bias block s G + d; one d a parameter."""
        G, A = self.factors(fisher=fisher)
        widened = [math.sqrt(scale) * M + deltas[0].sqrt() * torch.eye(len(M)).to(M) for M in (G, A)]
        bias = [scale * block + deltas[1] * torch.eye(len(G)).to(G) for block in self.bias_blocks(G)]
        return torch.block_diag(torch.kron(*widened), *bias)


class _Holder(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Any) -> Tensor:
        return self.function(self.model, x)


def log_evidence(nll: Tensor, scale: float, sigma: float | None, n: int, P: Tensor, P0: Tensor, d: Tensor) -> Tensor:
    """log p(D|theta) - (log|P| - log|P0| + d' P0 d) / 2; n values observed; sigma None: classification."""
    log_normalizer = 0.0 if sigma is None else n * math.log(sigma * math.sqrt(2 * math.pi))
    return -scale * nll - log_normalizer - 0.5 * (P.logdet() - P0.logdet() + d @ P0 @ d)


def output_covariance(J: Tensor, precision: Tensor) -> Tensor:
    """J [B, C, P] -> [B, C, C]."""
    return torch.stack([row @ precision.inverse() @ row.T for row in J])


def joint_covariance(J: Tensor, precision: Tensor) -> Tensor:
    """J [B, C, P] -> [B·C, B·C], inputs outer, outputs inner."""
    return J.flatten(0, 1) @ precision.inverse() @ J.flatten(0, 1).T


def probit(mean: Tensor, cov: Tensor) -> Tensor:
    """softmax(mean / sqrt(1 + pi/8 var)): the multi-output probit approximation of MacKay (1992)."""
    return (mean / (1 + math.pi / 8 * cov.diagonal(dim1=1, dim2=2)).sqrt()).softmax(-1)


def mean_field(mean: Tensor, variance_of_difference: Callable[[int, int, int], Tensor]) -> Tensor:
    """p_k ∝ 1 / Σ_j exp(−(m_k − m_j) / sqrt(1 + pi/8 v_kj)), class by class: Lu, Ie & Sha (2020)."""
    rows, K = mean.shape
    p = torch.zeros_like(mean)
    for n in range(rows):
        for k in range(K):
            p[n, k] = 1 / sum(
                torch.exp(-(mean[n, k] - mean[n, j]) / (1 + math.pi / 8 * variance_of_difference(n, k, j)).sqrt())
                for j in range(K)
            )
    return p / p.sum(-1, keepdim=True)


def mean_field_1(mean: Tensor, cov: Tensor) -> Tensor:
    """Without the covariances of logits."""
    return mean_field(mean, lambda n, k, j: cov[n, k, k] + cov[n, j, j])


def mean_field_2(mean: Tensor, cov: Tensor) -> Tensor:
    """With them."""
    return mean_field(mean, lambda n, k, j: cov[n, k, k] + cov[n, j, j] - 2 * cov[n, k, j])


def bridge(mean: Tensor, cov: Tensor, *, normalized: bool = False) -> Tensor:
    """Mean of the Dirichlet of Hobbhahn, Kristiadi & Hennig (2022), after conditioning the logits to sum to zero.

    `normalized` first rescales so that the mean variance is sqrt(K/2).
    """
    result = []
    for m, V in zip(mean, cov, strict=True):
        K, ones = len(m), torch.ones_like(m)
        total = ones @ V @ ones
        m, V = m - V @ ones * (ones @ m) / total, V - torch.outer(V @ ones, ones @ V) / total
        if normalized:
            size = V.diagonal().mean() / math.sqrt(K / 2)
            m, V = m / size.sqrt(), V / size
        alpha = (1 - 2 / K + m.exp() / K**2 * (-m).exp().sum()) / V.diagonal()
        result.append(alpha / alpha.sum())
    return torch.stack(result)


def expected_softmax(mean: Tensor, cov: Tensor, order: int = 40) -> Tensor:
    """E softmax(f), f ~ N(mean, cov), by a tensor grid of Gauss-Hermite nodes in the K differences to the last."""
    K, (nodes, weights) = mean.shape[1] - 1, map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * K).reshape(-1, K)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * K).reshape(-1, K).prod(-1)
    difference = torch.cat([torch.eye(K), -torch.ones(K, 1)], 1).to(mean)
    result = []
    for m, V in zip(mean, cov, strict=True):
        L = torch.linalg.cholesky(difference @ V @ difference.T)
        logits = torch.nn.functional.pad(difference @ m + grid @ L.T, (0, 1))
        result.append(mass @ logits.softmax(-1))
    return torch.stack(result)


def linear_regression(X: Tensor, Y: Tensor, sigma: float, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bayesian linear regression with a bias, every output by itself: W [C, D+1], cov [D+1, D+1], log p(Y)."""
    design = torch.cat([X, torch.ones(len(X), 1).to(X)], 1)
    cov = (design.T @ design / sigma**2 + delta * torch.eye(design.shape[1]).to(X)).inverse()
    weights = (cov @ design.T @ Y / sigma**2).T
    marginal = design @ design.T / delta + sigma**2 * torch.eye(len(X)).to(X)
    density = torch.distributions.MultivariateNormal(torch.zeros(len(X)).to(X), marginal)
    return weights, cov, sum(density.log_prob(Y[:, c]) for c in range(Y.shape[1]))
