"""How a P×P matrix is stored and solved (``hessian_structure=``, ``damping=``).

Each structure is a pair: a curvature that adds up over data, and the factorized precision once the prior is added.
"""

from laplace.enums import HessianStructure
from laplace.structures.base import AbstractCurvature, AbstractPrecision
from laplace.structures.diag import DiagCurvature, DiagPrecision
from laplace.structures.full import FullCurvature, FullPrecision
from laplace.structures.kron import Kron, KronCurvature
from laplace.structures.kron_decomposed import KronDecomposed

STRUCTURES: dict[HessianStructure, type[AbstractCurvature]] = {
    HessianStructure.FULL: FullCurvature,
    HessianStructure.KRON: KronCurvature,
    HessianStructure.DIAG: DiagCurvature,
}
"""Which class implements which name."""

__all__ = [
    "STRUCTURES",
    "AbstractCurvature",
    "AbstractPrecision",
    "DiagCurvature",
    "DiagPrecision",
    "FullCurvature",
    "FullPrecision",
    "Kron",
    "KronCurvature",
    "KronDecomposed",
]
