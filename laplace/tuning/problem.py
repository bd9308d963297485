"""What tuning sees of an estimator: the fit, and how hyperparameters enter prior, likelihood and posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from laplace.enums import CurvatureKind
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, AbstractPrecision
from laplace.structures.basis import Basis
from laplace.types import Scalar


def _any_prior(prior: GaussianPrior) -> None:
    """A structure that takes every prior."""


@dataclass(frozen=True)
class Problem:
    """A fit and everything fixed about it. Pure: nothing here changes the estimator."""

    fit: Fit
    """What was learned."""
    prior_mean: Tensor
    """μ₀, ``[]`` or ``[P]``."""
    sizes: tuple[int, ...]
    """Number of weights in each parameter group."""
    kind: CurvatureKind
    """Which curvature the fit holds."""
    make_likelihood: Callable[[Tensor, Any], AbstractLikelihood]
    """From noise σ and output temperature to the likelihood."""
    sigma_noise: Tensor
    output_temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the structure's posterior: ``damping``."""
    structure: type[AbstractCurvature] = AbstractCurvature
    """How the curvature is stored where it is taken again, at other weights."""
    check_prior: Callable[[GaussianPrior], None] = _any_prior
    """Raises if the structure cannot take a prior."""

    def prior(self, precision: Tensor) -> GaussianPrior:
        """The prior with these precisions, ``[1]``, ``[n_layers]`` or ``[P]``."""
        return GaussianPrior(self.prior_mean, precision, self.sizes)

    def likelihood(self, sigma_noise: Tensor | None = None, output_temperature: Any = None) -> AbstractLikelihood:
        """The likelihood; what is not given is as it is at present."""
        sigma = self.sigma_noise if sigma_noise is None else sigma_noise
        return self.make_likelihood(
            sigma, self.output_temperature if output_temperature is None else output_temperature
        )

    def curvature(self, likelihood: AbstractLikelihood) -> AbstractCurvature:
        """The curvature at the noise and temperature of a likelihood."""
        return self.fit.scaled(likelihood.curvature_scale(self.kind))

    def basis(self, precision: Tensor) -> Basis | None:
        """Coordinates that posteriors with as many precisions share, whatever the noise; ``None`` without any."""
        if self.sigma_noise.dim():
            return None  # each output scales its weights in its own way
        return self.fit.curvature.basis(self.prior(precision))

    def posterior(
        self, precision: Tensor, likelihood: AbstractLikelihood, basis: Basis | None = None
    ) -> AbstractPrecision:
        """The posterior precision, in the coordinates of ``basis`` where there is one; differentiable."""
        curvature, prior = self.curvature(likelihood), self.prior(precision)
        if basis is not None:
            return basis.posterior(curvature, prior, **self.options)
        return curvature.posterior(prior, **self.options)

    def log_likelihood(self, likelihood: AbstractLikelihood) -> Scalar:
        """Log p(D | θ*) in nats: the tempered likelihood minus its (untempered) normalizer."""
        return log_likelihood(self.fit, likelihood)

    def evidence(self, precision: Tensor, sigma_noise: Tensor | None = None) -> Scalar:
        """Log marginal likelihood, in nats; differentiable in both."""
        likelihood = self.likelihood(sigma_noise)
        return log_marginal_likelihood(self.fit, self.prior(precision), likelihood, self.kind, **self.options)

    def residual_noise(self, *, per_output: bool = False) -> Tensor:
        """Root mean squared residual of the training data, ``[]`` or ``[C]``: the noise of most likelihood."""
        fit, nll, likelihood = self.fit, self.fit.known_nll, self.likelihood()
        if per_output:
            return likelihood.residual_noise(fit.nll_of_outputs, fit.n_positions)
        return likelihood.residual_noise(nll, fit.n_positions * fit.n_outputs)


def log_likelihood(fit: Fit, likelihood: AbstractLikelihood) -> Scalar:
    """Log p(D | θ*) in nats: the tempered likelihood minus its (untempered) normalizer.

    Exact at the trained weights; O(1), from what ``fit`` summed.
    """
    scale, nll = likelihood.scale, fit.known_nll
    if scale.dim() and fit.head is not None:
        nll = (scale * fit.nll_of_outputs).sum()
    else:
        nll = (fit.common(scale) if fit.head is None else scale) * nll
    return -nll - likelihood.log_normalizer(fit.n_positions, fit.n_outputs)


def log_marginal_likelihood(
    fit: Fit, prior: GaussianPrior, likelihood: AbstractLikelihood, kind: CurvatureKind, **options: Any
) -> Scalar:
    """Laplace approximation of log p(D), in nats; differentiable in prior precision and noise.

    ``log p(D|θ*) − ½ (log|P| − log|P₀| + (θ* − μ₀)ᵀ P₀ (θ* − μ₀))``

    Exact for a Gaussian likelihood with the full structure if the weights are the posterior mode. Its cost is that of
    the structure's ``posterior_logdet``.

    References
    ----------
    MacKay (1992), "A practical Bayesian framework for backpropagation networks"; Immer, Bauer, Fortuin, Rätsch & Khan
    (2021), "Scalable marginal likelihood estimation for model selection in deep learning". arXiv:2104.04975
    """
    curvature = fit.scaled(likelihood.curvature_scale(kind))
    log_det_ratio = curvature.log_det_ratio(prior, **options)
    return log_likelihood(fit, likelihood) - 0.5 * (log_det_ratio + prior.scatter(fit.mean))


__all__ = ["Problem", "log_likelihood", "log_marginal_likelihood"]
