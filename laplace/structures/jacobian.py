"""Derivatives of outputs in the random weights, kept in factors: ``J [columns, batch, P]`` is never whole.

A *column* is one direction in the outputs of a datum: an output, or a root of its Hessian. For a layer that multiplies
its inputs by a weight, ``J_qb = Σ_t g_qbt ⊗ a_bt`` over the positions t at which the weight is used, with ``g`` the
gradients at the layer's outputs and ``a`` its inputs. Structures ask blocks for squares, (co)variances and products;
they compute them piece by piece under a bound on memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.linalg import piece_elements


class JacobianBlock(ABC):
    """Derivatives in one parameter group, ``[columns, batch, p]``: the slow and correct defaults."""

    @property
    @abstractmethod
    def n_columns(self) -> int:
        """Q, the number of columns."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """B, the number of rows of the batch."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter group as a matrix ``(outputs, inputs)``, or ``(p,)``."""

    @property
    def n_params(self) -> int:
        """p, the number of weights in the group."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def sample(self) -> Tensor:
        """Any tensor of the block, for its dtype and device."""

    @abstractmethod
    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """A part of J, written out."""

    @property
    @abstractmethod
    def n_units(self) -> int:
        """Into how many equal parts the weights can be cut."""

    @abstractmethod
    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> JacobianBlock:
        """J in another basis of the weights: as matrices ``Lᵀ J R``, as vectors ``J R``; ``None`` is the identity."""

    @abstractmethod
    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> JacobianBlock:
        """Mixtures of the columns."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers it keeps."""

    def cuts(self, n_columns: int, *, whole_batch: bool = False) -> Iterator[tuple[slice, slice, slice]]:
        """Rows, units and weights of bounded pieces of some columns."""
        n_rows, n_units, n_params, limit = self.n_rows, self.n_units, self.n_params, piece_elements(self.sample.device)
        unit = n_params // n_units
        rows_each = n_rows if whole_batch else max(1, limit // max(1, n_columns * n_params))
        rows_each = max(1, min(rows_each, n_rows))
        units_each = max(1, min(n_units, limit // max(1, n_columns * rows_each * unit)))
        for start in range(0, n_rows, rows_each):
            rows = slice(start, min(start + rows_each, n_rows))
            for first in range(0, n_units, units_each):
                last = min(first + units_each, n_units)
                yield rows, slice(first, last), slice(first * unit, last * unit)

    def pieces(self, *, whole_batch: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
        """All of J in bounded pieces, of rows and weights or of weights only, each ``[columns, rows, weights]``."""
        for rows, units, weights in self.cuts(self.n_columns, whole_batch=whole_batch):
            yield rows, weights, self.piece(rows, units)

    def dense(self, rows: slice | None = None) -> Float[Tensor, "columns batch params"]:
        """J of some rows, written out."""
        return self.piece(slice(None) if rows is None else rows, slice(None))

    def entries(self, rows: slice, index: Int[Tensor, " part"]) -> Float[Tensor, "columns batch part"]:
        """J of some rows in some weights; overridden where the others need not be written out."""
        return self.piece(rows, slice(None))[..., index]

    def to(self, dtype: torch.dtype) -> JacobianBlock:  # noqa: ARG002 - derivatives of a network are in it already
        """The same in the precision of the curvature."""
        return self

    def compact(self) -> JacobianBlock:
        """The same in as few numbers as it can be kept in, where it is used more than once."""
        return self

    def by_column(self) -> Iterator[JacobianBlock]:
        """The block in as many columns at a time as are cheapest to write out together."""
        yield self

    def squared(self, J: Tensor) -> Tensor:
        """J² of a piece."""
        return J.square()

    def squares(self) -> Float[Tensor, " params"]:
        """Σ J² over columns and rows, ``[p]``."""
        total = self.sample.new_zeros(self.n_params)
        for column in self.by_column():
            for _, weights, J in column.pieces():
                total[weights] += column.squared(J).sum((0, 1))
        return total

    def add_squares(self, total: Float[Tensor, " params"]) -> None:
        """Add Σ J² to a total ``[p]``."""
        total += self.squares()

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """Σ_p w_p J_p²."""
        columns = [
            self._assemble([(rows, column.squared(J) @ w[weights]) for rows, weights, J in column.pieces()], 1)
            for column in self.by_column()
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns)

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """Σ_p w_p J_qp J_kp for each row."""
        parts = []
        for rows, weights, J in self.pieces():
            half = (J * w[weights].sqrt()).transpose(0, 1)
            parts.append((rows, half @ half.mT))
        return self._assemble(parts, 0)

    def kernel(self, w: Float[Tensor, " params"]) -> Float[Tensor, "joint joint"]:
        """The same across rows, ``[batch·columns, batch·columns]``, row by row."""
        total: Tensor | None = None
        for _, weights, J in self.pieces(whole_batch=True):
            half = (J * w[weights].sqrt()).transpose(0, 1).flatten(0, 1)
            total = half @ half.T if total is None else total + half @ half.T
        assert total is not None, "there are weights"
        return total

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """J v for several vectors of weights."""
        parts = [(rows, torch.einsum("qbp,sp->sqb", J, v[:, weights])) for rows, weights, J in self.pieces()]
        return self._assemble(parts, 2)

    def apply_transposed(self, w: Float[Tensor, "samples columns batch"]) -> Float[Tensor, "samples params"]:
        """Σ_qb w_qb J_qb for several weighings of columns and rows."""
        total = w.new_zeros(len(w), self.n_params)
        for rows, weights, J in self.pieces():
            total[:, weights] += torch.einsum("sqb,qbp->sp", w[:, :, rows], J)
        return total

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """Products ``J J'ᵀ`` with derivatives in the same group at other inputs."""
        step = max(1, piece_elements(other.sample.device) // max(1, other.n_columns * other.n_params))
        parts: list[Tensor] = []
        for start in range(0, other.n_rows, step):
            J = other.dense(slice(start, start + step))
            parts.append(self.apply(J.flatten(0, 1)).unflatten(0, J.shape[:2]))
        return torch.cat(parts, 1).permute(2, 3, 0, 1)

    def _assemble(self, parts: list[tuple[slice, Tensor]], dim: int) -> Tensor:
        """Add pieces of the same rows, join pieces of different rows."""
        joined: dict[int, Tensor] = {}
        for rows, part in parts:
            start = rows.start or 0
            joined[start] = joined[start] + part if start in joined else part
        return torch.cat([joined[start] for start in sorted(joined)], dim)


@dataclass(frozen=True)
class DenseBlock(JacobianBlock):
    """J written out: for small groups (biases, scales, bare parameters)."""

    values: Float[Tensor, "columns batch params"]
    """``[columns, batch, p]``."""

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.values.shape[0]

    @property
    def n_rows(self) -> int:
        """B."""
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p,)``."""
        return (self.values.shape[2],)

    @property
    def sample(self) -> Tensor:
        """J."""
        return self.values

    @property
    def n_units(self) -> int:
        """Each weight is one."""
        return self.values.shape[2]

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """A view."""
        return self.values[:, rows, units]

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> DenseBlock:
        """One product."""
        return DenseBlock(torch.einsum("mq,qbp->mbp", weights, self.values))

    @property
    def size(self) -> int:
        """That of J."""
        return self.values.numel()

    @property
    def _is_small(self) -> bool:
        """Whether a temporary of the size of J is allowed."""
        return self.values.numel() <= piece_elements(self.values.device)

    def squares(self) -> Float[Tensor, " params"]:
        """At once where it is small."""
        return self.values.square().sum((0, 1)) if self._is_small else super().squares()

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """At once where it is small."""
        return self.values.square() @ w if self._is_small else super().variance(w)

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """One product, where both are written out."""
        if not isinstance(other, DenseBlock):
            return super().cross(other)
        product = self.values.flatten(0, 1) @ other.values.flatten(0, 1).T
        return product.reshape(*self.values.shape[:2], *other.values.shape[:2])

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> DenseBlock:
        """J R, or Lᵀ J R."""
        values = self.values.unflatten(-1, tuple(shape))
        *outer, inner = sides
        values = values if inner is None else values @ inner
        for side in outer:
            values = values if side is None else side.T @ values
        return DenseBlock(values.flatten(2))


@dataclass(frozen=True, init=False)
class SumBlock(DenseBlock):
    """The block of a bias, ``J_qb = Σ_t g_qbt``, which remembers its positions and adds them up when it is asked to."""

    left: Float[Tensor, "columns batch positions params"]
    """g, ``[columns, batch, positions, p]``."""

    def __init__(self, left: Float[Tensor, "columns batch positions params"]) -> None:
        object.__setattr__(self, "left", left)

    @cached_property
    def values(self) -> Float[Tensor, "columns batch params"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """J."""
        return self.left.sum(2)

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.left.shape[0]

    @property
    def n_rows(self) -> int:
        """B."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p,)``."""
        return (self.left.shape[3],)

    @property
    def sample(self) -> Tensor:
        """g."""
        return self.left

    def compact(self) -> DenseBlock:
        """Without the positions."""
        return DenseBlock(self.values)


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """Sum of one or more tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
