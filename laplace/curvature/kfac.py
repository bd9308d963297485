"""Kronecker factors from the blocks of Jacobians: pure mathematics.

The curvature of a group of weights is ``Σ J Jᵀ`` over columns and data. With ``J = Σ_t g_t ⊗ a_t`` it is approximated
by ``G ⊗ A``; both are raw sums here, and the inputs' side is divided by the number of its rows once all data are seen.

``expand`` (weights shared over positions act as on independent data)::

    G = Σ g gᵀ over columns, data and positions        A = Σ a aᵀ over data and positions, to be divided by their number

``reduce`` (positions are averaged before)::

    G = Σ (Σ_t g_t)(Σ_t g_t)ᵀ                           A = Σ (mean_t a_t)(mean_t a_t)ᵀ over data

The mean is over the positions of a datum that count, the sum over data that have any. Tables of embeddings expand in
either setting: their side of the tokens is then diagonal. Groups without such factors get an exact block, dense while
it is small, else its diagonal.

References
----------
Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature", arXiv:1503.05671;
Grosse & Martens (2016), "A Kronecker-factored approximate Fisher matrix for convolution layers", arXiv:1602.01407;
Eschenhagen, Immer, Turner, Schneider & Hennig (2023), "Kronecker-factored approximate curvature for modern neural
network architectures", arXiv:2311.00636 (expand and reduce: section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import pending
from laplace.structures import Kron
from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import JacobianBlock, SumBlock
from laplace.structures.open_kron import OpenKron, add_upper
from laplace.structures.product import ProductBlock

DENSE_LIMIT = 1024
"""Number of weights up to which a group without factors gets a dense block."""


@dataclass(frozen=True)
class Rows:
    """What the factors of one parameter group are summed of: rows r of ``Σ r rᵀ``, or a diagonal."""

    outputs: Tensor
    """Rows of G, or of the exact block; a vector for its diagonal."""
    gradients: Tensor | None = None
    """Gradients that they were made of, if other groups may have the same."""
    inputs: Tensor | None = None
    """Rows of A, or a diagonal; ``None`` when there is one factor."""
    count: int | Tensor = 0
    """Number of rows in A."""
    inputs_first: bool = False
    """Whether the first axis of the weight belongs to the inputs."""


def kron(
    columns: Iterable[Sequence[JacobianBlock]], diagonal: Collection[int], resolution: float, *, reduce: bool
) -> Kron:
    """Factors of the same data, some columns at a time: raw sums, with the number of rows in the inputs' sides.

    Inputs are summed with the first columns, since all have the same; outputs that groups share stay shared.
    """
    outputs, inputs = Moments(), Moments()
    groups: list[tuple[int | Tensor, bool]] = []
    for blocks in columns:
        each = enumerate(blocks)
        new = [rows(block, reduce=reduce, inputs=not groups, diagonal=group in diagonal) for group, block in each]
        outputs.add([(row.outputs, row.gradients) for row in new])
        if not groups:
            groups = [(row.count, row.inputs_first) for row in new]
            inputs.add([(row.inputs, row.inputs) for row in new])
    sides = [[G] if A is None else [G, A] for G, A in zip(outputs.finished(), inputs.finished(), strict=True)]
    turned = [pair[::-1] if first else pair for pair, (_, first) in zip(sides, groups, strict=True)]
    factors = [[side for side in pair if side is not None] for pair in turned]
    return OpenKron(factors, [count for count, _ in groups], resolution)


class Moments:
    """Sums of outer products, each made once: a weight and its bias share their gradients, layers their inputs."""

    def __init__(self) -> None:
        self.totals: list[Tensor | None] = []
        self._owner: list[int] = []

    def add(self, groups: Sequence[tuple[Tensor | None, Tensor | None]]) -> None:
        """Add Σ r rᵀ for each group, over all axes of its rows but the last; a vector is a diagonal, added as it is.

        Beside the rows there is what they were made of: groups in which it is the same share the sum.
        """
        if not self._owner:
            known: dict[Any, int] = {}
            self._owner = [known.setdefault(address(source), number) for number, (_, source) in enumerate(groups)]
            self.totals = [None] * len(groups)
        for number, (rows, _) in enumerate(groups):
            if rows is None or self._owner[number] != number:
                continue
            total, n = self.totals[number], rows.shape[-1]
            if rows.dim() == 1:
                self.totals[number] = rows if total is None else total.add_(rows)
                continue
            if total is None:
                self.totals[number] = total = rows.new_zeros(n, n)
            add_upper(total, rows.reshape(-1, n))

    def finished(self) -> list[Tensor | None]:
        """The sums, those that groups share being one tensor; of matrices what is on the diagonal and above."""
        return [self.totals[owner] for owner in self._owner]


def _occurrences(block: GatherBlock, dtype: torch.dtype) -> Tensor:
    """How often each token of a table was looked up, ``[tokens]``."""
    ones = torch.ones(len(block.row_token), dtype=dtype, device=block.row_token.device)
    return ones.new_zeros(block.n_tokens).index_add_(0, block.row_token, ones)


def address(rows: Tensor | None) -> Any:
    """What is equal where rows are the same numbers in the same order, as long as they live."""
    if rows is None or not rows.numel():
        return object()
    # Axes of length 1 do not matter, a transposition does.
    axes = tuple(axis for axis in zip(rows.shape, rows.stride(), strict=True) if axis[0] > 1)
    return rows.data_ptr(), rows.shape[-1], axes


def rows(block: JacobianBlock, *, reduce: bool, inputs: bool, diagonal: bool = False) -> Rows:
    """What the factors of a block of Jacobians are summed of.

    Parameters
    ----------
    block
        Derivatives in one group of weights.
    reduce
        Average positions instead of treating them as data.
    inputs
        Those of A, too; ``False`` for further columns of the same data.
    diagonal
        Keep only the diagonal of an exact block.

    Returns
    -------
    Rows of G and A, or an exact block.

    Notes
    -----
    Time of the sums O(rows · (O² · columns + I²)) for a weight of O × I.
    """
    if isinstance(block, ProductBlock):
        left, right, count = block.left, block.right, block.count
        gradients = left.transpose(2, 3).flatten(3)  # [columns, batch, positions, groups · O]
        if reduce:
            left = left.sum(3, keepdim=True)
            right = right.sum(2, keepdim=True) / block.counts.clamp(min=1).reshape(-1, 1, 1, 1)
            count = pending.count((block.counts > 0).sum() * right.shape[1])
        # The groups of a grouped convolution belong to the first axis of its weight; on the other side they are data.
        if not block.transposed:
            left = left.transpose(2, 3).flatten(3)
        else:
            right = right.transpose(1, 2).flatten(2)  # [batch, positions, groups · I]
        source = None if block.transposed and block.left.shape[2] > 1 else gradients
        return Rows(left, source, right if inputs else None, count, block.transposed)
    if isinstance(block, GatherBlock):
        tokens = _occurrences(block, block.left.dtype) if inputs else None
        return Rows(block.left, None, tokens, len(block.row_token), inputs_first=True)
    if isinstance(block, SumBlock):
        return Rows(block.values if reduce else block.left, block.left)
    if diagonal or block.n_params > DENSE_LIMIT:
        return Rows(block.squares())
    return Rows(block.dense())
