"""Inputs in the eigenbasis of a dense curvature, where every posterior with a scalar prior is diagonal.

With A = Q diag(s λ + δ) Qᵀ and the rotated derivatives J Q, variances are ``(J Q)² · 1/(s λ + δ)``: linear in the
inverse spectrum, so that those under many posteriors are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.likelihoods.draws import chunks
from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision, DiagPrecision
from laplace.structures.basis import Basis

KEPT_SQUARES = 2**27
"""Numbers of squared derivatives that one batch keeps between posteriors: 512 MB in float32."""


@dataclass(frozen=True)
class SpectralLinearization(Linearization):
    """Outputs, and their derivatives in the coordinates of a ``DenseBasis``."""

    f: Tensor
    """Outputs, ``[batch, *positions, C]``."""
    projected: Callable[[], Iterator[Tensor]]
    """Makes the derivatives J Q, ``[chunk, columns, P]`` for a chunk of data at a time."""
    _squares: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def _squared(self, n_params: int) -> Iterator[Float[Tensor, "rows params"]]:
        """(J Q)² by chunks of rows, kept if they fit."""
        if self._squares:
            yield from self._squares
            return
        keep = self.f.numel() * n_params <= KEPT_SQUARES
        made = []
        for chunk in self.projected():
            squares = chunk.square().flatten(0, 1)
            if keep:
                made.append(squares)
            yield squares
        self._squares.extend(made)

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """(J Q)² / spectrum."""
        (only,) = self.variances([precision], dtype)
        return only

    def variances(
        self, precisions: Sequence[AbstractPrecision], dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "rows outputs"]]:
        """One product of the squares with all inverse spectra."""
        different = {id(precision): _diagonal(precision).vector for precision in precisions}
        inverse = (1 / torch.stack(list(different.values()), 1)).to(dtype)
        found = torch.cat([squares @ inverse for squares in self._squared(len(inverse))])
        variances = dict(zip(different, found.unbind(1), strict=True))
        for precision in precisions:
            yield variances[id(precision)].reshape(-1, self.n_outputs)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """J Q diag(1/spectrum) (J Q)ᵀ, datum by datum."""
        inverse = 1 / _diagonal(precision).vector.to(dtype)
        parts = []
        for chunk in self.projected():
            rows = chunk.reshape(-1, self.n_outputs, chunk.shape[-1])
            parts.append((rows * inverse) @ rows.mT)
        return torch.cat(parts)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        inverse = 1 / _diagonal(precision).vector.to(dtype)
        J = torch.cat([chunk.flatten(0, 1) for chunk in self.projected()])
        return (J * inverse) @ J.mT

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """(J₀ Q − J₁ Q)² / spectrum."""
        inverse = 1 / _diagonal(precision).vector.to(dtype)
        first, second = torch.cat([chunk.flatten(0, 1) for chunk in self.projected()]).unflatten(0, (-1, 2)).unbind(1)
        return ((first - second).square() @ inverse).unsqueeze(-1)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Through the rotated weights."""
        mean = self.mean(dtype)
        J = torch.cat([chunk.flatten(0, 1) for chunk in self.projected()])
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            z = _diagonal(precision).sample(size, generator).to(dtype)
            yield mean + (z @ J.mT).reshape(size, *mean.shape)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:  # noqa: ARG002
        """Already rotated."""
        return self


def _diagonal(precision: AbstractPrecision) -> DiagPrecision:
    assert isinstance(precision, DiagPrecision), "made by the basis these inputs were rotated into"
    return precision
