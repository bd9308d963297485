"""Some of the outputs: those of one head among several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis


@dataclass(frozen=True)
class SomeOutputs(Linearization):
    """Inputs of which some outputs are looked at."""

    inner: Linearization
    """With all outputs."""
    at: slice
    """Which."""

    @property
    def f(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only here
        """Outputs, ``[batch, k]``."""
        return self.inner.f[..., self.at]

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Of these outputs."""
        return self.inner.variance(precision, dtype)[:, self.at]

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """Of these outputs."""
        return self.inner.covariance(precision, dtype)[:, self.at, self.at]

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """Of these outputs of all rows."""
        n = self.inner.n_outputs
        whole = self.inner.joint_covariance(precision, dtype).unflatten(1, (-1, n)).unflatten(0, (-1, n))
        return whole[:, self.at][..., self.at].flatten(0, 1).flatten(1, 2)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:  # noqa: ARG002
        """Raise: there are no pairs among several heads."""
        msg = "Heads compare no inputs: several heads have no pairs."
        raise UnsupportedError(msg)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Of these outputs."""
        yield from (part[..., self.at] for part in self.inner.functions(precision, n_samples, generator, dtype))

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Of these outputs."""
        drawn = self.inner.network_functions(precision, n_samples, generator, dtype)
        yield from (part[..., self.at] for part in drawn)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Derivatives in other coordinates."""
        return replace(self, inner=self.inner.rotated(basis, dtype))


__all__ = ["SomeOutputs"]
