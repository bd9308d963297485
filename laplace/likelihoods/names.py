"""What signatures say of ``likelihood=``, so that type checkers know what a prediction is.

``L`` is the likelihood that an estimator was given: ``KronLLLaplace[Literal["classification"]]`` returns probabilities
when it is called, ``KronLLLaplace[Literal["regression"]]`` mean and covariance.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from typing_extensions import TypeVar

from laplace.enums import Likelihood
from laplace.likelihoods.base import AbstractLikelihood
from laplace.likelihoods.predictions import PredictsMoments, PredictsProbabilities

ProbabilitiesLike: TypeAlias = (
    Literal[
        "classification", "binary", "multilabel", Likelihood.CLASSIFICATION, Likelihood.BINARY, Likelihood.MULTILABEL
    ]
    | PredictsProbabilities
)
"""Predictions are probabilities, one tensor."""
MomentsLike: TypeAlias = (
    Literal[
        "regression",
        "reward_modeling",
        "poisson",
        "negative_binomial",
        "heteroscedastic_regression",
        Likelihood.REGRESSION,
        Likelihood.REWARD_MODELING,
        Likelihood.POISSON,
        Likelihood.NEGATIVE_BINOMIAL,
        Likelihood.HETEROSCEDASTIC_REGRESSION,
    ]
    | PredictsMoments
)
"""Predictions are mean and covariance; of pairs (``fitting=True``) they are probabilities."""
LikelihoodLike: TypeAlias = ProbabilitiesLike | MomentsLike | AbstractLikelihood
"""What the keyword takes. One of a user's own is given as an object, also where it has a name."""

L = TypeVar("L", bound=LikelihoodLike, default=LikelihoodLike)
"""Of functions."""
L_co = TypeVar("L_co", bound=LikelihoodLike, default=LikelihoodLike, covariant=True)
"""Of classes."""

__all__ = ["L", "L_co", "LikelihoodLike", "MomentsLike", "ProbabilitiesLike"]
