"""The log marginal likelihood, and gradient ascent on it (``log_marginal_likelihood``, ``method="marglik"``).

Pure functions of a fit, a prior and a likelihood: the public methods assign what they are given, these do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from laplace.enums import CurvatureKind
from laplace.errors import InputError, NumericalWarning
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood
from laplace.prior import GaussianPrior
from laplace.types import Scalar


def log_likelihood(fit: Fit, likelihood: AbstractLikelihood) -> Scalar:
    """Log p(D | θ*) in nats: the tempered likelihood minus its (untempered) normalizer.

    Parameters
    ----------
    fit
        What was learned.
    likelihood
        With its noise and temperature; differentiable in the noise.

    Returns
    -------
    ``[]``.

    Notes
    -----
    Exact at the trained weights; O(1), from what ``fit`` summed.
    """
    return -likelihood.scale * fit.nll - likelihood.log_normalizer(fit.n_positions, fit.n_outputs)


def log_marginal_likelihood(
    fit: Fit, prior: GaussianPrior, likelihood: AbstractLikelihood, kind: CurvatureKind, **options: Any
) -> Scalar:
    """Laplace approximation of log p(D), in nats; differentiable in prior precision and noise.

    ``log p(D|θ*) − ½ (log|P| − log|P₀| + (θ* − μ₀)ᵀ P₀ (θ* − μ₀))``

    Parameters
    ----------
    fit
        What was learned.
    prior
        Over the same weights.
    likelihood
        With its noise and temperature.
    kind
        Which curvature the fit holds.
    **options
        Of the structure: ``damping``.

    Returns
    -------
    ``[]``.

    Notes
    -----
    Exact for a Gaussian likelihood with the full structure if the weights are the posterior mode. Its cost is that of
    the structure's ``posterior_logdet``.

    References
    ----------
    MacKay (1992), "A practical Bayesian framework for backpropagation networks"; Immer, Bauer, Fortuin, Rätsch & Khan
    (2021), "Scalable marginal likelihood estimation for model selection in deep learning". arXiv:2104.04975
    """
    curvature = fit.curvature * likelihood.curvature_scale(kind)
    log_det_ratio = curvature.posterior_logdet(prior, **options) - prior.logdet()
    return log_likelihood(fit, likelihood) - 0.5 * (log_det_ratio + prior.scatter(fit.mean))


def optimize(
    objective: Callable[[Tensor], Tensor],
    initial: Tensor,
    *,
    n_steps: int,
    lr: float,
    progress_bar: bool = False,
) -> tuple[Tensor, float]:
    """Maximize an objective over positive values by Adam on their logarithms.

    Parameters
    ----------
    objective
        Positive values → number to maximize.
    initial
        Where to start; not changed.
    n_steps
        Number of steps.
    lr
        Learning rate.
    progress_bar
        Show a progress bar.

    Returns
    -------
    The best values seen and their objective, which is never below that of the start.

    Raises
    ------
    InputError
        If the objective is not finite at the start.
    """
    log_values = initial.detach().log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([log_values], lr=lr, maximize=True)
    best_values, best = initial.detach().clone(), -float("inf")
    for step in trange(n_steps + 1, desc="[Optimizing the marginal likelihood]", disable=not progress_bar):
        with torch.enable_grad():
            value = objective(log_values.exp())
        current = float(value.detach())
        if current != current or abs(current) == float("inf"):
            if step == 0:
                msg = (
                    f"The log marginal likelihood is {current} at the initial prior precision. Pass another "
                    "init_prior_prec, or check the training data for extreme values."
                )
                raise InputError(msg)
            msg = f"The log marginal likelihood became {current} in step {step}; the best value before it is kept."
            warnings.warn(msg, NumericalWarning, stacklevel=2)
            break
        if current > best:
            best, best_values = current, log_values.detach().exp()
        if step < n_steps:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return best_values, best
