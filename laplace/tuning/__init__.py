"""Choosing hyperparameters (``optimize_prior_precision``, ``tune``, ``log_marginal_likelihood``)."""

from laplace.tuning.cached import CachedData
from laplace.tuning.gridsearch import log_grid, search
from laplace.tuning.head import HeadData, check_same_data, fit_at
from laplace.tuning.joint import LIMITS, Joint, tune
from laplace.tuning.kfold import cross_validation_scores
from laplace.tuning.loo import leave_one_out_score, refitted_leave_one_out_scores
from laplace.tuning.marglik import BOUNDS, maximize_evidence, optimize
from laplace.tuning.methods import METHODS, REFITS, by_validation
from laplace.tuning.metrics import RunningNLLMetric, get_nll, validate
from laplace.tuning.problem import Problem, log_likelihood, log_marginal_likelihood
from laplace.tuning.recipe import Candidate, Chosen, Recipe, Validation, checked_recipe, refitted_heads
from laplace.tuning.result import Tuning
from laplace.tuning.scores import Loss, RunningMetric, Score, choose_score, seed_of
from laplace.tuning.settings import Noise, Settings

__all__ = [
    "BOUNDS",
    "LIMITS",
    "METHODS",
    "REFITS",
    "CachedData",
    "Candidate",
    "Chosen",
    "HeadData",
    "Joint",
    "Loss",
    "Noise",
    "Problem",
    "Recipe",
    "RunningMetric",
    "RunningNLLMetric",
    "Score",
    "Settings",
    "Tuning",
    "Validation",
    "by_validation",
    "check_same_data",
    "checked_recipe",
    "choose_score",
    "cross_validation_scores",
    "fit_at",
    "get_nll",
    "leave_one_out_score",
    "log_grid",
    "log_likelihood",
    "log_marginal_likelihood",
    "maximize_evidence",
    "optimize",
    "refitted_heads",
    "refitted_leave_one_out_scores",
    "search",
    "seed_of",
    "tune",
    "validate",
]
