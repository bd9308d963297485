"""A Gaussian fitted to the posterior of a head's weights by variational inference (``method="elbo"``).

q = N(m, Σ) maximizes the evidence lower bound, from features alone:

    ELBO = −s Σ_n E_q[nll(f_n, y_n)] − KL(q ‖ N(μ₀, diag(δ)⁻¹)),      f_n = W φ_n + b ~ N(J_n m, J_n Σ J_nᵀ)
    at the optimum   Σ⁻¹ = s Σ_n E_q[Λ_n] ⊗ φ_n φ_nᵀ + diag(δ)   and   s Σ_n J_nᵀ E_q[∇nll] + δ (m − μ₀) = 0

with Λ the Hessian in the outputs. So the posterior is a curvature with the prior added, as that of Laplace, whose Λ is
averaged over q instead of taken at one point: where features separate the classes Λ is nearly zero at the mode, and
Laplace gives the weights the spread of the prior although the likelihood forbids most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from laplace import linalg
from laplace.curvature import last_layer
from laplace.enums import HessianStructure
from laplace.errors import UnsupportedError
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood, OutputHessian
from laplace.likelihoods.draws import antithetic_normals, chunks
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, AbstractPrecision, DiagCurvature, DiagPrecision, FullCurvature, Kron
from laplace.structures.head_block import HeadBlock, head_blocks
from laplace.structures.kron import KronCurvature
from laplace.structures.wide_kron import refuse_wide
from laplace.tuning.head import HeadData, fit_at
from laplace.tuning.newton import Head, mode, scaled
from laplace.tuning.problem import Problem

N_POINTS = 32
"""Points per row over which gradient and Hessian are averaged, in pairs ±z."""
MAX_STEPS = 14
"""Evaluations of the bound for one prior precision; each starts where that of a neighbor ended."""
INCONSISTENT = 1e-2
"""By how much the bound may fall, in nats: of points its optimum is not quite where averaged derivatives say."""
MAX_DENSE = 1024
"""Most weights with a dense covariance."""
N_COARSE = 9
"""Points of the grid that are tried first, from strong priors to weak ones."""


Sums: TypeAlias = Tensor
"""Averaged curvature, summed over rows: ``[P, P]`` (full), ``[P]`` (diag) or Σ E[Λ], ``[C, C]`` (kron)."""


@dataclass(frozen=True)
class Family:
    """How a structure sums averaged Hessians, and what it makes of the sums."""

    add_up: Callable[[Sequence[HeadBlock], OutputHessian], Sums]
    make: Callable[[Sums, Tensor, int, int, torch.dtype], AbstractCurvature]
    """From sums, Σ φφᵀ, numbers of rows and of parameter groups, and the precision of use."""


def _sum(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> Sums:  # noqa: ARG001 - features do not change
    refuse_wide(hessian.n_outputs, 'method="elbo" with hessian_structure="kron"')
    return hessian.sum()


def _full(sums: Sums, inputs: Tensor, n_rows: int, n_groups: int, dtype: torch.dtype) -> FullCurvature:  # noqa: ARG001
    return FullCurvature(sums.to(dtype))


def _diag(sums: Sums, inputs: Tensor, n_rows: int, n_groups: int, dtype: torch.dtype) -> DiagCurvature:  # noqa: ARG001
    return DiagCurvature(sums.to(dtype))


def _kron(sums: Sums, inputs: Tensor, n_rows: int, n_groups: int, dtype: torch.dtype) -> KronCurvature:
    """Raw sums; that of the outputs is shared by weight and bias, and decomposed once."""
    return KronCurvature(Kron([[sums, inputs], [sums]][:n_groups]), (n_rows,) * n_groups, dtype=dtype)


FAMILIES: Mapping[HessianStructure, Family] = {
    HessianStructure.FULL: Family(last_layer.full, _full),
    HessianStructure.DIAG: Family(last_layer.diag, _diag),
    HessianStructure.KRON: Family(_sum, _kron),
}
"""Structures of a covariance that can be fitted."""


def check_family(structure: type[AbstractCurvature], n_params: int) -> None:
    """Raise unless a covariance of such a structure can be fitted."""
    if structure.name not in FAMILIES:
        msg = (
            f'method="elbo" fits a covariance with hessian_structure="full", "kron" or "diag"; this one is '
            f'"{structure.name.value}". Make the object with one of those, or use method="marglik" or tune(val_loader).'
        )
        raise UnsupportedError(msg)
    if structure.name is HessianStructure.FULL and n_params > MAX_DENSE:
        msg = (
            f'method="elbo" fits a dense covariance of up to {MAX_DENSE:,} weights; the last layer has {n_params:,}. '
            'Use hessian_structure="kron" or "diag", or validation data: tune(val_loader).'
        )
        raise UnsupportedError(msg)


@dataclass(frozen=True)
class Gaussian:
    """q: its mean, and the sums of its curvature."""

    mean: Float[Tensor, " params"]
    """m."""
    sums: Sums
    """Of E_q[Λ]."""

    def towards(self, direction: Tensor, sums: Sums, rate: float) -> Gaussian:
        """A part of the way."""
        return Gaussian(self.mean + rate * direction, self.sums + rate * (sums - self.sums))


@dataclass(frozen=True)
class Averages:
    """What is averaged over a Gaussian."""

    elbo: float
    """In nats."""
    gradient: Float[Tensor, " params"]
    """Of −ELBO in m."""
    hessian: OutputHessian
    """E_q[Λ] of all rows, at unit temperature."""


@dataclass(frozen=True)
class VariationalHead:
    """Variational inference for a head on fixed features, with a covariance of some structure."""

    data: HeadData
    likelihood: AbstractLikelihood
    structure: type[AbstractCurvature]
    base: Float[Tensor, "points rows outputs"]
    """Standard normal points, the same for every Gaussian."""
    inputs: Tensor
    """Of Kronecker factors Σ φφᵀ, or its diagonal where features are in its eigenbasis."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the structure's posterior."""

    @classmethod
    def of(
        cls,
        data: HeadData,
        likelihood: AbstractLikelihood,
        structure: type[AbstractCurvature],
        options: Mapping[str, Any],
        seed: int,
        n_points: int = N_POINTS,
    ) -> VariationalHead:
        """With points drawn by a seed."""
        generator = torch.Generator().manual_seed(seed)
        base = antithetic_normals(n_points, len(data.phi), data.shapes[0][0], generator, data.phi)
        return cls(data, likelihood, structure, base, data.phi.square().sum(0), options)

    def head(self, prior: GaussianPrior) -> Head:
        """The regularized loss under a prior."""
        return Head(self.data.phi, self.data.y, self.data.shapes, self.likelihood, prior)

    def curvature(self, q: Gaussian, like: Tensor | None = None) -> AbstractCurvature:
        """Σ E[Λ] ⊗ φφᵀ at unit temperature, in the form of the structure, in the precision of ``like``."""
        dtype = self.data.phi.dtype if like is None else like.dtype
        counts = len(self.data.phi), len(self.data.shapes)
        return FAMILIES[self.structure.name].make(q.sums, self.inputs, *counts, dtype)

    def posterior(self, q: Gaussian, prior: GaussianPrior) -> AbstractPrecision:
        """Σ⁻¹, with the prior."""
        return (self.curvature(q) * self.likelihood.scale.to(q.mean)).posterior(prior, **self.options)

    def averages(self, q: Gaussian, prior: GaussianPrior) -> Averages:
        """The bound and its derivatives: O(rows · C · (D C + points)) beside the factorization."""
        head, precision, scale = self.head(prior), self.posterior(q, prior), self.likelihood.scale.to(q.mean)
        n_points, n_rows, n_outputs = self.base.shape
        nll, gradients, hessians = torch.zeros_like(scale), [], []
        start = 0
        for size in chunks(n_rows, n_points * n_outputs):
            rows = slice(start, start + size)
            start += size
            f = head.outputs(q.mean, self.data.phi[rows])
            f = (f + self._spread(precision, rows)).flatten(0, 1)
            y = self.data.y[rows]
            y = y.repeat(n_points, *([1] * (y.dim() - 1)))
            nll = nll + self.likelihood.nll(f, y) / n_points
            gradients.append(self.likelihood.gradient(f, y).unflatten(0, (n_points, -1)).mean(0))
            hessians.append(self.likelihood.hessian(self.likelihood.observed(f, y)).averaged(n_points))
        delta = prior.diagonal()
        kl = precision.logdet() - prior.logdet() - prior.n_params + (delta * precision.diagonal_of_inverse()).sum()
        kl = 0.5 * (kl + prior.scatter(q.mean))
        gradient = scale * head.pull_back(torch.cat(gradients)) + delta * (q.mean - prior.mean)
        return Averages(float(-scale * nll - kl), gradient, OutputHessian.followed_by(hessians))

    def _spread(self, precision: AbstractPrecision, rows: slice) -> Float[Tensor, "points rows outputs"]:
        """The points, with the covariance of the outputs of each row."""
        blocks = self.head_blocks(rows)
        if isinstance(precision, DiagPrecision):
            return precision.block_variance(blocks).T.sqrt() * self.base[:, rows]
        return torch.einsum("nck,snk->snc", linalg.root(precision.block_covariance(blocks)), self.base[:, rows])

    def head_blocks(self, rows: slice) -> list[HeadBlock]:
        """Derivatives of the outputs of some rows."""
        return head_blocks(self.data.phi[rows], self.data.shapes)

    def start(self, prior: GaussianPrior) -> Gaussian:
        """The mode, with the curvature where all classes are equally likely: more than anywhere."""
        head = self.head(prior)
        theta = mode(head)
        zeros = torch.zeros_like(head.outputs(theta))
        hessian = self.likelihood.hessian(self.likelihood.observed(zeros, self.data.y))
        return Gaussian(theta, FAMILIES[self.structure.name].add_up(head.blocks(self.data.phi), hessian))

    def fit(
        self, prior: GaussianPrior, q: Gaussian, max_steps: int = MAX_STEPS, enough: float = 1e-2
    ) -> tuple[Gaussian, float]:
        """The best Gaussian under a prior, and its bound.

        Each step goes to ``m − H⁻¹ g`` and to the sums of E_q[Λ], with g and ``H = s Σ E_q[Λ] ⊗ φφᵀ + δ`` averaged over
        the Gaussian at hand; half of the way where the bound would fall. Natural-gradient descent. It ends where a step
        is worth less than ``enough`` nats.

        References
        ----------
        Opper & Archambeau (2009), "The variational Gaussian approximation revisited"; Khan & Lin (2017),
        "Conjugate-computation variational inference", arXiv:1703.04265; Nickisch & Rasmussen (2008), "Approximations
        for binary Gaussian process classification".
        """
        head, here, rate = self.head(prior), self.averages(q, prior), 1.0
        scale = self.likelihood.scale.to(q.mean)
        for _ in range(max_steps):
            direction = head.newton_direction(scaled(here.hessian, scale), here.gradient, 0.05)
            sums = FAMILIES[self.structure.name].add_up(head.blocks(self.data.phi), here.hessian)
            moved = q.towards(direction, sums, rate)
            there = self.averages(moved, prior)
            gain = there.elbo - here.elbo
            decrement = -0.5 * float(here.gradient @ direction)
            if gain >= -INCONSISTENT:
                q, here = moved, there
            if abs(gain) <= enough * rate and decrement <= enough:
                break
            rate = min(1.0, 1.5 * rate) if gain >= -INCONSISTENT else 0.5 * rate
        return q, here.elbo


