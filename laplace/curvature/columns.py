"""Curvature from its columns: ``H = Σ J Jᵀ`` over columns and data, with J in factors, one block per parameter group.

Pure functions of columns, and ``ColumnsInterface``, which makes structures of them for every back end that has columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.curvature.interface import CurvatureInterface
from laplace.curvature.structured import Basis
from laplace.enums import HessianStructure
from laplace.linalg import CHUNK_ELEMENTS
from laplace.structures import Kron
from laplace.structures.dense_jacobian import dense_rows
from laplace.structures.jacobian import DenseBlock, JacobianBlock, sum_parts
from laplace.structures.wide_kron import WideKron
from laplace.types import Inputs, Scalar

Columns: TypeAlias = "Iterable[Sequence[JacobianBlock]]"
"""Some columns at a time: one block for each parameter group."""


def full(columns: Columns, sizes: Sequence[int], like: Tensor) -> Float[Tensor, "params params"]:
    """``Σ J Jᵀ``, ``[P, P]``, in the precision of ``like``: exact."""
    total = like.new_zeros(sum(sizes), sum(sizes))
    for blocks in columns:
        for J in dense_rows(blocks):
            flat = J.flatten(0, 1)
            total.addmm_(flat.T, flat)
    return total


def diag(columns: Columns, sizes: Sequence[int], like: Tensor) -> Float[Tensor, " params"]:
    """Its diagonal ``[P]``: exact, layer by layer."""
    total = like.new_zeros(sum(sizes))
    parts = total.split(list(sizes))
    for blocks in columns:
        if len(blocks) != len(parts):  # chosen weights in another order are one block
            total += torch.cat([block.squares() for block in blocks])
            continue
        for block, part in zip(blocks, parts, strict=True):
            block.add_squares(part)
    return total


def blockdiag(columns: Columns, sizes: Sequence[int], like: Tensor) -> list[Float[Tensor, "p p"]]:
    """The diagonal block ``Σ J Jᵀ`` of each parameter group: exact.

    Time O(columns · rows · Σ p²); J is written out for one group and a bounded number of data at a time.
    """
    totals = [like.new_zeros(size, size) for size in sizes]
    for blocks in columns:
        for total, block in zip(totals, blocks, strict=True):
            for J in dense_rows([block]):
                flat = J.flatten(0, 1)
                total.addmm_(flat.T, flat)
    return totals


def ekfac(columns: Columns, basis: Basis, shapes: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """The diagonal of the curvature in a basis, ``Σ (Uᵀ J V)²`` for each parameter group: exact.

    References
    ----------
    George et al. (2018), arXiv:1806.03884.
    """
    totals = [like.new_zeros(shape) for shape in shapes]
    for blocks in columns:
        for total, block, sides, shape in zip(totals, blocks, basis, shapes, strict=True):
            total += block.rotate(sides, shape).squares().view(shape)
    return totals


def lowrank(
    columns: Columns, directions: Float[Tensor, "params k"], sizes: Sequence[int]
) -> tuple[Float[Tensor, "params k"], Scalar]:
    """Products ``H V = Σ J (Jᵀ V)`` and the trace ``Σ J²``: neither H nor J is formed.

    Time O(columns · rows · P · k), memory O(P k) beside that of the columns.
    """
    rows = [part.T.contiguous() for part in directions.split(list(sizes))]
    totals, trace = [torch.zeros_like(part) for part in rows], directions.new_zeros(())
    for blocks in columns:
        if not blocks[0].n_rows:
            continue
        step = max(1, CHUNK_ELEMENTS // max(1, *(block.size for block in blocks)))
        for start in range(0, directions.shape[1], step):
            some = slice(start, start + step)
            products = sum_parts([block.apply(part[some]) for block, part in zip(blocks, rows, strict=True)])
            for total, block in zip(totals, blocks, strict=True):
                total[some] += block.apply_transposed(products)
        trace = trace + torch.stack([block.squares().sum() for block in blocks]).sum()
    return torch.cat(totals, 1).T, trace


def dense_columns(J: Float[Tensor, "columns rows params"], sizes: Sequence[int]) -> list[JacobianBlock]:
    """Columns that are written out, as blocks."""
    return [DenseBlock(part) for part in J.split(list(sizes), -1)]


class Sums(Protocol):
    """The curvature of a batch, of which one structure is asked for."""

    def full(self) -> Tensor:
        """Dense curvature ``[P, P]``."""
        ...

    def diag(self) -> Tensor:
        """Diagonal ``[P]``."""
        ...

    @property
    def kron(self) -> Callable[[], Kron | WideKron]:
        """Makes Kronecker factors, raw sums."""
        ...

    def blockdiag(self) -> list[Tensor]:
        """The diagonal block of each group, ``[p, p]``."""
        ...

    def ekfac(self, basis: Basis, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The diagonal of the curvature in a basis, group by group."""
        ...

    def lowrank(self, directions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products of the curvature with directions ``[P, k]``, and its trace ``[]`` where it is known."""
        ...


@dataclass(frozen=True)
class ColumnSums:
    """The same from columns, which may be made as we go."""

    columns: Columns
    """Columns of the batch."""
    sizes: Sequence[int]
    """Number of weights in each parameter group."""
    like: Tensor
    """Any tensor in the precision of the result, where it is to be."""
    kron: Callable[[], Kron | WideKron]
    """Kronecker factors, raw sums, which columns alone do not give."""

    def full(self) -> Tensor:
        """Dense curvature ``[P, P]``."""
        return full(self.columns, self.sizes, self.like)

    def diag(self) -> Tensor:
        """Diagonal ``[P]``."""
        return diag(self.columns, self.sizes, self.like)

    def blockdiag(self) -> list[Tensor]:
        """The diagonal block of each group, ``[p, p]``."""
        return blockdiag(self.columns, self.sizes, self.like)

    def ekfac(self, basis: Basis, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The diagonal of the curvature in a basis, group by group."""
        return ekfac(self.columns, basis, shapes, self.like)

    def lowrank(self, directions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products of the curvature with directions ``[P, k]``, and its trace ``[]``."""
        return lowrank(self.columns, directions.to(self.like.dtype), self.sizes)


class ColumnsInterface(CurvatureInterface):
    """A back end whose curvature is a sum of outer products; see ``CurvatureInterface`` for the parameters."""

    @abstractmethod
    def columns(self, x: Inputs, y: Tensor) -> AbstractContextManager[tuple[Tensor, Iterator[Sequence[JacobianBlock]]]]:
        """Loss ``[]``, and columns J with ``H = Σ J Jᵀ`` over columns and rows, to be used inside the context.

        Parameters
        ----------
        x
            A batch of inputs.
        y
            Its targets.
        """

    @property
    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.params]

    def blockdiag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal block of each parameter group, ``[p, p]``."""
        self._refuse(kwargs, HessianStructure.BLOCKDIAG)
        with self.columns(x, y) as (loss, columns):
            return loss, blockdiag(columns, self._sizes, loss)

    def ekfac(
        self, x: Inputs, y: Tensor, basis: Basis, shapes: Sequence[tuple[int, ...]], **kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal of the curvature in a basis, group by group."""
        self._refuse(kwargs, HessianStructure.EKFAC)
        with self.columns(x, y) as (loss, columns):
            return loss, ekfac(columns, basis, shapes, loss)

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]``, products of the curvature with directions ``[P, k]``, and its trace ``[]``."""
        self._refuse(kwargs, HessianStructure.LOWRANK)
        with self.columns(x, y) as (loss, columns):
            return loss, *lowrank(columns, directions.to(loss.dtype), self._sizes)
