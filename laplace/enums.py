"""The option names a user can pass, each an enum whose members are plain strings.

``"kron" == HessianStructure.KRON`` holds, so either spelling works everywhere. What a name *does* lives in the package
of its keyword (see ``DESIGN.md``); this module only lists the choices and turns text into members.
"""

from __future__ import annotations

import difflib
from enum import Enum
from typing import TypeVar

from laplace.errors import UnsupportedError


class SubsetOfWeights(str, Enum):
    """Which weights are random."""

    ALL = "all"
    """Every parameter that requires a gradient."""
    LAST_LAYER = "last_layer"
    """The weight and bias of the last linear layer."""
    SUBNETWORK = "subnetwork"
    """The parameters at chosen indices."""


class HessianStructure(str, Enum):
    """How the P×P curvature is stored and solved."""

    FULL = "full"
    """A dense matrix."""
    KRON = "kron"
    """One Kronecker product per layer."""
    DIAG = "diag"
    """The diagonal alone."""
    BLOCKDIAG = "blockdiag"
    """One dense block per parameter group."""
    EKFAC = "ekfac"
    """The eigenbasis of one Kronecker product per layer, with the curvature's own diagonal in it."""
    LOWRANK = "lowrank"
    """Leading eigenpairs plus the prior."""
    GP = "gp"
    """No P×P matrix at all: a Gaussian process over the outputs."""


class FunctionalApproximation(str, Enum):
    """How a function-space posterior is made affordable."""

    SOD = "sod"
    """A subset of the data."""
    NYSTROM = "nystrom"
    """Nyström features (ELLA)."""
    VARIATIONAL = "variational"
    """Variational inducing points (VaLLA)."""


class Likelihood(str, Enum):
    """What the outputs of the network mean."""

    REGRESSION = "regression"
    """The mean of a Gaussian with standard deviation ``sigma_noise``."""
    CLASSIFICATION = "classification"
    """The logits of a categorical distribution."""
    REWARD_MODELING = "reward_modeling"
    """The scores of a Bradley–Terry preference model."""
    BINARY = "binary"
    """One logit: the probability of 1, against 0."""
    MULTILABEL = "multilabel"
    """One logit for each label, several of which may be right."""
    POISSON = "poisson"
    """The log rate of a count."""
    NEGATIVE_BINOMIAL = "negative_binomial"
    """The log mean of a count that varies more than a Poisson one."""
    HETEROSCEDASTIC_REGRESSION = "heteroscedastic_regression"
    """Means of Gaussians, and after them the logs of their variances."""

    def __str__(self) -> str:
        return self.value


class LinkApprox(str, Enum):
    """How a Gaussian over logits becomes class probabilities."""

    PROBIT = "probit"
    """Logits divided by √(1 + π/8 · variance), then softmax: needs variances only."""
    MC = "mc"
    """The average softmax of samples: exact as their number grows."""
    MF1 = "mf1"
    """Mean field: pairwise differences of logits, each with the sum of both variances."""
    MF2 = "mf2"
    """The same with covariances: the variance of each difference itself."""
    BRIDGE = "bridge"
    """The mean of the Dirichlet that the Laplace bridge assigns."""
    BRIDGE_NORM = "bridge_norm"
    """The Laplace bridge after normalizing the size of the variances."""


class PredType(str, Enum):
    """How the posterior over weights is pushed to the outputs."""

    GLM = "glm"
    """Through the linearized network: a Gaussian over outputs in closed form."""
    NN = "nn"
    """Through the network itself, one weight sample at a time."""
    GP = "gp"
    """Through the Gaussian process of the function-space estimators."""


class ForeignScore(str, Enum):
    """How foreign an input is; of all, more is more foreign."""

    FISHER = "fisher"
    """The doubt of the classifier and the density of the features together, by Fisher's method."""
    DENSITY = "density"
    """Minus the log density of the features; of a regression their Mahalanobis distance."""
    RELATIVE = "relative"
    """The relative Mahalanobis distance."""
    MAX_PROB = "max_prob"
    """One minus the largest probability of the prediction."""
    ENTROPY = "entropy"
    """Of the prediction, in nats."""
    MUTUAL_INFORMATION = "mutual_information"
    """Of prediction and weights, in nats: what the weights disagree about."""


class PriorStructure(str, Enum):
    """How many prior precisions there are."""

    SCALAR = "scalar"
    """One for all weights."""
    LAYERWISE = "layerwise"
    """One per parameter group (weight and bias are two groups)."""
    DIAG = "diag"
    """One per weight."""


class TuningMethod(str, Enum):
    """How the prior precision is chosen."""

    MARGLIK = "marglik"
    """By ascent on the log marginal likelihood: needs no validation data."""
    GRIDSEARCH = "gridsearch"
    """By the loss on validation data over a logarithmic grid."""
    LOO = "loo"
    """By the leave-one-out score of the training data over the grid, in closed form (last layer, full or diag)."""
    ELBO = "elbo"
    """By the evidence lower bound of a Gaussian fitted to the posterior of a classifier's last layer."""
    CV = "cv"
    """By the score of k folds of training features, the head estimated again for each (last layer)."""


class FeatureReduction(str, Enum):
    """How features ``[batch, positions, features]`` become ``[batch, features]``, as the model itself does it."""

    PICK_FIRST = "pick_first"
    """The first position (a classification token)."""
    PICK_LAST = "pick_last"
    """The last position."""
    AVERAGE = "average"
    """The mean over positions."""


class KfacApprox(str, Enum):
    """How Kronecker factors treat a weight that is used at several positions of a datum."""

    EXPAND = "expand"
    """Positions count as data."""
    REDUCE = "reduce"
    """Positions are averaged first."""


class CurvatureKind(str, Enum):
    """Which matrix a curvature back end computes; it decides how the matrix scales with the observation noise."""

    GGN = "ggn"
    """Generalized Gauss–Newton, Hessian, or Fisher sampled from the model: scales with 1/σ²."""
    EF = "ef"
    """Empirical Fisher, an outer product of gradients of the noisy likelihood: scales with 1/σ⁴."""


E = TypeVar("E", bound=Enum)


def choose(choices: type[E], value: object, keyword: str) -> E:
    """The enum member that a user's value (a member, or its text) stands for; ``keyword`` opens the error message."""
    try:
        return choices(value)
    except ValueError:
        names = [member.value for member in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"{keyword} must be one of {', '.join(map(repr, names))}; got {value!r}.{hint}"
        raise UnsupportedError(msg) from None
