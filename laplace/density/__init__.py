"""The density of features in the training data, and scores of how foreign a row is.

Sums of features add up while data are read (``Accumulator``, ``ClassSums``); they make a mixture of Gaussians
(``FeatureDensity``), whose values are compared with those of reference rows (``Excess``, ``Reference``).
"""

from laplace.density.density import FeatureDensity
from laplace.density.kinds import entropy, log_one_minus_max, max_prob, mutual_information
from laplace.density.reference import Excess, Reference, Tail
from laplace.density.sums import MAX_FEATURES, Accumulator, ClassSums, reason_against

__all__ = [
    "MAX_FEATURES",
    "Accumulator",
    "ClassSums",
    "Excess",
    "FeatureDensity",
    "Reference",
    "Tail",
    "entropy",
    "log_one_minus_max",
    "max_prob",
    "mutual_information",
    "reason_against",
]
