"""``Laplace()`` as type checkers see it: which class comes of which structure and weights, and which options it takes.

``laplace/laplace.py`` has the function that runs; a test compares these declarations with its tables and with the
constructors of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import nn
from typing_extensions import Unpack, overload

from laplace.baselaplace import (
    ELLA,
    LLELLA,
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LLVaLLA,
    LowRankLaplace,
    VaLLA,
    keywords,
)
from laplace.baselaplace.fitted import FittedLaplace
from laplace.enums import FunctionalApproximation, HessianStructure, SubsetOfWeights
from laplace.likelihoods import L, LikelihoodLike
from laplace.lllaplace import (
    BlockDiagLLLaplace,
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    LowRankLLLaplace,
)
from laplace.several import SeveralHeads
from laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace
from laplace.types import FunctionalApproximationLike, HessianStructureLike, SubsetOfWeightsLike

LastLayer: TypeAlias = Literal["last_layer", SubsetOfWeights.LAST_LAYER]
All: TypeAlias = Literal["all", SubsetOfWeights.ALL]
Subnetwork: TypeAlias = Literal["subnetwork", SubsetOfWeights.SUBNETWORK]
Full: TypeAlias = Literal["full", HessianStructure.FULL]
Kron: TypeAlias = Literal["kron", HessianStructure.KRON]
Diag: TypeAlias = Literal["diag", HessianStructure.DIAG]
BlockDiag: TypeAlias = Literal["blockdiag", HessianStructure.BLOCKDIAG]
Ekfac: TypeAlias = Literal["ekfac", HessianStructure.EKFAC]
LowRank: TypeAlias = Literal["lowrank", HessianStructure.LOWRANK]
Gp: TypeAlias = Literal["gp", HessianStructure.GP]
Sod: TypeAlias = Literal["sod", FunctionalApproximation.SOD]
Nystrom: TypeAlias = Literal["nystrom", FunctionalApproximation.NYSTROM]
Variational: TypeAlias = Literal["variational", FunctionalApproximation.VARIATIONAL]


@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Kron = ...,
    **options: Unpack[keywords.KronLastLayerKeywords],
) -> KronLLLaplace[L]: ...
@overload  # Where the structure is left out the overload above comes first.
def Laplace(  # pyright: ignore[reportOverlappingOverload]
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Full = ...,
    **options: Unpack[keywords.LastLayerKeywords],
) -> FullLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Diag = ...,
    **options: Unpack[keywords.LastLayerKeywords],
) -> DiagLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: BlockDiag = ...,
    **options: Unpack[keywords.LastLayerKeywords],
) -> BlockDiagLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Ekfac = ...,
    **options: Unpack[keywords.LastLayerKeywords],
) -> EKFACLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: LowRank = ...,
    **options: Unpack[keywords.LowRankLastLayerKeywords],
) -> LowRankLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Kron = ...,
    **options: Unpack[keywords.KronKeywords],
) -> KronLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Full,
    **options: Unpack[keywords.WeightsKeywords],
) -> FullLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Diag,
    **options: Unpack[keywords.WeightsKeywords],
) -> DiagLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: BlockDiag,
    **options: Unpack[keywords.WeightsKeywords],
) -> BlockDiagLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Ekfac,
    **options: Unpack[keywords.WeightsKeywords],
) -> EKFACLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: LowRank,
    **options: Unpack[keywords.LowRankKeywords],
) -> LowRankLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: Subnetwork,
    hessian_structure: Full,
    **options: Unpack[keywords.SubnetworkKeywords],
) -> FullSubnetLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: Subnetwork,
    hessian_structure: Diag,
    **options: Unpack[keywords.SubnetworkKeywords],
) -> DiagSubnetLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Gp = ...,
    *,
    functional_approximation: Sod = ...,
    **options: Unpack[keywords.FunctionalLastLayerKeywords],
) -> FunctionalLLLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Gp = ...,
    *,
    functional_approximation: Nystrom,
    **options: Unpack[keywords.EllaLastLayerKeywords],
) -> LLELLA[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: LastLayer = ...,
    hessian_structure: Gp = ...,
    *,
    functional_approximation: Variational,
    **options: Unpack[keywords.VallaLastLayerKeywords],
) -> LLVaLLA[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Gp,
    *,
    functional_approximation: Sod = ...,
    **options: Unpack[keywords.FunctionalKeywords],
) -> FunctionalLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Gp,
    *,
    functional_approximation: Nystrom,
    **options: Unpack[keywords.EllaKeywords],
) -> ELLA[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: All,
    hessian_structure: Gp,
    *,
    functional_approximation: Variational,
    **options: Unpack[keywords.VallaKeywords],
) -> VaLLA[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: SubsetOfWeights,
    hessian_structure: HessianStructureLike = ...,
    *,
    functional_approximation: FunctionalApproximationLike = ...,
    **options: Unpack[keywords.AnyKeywords],
) -> FittedLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: L,
    subset_of_weights: SubsetOfWeightsLike = ...,
    hessian_structure: HessianStructure = ...,
    *,
    functional_approximation: FunctionalApproximationLike = ...,
    **options: Unpack[keywords.AnyKeywords],
) -> FittedLaplace[L]: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: Mapping[Any, LikelihoodLike],
    subset_of_weights: SubsetOfWeightsLike = ...,
    hessian_structure: HessianStructureLike = ...,
    *,
    functional_approximation: FunctionalApproximationLike = ...,
    **options: Unpack[keywords.AnyKeywords],
) -> SeveralHeads: ...
def Laplace(*arguments: Any, **options: Any) -> Any:
    """Types alone: ``laplace.laplace.Laplace`` runs."""
    raise NotImplementedError


__all__ = ["Laplace"]
