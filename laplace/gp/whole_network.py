"""Kernels of a whole network, from derivatives in factors: ``J [rows, C, P]`` is never whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.gp.tangents import Points, Tangents
from laplace.network.parameters import split_sizes
from laplace.predictive.linearization import NetworkLinearization
from laplace.structures.jacobian import JacobianBlock, sum_parts


@dataclass(frozen=True)
class BlockPoints(Points):
    """Points of a whole network: blocks of one column, for several batches."""

    pieces: Sequence[Callable[[], list[JacobianBlock]]]
    """How to get the blocks of each batch, one for each parameter group."""
    sizes: Sequence[int]
    """Number of points in each batch."""

    @property
    def n_points(self) -> int:
        """M."""
        return sum(self.sizes)

    def gram(self) -> Float[Tensor, "points points"]:
        """Batch by batch; only one of the two halves is computed."""
        rows: list[list[Tensor]] = []
        for i, first in enumerate(self.pieces):
            blocks = first()
            row = [product(blocks, second())[0] for second in self.pieces[:i]]
            rows.append([*row, product(blocks, blocks)[0]])
        n, sample = self.n_points, rows[0][0]
        total, start = sample.new_zeros(n, n), 0
        for size, row in zip(self.sizes, rows, strict=True):
            filled = torch.cat(row, 1)
            total[start : start + size, : filled.shape[1]] = filled
            total[: filled.shape[1], start : start + size] = filled.T
            start += size
        return 0.5 * (total + total.T)

    def combine(self, weights: Float[Tensor, "vectors points"]) -> Float[Tensor, "vectors params"]:
        """Piece by piece: no more of J at a time than chunks may take."""
        total: list[Tensor] | None = None
        for part, piece in zip(weights.split(list(self.sizes), 1), self.pieces, strict=True):
            blocks = piece()
            if total is None:
                total = [part.new_zeros(len(part), block.n_params) for block in blocks]
            for group, block in zip(total, blocks, strict=True):
                for rows, some, J in block.pieces():
                    group[:, some] += part[:, rows] @ J[0]
        assert total is not None, "there are points"
        return torch.cat(total, 1)

    def against(self, rows: Float[Tensor, "rows params"]) -> Float[Tensor, "rows points"]:
        """By each block."""
        columns = []
        for piece in self.pieces:
            blocks = piece()
            parts = split_sizes(rows, [block.n_params for block in blocks])
            columns.append(sum_parts([b.apply(v)[:, 0] for b, v in zip(blocks, parts, strict=True)]))
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class BlockTangents(Tangents):
    """Derivatives of a whole network, a few outputs at a time."""

    inputs: NetworkLinearization
    """Linearized."""
    dtype: torch.dtype
    """To compute in."""

    @property
    def _step(self) -> int:
        """How many columns fit the memory that chunks may take."""
        assert self.inputs.derivatives is not None, "tangents checks this"
        return self.inputs.derivatives.n_columns_at_once

    def _by_column(self, step: int) -> Iterator[list[JacobianBlock]]:
        for start in range(0, self.inputs.n_columns, step):
            yield self.inputs.blocks(self.dtype, start, start + step)

    def _rows(self, columns: Tensor) -> Tensor:
        """From ``[columns, batch, k]`` to ``[rows, C, k]``."""
        return columns.transpose(0, 1).reshape(-1, self.inputs.n_outputs, columns.shape[-1])

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """By each block."""
        columns = []
        for blocks in self._by_column(self._step):
            parts = split_sizes(vectors, [block.n_params for block in blocks])
            columns.append(sum_parts([b.apply(v) for b, v in zip(blocks, parts, strict=True)]))
        return self._rows(torch.cat(columns, 1).permute(1, 2, 0))

    def cross(self, points: Points) -> Float[Tensor, "rows outputs points"]:
        """Of blocks with blocks."""
        assert isinstance(points, BlockPoints), "points of the same network"
        columns = []
        for blocks in self._by_column(self._step):
            columns.append(torch.cat([product(blocks, piece()) for piece in points.pieces], 2))
        return self._rows(torch.cat(columns))

    def _ones(self, blocks: Sequence[JacobianBlock]) -> list[Tensor]:
        return [block.sample.new_ones(1, dtype=self.dtype).expand(block.n_params) for block in blocks]

    def variance(self) -> Float[Tensor, "rows outputs"]:
        """A few outputs at a time."""
        columns = [
            sum_parts([b.variance(w) for b, w in zip(blocks, self._ones(blocks), strict=True)])
            for blocks in self._by_column(self._step)
        ]
        return self._rows(torch.cat(columns).unsqueeze(-1)).squeeze(-1)

    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """All outputs of a position at a time."""
        parts = [
            sum_parts([b.covariance(w) for b, w in zip(blocks, self._ones(blocks), strict=True)])
            for blocks in self._by_column(self.inputs.n_outputs)
        ]
        return torch.stack(parts, 1).flatten(0, 1)

    def joint(self) -> Float[Tensor, "joint joint"]:
        """All outputs at once."""
        blocks = self.inputs.blocks(self.dtype)
        return sum_parts([b.kernel(w) for b, w in zip(blocks, self._ones(blocks), strict=True)])

    def pair_variance(self) -> Float[Tensor, " pairs"]:
        """One column, the difference."""
        blocks = self.inputs.differences(self.dtype)
        return sum_parts([b.variance(w) for b, w in zip(blocks, self._ones(blocks), strict=True)]).squeeze(0)


def product(first: Sequence[JacobianBlock], second: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch points"]:
    """``J₁ J₂ᵀ``, where the second has one column: ``[columns, batch₁, batch₂]``."""
    return sum_parts([a.cross(b)[:, :, 0] for a, b in zip(first, second, strict=True)])
