"""The estimators: what users hold. They wire the other packages together and hold no formulas."""

from laplace.baselaplace.base import BaseLaplace
from laplace.baselaplace.blockdiag import BlockDiagLaplace
from laplace.baselaplace.diag import DiagLaplace
from laplace.baselaplace.ekfac import EKFACLaplace
from laplace.baselaplace.ella import ELLA
from laplace.baselaplace.full import FullLaplace
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.baselaplace.kron import KronLaplace
from laplace.baselaplace.last_layer_features import LLELLA, LLVaLLA
from laplace.baselaplace.lowrank import LowRankLaplace
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.baselaplace.subset_of_data import FunctionalLaplace
from laplace.baselaplace.valla import VaLLA

__all__ = [
    "ELLA",
    "LLELLA",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "BlockDiagLaplace",
    "DiagLaplace",
    "EKFACLaplace",
    "FullLaplace",
    "FunctionalLaplace",
    "KronLaplace",
    "LLVaLLA",
    "LowRankLaplace",
    "ParametricLaplace",
    "VaLLA",
]
