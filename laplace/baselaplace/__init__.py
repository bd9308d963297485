"""The estimators: what users hold. They wire the other rooms together and hold no formulas."""

from laplace.baselaplace.base import BaseLaplace
from laplace.baselaplace.blockdiag import BlockDiagLaplace
from laplace.baselaplace.diag import DiagLaplace
from laplace.baselaplace.ekfac import EKFACLaplace
from laplace.baselaplace.full import FullLaplace
from laplace.baselaplace.kron import KronLaplace
from laplace.baselaplace.lowrank import LowRankLaplace
from laplace.baselaplace.parametric import ParametricLaplace

__all__ = [
    "BaseLaplace",
    "BlockDiagLaplace",
    "DiagLaplace",
    "EKFACLaplace",
    "FullLaplace",
    "KronLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
]
