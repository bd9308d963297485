"""Bayesian predictions from a network that is already trained.

Fit a Laplace approximation at the weights the network has, of its last layer or of all its weights, and get calibrated
probabilities, error bars, samples and the evidence.
"""

from laplace.baselaplace import BaseLaplace, DiagLaplace, FullLaplace, KronLaplace, ParametricLaplace
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
from laplace.lllaplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace, LLLaplace

# Last: each shares its name with the module it lives in, which it stands before from here on.
from laplace.laplace import Laplace  # isort: skip
from laplace.marglik_training import marglik_training  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
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
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
    "marglik_training",
]
