"""Everything about some inputs that does not depend on the posterior: computed once, it serves any prior or noise.

``FeatureLinearization`` is exact for a linear last layer and needs its features alone; ``JacobianLinearization`` holds
the derivatives of a whole network in factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.likelihoods.draws import chunks, draw
from laplace.network.parameters import head_views, split_sizes
from laplace.predictive.base import Linearization
from laplace.predictive.spectral import SpectralLinearization
from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis, DenseBasis
from laplace.structures.jacobian import JacobianBlock


@dataclass(frozen=True)
class FeatureLinearization(Linearization):
    """Outputs and the features of their last layer: ``f(θ) = f + φ (W − W*)ᵀ + (b − b*)``, exactly.

    Attributes
    ----------
    f
        Outputs, ``[batch, *positions, C]``.
    phi
        Features, ``[batch, *positions, D]``.
    bias
        Whether the layer has a bias.
    """

    f: Tensor
    phi: Tensor
    bias: bool

    def _rows(self, dtype: torch.dtype) -> Float[Tensor, "rows features"]:
        return self.phi.reshape(-1, self.phi.shape[-1]).to(dtype)

    def select(self, rows: Tensor) -> FeatureLinearization:
        """Some of its flattened rows, ``[rows, ...]``."""
        f, phi = (part.reshape(-1, part.shape[-1])[rows] for part in (self.f, self.phi))
        return FeatureLinearization(f, phi, self.bias)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Features in other coordinates, where those of features alone are rotated; else all weights at once."""
        phi = self._rows(dtype)
        if isinstance(basis, DenseBasis):
            return SpectralLinearization(self.f, lambda: basis.features(phi, self.n_outputs, self.bias))
        return replace(self, phi=basis.features(phi, self.n_outputs, self.bias).reshape(self.phi.shape))

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """From features, by the structure."""
        return precision.feature_variance(self._rows(dtype), self.n_outputs, self.bias, diagonal=True)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """From features, by the structure."""
        return precision.feature_variance(self._rows(dtype), self.n_outputs, self.bias)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """From features, by the structure."""
        return precision.feature_covariance(self._rows(dtype), self.n_outputs, self.bias)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """The Jacobian of a difference is that of the features, and 0 for the bias."""
        first, second = self.phi.to(dtype).unbind(1)
        J = torch.nn.functional.pad(first - second, (0, int(self.bias))).unsqueeze(1)
        return precision.functional_variance(J).flatten(1)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Through the weights."""
        phi, mean = self._rows(dtype), self.mean(dtype)
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            weight, offset = head_views(precision.sample(size, generator), self.n_outputs, phi.shape[-1], self.bias)
            f = mean + torch.einsum("nd,scd->snc", phi, weight)
            yield f if offset is None else f + offset.unsqueeze(1)


@runtime_checkable
class Derivatives(Protocol):
    """Derivatives of outputs in all random weights, made when they are asked for."""

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Blocks of mixtures of the outputs of each datum, ``[columns, positions·C]``."""
        ...

    @property
    def n_columns_at_once(self) -> int:
        """How many columns fit the memory that chunks may take."""
        ...


