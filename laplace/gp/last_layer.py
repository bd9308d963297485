"""Kernels of a linear last layer, from features alone: ``J = I_C ⊗ φ̃ᵀ`` is never built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.gp.tangents import Points, Tangents
from laplace.network.parameters import augment, head_views, output_index


@dataclass(frozen=True)
class FeaturePoints(Points):
    """Points of a last layer: ``J_m = e_c ⊗ φ̃``.

    Attributes
    ----------
    phi
        Features of the points, with the constant of the bias, ``[M, D̃]``.
    output
        Output of each, ``[M]``.
    n_outputs
        C.
    bias
        Whether the layer has one.
    """

    phi: Float[Tensor, "points features"]
    output: Int[Tensor, " points"]
    n_outputs: int
    bias: bool

    @property
    def n_points(self) -> int:
        """M."""
        return len(self.phi)

    def gram(self) -> Float[Tensor, "points points"]:
        """Features of different outputs do not meet."""
        return (self.phi @ self.phi.T) * (self.output.unsqueeze(1) == self.output)

    def combine(self, weights: Float[Tensor, "vectors points"]) -> Float[Tensor, "vectors params"]:
        """Added output by output."""
        total = weights.new_zeros(len(weights), self.n_outputs, self.phi.shape[1])
        for c in self.output.unique().tolist():
            of_c = self.output == c
            total[:, c] = weights[:, of_c] @ self.phi[of_c]
        n_params = self.n_outputs * self.phi.shape[1]
        index = output_index(self.n_outputs, n_params, self.bias).flatten().to(weights.device)
        return torch.empty_like(total.flatten(1)).index_copy_(1, index, total.flatten(1))

    def against(self, rows: Float[Tensor, "rows params"]) -> Float[Tensor, "rows points"]:
        """The part of the point's output with its features."""
        index = output_index(self.n_outputs, rows.shape[1], self.bias).to(rows.device)
        result = rows.new_empty(len(rows), self.n_points)
        for c in self.output.unique().tolist():
            of_c = self.output == c
            result[:, of_c] = rows[:, index[c]] @ self.phi[of_c].T
        return result


@dataclass(frozen=True)
class FeatureTangents(Tangents):
    """``J = I_C ⊗ φ̃ᵀ``, in the order of public vectors: the weight row by row, then the bias.

    Attributes
    ----------
    phi
        Features of each row, ``[rows, D]``.
    n_outputs
        C.
    bias
        Whether the layer has one.
    """

    phi: Float[Tensor, "rows features"]
    n_outputs: int
    bias: bool

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """One product with features."""
        weight, offset = head_views(vectors, self.n_outputs, self.phi.shape[1], self.bias)
        result = torch.einsum("nd,kcd->nck", self.phi, weight)
        return result if offset is None else result + offset.T

    def cross(self, points: Points) -> Float[Tensor, "rows outputs points"]:
        """Products of features, where the outputs agree."""
        assert isinstance(points, FeaturePoints), "points of the same last layer"
        products = augment(self.phi, self.bias) @ points.phi.T
        same = torch.arange(self.n_outputs, device=self.phi.device).unsqueeze(1) == points.output
        return products.unsqueeze(1) * same

    def variance(self) -> Float[Tensor, "rows outputs"]:
        """The same for all outputs."""
        return augment(self.phi, self.bias).square().sum(1, keepdim=True).expand(-1, self.n_outputs)

    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """Diagonal."""
        return torch.diag_embed(self.variance())

    def joint(self) -> Float[Tensor, "joint joint"]:
        """``Φ̃ Φ̃ᵀ ⊗ I``."""
        phi = augment(self.phi, self.bias)
        return torch.kron(phi @ phi.T, torch.eye(self.n_outputs, dtype=phi.dtype, device=phi.device))

    def pair_variance(self) -> Float[Tensor, " pairs"]:
        """Of the differences of features: the bias cancels."""
        first, second = self.phi.reshape(-1, 2, self.phi.shape[1]).unbind(1)
        return (first - second).square().sum(1)
