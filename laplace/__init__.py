"""Bayesian predictions from a network that is already trained.

Fit a Laplace approximation at the weights the network has, of its last layer, of all its weights or of chosen ones,
and get calibrated probabilities, error bars, samples and the evidence.
"""

from laplace.baselaplace import (
    ELLA,
    LLELLA,
    BaseFunctionalLaplace,
    BaseLaplace,
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LLVaLLA,
    LowRankLaplace,
    ParametricLaplace,
    VaLLA,
)
from laplace.baselaplace.plan import Plan
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
    FunctionalLLLaplace,
    KronLLLaplace,
    LLLaplace,
    LowRankLLLaplace,
)
from laplace.optional import warn_of_namesake
from laplace.predictive import Prediction
from laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

# Last: each shares its name with the module it lives in, which it stands before from here on.
from laplace.laplace import Laplace  # isort: skip
from laplace.loading import load  # isort: skip
from laplace.marglik_training import marglik_training  # isort: skip

__version__ = "0.1.0"

warn_of_namesake()
del warn_of_namesake

__all__ = [
    "ELLA",
    "LLELLA",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "BlockDiagLLLaplace",
    "BlockDiagLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "EKFACLLLaplace",
    "EKFACLaplace",
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
    "LowRankLLLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
    "Plan",
    "PredType",
    "Prediction",
    "PriorStructure",
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
    "VaLLA",
    "load",
    "marglik_training",
]
