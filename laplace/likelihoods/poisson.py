"""Counts: a Poisson distribution whose log rate is the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.enums import Likelihood, LinkApprox
from laplace.errors import InputError, NumericalWarning, warn
from laplace.likelihoods import quadrature
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, check_same_shape, datum_index
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsMoments, as_it_is
from laplace.types import Outputs, Scalar, Targets

LARGE = 20.0
"""Shape of a Gamma distribution from which log Γ is that of Stirling's series."""
STIRLING = ((12, 1, 1.0), (360, 3, -1.0), (1260, 5, 1.0), (1680, 7, -1.0))
"""Denominators, powers and signs of the series."""


@dataclass(frozen=True)
class PoissonLikelihood(PredictsMoments):
    """−log p(y|f) = e^f − y f + log y!, summed over outputs and tempered by 1/T.

    Attributes
    ----------
    temperature
        T.
    """

    temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.POISSON.value

    # -- fitting ------------------------------------------------------------------------------------------------------

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Of the counts, summed over rows and outputs."""
        return _nll(f, y).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """e^f − y, ``[rows, C]``."""
        return f.exp() - y

    def hessian(self, f: Outputs) -> OutputHessian:
        """diag(e^f)."""
        return OutputHessian(f.shape[-1], diagonal=f.exp())

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """diag(e^(f/2)), ``[rows, C, C]``."""
        return torch.diag_embed((f / 2).exp())

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at counts drawn from the rates, ``[samples, rows, C]``."""
        rate = f.exp().expand(n_samples, *f.shape)
        return rate - torch.poisson(rate, generator=generator)

    # -- predicting ---------------------------------------------------------------------------------------------------

    def expectation(self, f: Tensor) -> Tensor:
        """The rate, e^f."""
        return f.exp()

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Float[Tensor, "rows outputs"]:
        """The expected rate."""
        return (mean + variance / 2).exp()

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:  # noqa: ARG002
        """Mean and (co)variance of the rate, which is log-normal: exact."""
        return log_normal

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Of each count's marginal, summed: ``−log ∫ p(y|f) N(f) df`` by quadrature.

        To rounding for standard deviations of f up to 1, to 2e-4 nats at 3. Where functions were sampled, the rate is
        given a Gamma distribution with the moments of the samples, and the count a negative binomial one.
        """
        variance = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
        if link is as_it_is:
            return _negative_binomial_nll(mean, variance, y).sum()
        return _marginal_nll(mean, variance, y, 1.0).sum()

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """The log density."""
        return {"nll": self.predictive_nll}

    # -- variational inference ----------------------------------------------------------------------------------------

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """Counts are independent, given their rates."""
        return Ask.VARIANCE

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """Of each count's marginal, summed over outputs: at α = 0 in closed form, else by quadrature."""
        variance = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
        if alpha == 0:
            each = (mean + variance / 2).exp() - y * mean + torch.lgamma(y + 1)
            return self.scale * each.sum(-1)
        return _marginal_nll(mean, variance, y, alpha * self.scale).sum(-1) / alpha

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, counts in the shape of the outputs (or without the last axis, C = 1); flatten positions."""
        if y.shape == f.shape[:-1] and f.shape[-1] == 1:
            y = y.unsqueeze(-1)
        check_same_shape(f, y, "Counts")
        check_outputs(f)
        if y.is_complex() or y.dtype is torch.bool:
            msg = f"Counts must be numbers; got {y.dtype}."
            raise InputError(msg)
        linalg.check_finite(y, "Counts", "Leave those rows out of the data.")
        if bool((y < 0).any()) or (y.is_floating_point() and bool((y != y.round()).any())):
            msg = 'likelihood="poisson" takes counts: 0, 1, 2, … of any type; others came.'
            raise InputError(msg)
        flat = f.reshape(-1, f.shape[-1])
        return Positions(flat, y.reshape(flat.shape).to(f.dtype), datum=datum_index(len(f), len(flat), f.device))

    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of positions."""
        return y.numel() // n_outputs


def log_normal(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (co)variance of e^f for a Gaussian f: ``m_i = e^(μ_i + V_ii/2)``, ``m_i m_j (e^(V_ij) − 1)``."""
    if cov.dim() == mean.dim():
        rate = (mean + cov / 2).exp()
        spread = rate.square() * cov.expm1()
    else:
        rate = (mean + cov.diagonal(dim1=-2, dim2=-1) / 2).exp()
        spread = rate.unsqueeze(-1) * rate.unsqueeze(-2) * cov.expm1()
    if not bool(rate.detach().isfinite().all()) or not bool(spread.detach().isfinite().all()):
        msg = (
            "A predicted rate is too large for its type: the posterior is so wide that its exponential overflows. "
            "Choose the prior precision with tune(val_loader), or a larger one."
        )
        warn(msg, NumericalWarning)
    return rate, spread


def _nll(f: Tensor, y: Tensor) -> Tensor:
    """Of each count."""
    return f.exp() - y * f + torch.lgamma(y + 1)


def _marginal_nll(mean: Tensor, variance: Tensor, y: Tensor, power: float | Tensor) -> Tensor:
    """``−log E[p(y|f)^power]`` for each count."""
    return -quadrature.log_mean_exp(
        lambda f: -power * _nll(f, y),
        lambda f: power * (y - f.exp()),
        lambda f: power * f.exp(),
        mean,
        variance,
    )


def _negative_binomial_nll(rate: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Of counts whose rate has a Gamma distribution with this mean and variance."""
    shape = rate.square() / variance.clamp(min=torch.finfo(rate.dtype).eps * rate.square())
    # log Γ(s) − log Γ(s + y) + y log s, which tends to 0 as s grows: from 20 on by Stirling, without the difference.
    small, large = shape.clamp(max=LARGE), shape.clamp(min=LARGE)
    exact = torch.lgamma(small) - torch.lgamma(small + y) + y * small.log()
    series = [sign / (n * large**k) - sign / (n * (large + y) ** k) for n, k, sign in STIRLING]
    stirling = y - (large + y - 0.5) * torch.log1p(y / large) + sum(series)
    ratio = rate / shape
    growth = torch.where(shape < LARGE, exact, stirling)
    # s log(1 + m/s) tends to the rate m.
    return torch.lgamma(y + 1) + growth - y * rate.log() + (shape + y) * torch.log1p(ratio)
