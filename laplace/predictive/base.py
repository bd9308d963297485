"""What every kind of linearized inputs can tell about outputs under a posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis


class Linearization(ABC):
    """Outputs at some inputs and how they depend on the random weights, to first order."""

    f: Tensor
    """Outputs, ``[batch, *positions, C]``."""

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.f.shape[-1]

    @property
    def features(self) -> Tensor | None:
        """What enters the last layer, ``[rows, D]``; ``None`` where it is not known."""
        return None

    def with_weights(self, theta: Tensor) -> Linearization:
        """The outputs at other random weights; where they are linear in them."""
        raise NotImplementedError

    @property
    def is_linear(self) -> bool:
        """Whether outputs are linear in the random weights, so that rows of several batches can be one batch."""
        return False

    def select(self, rows: Tensor) -> Linearization:
        """Some rows, flattened; where outputs are linear in the random weights."""
        raise NotImplementedError

    def followed_by(self, others: Sequence[Linearization]) -> Linearization:
        """With the rows of others after these; where outputs are linear in the random weights."""
        raise NotImplementedError

    def mean(self, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Outputs, flattened to rows."""
        return self.f.reshape(-1, self.n_outputs).to(dtype)

    @abstractmethod
    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Variances of the outputs, in their units squared and without observation noise."""

    @abstractmethod
    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """Covariances of the outputs of each row, without observation noise."""

    @abstractmethod
    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """Covariance of all outputs of all rows, row by row, without observation noise."""

    @abstractmethod
    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """Variances of the differences f₀ − f₁ of each pair, for outputs ``[pairs, 2, 1]``."""

    @abstractmethod
    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Draw whole functions of the linearized network, coherent over the rows of the call, in chunks of samples.

        Parameters
        ----------
        precision
            Posterior precision of the weights.
        n_samples
            How many.
        generator
            Source of randomness.
        dtype
            To compute in.

        Yields
        ------
        ``[samples, rows, C]``, ``n_samples`` in all.
        """

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """The same of the network itself; for a linear last layer it is the same."""
        return self.functions(precision, n_samples, generator, dtype)

    def variances(
        self, precisions: Sequence[AbstractPrecision], dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "rows outputs"]]:
        """Variances under several posteriors, one after the other; one that comes again is not computed again."""
        last: tuple[AbstractPrecision, Tensor] | None = None
        for precision in precisions:
            if last is None or last[0] is not precision:
                last = precision, self.variance(precision, dtype)
            yield last[1]

    @abstractmethod
    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """The same in other coordinates of the weights, for posteriors that ``basis`` makes."""

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """What to keep of it for repeated use, and its size in numbers; ``None`` when that is above a limit."""
        size = self.f.numel()
        return (self, size) if size <= limit else None

    def restore(self, rows: Tensor, n_leading: int = 0) -> Tensor:
        """From rows back to ``[batch, *positions]``, in the dtype of the outputs."""
        lead = rows.shape[:n_leading]
        return rows.reshape(*lead, *self.f.shape[:-1], *rows.shape[n_leading + 1 :]).to(self.f.dtype)
