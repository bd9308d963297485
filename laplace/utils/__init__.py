"""Forwarding addresses: names that code written for laplace-torch imports from ``laplace.utils``. Imports only."""

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
from laplace.network.feature_extractor import FeatureExtractor
from laplace.structures import Kron, KronDecomposed

__all__ = [
    "FeatureExtractor",
    "FunctionalApproximation",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "Likelihood",
    "LinkApprox",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
]
