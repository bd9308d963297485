"""Forwarding addresses of helpers: linear algebra, priors, samples and scores."""

from laplace.likelihoods.draws import normal_samples
from laplace.linalg import block_diag, diagonal_add_scalar, invsqrt_precision, kron, symeig
from laplace.network.sampler import SoDSampler
from laplace.prior import expand_prior_precision, fix_prior_prec_structure, parameters_per_layer
from laplace.tuning.metrics import get_nll, validate

__all__ = [
    "SoDSampler",
    "block_diag",
    "diagonal_add_scalar",
    "expand_prior_precision",
    "fix_prior_prec_structure",
    "get_nll",
    "invsqrt_precision",
    "kron",
    "normal_samples",
    "parameters_per_layer",
    "symeig",
    "validate",
]
