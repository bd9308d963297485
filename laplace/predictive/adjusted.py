"""Outputs whose variance is not the posterior's alone: without it, or with more of it where inputs are foreign."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision, DiagPrecision
from laplace.structures.basis import Basis

NO_POSTERIOR = DiagPrecision(torch.zeros(0))
"""What stands for a posterior where its variance is not used: it need not be factorized then."""


@dataclass(frozen=True)
class Adjusted(Linearization):
    """Inputs of which each output has an independent value of its own beside the posterior, or instead of it."""

    inner: Linearization
    """Outputs and their derivatives."""
    extra: Float[Tensor, "rows outputs"] | None = None
    """Variance of that value, in output units squared; ``None`` for none."""
    uses_posterior: bool = True
    """Whether the posterior's variance counts."""

    @property
    def f(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only here
        """Outputs, ``[batch, *positions, C]``."""
        return self.inner.f

    def _extra(self, like: Tensor) -> Float[Tensor, "rows outputs"]:
        return torch.zeros_like(like) if self.extra is None else self.extra.to(like).expand_as(like)

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """The sum."""
        extra = self._extra(self.mean(dtype))
        return self.inner.variance(precision, dtype) + extra if self.uses_posterior else extra

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """On the diagonal."""
        extra = self._extra(self.mean(dtype))
        if extra.requires_grad and not self.uses_posterior:  # zeros have roots without a gradient
            extra = extra.clamp(min=1e-30)
        extra = torch.diag_embed(extra)
        return self.inner.covariance(precision, dtype) + extra if self.uses_posterior else extra

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """On the diagonal."""
        extra = torch.diag(self._extra(self.mean(dtype)).flatten())
        return self.inner.joint_covariance(precision, dtype) + extra if self.uses_posterior else extra

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """Of the difference of two values, both variances."""
        extra = self._extra(self.mean(dtype)).reshape(-1, 2).sum(1, keepdim=True)
        return self.inner.pair_variance(precision, dtype) + extra if self.uses_posterior else extra

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Those of the posterior, or the mean, and the value of each output."""
        yield from self._moved(
            self.inner.functions(precision, n_samples, generator, dtype), n_samples, generator, dtype
        )

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """The same of the network itself."""
        drawn = self.inner.network_functions(precision, n_samples, generator, dtype)
        yield from self._moved(drawn, n_samples, generator, dtype)

    def _moved(
        self, drawn: Iterator[Tensor], n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Samples with the value of each output; without the posterior those of the mean."""
        if not self.uses_posterior:
            drawn = iter([self.mean(dtype).expand(n_samples, -1, -1)])
        for part in drawn:
            if self.extra is None:
                yield part
                continue
            noise = torch.randn(part.shape, dtype=dtype, device=part.device, generator=generator)
            yield part + self._extra(part[0]).sqrt() * noise

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Derivatives in other coordinates."""
        return replace(self, inner=self.inner.rotated(basis, dtype))


@dataclass(frozen=True)
class Contrasts(Linearization):
    """Inputs whose outputs vary about their mean over outputs: what all of a row share, a softmax does not see.

    Links that use variances alone would take it for doubt about the classes.
    """

    inner: Linearization
    """Outputs and their derivatives."""

    @property
    def f(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only here
        """Outputs, ``[batch, *positions, C]``."""
        return self.inner.f

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """The diagonal of ``covariance``."""
        return self.covariance(precision, dtype).diagonal(dim1=1, dim2=2)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """``M S M`` with M = I − 11ᵀ/C."""
        half = self.inner.covariance(precision, dtype)
        half = half - half.mean(1, keepdim=True)
        return half - half.mean(2, keepdim=True)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """That of the outputs: nothing that uses variances alone is made of it."""
        return self.inner.joint_covariance(precision, dtype)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """What two items share cancels already."""
        return self.inner.pair_variance(precision, dtype)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Those of the outputs: after the softmax they are the same."""
        yield from self.inner.functions(precision, n_samples, generator, dtype)

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Likewise."""
        yield from self.inner.network_functions(precision, n_samples, generator, dtype)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Derivatives in other coordinates."""
        return replace(self, inner=self.inner.rotated(basis, dtype))
