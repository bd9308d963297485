"""Choosing hyperparameters (``optimize_prior_precision``, ``tune``, ``log_marginal_likelihood``)."""

from laplace.tuning.cached import CachedData
from laplace.tuning.gridsearch import log_grid, search
from laplace.tuning.joint import LIMITS, Joint, tune
from laplace.tuning.marglik import BOUNDS, maximize_evidence, optimize
from laplace.tuning.metrics import RunningNLLMetric, get_nll, validate
from laplace.tuning.problem import Problem, log_likelihood, log_marginal_likelihood
from laplace.tuning.result import Tuning
from laplace.tuning.scores import Loss, RunningMetric, Score, choose_score

__all__ = [
    "BOUNDS",
    "LIMITS",
    "CachedData",
    "Joint",
    "Loss",
    "Problem",
    "RunningMetric",
    "RunningNLLMetric",
    "Score",
    "Tuning",
    "choose_score",
    "get_nll",
    "log_grid",
    "log_likelihood",
    "log_marginal_likelihood",
    "maximize_evidence",
    "optimize",
    "search",
    "tune",
    "validate",
]
