"""Counts that vary more than those of a Poisson distribution: a negative binomial one whose log mean is the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace import checks, linalg
from laplace.enums import Likelihood
from laplace.likelihoods import quadrature
from laplace.likelihoods.poisson import PoissonLikelihood, log_ways


@dataclass(frozen=True)
class NegativeBinomialLikelihood(PoissonLikelihood):
    """Counts with mean μ = E e^f and variance μ + α μ², tempered by 1/T; E is the exposure, α the dispersion.

    With r = 1/α: ``−log p(y|f) = (y + r) log(1 + α μ) − y log(α μ) − log Γ(y + r) + log Γ(r) + log y!``. It is a
    Poisson distribution whose rate has a Gamma one, and tends to that of the rate e^f as α falls to 0. Targets,
    exposures and predictions are those of ``PoissonLikelihood``; the curvature is the Fisher information,
    μ / (1 + α μ), which depends on no count and is positive.

    Attributes
    ----------
    temperature
        T.
    exposure
        Whether targets come with exposures.
    dispersion
        α, a positive number that is not learned; 1 unless given. Estimate it on training data, for example by the
        moments: ``((y − μ)² − μ).sum() / (μ²).sum()`` with the network's means μ.
    """

    dispersion: float = 1.0

    name: ClassVar[str] = Likelihood.NEGATIVE_BINOMIAL.value

    def __post_init__(self) -> None:
        """Check the dispersion."""
        checks.number("dispersion", self.dispersion, positive=True)

    def _excess(self, f: Tensor) -> Tensor:
        """log α μ, whose logistic function is the probability that the distribution has for a parameter."""
        return f + linalg.number(self.dispersion, f.device, f.dtype).log()

    def _nll(self, f: Tensor, y: Tensor) -> Tensor:
        r = linalg.number(1 / self.dispersion, f.device, f.dtype)
        return (y + r) * F.softplus(self._excess(f)) - y * f + log_ways(r, y)

    def _slope(self, f: Tensor, y: Tensor) -> Tensor:
        z = self._excess(f)
        return torch.sigmoid(z) / self.dispersion - y * torch.sigmoid(-z)

    def _curvature(self, f: Tensor, y: Tensor) -> Tensor:
        z = self._excess(f)
        return (y + 1 / self.dispersion) * torch.sigmoid(z) * torch.sigmoid(-z)

    def _mean_nll(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """By quadrature: to rounding for standard deviations of f up to 1, to 1e-6 (y + r) nats at 3."""
        return quadrature.mean(lambda f: self._nll(f, y), mean, variance)

    def _fisher(self, f: Tensor) -> Tensor:
        return torch.sigmoid(self._excess(f)) / self.dispersion

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        r = 1 / self.dispersion
        gamma = torch._standard_gamma(torch.full_like(f, r), generator=generator)  # pyright: ignore[reportPrivateUsage]
        return torch.poisson(f.exp() * gamma / r, generator=generator)

    @property
    def _dispersion(self) -> float:
        return self.dispersion


__all__ = ["NegativeBinomialLikelihood"]
