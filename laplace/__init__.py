"""Bayesian predictions from a network that is already trained.

Fit a Laplace approximation at the weights the network has, of its last layer, of all its weights or of chosen ones,
and get calibrated probabilities, error bars, samples and the evidence.
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
from laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

from laplace.laplace import Laplace  # isort: skip - last: the function's module shares the package's name

__version__ = "0.1.0"

__all__ = [
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FullSubnetLaplace",
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
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
]
