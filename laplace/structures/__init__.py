"""How a P×P matrix is stored and solved (``hessian_structure=``, ``damping=``).

Each structure is a pair: a curvature that adds up over data, and the factorized precision once the prior is added.
"""

from laplace.enums import HessianStructure
from laplace.structures.base import AbstractCurvature, AbstractPrecision
from laplace.structures.blockdiag import BlockDiagCurvature, BlockDiagPrecision
from laplace.structures.diag import DiagCurvature, DiagPrecision
from laplace.structures.ekfac import EKFACCurvature, EKFACPrecision
from laplace.structures.full import FullCurvature, FullPrecision
from laplace.structures.kron import Kron, KronCurvature
from laplace.structures.kron_decomposed import KronDecomposed
from laplace.structures.lowrank import LowRankCurvature, Truncation
from laplace.structures.lowrank_precision import LowRankPrecision

STRUCTURES: dict[HessianStructure, type[AbstractCurvature]] = {
    HessianStructure.FULL: FullCurvature,
    HessianStructure.KRON: KronCurvature,
    HessianStructure.DIAG: DiagCurvature,
    HessianStructure.BLOCKDIAG: BlockDiagCurvature,
    HessianStructure.EKFAC: EKFACCurvature,
    HessianStructure.LOWRANK: LowRankCurvature,
}
"""Which class implements which name."""

__all__ = [
    "STRUCTURES",
    "AbstractCurvature",
    "AbstractPrecision",
    "BlockDiagCurvature",
    "BlockDiagPrecision",
    "DiagCurvature",
    "DiagPrecision",
    "EKFACCurvature",
    "EKFACPrecision",
    "FullCurvature",
    "FullPrecision",
    "Kron",
    "KronCurvature",
    "KronDecomposed",
    "LowRankCurvature",
    "LowRankPrecision",
    "Truncation",
]
