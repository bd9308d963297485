"""A sparse Gaussian process around the outputs of a network (VaLLA): pure mathematics.

Prior ``GP(f*, J Jᵀ / δ)``. At M inducing points, one output each, ``J_Z J_Zᵀ = R Rᵀ``, and features are
``φ(x) = J(x) J_Zᵀ R⁻ᵀ``. The posterior keeps the network as its mean; its covariance is

``J Jᵀ/δ − φ φᵀ/δ + φ (A + δ I)⁻¹ φᵀ``,  ``A = L Lᵀ``,

which is ``K_xx − K_xZ (A'⁻¹ + K_ZZ)⁻¹ K_Zx`` with ``A' = R⁻ᵀ A R⁻¹`` and K the kernel with its prior. In this form the
best A of a Gaussian likelihood does not depend on the prior: ``Σ φᵀ Λ φ / (σ² T)``.

References
----------
Ortega, Rodríguez Santana & Hernández-Lobato (2024), "Variational linearized Laplace approximation for Bayesian deep
learning". arXiv:2302.12565; Titsias (2009), "Variational learning of inducing variables in sparse Gaussian processes".
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.errors import NotPositiveDefiniteError, NumericalWarning, warn
from laplace.gp.derivatives import InducingPoints, Jacobian
from laplace.gp.posterior import FeatureMap, FeaturePrecision
from laplace.likelihoods import AbstractLikelihood, Ask
from laplace.types import Outputs, Scalar, Targets


def kernel_factor(points: InducingPoints) -> Float[Tensor, "points points"]:
    """R, lower triangular, with ``R Rᵀ = J_Z J_Zᵀ``."""
    kernel = points.gram()
    causes = "Likely causes: inducing points that repeat others, or more of them than random weights. Use fewer."
    if not bool(kernel.isfinite().all()):
        which = (~kernel.diagonal().isfinite()).nonzero().flatten().tolist()[:5]
        msg = (
            f"The kernel of the inducing points is not finite (at the points {which}): there is none to build on. Look "
            "for NaN or infinite values in their inputs, in the weights, and in derivatives of the outputs."
        )
        raise NotPositiveDefiniteError(msg)
    if not bool((kernel.diagonal() > 0).all()):
        which = (kernel.diagonal() <= 0).nonzero().flatten().tolist()[:5]
        msg = (
            f"The outputs do not depend on the random weights at the inducing points {which}: there is no kernel to "
            "build on. Choose other inducing points."
        )
        raise NotPositiveDefiniteError(msg)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            factor = linalg.cholesky(kernel, "kernel of the inducing points")
    except NotPositiveDefiniteError as error:
        smallest = float(torch.linalg.eigvalsh(kernel.double()).min())
        msg = (
            f"The kernel of the {len(kernel)} inducing points is not positive definite (smallest eigenvalue "
            f"{smallest:.3e}), and no small jitter makes it so. {causes}"
        )
        raise NotPositiveDefiniteError(msg) from error
    jitter = float((factor @ factor.T - kernel).diagonal().mean())
    if caught:
        msg = (
            f"The kernel of the {len(kernel)} inducing points is not positive definite to working precision; a jitter "
            f"of about {jitter:.2e} was added to its diagonal. {causes}"
        )
        warn(msg, NumericalWarning)
    return factor


@dataclass(frozen=True)
class InducingMap(FeatureMap):
    """``φ(x) = J(x) J_Zᵀ R⁻ᵀ``, ``[rows, C, M]``."""

    points: InducingPoints
    """The inducing points."""
    kernel_root: Float[Tensor, "points points"]
    """R, ``[M, M]``."""

    has_residual = True
    """Away from the inducing points the posterior is the prior."""

    def features(self, at: Jacobian) -> Float[Tensor, "rows outputs points"]:
        """By the kernel with the inducing points."""
        cross = at.cross(self.points)
        flat = torch.linalg.solve_triangular(self.kernel_root, cross.flatten(0, 1).T, upper=False).T
        return flat.reshape(cross.shape)


def triangular_root(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """L, lower triangular, with ``L Lᵀ`` a positive semi-definite, possibly singular, matrix."""
    values, vectors = linalg.eigh(matrix, "data term of the inducing points")
    return torch.linalg.qr((vectors * values.sqrt()).T).R.T


def kl_divergence(root: Float[Tensor, "points points"], delta: Tensor, shift: Scalar) -> Scalar:
    """From the prior to the posterior over functions, in nats.

    ``½ [log |A + δ I| − M log δ − tr(A (A + δ I)⁻¹)] + ½ δ ‖θ* − μ₀‖²``. The last term is what it costs that the mean
    is the network and not the prior mean: with it, at α = 0, the objective bounds the evidence also as a function of δ;
    without, the largest δ would always be best.
    """
    factor = FeaturePrecision.of(root @ root.T, delta).factor
    inverse_trace = torch.cholesky_inverse(factor).diagonal().sum()
    # tr(A (A + δ I)⁻¹) = M − δ tr((A + δ I)⁻¹)
    explained = len(root) - delta * inverse_trace
    log_det = 2 * factor.diagonal().log().sum() - len(root) * delta.log()
    return 0.5 * (log_det - explained + delta * shift)


@dataclass(frozen=True)
class Statistics:
    """All that training needs of a batch: nothing in it changes with the parameters."""

    f: Outputs
    """Outputs of the unmasked rows, ``[rows, C]``; for pairs the logits (Δ, 0)."""
    y: Targets
    """Their targets."""
    phi: Float[Tensor, "rows outputs points"]
    """Features, ``[rows, C, M]``."""
    left: Tensor
    """What they leave of ``J Jᵀ``, ``[rows, C, C]``; where variances are enough its diagonal ``[rows, C]``."""

    @property
    def size(self) -> int:
        """How many numbers it keeps."""
        return self.f.numel() + self.y.numel() + self.phi.numel() + self.left.numel()

    @cached_property
    def left_root(self) -> Float[Tensor, "rows outputs outputs"]:
        """A root of what is left, for samples."""
        return linalg.root(self.left)

    def covariance(self, precision: FeaturePrecision) -> Tensor:
        """Of the outputs: covariances ``[rows, C, C]``, or variances ``[rows, C]`` where those of the rest are kept."""
        half = precision.whitened(self.phi)
        known = half.square().sum(-1) if self.left.dim() == half.dim() - 1 else half @ half.mT
        return self.left / precision.delta + known

    def samples(
        self, precision: FeaturePrecision, n_samples: int, generator: torch.Generator
    ) -> Float[Tensor, "samples rows outputs"]:
        """Draws of the outputs, differentiable in the precision."""
        dtype, device = self.f.dtype, self.f.device
        noise = torch.randn(n_samples, *self.f.shape, generator=generator, dtype=dtype, device=device)
        left = torch.einsum("nck,snk->snc", self.left_root, noise) / precision.delta.sqrt()
        return self.f + left + torch.einsum("nck,sk->snc", self.phi, precision.sample(n_samples, generator))


def needs_covariance(likelihood: AbstractLikelihood, alpha: float, n_samples: int) -> bool:
    """Whether the objective needs covariances between outputs: variances are enough for the probit of a softmax."""
    return bool(n_samples) or likelihood.for_targets().energy_asks(alpha) is Ask.COVARIANCE


@dataclass(frozen=True)
class Objective:
    """The α-energy of the posterior, to be minimized: at α = 0 the negative evidence lower bound."""

    alpha: float
    """α in [0, 1]."""
    n_rows: int
    """Number of unmasked rows in all training data."""
    shift: Scalar
    """``‖θ* − μ₀‖²``."""
    n_samples: int
    """Of the logits; 0 for the closed form."""
    generator: torch.Generator
    """Source of their randomness."""

    def data_term(
        self, batch: Statistics, root: Tensor, delta: Tensor, likelihood: AbstractLikelihood
    ) -> Float[Tensor, " rows"]:
        """The energy of each row, in nats, without the normalizer of the likelihood."""
        precision = FeaturePrecision.of(root @ root.T, delta)
        likelihood = likelihood.for_targets()
        if self.n_samples:
            samples = batch.samples(precision, self.n_samples, self.generator)
            return likelihood.sampled_energy(samples, batch.y, self.alpha)
        return likelihood.energy(batch.f, batch.covariance(precision), batch.y, self.alpha)

    def __call__(self, batch: Statistics, root: Tensor, delta: Tensor, likelihood: AbstractLikelihood) -> Scalar:
        """The objective, estimated from a batch, in nats."""
        rows = self.data_term(batch, root, delta, likelihood)
        data = self.n_rows / len(rows) * rows.sum()
        normalizer = likelihood.log_normalizer(self.n_rows, batch.f.shape[-1])
        return data + normalizer + kl_divergence(root, delta, self.shift)
