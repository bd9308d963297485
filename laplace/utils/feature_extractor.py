"""Forwarding address of ``laplace.network.feature_extractor``."""

from laplace.enums import FeatureReduction
from laplace.network.feature_extractor import FeatureExtractor

__all__ = ["FeatureExtractor", "FeatureReduction"]
