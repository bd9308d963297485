"""A posterior over functions that is one over the weights of features, and of the prior what features leave out.

ELLA and VaLLA write the outputs as ``f* + φ z``, with ``z ~ N(0, (A + δ I)⁻¹)`` and a matrix A of what the data say;
VaLLA adds what its features leave of the prior, ``N(0, (J Jᵀ − φ φᵀ)/δ)``. So z has an ordinary precision, φ are its
Jacobians, and predictions, links and tuning are those of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.errors import UnsupportedError
from laplace.gp.derivatives import Jacobian, clamped_diagonal, jacobian
from laplace.likelihoods.draws import chunks
from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision, FullPrecision
from laplace.structures.basis import Basis


class FeatureMap(ABC):
    """From derivatives of outputs to their features."""

    has_residual: ClassVar[bool]
    """Whether what features leave of the prior belongs to the posterior."""

    @abstractmethod
    def features(self, at: Jacobian) -> Float[Tensor, "rows outputs k"]:
        """φ of each output."""


@dataclass(frozen=True)
class FeaturePrecision(FullPrecision):
    """``A + δ I``, ``[K, K]``."""

    delta: Tensor = field(kw_only=True)
    """δ, the precision of the isotropic prior over the weights of the network, ``[]``, in 1/weight²."""

    @classmethod
    def of(cls, learned: Float[Tensor, "k k"], delta: Tensor) -> FeaturePrecision:
        """Add the prior."""
        eye = torch.eye(len(learned), dtype=learned.dtype, device=learned.device)
        return cls(learned + delta * eye, delta=delta)

    def whitened(self, phi: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows k"]:
        """φ L⁻ᵀ, with ``L Lᵀ = A + δ I``: products of it are covariances."""
        flat = phi.reshape(-1, self.n_params)
        return torch.linalg.solve_triangular(self.factor, flat.T, upper=False).T.reshape(phi.shape)


@dataclass(frozen=True)
class PriorResidual:
    """``J Jᵀ − φ φᵀ``: what features leave of the prior. Rounding that would leave less than nothing is set to zero."""

    at: Jacobian
    """Derivatives at the inputs."""
    phi: Float[Tensor, "rows outputs k"]
    """Features, ``[rows, C, K]``."""

    @cached_property
    def variance(self) -> Float[Tensor, "rows outputs"]:
        """Its diagonal, ``[rows, C]``."""
        return (self.at.variance() - self.phi.square().sum(-1)).clamp(min=0)

    @cached_property
    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """Between the outputs of each row, ``[rows, C, C]``."""
        return clamped_diagonal(self.at.covariance() - self.phi @ self.phi.mT)

    @cached_property
    def joint(self) -> Float[Tensor, "joint joint"]:
        """Across rows, ``[rows·C, rows·C]``."""
        flat = self.phi.flatten(0, 1)
        return clamped_diagonal(self.at.joint() - flat @ flat.T)

    def of_pairs(self) -> Float[Tensor, " pairs"]:
        """Of the differences of scores that follow each other."""
        first, second = self.phi.reshape(-1, 2, self.phi.shape[-1]).unbind(1)
        return (self.at.pair_variance() - (first - second).square().sum(-1)).clamp(min=0)


@dataclass(frozen=True)
class FunctionLinearization(Linearization):
    """Outputs, their features, and what features leave of the prior."""

    f: Tensor
    """Outputs, ``[batch, *positions, C]``."""
    phi: Float[Tensor, "rows outputs k"]
    """Features, ``[rows, C, K]``."""
    residual: PriorResidual | None
    """What they leave of the prior; ``None`` where it does not belong to the posterior."""

    @classmethod
    def of(cls, inputs: Linearization, features: FeatureMap, dtype: torch.dtype) -> FunctionLinearization:
        """From outputs with derivatives."""
        at = jacobian(inputs, dtype)
        phi = features.features(at)
        return cls(inputs.f, phi, PriorResidual(at, phi) if features.has_residual else None)

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:  # noqa: ARG002
        """Of features, and what they leave."""
        known = _checked(precision)
        variance = known.whitened(self.phi).square().sum(-1)
        return variance if self.residual is None else variance + self.residual.variance / known.delta

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:  # noqa: ARG002
        """Of features, and what they leave."""
        known = _checked(precision)
        half = known.whitened(self.phi)
        covariance = half @ half.mT
        return covariance if self.residual is None else covariance + self.residual.covariance / known.delta

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:  # noqa: ARG002
        """Of features, and what they leave."""
        known = _checked(precision)
        half = known.whitened(self.phi).flatten(0, 1)
        covariance = half @ half.T
        return covariance if self.residual is None else covariance + self.residual.joint / known.delta

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:  # noqa: ARG002
        """Of differences of features."""
        known = _checked(precision)
        first, second = self.phi.reshape(-1, 2, self.phi.shape[-1]).unbind(1)
        variance = known.whitened(first - second).square().sum(-1)
        variance = variance if self.residual is None else variance + self.residual.of_pairs() / known.delta
        return variance.unsqueeze(-1)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Through the weights of the features; the rest by a root of its matrix across rows."""
        known, mean = _checked(precision), self.mean(dtype)
        root = None if self.residual is None else linalg.root(self.residual.joint) / known.delta.sqrt()
        for size in chunks(n_samples, max(known.n_params, mean.numel())):
            z = known.sample(size, generator)
            f = mean + torch.einsum("nck,sk->snc", self.phi, z)
            if root is not None:
                noise = torch.randn(size, len(root), dtype=root.dtype, device=root.device, generator=generator)
                f = f + (noise @ root.T).reshape(f.shape)
            yield f

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:  # noqa: ARG002
        """Not asked for: features have their own coordinates."""
        msg = f"Features of functions are not rotated; got a {type(basis).__name__}."
        raise UnsupportedError(msg)

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """Outputs and features, if they fit."""
        size = self.f.numel() + self.phi.numel()
        return (self, size) if size <= limit else None


def _checked(precision: AbstractPrecision) -> FeaturePrecision:
    assert isinstance(precision, FeaturePrecision), "of the features of these functions"
    return precision
