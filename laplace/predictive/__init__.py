"""From weights to predictions (``pred_type=``, ``link_approx=``, ``joint=``, ``diagonal_output=``): pure functions."""

from laplace.predictive.linearization import FeatureLinearization, JacobianLinearization, Linearization
from laplace.predictive.pairs import compare
from laplace.predictive.pushforward import Options, functional_samples, predict

__all__ = [
    "FeatureLinearization",
    "JacobianLinearization",
    "Linearization",
    "Options",
    "compare",
    "functional_samples",
    "predict",
]
