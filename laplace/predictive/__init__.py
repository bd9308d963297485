"""From weights to predictions (``pred_type=``, ``link_approx=``, ``joint=``, ``diagonal_output=``): pure functions."""

from laplace.predictive.linearization import Linearization, NetworkLinearization
from laplace.predictive.pairs import compare
from laplace.predictive.prediction import Prediction
from laplace.predictive.pushforward import Options, functional_samples, predict

__all__ = [
    "Linearization",
    "NetworkLinearization",
    "Options",
    "Prediction",
    "compare",
    "functional_samples",
    "predict",
]
