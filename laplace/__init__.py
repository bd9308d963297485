"""Bayesian predictions from a network that is already trained.

Fit a Laplace approximation at the weights the network has, of its last layer, of all its weights or of chosen ones,
and get calibrated probabilities, error bars, samples and the evidence.
"""

from laplace.baselaplace import (
    ELLA,
    LLELLA,
    BaseFunctionalLaplace,
    BaseLaplace,
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LLVaLLA,
    ParametricLaplace,
    VaLLA,
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
from laplace.lllaplace import DiagLLLaplace, FullLLLaplace, FunctionalLLLaplace, KronLLLaplace, LLLaplace
from laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

# Last: each shares its name with the module it lives in, which it stands before from here on.
from laplace.laplace import Laplace  # isort: skip
from laplace.marglik_training import marglik_training  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "ELLA",
    "LLELLA",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FullSubnetLaplace",
    "FunctionalApproximation",
    "FunctionalLLLaplace",
    "FunctionalLaplace",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "LLVaLLA",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
    "VaLLA",
    "marglik_training",
]
