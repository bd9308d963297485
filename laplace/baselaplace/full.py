"""``FullLaplace``: dense curvature."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from laplace.baselaplace.described import described
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.likelihoods import L_co
from laplace.structures import AbstractCurvature, FullCurvature, FullPrecision


@described
class FullLaplace(ParametricLaplace[L_co]):
    """A posterior with a dense precision, ``s H + diag(δ) = L Lᵀ``: exact for the curvature.

    All weights that require a gradient are random. Memory O(P²), time O(P³) to factorize, once. Fitting takes a
    backward pass for each output of a datum, and time O(P²) each.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = FullCurvature

    @property
    def posterior_scale(self) -> Float[Tensor, "params params"]:
        """Lower-triangular ``L`` with ``L Lᵀ`` the posterior covariance, ``[P, P]``."""
        posterior = self._in_form
        assert isinstance(posterior, FullPrecision), "made by FullCurvature"
        return posterior.root.clone()

    @property
    def posterior_covariance(self) -> Float[Tensor, "params params"]:
        """Posterior covariance, ``[P, P]``."""
        posterior = self._in_form
        assert isinstance(posterior, FullPrecision), "made by FullCurvature"
        return posterior.covariance.clone()
