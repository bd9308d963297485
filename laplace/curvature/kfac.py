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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace import pending
from laplace.structures import Kron
from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import JacobianBlock, SumBlock
from laplace.structures.product import ProductBlock

DENSE_LIMIT = 1024
"""Number of weights up to which a group without factors gets a dense block."""


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors, or the exact block, of one parameter group."""

    outputs: Tensor
    """G, or the exact block: a matrix, or a vector for a diagonal."""
    inputs: Tensor | None = None
    """A, a raw sum; ``None`` when there is one factor."""
    count: int | Tensor = 0
    """Number of rows in A."""
    inputs_first: bool = False
    """Whether the first axis of the weight belongs to the inputs."""

    @property
    def sides(self) -> list[Tensor]:
        """Its factors, in the order of the axes of the weight."""
        if self.inputs is None:
            return [self.outputs]
        return [self.inputs, self.outputs] if self.inputs_first else [self.outputs, self.inputs]


def kron(
    columns: Iterable[Sequence[JacobianBlock]],
    diagonal: Collection[int],
    dtype: torch.dtype,
    resolution: float,
    *,
    reduce: bool,
) -> Kron:
    """Factors of the same data, some columns at a time: raw sums, with the number of rows in the inputs' sides."""
    total: list[Factors] = []
    for blocks in columns:
        moment, inputs = Moments(dtype), not total
        new = [
            factors(block, moment, reduce=reduce, inputs=inputs, diagonal=group in diagonal)
            for group, block in enumerate(blocks)
        ]
        total = more_columns(total, new) if total else new
    return Kron([group.sides for group in total], [group.count for group in total], resolution)


def more_columns(first: list[Factors], second: list[Factors]) -> list[Factors]:
    """Add further columns of the same data: inputs are counted once, and outputs that groups share stay shared."""
    sums: dict[tuple[int, int], Tensor] = {}
    added: list[Factors] = []
    for ours, theirs in zip(first, second, strict=True):
        key = (id(ours.outputs), id(theirs.outputs))
        if key not in sums:
            sums[key] = ours.outputs + theirs.outputs
        added.append(replace(ours, outputs=sums[key]))
    return added


class Moments:
    """Sums of outer products, returned in ``dtype`` and each made once: a weight and its bias share their gradients."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Σ r rᵀ over all axes but the last."""
        # Equal keys mean the same numbers in the same order: axes of length 1 do not matter, a transposition does.
        axes = tuple(axis for axis in zip(rows.shape, rows.stride(), strict=True) if axis[0] > 1)
        key = (rows.data_ptr(), rows.shape[-1], axes)
        if key not in self._known:
            flat = rows.reshape(-1, rows.shape[-1])
            # The rows are kept, so that their address is not used again.
            self._known[key] = (rows, (flat.T @ flat).to(self.dtype))
        return self._known[key][1]


def _occurrences(block: GatherBlock, dtype: torch.dtype) -> Tensor:
    """How often each token of a table was looked up, ``[tokens]``."""
    ones = torch.ones(len(block.row_token), dtype=dtype, device=block.row_token.device)
    return ones.new_zeros(block.n_tokens).index_add_(0, block.row_token, ones)


def factors(block: JacobianBlock, moment: Moments, *, reduce: bool, inputs: bool, diagonal: bool = False) -> Factors:
    """The factors of a block of Jacobians.

    Parameters
    ----------
    block
        Derivatives in one group of weights.
    moment
        Makes sums, shared by the groups.
    reduce
        Average positions instead of treating them as data.
    inputs
        Compute A, too; ``False`` for further columns of the same data.
    diagonal
        Keep only the diagonal of an exact block.

    Returns
    -------
    G and A, or an exact block.

    Notes
    -----
    Time O(rows · (O² · columns + I²)) for a weight of O × I.
    """
    if isinstance(block, ProductBlock):
        left, right, count = block.left, block.right, block.count
        if reduce:
            left = left.sum(3, keepdim=True)
            right = right.sum(2, keepdim=True) / block.counts.clamp(min=1).reshape(-1, 1, 1, 1)
            count = pending.count((block.counts > 0).sum() * right.shape[1])
        # The groups of a grouped convolution belong to the first axis of its weight; on the other side they are data.
        if block.transposed:
            right = right.transpose(1, 2).flatten(2)  # [batch, positions, groups · I]
        else:
            left = left.transpose(2, 3).flatten(3)  # [columns, batch, positions, groups · O]
        return Factors(moment(left), moment(right) if inputs else None, count, block.transposed)
    if isinstance(block, GatherBlock):
        tokens = _occurrences(block, moment.dtype) if inputs else None
        return Factors(moment(block.left), tokens, len(block.row_token), inputs_first=True)
    if isinstance(block, SumBlock):
        return Factors(moment(block.values if reduce else block.left))
    if diagonal or block.n_params > DENSE_LIMIT:
        return Factors(block.squares().to(moment.dtype))
    return Factors(moment(block.dense()))
