"""Probabilities of preferences (``fitting=True`` of reward modeling), from the joint posterior of a pair's scores.

Only the difference Δ = f₀ − f₁ matters, so a pair is a classification problem with the logits (Δ, 0): the links and all
that is built on them serve it as they are. The variance of Δ contains the covariance of the two scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import ShapeError, UnsupportedError
from laplace.predictive.linearization import Linearization
from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis


@dataclass(frozen=True)
class Pairs(Linearization):
    """Linearized pairs: their outputs are the logits (Δ, 0), whose variances are (var Δ, 0).

    Attributes
    ----------
    f
        Logits, ``[pairs, 2]``.
    scores
        Linearized items, with outputs ``[pairs, 2, 1]``.
    """

    f: Tensor
    scores: Linearization

    @property
    def is_linear(self) -> bool:
        """As the scores are."""
        return self.scores.is_linear

    def followed_by(self, others: Sequence[Linearization]) -> Pairs:
        """Pair after pair."""
        parts = [other for other in others if isinstance(other, Pairs)]
        return Pairs(torch.cat([self.f, *(p.f for p in parts)]), self.scores.followed_by([p.scores for p in parts]))

    def mean(self, dtype: torch.dtype) -> Float[Tensor, "pairs outputs"]:
        """Logits, ``[pairs, 2]``."""
        return against_zero(self.scores.mean(dtype).reshape(-1, 2))

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs outputs"]:
        """Variances of the logits, ``[pairs, 2]``, in output units squared."""
        variance = self.scores.pair_variance(precision, dtype)
        return torch.cat([variance, torch.zeros_like(variance)], -1)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs outputs outputs"]:
        """Covariances of the logits, ``[pairs, 2, 2]``: diagonal, because the second is always 0."""
        return torch.diag_embed(self.variance(precision, dtype))

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:  # noqa: ARG002
        """Not asked for: joint predictions of pairs average over functions."""
        msg = "Probabilities of pairs have no joint covariance; joint=True averages over functions."
        raise UnsupportedError(msg)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """That of the scores."""
        return self.scores.pair_variance(precision, dtype)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Pairs:
        """The scores in other coordinates."""
        return replace(self, scores=self.scores.rotated(basis, dtype))

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """What is kept of the scores."""
        found = self.scores.kept(limit)
        return None if found is None else (Pairs(self.f, found[0]), found[1])

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples pairs outputs"]]:
        """The same of the network itself."""
        for part in self.scores.network_functions(precision, n_samples, generator, dtype):
            yield against_zero(part.reshape(len(part), -1, 2))

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples pairs outputs"]]:
        """Logits of whole functions, in chunks of samples."""
        for part in self.scores.functions(precision, n_samples, generator, dtype):
            yield against_zero(part.reshape(len(part), -1, 2))


def compare(inputs: Linearization) -> Pairs:
    """Compare the two items of each pair."""
    f = inputs.f
    if f.shape[1:] not in ((2, 1), (2,)):
        msg = (
            "fitting=True gives the probabilities of pairs: inputs [batch, 2, ...] with scores [batch, 2, 1]; the "
            f"model returns {list(f.shape)}. For scores of single inputs leave it out."
        )
        raise ShapeError(msg)
    return Pairs(against_zero(f.reshape(-1, 2)), inputs)


def against_zero(scores: Float[Tensor, "*batch two"]) -> Float[Tensor, "*batch two"]:
    """From two scores to the logits (f₀ − f₁, 0), which have the same softmax."""
    gap = scores[..., :1] - scores[..., 1:]
    return torch.cat([gap, torch.zeros_like(gap)], -1)
