"""From weights to predictions (``pred_type=``, ``link_approx=``, ``joint=``, ``diagonal_output=``): pure functions."""

from laplace.predictive.links import LINKS
from laplace.predictive.pairs import compare
from laplace.predictive.pushforward import Linearization, Options, functional_samples, predict

__all__ = ["LINKS", "Linearization", "Options", "compare", "functional_samples", "predict"]
