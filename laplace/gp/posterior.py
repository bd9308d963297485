"""``FunctionPosterior``: what the outputs at some inputs are like, given their tangents; shared by ELLA and VaLLA.

Both write the posterior covariance of the outputs as ``φ (A + δ I)⁻¹ φ'ᵀ``, with features φ of the outputs and a
matrix A of what the data say about them; VaLLA adds what its features leave of the prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.gp.tangents import Tangents


class FunctionPosterior(ABC):
    """Zero-mean Gaussian over functions, around the outputs of the network.

    Parameters
    ----------
    learned
        A, ``[K, K]``, positive semi-definite, at the present noise and temperature.
    delta
        δ, the precision of the isotropic prior, ``[]``, in 1/weight².
    """

    def __init__(self, learned: Float[Tensor, "k k"], delta: Tensor) -> None:
        self.delta = delta
        eye = torch.eye(len(learned), dtype=learned.dtype, device=learned.device)
        self.factor = linalg.cholesky(learned + delta * eye, "posterior precision of the features")

    @abstractmethod
    def features(self, tangents: Tangents) -> Float[Tensor, "rows outputs k"]:
        """φ of each output.

        Parameters
        ----------
        tangents
            At the inputs.
        """

    def _whitened(self, tangents: Tangents) -> tuple[Tensor, Tensor]:
        """Features φ, and φ L⁻ᵀ with ``L Lᵀ = A + δ I``."""
        phi = self.features(tangents)
        flat = torch.linalg.solve_triangular(self.factor, phi.flatten(0, 1).T, upper=False).T
        return phi, flat.reshape(phi.shape)

    def variance(self, tangents: Tangents) -> Float[Tensor, "rows outputs"]:
        """Variances of the outputs, ``[rows, C]``, in output units squared.

        Parameters
        ----------
        tangents
            At the inputs.
        """
        phi, half = self._whitened(tangents)
        return half.square().sum(-1) + self._variance_left(tangents, phi)

    def covariance(self, tangents: Tangents) -> Float[Tensor, "rows outputs outputs"]:
        """Covariances of the outputs of each row, ``[rows, C, C]``.

        Parameters
        ----------
        tangents
            At the inputs.
        """
        phi, half = self._whitened(tangents)
        return half @ half.mT + self._covariance_left(tangents, phi)

    def joint_covariance(self, tangents: Tangents) -> Float[Tensor, "joint joint"]:
        """Covariance of all outputs of all rows, ``[rows·C, rows·C]``, row by row.

        Parameters
        ----------
        tangents
            At the inputs.
        """
        phi, half = (part.flatten(0, 1) for part in self._whitened(tangents))
        return half @ half.T + self._joint_left(tangents, phi)

    # What features leave of the prior: nothing, unless a subclass says otherwise.

    def _variance_left(self, tangents: Tangents, phi: Tensor) -> Tensor:  # noqa: ARG002
        return phi.new_zeros(phi.shape[:2])

    def _covariance_left(self, tangents: Tangents, phi: Tensor) -> Tensor:  # noqa: ARG002
        return phi.new_zeros(())

    def _joint_left(self, tangents: Tangents, phi: Tensor) -> Tensor:  # noqa: ARG002
        return phi.new_zeros(())
