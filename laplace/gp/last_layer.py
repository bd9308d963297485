"""Kernels of a linear last layer, from features alone: ``J = I_C ⊗ φ̃ᵀ`` is never built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.gp.tangents import Points, Tangents
from laplace.structures.head_block import HeadBlock


@dataclass(frozen=True)
class FeaturePoints(Points):
    """Points of a last layer: ``J_m = e_c ⊗ φ̃``."""

    head: HeadBlock
    """Derivatives at the points, as one block."""
    output: Int[Tensor, " points"]
    """Output of each, ``[M]``."""

    @cached_property
    def phi(self) -> Float[Tensor, "points augmented"]:
        """Features of the points, with the constant of the bias."""
        return self.head.augmented

    @property
    def n_points(self) -> int:
        """M."""
        return len(self.phi)

    def gram(self) -> Float[Tensor, "points points"]:
        """Features of different outputs do not meet."""
        return (self.phi @ self.phi.T) * (self.output.unsqueeze(1) == self.output)

    def combine(self, weights: Float[Tensor, "vectors points"]) -> Float[Tensor, "vectors params"]:
        """Added output by output."""
        total = weights.new_zeros(len(weights), *self.head.order.shape)
        for c in self.output.unique().tolist():
            of_c = self.output == c
            total[:, c] = weights[:, of_c] @ self.phi[of_c]
        flat = total.flatten(1)
        return torch.empty_like(flat).index_copy_(1, self.head.order.flatten(), flat)

    def against(self, rows: Float[Tensor, "rows params"]) -> Float[Tensor, "rows points"]:
        """The part of the point's output with its features."""
        result = rows.new_empty(len(rows), self.n_points)
        for c in self.output.unique().tolist():
            of_c = self.output == c
            result[:, of_c] = rows[:, self.head.order[c]] @ self.phi[of_c].T
        return result


@dataclass(frozen=True)
class FeatureTangents(Tangents):
    """``J = I_C ⊗ φ̃ᵀ``, as one block of a head."""

    head: HeadBlock

    @cached_property
    def phi(self) -> Float[Tensor, "rows augmented"]:
        """Features, with the constant of the bias."""
        return self.head.augmented

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """One product with features."""
        return self.head.apply(vectors).permute(2, 1, 0)

    def cross(self, points: Points) -> Float[Tensor, "rows outputs points"]:
        """Products of features, where the outputs agree."""
        assert isinstance(points, FeaturePoints), "points of the same last layer"
        products = self.phi @ points.phi.T
        same = torch.arange(self.head.n_outputs, device=products.device).unsqueeze(1) == points.output
        return products.unsqueeze(1) * same

    def variance(self) -> Float[Tensor, "rows outputs"]:
        """The same for all outputs."""
        return self.phi.square().sum(1, keepdim=True).expand(-1, self.head.n_outputs)

    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """Diagonal."""
        return torch.diag_embed(self.variance())

    def joint(self) -> Float[Tensor, "joint joint"]:
        """``Φ̃ Φ̃ᵀ ⊗ I``."""
        eye = torch.eye(self.head.n_outputs, dtype=self.phi.dtype, device=self.phi.device)
        return torch.kron(self.phi @ self.phi.T, eye)

    def pair_variance(self) -> Float[Tensor, " pairs"]:
        """Of the differences of features: the bias cancels."""
        return self.head.differences().augmented.square().sum(1)
