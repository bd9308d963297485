"""``BlockDiagLaplace``: one dense block of curvature per parameter group."""

from __future__ import annotations

from typing import ClassVar

from laplace.baselaplace.described import described
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.likelihoods import L_co
from laplace.structures import AbstractCurvature, BlockDiagCurvature


@described
class BlockDiagLaplace(ParametricLaplace[L_co]):
    """A posterior in which parameter groups are independent, each with a dense precision ``s H_gg + diag(δ_g)``.

    All weights that require a gradient are random. Approximate: correlations between groups (weight and bias of a
    layer are two) are dropped, all others are kept. For groups of p weights memory O(Σ p²), time O(Σ p³) to factorize,
    once; any prior fits. Fitting takes a backward pass for each output of a datum, and time O(Σ p²) each.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = BlockDiagCurvature