@dataclass(frozen=True)
class StoredDerivatives:
    """All columns, kept.

    Attributes
    ----------
    blocks
        One for each parameter group.
    """

    blocks: Sequence[JacobianBlock]

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Mixtures of them; as they are where all are asked for."""
        if torch.equal(mix, torch.eye(self.n_columns_at_once, dtype=mix.dtype, device=mix.device)):
            return list(self.blocks)
        return [block.mix(mix) for block in self.blocks]

    @property
    def n_columns_at_once(self) -> int:
        """All of them are there already."""
        return self.blocks[0].n_columns


@dataclass(frozen=True)
class JacobianLinearization(Linearization):
    """Outputs of a network and their derivatives: ``f(θ) ≈ f + J (θ − θ*)``.

    Attributes
    ----------
    f
        Outputs, ``[batch, *positions, C]``.
    derivatives
        In the random weights; ``None`` where only the network itself is asked for.
    evaluate
        The network's outputs at other weights ``[P]``.
    theta
        The weights it is linearized at, ``[P]``.
    """

    f: Tensor
    derivatives: Derivatives | None
    evaluate: Callable[[Tensor], Tensor]
    theta: Tensor

    @property
    def _derivatives(self) -> Derivatives:
        if self.derivatives is None:
            msg = "These outputs were computed without derivatives."
            raise UnsupportedError(msg)
        return self.derivatives

    def _blocks(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> list[JacobianBlock]:
        """Derivatives of some of the ``positions · C`` outputs of each datum."""
        eye = torch.eye(self.f[0].numel(), dtype=dtype, device=self.f.device)
        return self._derivatives.columns(eye[start:stop])

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """A few outputs at a time."""
        step, n_columns = self._derivatives.n_columns_at_once, self.f[0].numel()
        parts = [
            precision.block_variance(self._blocks(dtype, start, start + step)) for start in range(0, n_columns, step)
        ]
        return torch.cat(parts).T.reshape(-1, self.n_outputs)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """All outputs of a position at a time."""
        step, n_columns = self.n_outputs, self.f[0].numel()
        parts = [
            precision.block_covariance(self._blocks(dtype, start, start + step)) for start in range(0, n_columns, step)
        ]
        return torch.stack(parts, 1).flatten(0, 1)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """All outputs at once."""
        return precision.block_kernel(self._blocks(dtype))

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """One column, the difference."""
        mix = torch.tensor([[1.0, -1.0]], dtype=dtype, device=self.f.device)
        return precision.block_variance(self._derivatives.columns(mix)).T

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """In function space where there are fewer outputs than samples, else through the weights."""
        mean = self.mean(dtype)
        if mean.numel() <= n_samples:
            cov = self.joint_covariance(precision, dtype).unsqueeze(0)
            for part in draw(mean.reshape(1, -1), cov, n_samples, generator):
                yield part.reshape(-1, *mean.shape)
            return
        n_columns = self.f[0].numel()
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            theta = precision.sample(size, generator)
            rows: list[Tensor] = []
            step = self._derivatives.n_columns_at_once
            for start in range(0, n_columns, step):
                blocks = self._blocks(dtype, start, start + step)
                parts = split_sizes(theta, [block.n_params for block in blocks])
                rows.append(torch.stack([b.apply(v) for b, v in zip(blocks, parts, strict=True)]).sum(0))
            yield mean + torch.cat(rows, 1).transpose(1, 2).reshape(size, *mean.shape)

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """One forward pass a sample, by functional calls."""
        mean = self.mean(dtype)
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            thetas = self.theta + precision.sample(size, generator)
            yield torch.stack([self.evaluate(theta).reshape(mean.shape).to(dtype) for theta in thetas])

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Derivatives in other coordinates, group by group or all weights at once."""
        if isinstance(basis, DenseBasis):
            return SpectralLinearization(self.f, lambda: basis.blocks(self._blocks(dtype)))
        return replace(self, derivatives=StoredDerivatives(basis.blocks(self._blocks(dtype))))

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """All columns, each group in factors or written out, whichever is smaller, if they fit."""
        if self.derivatives is None:
            return super().kept(limit)
        dtype = torch.promote_types(self.f.dtype, torch.float32)
        blocks, n_columns = self._blocks(dtype, 0, 1), self.f[0].numel()
        least = sum(min(block.size, block.n_rows * block.n_params) for block in blocks) * n_columns
        if least + self.f.numel() > limit:
            return None
        blocks = [block.compact() for block in (blocks if n_columns == 1 else self._blocks(dtype))]
        size, stored = sum(block.size for block in blocks) + self.f.numel(), StoredDerivatives(blocks)
        return JacobianLinearization(self.f, stored, self.evaluate, self.theta), size
