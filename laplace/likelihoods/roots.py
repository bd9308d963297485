"""Roots of Hessians in the outputs, of which no column is built before it is asked for.

A root has ``r rᵀ = Λ`` in each row. Combinations of its columns cost O(rows · C), whatever their number, so that nobody
needs ``[rows, C, columns]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.types import Outputs


class Root(ABC):
    """Columns of roots, one set for each row."""

    @property
    @abstractmethod
    def sizes(self) -> Float[Tensor, "rows columns"]:
        """Squared lengths of the columns, which are what they add to the trace, ``[rows, columns]``."""

    @abstractmethod
    def mix(self, weights: Float[Tensor, "rows columns"]) -> Outputs:
        """The combination ``Σ_j w_j r_j`` of the columns of each row, ``[rows, C]``."""


@dataclass(frozen=True)
class DiagonalRoot(Root):
    """Roots of diagonal matrices: column c belongs to output c."""

    diagonal: Outputs
    """``[rows, C]``."""

    @property
    def sizes(self) -> Tensor:
        """The diagonal."""
        return self.diagonal

    def mix(self, weights: Tensor) -> Outputs:
        """√d times the weights."""
        return self.diagonal.sqrt() * weights


@dataclass(frozen=True)
class DenseRoot(Root):
    """Roots that were written out."""

    root: Float[Tensor, "rows outputs columns"]
    """``[rows, C, columns]``."""

    @property
    def sizes(self) -> Tensor:
        """Squared lengths."""
        return self.root.square().sum(1)

    def mix(self, weights: Tensor) -> Outputs:
        """A product of matrix and vector in each row."""
        return (self.root @ weights.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class CategoricalRoot(Root):
    """Cholesky factors of ``diag(p) − p pᵀ`` with the likeliest class of each row first, C − 1 columns.

    With classes in that order and tails ``q_j = Σ_{i>j} p_i`` column j has ``√(p_j q_j / q_{j−1})`` at its own class
    and ``−p_i √(p_j / (q_{j−1} q_j))`` at later ones. Its length falls with j, and the columns from j on are a root of
    what the first ones leave: the matrix of the classes that remain, given that it is one of them.

    References
    ----------
    Tanabe & Sagae (1992), "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
    matrix of the multinomial distribution, with applications".
    """

    p: Outputs
    """Probabilities in descending order, ``[rows, C]``."""
    order: Tensor
    """The class of each, ``[rows, C]``."""

    @classmethod
    def of(cls, p: Outputs) -> CategoricalRoot:
        """From probabilities in the order of the classes, ``[rows, C]``."""
        return cls(*p.sort(-1, descending=True))

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Of each column the entry at its class, and what ``−p_i`` is multiplied by at later ones."""
        # Tails are sums, never 1 − Σ p, so that a confident network loses no digits.
        from_here = self.p.flip(-1).cumsum(-1).flip(-1)
        here, before, after = self.p[:, :-1], from_here[:, :-1], from_here[:, 1:]
        # A tail that underflows is that of classes whose probability does: their entries are zero.
        tiny = torch.finfo(self.p.dtype).tiny
        ratio = (here / before.clamp(min=tiny)).sqrt()
        return ratio * after.sqrt(), ratio / after.clamp(min=tiny).sqrt()

    @property
    def sizes(self) -> Tensor:
        """Squared lengths, descending."""
        own, factor = self._parts
        later = self.p.square().flip(-1).cumsum(-1).flip(-1)[:, 1:]
        # Factor by factor: the square of the second may overflow where that of the first is zero.
        return own.square() + (later.sqrt() * factor).square()

    def mix(self, weights: Tensor) -> Outputs:
        """One running sum over the classes."""
        own, factor = self._parts
        mixed = torch.zeros_like(self.p)
        mixed[:, :-1] = own * weights
        mixed[:, 1:] -= self.p[:, 1:] * (factor * weights).cumsum(-1)
        return torch.zeros_like(mixed).scatter(-1, self.order, mixed)


@dataclass(frozen=True)
class SideBySide(Root):
    """Roots of outputs that are independent of each other, one part after the other."""

    parts: Sequence[tuple[Root, Tensor]]
    """Each with a factor of its matrix, ``[]`` (of a diagonal one also ``[C]``)."""

    @property
    def sizes(self) -> Tensor:
        """Those of the parts."""
        return torch.cat([root.sizes * factor for root, factor in self.parts], -1)

    def mix(self, weights: Tensor) -> Outputs:
        """Those of the parts, each with its own weights."""
        split = weights.split([root.sizes.shape[-1] for root, _ in self.parts], -1)
        pairs = zip(self.parts, split, strict=True)
        return torch.cat([factor.sqrt() * root.mix(own) for (root, factor), own in pairs], -1)
