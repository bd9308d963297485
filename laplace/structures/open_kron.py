"""Kronecker factors of many batches, added up in place: in their own precision for a few batches, then in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace.linalg import piece_elements, wide_dtype
from laplace.structures.kron import Kron, check_forms

OPEN = 8
"""Batches that are added in their own precision: rounding then stays below what ``Kron.resolution`` allows for."""


TILE = 64
"""Size of the smallest tiles of a symmetric product of which one half is computed."""


def add_upper(total: Tensor, flat: Tensor) -> None:
    """Add ``flatᵀ flat``, at least what is on the diagonal and above: tile by tile where that is less work."""
    n = len(total)
    if n < 2 * TILE:
        total.addmm_(flat.T, flat)
        return
    half = n // 2
    add_upper(total[:half, :half], flat[:, :half])
    add_upper(total[half:, half:], flat[:, half:])
    total[:half, half:].addmm_(flat[:, :half].T, flat[:, half:])


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal below it."""
    n = len(total)
    if n >= 2 * TILE:
        half = n // 2
        mirror(total[:half, :half])
        mirror(total[half:, half:])
        total[half:, :half] = total[:half, half:].T


class FactorSum:
    """The sum of one factor; of a matrix what is on the diagonal and above, until it is read."""

    def __init__(self, first: Tensor) -> None:
        self.shape = first.shape
        self._wide: Tensor | None = None
        self._open: Tensor | None = first
        self._n_open, self._is_own = 1, False

    def copy(self) -> FactorSum:
        """Another one of the same value."""
        other = FactorSum(self.value.clone())
        other._wide, other._open, other._n_open = other._open, None, 0
        return other

    def add(self, new: FactorSum) -> None:
        """Add another one, which may be used afterwards."""
        if new._open is None or new._wide is not None:
            self._close()
            self._open, self._n_open, self._is_own = new.value, OPEN, False
        elif self._open is None or self._n_open + new._n_open > OPEN:
            self._close()
            self._open, self._n_open, self._is_own = new._open, new._n_open, False
        else:
            self._open = self._open.add_(new._open) if self._is_own else self._open + new._open
            self._n_open, self._is_own = self._n_open + new._n_open, True

    def _close(self) -> None:
        """Move what is open to float64, piece by piece: nothing as large as the factor is made beside the two."""
        if self._open is None:
            return
        if self._wide is None:
            self._wide = self._open.to(wide_dtype(self._open), copy=True)
        else:
            step = max(1, piece_elements(self._open.device) // max(1, self._open.stride(0)))
            for total, part in zip(self._wide.split(step), self._open.split(step), strict=True):
                total.add_(part)
        self._open, self._n_open = None, 0

    @property
    def value(self) -> Tensor:
        """The sum in float64."""
        changed = self._open is not None
        self._close()
        assert self._wide is not None, "made by closing"
        if changed and self._wide.dim() == 2:
            mirror(self._wide)
        return self._wide


class OpenKron(Kron):
    """A sum of Kronecker matrices, factor by factor, that others are added to; its factors are in float64 when read.

    Parameters
    ----------
    kfacs, counts, resolution
        As of ``Kron``, in the precision that they were computed in; of matrices what is on the diagonal and above.
    """

    _sums: list[list[FactorSum]]

    def __init__(
        self, kfacs: Sequence[Sequence[Tensor]], counts: Sequence[int | Tensor] | None = None, resolution: float = 0.0
    ) -> None:
        super().__init__(kfacs, counts, resolution)

    @property
    def kfacs(self) -> list[list[Tensor]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The factors in float64."""
        return [[each.value for each in sums] for sums in self._sums]

    @kfacs.setter
    def kfacs(self, kfacs: Sequence[Sequence[Tensor]]) -> None:
        known = {id(side): FactorSum(side) for block in kfacs for side in block}
        object.__setattr__(self, "_sums", [[known[id(side)] for side in block] for block in kfacs])

    @property
    def _forms(self) -> list[list[torch.Size]]:
        return [[each.shape for each in sums] for sums in self._sums]

    def absorbing(self, other: Kron) -> Kron:
        """Itself, after another one was added to it; factors that blocks share in both stay shared."""
        if not isinstance(other, OpenKron):
            return super().absorbing(other)
        if self._forms != other._forms:
            check_forms(self, other)
        blocks = zip(self._sums, other._sums, strict=True)
        pairs = [(ours, k, new) for ours, theirs in blocks for k, new in enumerate(theirs)]
        # What was one factor in all batches so far may be two in this one.
        parts: dict[int, dict[int, FactorSum]] = {}
        for ours, k, new in pairs:
            found = parts.setdefault(id(ours[k]), {})
            if id(new) not in found:
                found[id(new)] = ours[k].copy() if found else ours[k]
            ours[k] = found[id(new)]
        for mine, new in {id(ours[k]): (ours[k], new) for ours, k, new in pairs}.values():
            mine.add(new)
        if self.counts is not None and other.counts is not None:
            self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.resolution = max(self.resolution, other.resolution)
        return self
