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
from laplace.likelihoods.draws import normal_samples
from laplace.linalg import block_diag, diagonal_add_scalar, invsqrt_precision, kron, symeig
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.sampler import SoDSampler
from laplace.network.scoremask import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    RandomSubnetMask,
    ScoreBasedSubnetMask,
)
from laplace.network.subnetmask import LastLayerSubnetMask, ModuleNameSubnetMask, ParamNameSubnetMask, SubnetMask
from laplace.network.swag import fit_diagonal_swag_var
from laplace.prior import expand_prior_precision, fix_prior_prec_structure, parameters_per_layer
from laplace.structures import Kron, KronDecomposed
from laplace.tuning.metrics import RunningNLLMetric, get_nll, validate

__all__ = [
    "FeatureExtractor",
    "FunctionalApproximation",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "Likelihood",
    "LinkApprox",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "PredType",
    "PriorStructure",
    "RandomSubnetMask",
    "RunningNLLMetric",
    "ScoreBasedSubnetMask",
    "SoDSampler",
    "SubnetMask",
    "SubsetOfWeights",
    "TuningMethod",
    "block_diag",
    "diagonal_add_scalar",
    "expand_prior_precision",
    "fit_diagonal_swag_var",
    "fix_prior_prec_structure",
    "get_nll",
    "invsqrt_precision",
    "kron",
    "normal_samples",
    "parameters_per_layer",
    "symeig",
    "validate",
]
