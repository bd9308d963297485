"""Counts: a Poisson distribution whose log rate is the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg, pending
from laplace.enums import Likelihood, LinkApprox
from laplace.errors import InputError, NumericalWarning, ShapeError, warn
from laplace.likelihoods import quadrature
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, check_same_shape, datum_index, variance_of
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsMoments, as_it_is
from laplace.types import Outputs, Scalar, Targets

LARGE = 20.0
"""Shape of a Gamma distribution from which log Γ is that of Stirling's series."""
STIRLING = ((12, 1, 1.0), (360, 3, -1.0), (1260, 5, 1.0), (1680, 7, -1.0))
"""Denominators, powers and signs of the series."""


@dataclass(frozen=True)
class PoissonLikelihood(PredictsMoments):
    """−log p(y|f) = E e^f − y (f + log E) + log y!, summed over outputs and tempered by 1/T; E is the exposure.

    Targets are counts in the shape of the outputs, ``[batch, *positions, C]``, of exposure 1. With ``exposure=True``
    they are counts and exposures side by side, ``[batch, *positions, C, 2]`` (of one output also
    ``[batch, *positions, 2]``): a count of 3 in half a year is (3, 0.5), and its mean is half the rate of a year.
    Predictions are mean and (co)variance of the rates, e^f, which are those of exposure 1.

    Attributes
    ----------
    temperature
        T.
    exposure
        Whether targets come with exposures.
    """

    temperature: float | Tensor = 1.0
    exposure: bool = False

    name: ClassVar[str] = Likelihood.POISSON.value

    # -- of each count, with the log of its mean: what a distribution says --------------------------------------------

    def _nll(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y * f + torch.lgamma(y + 1)

    def _slope(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y

    def _curvature(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the same for every count
        return f.exp()

    def _fisher(self, f: Tensor) -> Tensor:
        return f.exp()

    def _mean_nll(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        return (mean + variance / 2).exp() - y * mean + torch.lgamma(y + 1)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(f.exp(), generator=generator)

    @property
    def _dispersion(self) -> float:
        """α, with Var(y|f) = μ + α μ²."""
        return 0.0

    # -- fitting ------------------------------------------------------------------------------------------------------

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Of the counts, summed over rows and outputs.

        In float64, where there is one: terms of the size of y log y cancel.
        """
        wide, y = widened(f, y)
        return self._nll(self.observed(wide, y), self._counts(y)).sum().to(f.dtype)

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Mean less count, ``[rows, C]``; of a dispersed count divided by 1 + α times the mean."""
        return self._slope(self.observed(f, y), self._counts(y))

    def observed(self, f: Outputs, y: Targets) -> Outputs:
        """f + log E, the log of the mean of each count."""
        return f + y[..., 1].to(f).log() if self.exposure else f

    def hessian(self, f: Outputs) -> OutputHessian:
        """diag(e^f); of dispersed counts diag(e^f / (1 + α e^f))."""
        return OutputHessian(f.shape[-1], diagonal=self._fisher(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Its root, ``[rows, C, C]``."""
        return torch.diag_embed(self._fisher(f).sqrt())

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at counts drawn from the rates, ``[samples, rows, C]``."""
        f = f.expand(n_samples, *f.shape)
        return self._slope(f, self._draw(f, generator))

    # -- predicting ---------------------------------------------------------------------------------------------------

    def expectation(self, f: Tensor) -> Tensor:
        """The rate, e^f."""
        return f.exp()

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:  # noqa: ARG002
        """Mean and (co)variance of the rate, which is log-normal: exact."""
        return log_normal

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Outputs:
        """E[e^f + α e^2f], of counts of exposure 1: in closed form."""
        return (mean + variance / 2).exp() + self._dispersion * (2 * mean + 2 * variance).exp()

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Of each count's marginal, summed: ``−log ∫ p(y|f) N(f) df`` by quadrature.

        To rounding for standard deviations of f up to 1, to 2e-4 nats at 3. Where functions were sampled, the rate is
        given a Gamma distribution with the moments of the samples, and the count a negative binomial one.
        """
        dtype, (mean, cov, y) = mean.dtype, widened(mean, cov, y)
        variance, count = variance_of(mean, cov), self._counts(y)
        if link is as_it_is:
            exposure = y[..., 1].to(mean) if self.exposure else torch.ones_like(mean)
            rate, spread = exposure * mean, exposure.square() * variance
            spread = spread + self._dispersion * (rate.square() + spread)
            return _negative_binomial_nll(rate, spread, count).sum().to(dtype)
        return self._marginal_nll(self.observed(mean, y), variance, count, 1.0).sum().to(dtype)

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """The log density."""
        return {"nll": self.predictive_nll}

    # -- variational inference ----------------------------------------------------------------------------------------

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """Counts are independent, given their rates."""
        return Ask.VARIANCE

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """Of each count's marginal, summed over outputs, by quadrature; at α = 0 of Poisson counts in closed form."""
        dtype, (mean, cov, y) = mean.dtype, widened(mean, cov, y)
        mean, variance, count = self.observed(mean, y), variance_of(mean, cov), self._counts(y)
        if alpha == 0:
            return (self.scale * self._mean_nll(mean, variance, count).sum(-1)).to(dtype)
        return (self._marginal_nll(mean, variance, count, alpha * self.scale).sum(-1) / alpha).to(dtype)

    def _marginal_nll(self, mean: Tensor, variance: Tensor, y: Tensor, power: float | Tensor) -> Tensor:
        """``−log E[p(y|f)^power]`` for each count."""
        return -quadrature.log_mean_exp(
            lambda f: -power * self._nll(f, y),
            lambda f: -power * self._slope(f, y),
            lambda f: power * self._curvature(f, y),
            mean,
            variance,
        )

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, counts in the shape of the outputs (or without the last axis, C = 1); flatten positions."""
        last = (2,) if self.exposure else ()
        if f.shape[-1] == 1 and y.shape == (*f.shape[:-1], *last):
            y = y.reshape(*f.shape, *last)
        self._check_shape(f, y)
        check_outputs(f)
        if y.is_complex() or y.dtype is torch.bool:
            msg = f"Counts must be numbers; got {y.dtype}."
            raise InputError(msg)
        linalg.check_finite(y, "Counts", "Leave those rows out of the data.")
        count = self._counts(y)
        broken = count < 0
        if y.is_floating_point():
            broken = broken | (count != count.round())
        msg = f'likelihood="{self.name}" takes counts: 0, 1, 2, … of any type; others came.'
        pending.refuse(broken.any(), InputError, lambda: msg)
        if self.exposure:
            exposure = y[..., 1]
            pending.refuse(
                ~(exposure > 0).all(),
                InputError,
                lambda least: (
                    f"Exposures must be greater than 0; the least is {least:g}. Where nothing was observed there is no "
                    "count: leave those rows out of the data."
                ),
                lambda: [exposure.min()],
            )
        flat = f.reshape(-1, f.shape[-1])
        y = y.reshape(*flat.shape, *last).to(f.dtype)
        return Positions(flat, y, datum=datum_index(len(f), len(flat), f.device))

    def _check_shape(self, f: Tensor, y: Tensor) -> None:
        if not self.exposure:
            check_same_shape(f, y, "Counts")
        elif y.shape != (*f.shape, 2):
            msg = (
                f"With exposure=True targets are counts and exposures side by side, {[*f.shape, 2]}; got "
                f"{list(y.shape)}. Make them by torch.stack([counts, exposures], -1)."
            )
            raise ShapeError(msg)

    def _counts(self, y: Tensor) -> Tensor:
        """Targets without their exposures."""
        return y[..., 0] if self.exposure else y

    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of positions."""
        return y.numel() // (2 * n_outputs if self.exposure else n_outputs)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the widest type of their device."""
    return tuple(tensor.to(linalg.wide_dtype(tensor)) for tensor in tensors)


def log_normal(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (co)variance of e^f for a Gaussian f: ``m_i = e^(μ_i + V_ii/2)``, ``m_i m_j (e^(V_ij) − 1)``."""
    if cov.dim() == mean.dim():
        rate = (mean + cov / 2).exp()
        spread = rate.square() * cov.expm1()
    else:
        rate = (mean + cov.diagonal(dim1=-2, dim2=-1) / 2).exp()
        spread = rate.unsqueeze(-1) * rate.unsqueeze(-2) * cov.expm1()
    msg = (
        "A predicted rate is too large for its type: the posterior is so wide that its exponential overflows. "
        "Choose the prior precision with tune(val_loader), or a larger one."
    )
    finite = rate.detach().isfinite().all() & spread.detach().isfinite().all()
    pending.when(~finite, lambda: warn(msg, NumericalWarning))
    return rate, spread


def _negative_binomial_nll(rate: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Of counts whose rate has a Gamma distribution with this mean and variance."""
    shape = rate.square() / variance.clamp(min=torch.finfo(rate.dtype).eps * rate.square())
    # s log(1 + m/s) tends to the rate m.
    return log_ways(shape, y) - y * rate.log() + (shape + y) * torch.log1p(rate / shape)


def log_ways(shape: Tensor, y: Tensor) -> Tensor:
    """``log y! + log Γ(s) − log Γ(s + y) + y log s`` of a negative binomial distribution.

    But for log y! it tends to 0 as s grows: from 20 on by Stirling's series, without the difference.
    """
    small, large = shape.clamp(max=LARGE), shape.clamp(min=LARGE)
    exact = torch.lgamma(small) - torch.lgamma(small + y) + y * small.log()
    series = [sign / (n * large**k) - sign / (n * (large + y) ** k) for n, k, sign in STIRLING]
    stirling = y - (large + y - 0.5) * torch.log1p(y / large) + sum(series)
    return torch.lgamma(y + 1) + torch.where(shape < LARGE, exact, stirling)
