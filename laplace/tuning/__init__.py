"""Choosing hyperparameters (``optimize_prior_precision``, ``log_marginal_likelihood``)."""

from laplace.tuning.gridsearch import Loss, Validation, log_grid, search
from laplace.tuning.marglik import log_likelihood, log_marginal_likelihood, optimize
from laplace.tuning.metrics import RunningNLLMetric, get_nll, validate

__all__ = [
    "Loss",
    "RunningNLLMetric",
    "Validation",
    "get_nll",
    "log_grid",
    "log_likelihood",
    "log_marginal_likelihood",
    "optimize",
    "search",
    "validate",
]