def climb(
    solve: Callable[[int, Gaussian | None], tuple[Gaussian, float]], n_points: int
) -> dict[int, tuple[Gaussian, float]]:
    """Fit at points of an ascending grid until the best and both of its neighbors are among them.

    First some points from the strongest prior on, until the bound falls twice; then halves of the gaps beside the best.
    The bound has one maximum in log δ as a rule; where it has several, one of them is found.
    """
    found: dict[int, tuple[Gaussian, float]] = {}

    def best() -> int:
        return max(found, key=lambda index: found[index][1])

    q, n_coarse = None, min(n_points, N_COARSE)
    coarse = sorted({round(k * (n_points - 1) / max(n_coarse - 1, 1)) for k in range(n_coarse)}, reverse=True)
    for index in coarse:
        found[index] = solve(index, q)
        q = found[index][0]
        if best() not in list(found)[-2:]:
            break
    while True:
        center = best()
        below = [index for index in found if index < center]
        above = [index for index in found if index > center]
        gaps = [(max(below, default=center), center), (center, min(above, default=center))]
        halves = [(low + high) // 2 for low, high in gaps if high - low > 1]
        if not halves:
            return found
        for index in halves:
            found[index] = solve(index, found[center][0])


@dataclass(frozen=True)
class Best:
    """What a search over priors found."""

    best: int
    """Which of them."""
    values: Mapping[int, float]
    """The bound at those that were tried, by index, ascending."""
    fit: Fit
    """Mean and averaged curvature at the best."""


NOTES = ("Mean and covariance of the last layer are those of the variational fit.",)
POLISHING = 3 * MAX_STEPS
"""Steps at the prior that is chosen."""


def best_gaussian(
    problem: Problem, data: HeadData, precisions: Sequence[Tensor], seed: int, progress_bar: bool = False
) -> Best:
    """The Gaussian with the largest bound over prior precisions, ascending; computed in float64."""
    fit, likelihood, structure = problem.fit, problem.likelihood(), problem.structure
    wide = data.to(torch.zeros((), dtype=linalg.wide_dtype(fit.mean), device=fit.mean.device))
    turned, turn = (wide, None) if structure.name is not HessianStructure.KRON else in_eigenbasis(wide)
    variational = VariationalHead.of(turned, likelihood, structure, problem.options, seed)
    mean = problem.prior_mean.to(wide.phi)
    mean = mean if turn is None or mean.numel() == 1 else turned_weights(mean, turn, wide.shapes)

    def prior(index: int) -> GaussianPrior:
        return GaussianPrior(mean, precisions[index].to(wide.phi), problem.sizes)

    with tqdm(desc="[Variational inference]", unit="prior", disable=not progress_bar) as bar:

        def solve(index: int, q: Gaussian | None) -> tuple[Gaussian, float]:
            bar.update()
            return variational.fit(prior(index), variational.start(prior(index)) if q is None else q)

        found = climb(solve, len(precisions))
        best = max(found, key=lambda index: found[index][1])
        q, value = variational.fit(prior(best), found[best][0], POLISHING, 1e-3)
    values = {index: value if index == best else found[index][1] for index in sorted(found)}
    theta = q.mean if turn is None else turned_weights(q.mean, turn.T, wide.shapes)
    if turn is not None:
        variational = replace(variational, inputs=wide.phi.T @ wide.phi)
    moved = fit_at(fit, data, theta.to(fit.mean), likelihood, structure)
    return Best(best, values, replace(moved, curvature=variational.curvature(q, fit.mean), averaged=True))


def in_eigenbasis(data: HeadData) -> tuple[HeadData, Float[Tensor, "features features"]]:
    """Features in the eigenbasis of Σ φφᵀ, which Kronecker factors then need not look for again and again."""
    _, vectors = torch.linalg.eigh(data.phi.T @ data.phi)
    return replace(data, phi=data.phi @ vectors), vectors


def turned_weights(
    theta: Float[Tensor, " params"], turn: Float[Tensor, "features features"], shapes: Sequence[tuple[int, ...]]
) -> Float[Tensor, " params"]:
    """Weights ``W V`` of the same outputs at features ``φ V``; a bias stays."""
    n_weights = shapes[0][0] * shapes[0][1]
    return torch.cat([(theta[:n_weights].view(shapes[0]) @ turn).flatten(), theta[n_weights:]])


__all__ = ["FAMILIES", "Gaussian", "VariationalHead", "check_family", "climb"]
