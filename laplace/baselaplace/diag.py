"""``DiagLaplace``: diagonal curvature."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from laplace.baselaplace.parametric import ParametricLaplace
from laplace.structures import AbstractCurvature, DiagCurvature


class DiagLaplace(ParametricLaplace):
    """A posterior in which weights are independent, with precisions ``s h + δ``.

    Approximate: all correlations between weights are dropped. O(P) memory and time. See ``BaseLaplace`` for the
    parameters.
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
