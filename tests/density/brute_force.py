"""The density of features by its definition: one row at a time, dense matrices, distributions of PyTorch and NumPy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

KAPPA = 10


def rows_of(n_classes: int, n_features: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features whose means and spreads depend on their class; every class has rows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    mix = torch.randn(n_classes, n_features, n_features, generator=generator)
    phi = torch.einsum("nij,nj->ni", mix[y], torch.randn(n, n_features, generator=generator))
    phi += 3 * torch.randn(n_classes, n_features, generator=generator)[y] + 5
    order = torch.randperm(n, generator=generator)
    return phi[order], y[order]


def pooled(phi: Tensor, y: Tensor) -> Tensor:
    """S_w from deviations, row by row."""
    S, classes = np.zeros((phi.shape[1],) * 2), sorted(set(y.tolist()))
    for c in classes:
        mean = phi[y == c].numpy().mean(0)
        for row in phi[y == c].numpy():
            S += np.outer(row - mean, row - mean)
    return torch.from_numpy(S / (len(phi) - len(classes)))


def oas(S: Tensor, n: float) -> Tensor:
    """Chen et al. (2010), equation 23, with 2/p."""
    p = len(S)
    trace, square = float(S.trace()), float((S @ S).trace())
    bottom = (n + 1 - 2 / p) * (square - trace**2 / p)
    rho = 1.0 if bottom == 0 else min(1.0, ((1 - 2 / p) * square + trace**2) / bottom)
    return (1 - rho) * S + rho * trace / p * torch.eye(p)


def covariance_of(c: int, phi: Tensor, y: Tensor) -> Tensor:
    """S_c."""
    mine, shared = phi[y == c], pooled(phi, y)
    n = len(mine)
    if n == 1:
        return shared
    own = oas(torch.from_numpy(np.cov(mine.numpy(), rowvar=False).reshape(phi.shape[1], -1)), n - 1)
    return ((n - 1) * own + KAPPA * shared) / (n - 1 + KAPPA)


def mixture(phi: Tensor, y: Tensor, *, tied: bool = False) -> MixtureSameFamily:
    """The density as a distribution of PyTorch."""
    classes = sorted(set(y.tolist()))
    shares = torch.tensor([float((y == c).sum()) / len(y) for c in classes])
    means = torch.stack([phi[y == c].mean(0) for c in classes])
    covariances = torch.stack([pooled(phi, y) if tied else covariance_of(c, phi, y) for c in classes])
    return MixtureSameFamily(Categorical(shares), MultivariateNormal(means, covariances))


def squared_distance(row: Tensor, mean: Tensor, S: Tensor) -> float:
    """(φ − μ)ᵀ S⁻¹ (φ − μ)."""
    return float((row - mean) @ torch.linalg.inv(S) @ (row - mean))


def tail(values: list[float], v: float) -> float:
    """log of the share at or beyond v, by its definition, one number at a time; values without ties."""
    x = sorted(values)
    n = len(x)
    top = max(math.ceil(n / 10), min(5, n - 1))
    scale = sum(value - x[n - top - 1] for value in x[n - top :]) / top
    if v >= x[-1]:
        return math.log(1 / (n + 1)) - (v - x[-1]) / scale
    if v < x[0]:
        return math.log(1 - math.exp((v - x[0]) / scale) / (n + 1))
    i = max(i for i in range(n) if x[i] <= v)
    left, right = math.log((n - i) / (n + 1)), math.log((n - i - 1) / (n + 1))
    return left + (v - x[i]) / (x[i + 1] - x[i]) * (right - left)
