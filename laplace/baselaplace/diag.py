"""``DiagLaplace``: diagonal curvature."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from laplace.baselaplace.described import described
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.likelihoods import L_co
from laplace.structures import AbstractCurvature, DiagCurvature


@described
class DiagLaplace(ParametricLaplace[L_co]):
    """A posterior in which weights are independent, with precisions ``s h + δ``.

    All weights that require a gradient are random. Approximate: all correlations between weights are dropped. Memory
    O(P); fitting takes a backward pass for each output of a datum, with time O(P) each.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = DiagCurvature

    @property
    def posterior_variance(self) -> Float[Tensor, " params"]:
        """Posterior variance of each weight, ``[P]``."""
        return self._posterior.diagonal_of_inverse()

    @property
    def posterior_scale(self) -> Float[Tensor, " params"]:
        """Posterior standard deviation of each weight, ``[P]``."""
        return self.posterior_variance.sqrt()
