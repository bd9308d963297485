"""Nyström features of the kernel of the linearized network (ELLA): pure mathematics.

With ``J_M`` one row of J for each of M points and ``J_M J_Mᵀ = U diag(λ) Uᵀ``, the directions ``v_k = J_Mᵀ u_k / √λ_k``
are orthonormal vectors of weights. The posterior is that of the network whose weights only move along the K leading
ones, ``θ = θ* + V z``: features ``φ(x) = J(x) V``, precision ``Σ φᵀ Λ φ / (σ² T) + δ I``.

References
----------
Deng, Zhou & Zhu (2022), "Accelerated linearized Laplace approximation for Bayesian deep learning". arXiv:2210.12642
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.errors import NotPositiveDefiniteError, NumericalWarning, warn
from laplace.gp.derivatives import InducingPoints, Jacobian
from laplace.gp.posterior import FeatureMap, FeaturePrecision
from laplace.likelihoods import AbstractLikelihood
from laplace.types import Outputs, Scalar


def leading_directions(points: InducingPoints, n_eigenvalues: int) -> Float[Tensor, "k params"]:
    """The directions ``v_k`` of the leading eigenvalues, orthonormal, the largest first (equations 8 to 10).

    O(M²) products of rows of J, O(M³) for the eigenvalues, memory O(K P).

    Raises
    ------
    NotPositiveDefiniteError
        If the kernel is zero or not finite.
    """
    kernel = points.gram()
    values, vectors = linalg.eigh(kernel, "kernel of the subsample")
    values, vectors = values.flip(0)[:n_eigenvalues], vectors.flip(1)[:, :n_eigenvalues]
    resolved = values > len(kernel) * torch.finfo(kernel.dtype).eps * values[0]
    n_kept = int(resolved.sum())
    if not n_kept:
        msg = (
            "The kernel of the subsample is zero: the outputs do not depend on the random weights there. Is the model "
            "saturated at these data?"
        )
        raise NotPositiveDefiniteError(msg)
    if n_kept < n_eigenvalues:
        msg = (
            f"The kernel of the {len(kernel)} points has rank {n_kept} to working precision: {n_kept} of the "
            f"n_eigenvalues={n_eigenvalues} features are used, and more would not change the result."
        )
        warn(msg, NumericalWarning)
    directions = points.combine(vectors[:, :n_kept].T / values[:n_kept].sqrt().unsqueeze(1))
    # Orthonormal but for the rounding of small eigenvalues, which this removes.
    return torch.linalg.qr(directions.T).Q.T.contiguous()


def feature_gram(
    phi: Float[Tensor, "rows outputs k"], f: Outputs, likelihood: AbstractLikelihood
) -> Float[Tensor, "k k"]:
    """``Σ φᵀ Λ φ`` at unit noise and temperature, ``[K, K]`` (equation 12): what some data say about the features.

    Additive over data. O(rows · C · K²), without a matrix ``[C, C]``.
    """
    hessian, parts = likelihood.hessian(f), []
    if hessian.diagonal is not None:
        # diag(p) − p pᵀ of a softmax is a variance: features less their mean, without a difference of large numbers.
        means = hessian.root.mT @ phi if hessian.root is not None and hessian.sign < 0 else 0
        parts.append((hessian.diagonal.sqrt().unsqueeze(-1) * (phi - means)).flatten(0, 1))
    if hessian.root is not None and hessian.sign > 0:
        parts.append((hessian.root.mT @ phi).flatten(0, 1))
    half = torch.cat(parts)
    return half.T @ half


@dataclass(frozen=True)
class NystromMap(FeatureMap):
    """``φ(x) = J(x) V``, ``[rows, C, K]`` (equation 11); nothing outside the span of V belongs to the posterior."""

    directions: Float[Tensor, "k params"]
    """Vᵀ, ``[K, P]``."""

    has_residual = False
    """The prior outside the span is left out."""

    def features(self, at: Jacobian) -> Float[Tensor, "rows outputs k"]:
        """``J V``."""
        return at.times(self.directions)


def log_det_ratio(precision: FeaturePrecision) -> Scalar:
    """``log |A + δ I| − K log δ``: at most, and where the directions span the weights equal to, that of all weights."""
    return precision.logdet() - precision.n_params * precision.delta.log()
