"""Forwarding address of ``laplace.network.subnetmask`` and ``laplace.network.scoremask``."""

from laplace.network.scoremask import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    RandomSubnetMask,
    ScoreBasedSubnetMask,
)
from laplace.network.subnetmask import LastLayerSubnetMask, ModuleNameSubnetMask, ParamNameSubnetMask, SubnetMask

__all__ = [
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "RandomSubnetMask",
    "ScoreBasedSubnetMask",
    "SubnetMask",
]
