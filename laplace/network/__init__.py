"""The user's model and data: read, never written.

``model=``, ``last_layer_name=``, ``feature_reduction=``, ``dict_key_x=`` and ``dict_key_y=`` lead here. Nothing in this
package knows about curvature, priors or likelihoods.
"""

from laplace.network.batches import Batch, Passes, iterate
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.modes import evaluating, full_precision, training
from laplace.network.parameters import ParameterSubset
from laplace.network.whole_network import WholeNetwork

__all__ = [
    "Batch",
    "FeatureExtractor",
    "ParameterSubset",
    "Passes",
    "WholeNetwork",
    "evaluating",
    "full_precision",
    "iterate",
    "training",
]
