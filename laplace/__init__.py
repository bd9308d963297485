"""Bayesian predictions from a network that is already trained.

Fit a Laplace approximation at the weights the network has, of its last layer or of all its weights, and get calibrated
probabilities, error bars, samples and the evidence.
"""

from laplace.baselaplace import (
    BaseLaplace,
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    KronLaplace,
    LowRankLaplace,
    ParametricLaplace,
)
from laplace.enums import (
    FunctionalApproximation,
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace.lllaplace import (
    BlockDiagLLLaplace,
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    KronLLLaplace,
    LLLaplace,
    LowRankLLLaplace,
)

from laplace.laplace import Laplace  # isort: skip - last: the function's module shares the package's name

__version__ = "0.1.0"

__all__ = [
    "BaseLaplace",
    "BlockDiagLLLaplace",
    "BlockDiagLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "EKFACLLLaplace",
    "EKFACLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FunctionalApproximation",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "LowRankLLLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
]
