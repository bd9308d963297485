"""Derivatives as a kernel needs them: products of ``J`` with vectors of weights, and with the rows of chosen points.

The prior is isotropic, so that the kernel is ``J Jᵀ / δ``; here is ``J Jᵀ``, in a last layer from features alone
(``gp/last_layer.py``), for a whole network in factors (``gp/whole_network.py``). A *point* is one output of one datum:
one row of ``J``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class Points(ABC):
    """M chosen rows of ``J``: one output each of some data."""

    @property
    @abstractmethod
    def n_points(self) -> int:
        """M."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "points points"]:
        """``J_M J_Mᵀ``, ``[M, M]``, in output units squared times weight^−2."""

    @abstractmethod
    def combine(self, weights: Float[Tensor, "vectors points"]) -> Float[Tensor, "vectors params"]:
        """Linear combinations of the rows, ``W J_M``."""

    @abstractmethod
    def against(self, rows: Float[Tensor, "rows params"]) -> Float[Tensor, "rows points"]:
        """Products with rows that are written out, ``rows · J_Mᵀ``."""


class Tangents(ABC):
    """``J`` at some inputs, one row of them a position: ``[rows, C, P]``, never whole."""

    @abstractmethod
    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """J v for several vectors of weights."""

    @abstractmethod
    def cross(self, points: Points) -> Float[Tensor, "rows outputs points"]:
        """``J J_Mᵀ``."""

    @abstractmethod
    def variance(self) -> Float[Tensor, "rows outputs"]:
        """The diagonal of ``J Jᵀ``, ``[rows, C]``."""

    @abstractmethod
    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """``J Jᵀ`` of each row, ``[rows, C, C]``."""

    @abstractmethod
    def joint(self) -> Float[Tensor, "joint joint"]:
        """``J Jᵀ`` across rows, ``[rows·C, rows·C]``, row by row."""

    def pair_variance(self) -> Float[Tensor, " pairs"]:
        """``‖J₀ − J₁‖²`` of pairs of scores, one after the other, ``[pairs]``; slow and correct."""
        kernel = self.joint()
        blocks = kernel.reshape(len(kernel) // 2, 2, -1, 2).diagonal(dim1=0, dim2=2)  # [2, 2, pairs]
        return blocks[0, 0] + blocks[1, 1] - blocks[0, 1] - blocks[1, 0]


@dataclass(frozen=True)
class WrittenTangents(Tangents):
    """Jacobians that a user has written out."""

    J: Float[Tensor, "rows outputs params"]
    """``[rows, C, P]``."""

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """One product."""
        return self.J @ vectors.T

    def cross(self, points: Points) -> Float[Tensor, "rows outputs points"]:
        """By the points."""
        return points.against(self.J.flatten(0, 1)).unflatten(0, self.J.shape[:2])

    def variance(self) -> Float[Tensor, "rows outputs"]:
        """Squares."""
        return self.J.square().sum(-1)

    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """One product a row."""
        return self.J @ self.J.mT

    def joint(self) -> Float[Tensor, "joint joint"]:
        """One product."""
        return self.J.flatten(0, 1) @ self.J.flatten(0, 1).T


def clamped_diagonal(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The matrix with negative diagonal entries, which rounding leaves, set to zero."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix + torch.diag_embed(diagonal.clamp(min=0) - diagonal)
