"""Rows back to the data they belong to: a datum of several positions is left out, and put into a fold, as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.likelihoods import Positions


@dataclass(frozen=True)
class Grouping:
    """Where each row lies in a grid ``[data, positions]``, as wide as the datum of most rows."""

    order: Int[Tensor, " rows"]
    """The rows in the order of their data, ``[rows]``."""
    kept: Int[Tensor, " rows"]
    """Their places in the flattened grid, ``[rows]``; the others are empty."""
    n_data: int
    n_positions: int

    @classmethod
    def of(cls, datum: Int[Tensor, " rows"]) -> Grouping:
        """The grid of all data that have a row."""
        number, n_data = numbered(datum)
        order, counts = number.argsort(stable=True), number.bincount(minlength=n_data)
        n_positions = int(counts.max()) if n_data else 0
        ordered = number[order]
        place = torch.arange(len(datum), device=datum.device) - (counts.cumsum(0) - counts)[ordered]
        return cls(order, ordered * n_positions + place, n_data, n_positions)

    def grid(self, values: Float[Tensor, "rows k"]) -> Float[Tensor, "data positions k"]:
        """Values of the rows in their places, zero in empty ones."""
        empty = values.new_zeros(self.n_data * self.n_positions, values.shape[1])
        return empty.index_copy(0, self.kept, values[self.order]).unflatten(0, (self.n_data, self.n_positions))

    def positions(self, rows: Positions) -> Positions:
        """The rows as unmasked positions of the grid."""
        datum = self.kept // max(1, self.n_positions)
        return replace(rows, f=rows.f[self.order], y=rows.y[self.order], kept=self.kept, datum=datum)


def numbered(datum: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], int]:
    """Data with a row, counted from 0 in ascending order, and how many there are."""
    known, number = datum.unique(return_inverse=True)
    return number, len(known)
