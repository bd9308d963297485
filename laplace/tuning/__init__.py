"""Choosing hyperparameters (``optimize_prior_precision``, ``log_marginal_likelihood``)."""

from laplace.tuning.gridsearch import Loss, Validation, log_grid, search
from laplace.tuning.head import HeadData
from laplace.tuning.kfold import cross_validation_scores
from laplace.tuning.loo import leave_one_out_score, refitted_leave_one_out_scores
from laplace.tuning.marglik import log_likelihood, log_marginal_likelihood, optimize
from laplace.tuning.metrics import RunningNLLMetric, get_nll, validate

__all__ = [
    "HeadData",
    "Loss",
    "RunningNLLMetric",
    "Validation",
    "cross_validation_scores",
    "get_nll",
    "leave_one_out_score",
    "log_grid",
    "log_likelihood",
    "log_marginal_likelihood",
    "optimize",
    "refitted_leave_one_out_scores",
    "search",
    "validate",
]
