"""Kronecker blocks in their eigenbasis, with the prior added: the precision of ``hessian_structure="kron"``.

(U ⊗ V) diag(γ_i λ_j + δ) (U ⊗ V)ᵀ      or, damped,      (U ⊗ V) diag((γ_i + √δ)(λ_j + √δ)) (U ⊗ V)ᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace.attributes import check_attribute
from laplace.errors import ShapeError
from laplace.structures.rotated import RotatedPrecision


@dataclass(eq=False)
class KronDecomposed(RotatedPrecision):
    """Eigenvectors and eigenvalues of each factor, and one prior precision per block.

    Estimators hand out copies: assigning to one (tensors on another device, say) changes what it is, and nothing else.

    Attributes
    ----------
    eigenvectors
        For each block one or two orthogonal matrices; ``None`` is the identity.
    eigenvalues
        For each block one or two vectors.
    deltas
        Prior precision of each block, ``[n_blocks]``; zero when ``None``.
    damping
        Add √δ to each side of a product instead of δ to the product.
    """

    eigenvectors: Sequence[Sequence[Tensor | None]]
    eigenvalues: Sequence[Sequence[Tensor]]
    deltas: Tensor | None = None
    damping: bool = False

    def __post_init__(self) -> None:
        """Fill in zero deltas."""
        if self.deltas is None:
            first = self.eigenvalues[0][0]
            self.deltas = torch.zeros(len(self), dtype=first.dtype, device=first.device)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that a ``KronDecomposed`` has; others raise ``UnknownAttributeError``."""
        if name not in self.__dataclass_fields__:
            check_attribute(self, name)
        super().__setattr__(name, value)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.eigenvalues)

    def __add__(self, deltas: Tensor) -> KronDecomposed:
        """Add a prior precision to each block.

        Parameters
        ----------
        deltas
            ``[n_blocks]``, or one value for all.

        Raises
        ------
        ShapeError
            If there is another number of them.
        """
        if deltas.numel() not in (1, len(self)):
            msg = f"Expected one prior precision or one for each of the {len(self)} blocks; got {list(deltas.shape)}."
            raise ShapeError(msg)
        assert self.deltas is not None, "filled in on construction"
        return replace(self, deltas=self.deltas + deltas.reshape(-1))

    def __mul__(self, scalar: float | Tensor) -> KronDecomposed:
        """Multiply the eigenvalues, spread evenly over the factors; the prior is not touched."""
        values = [[side * scalar ** (1 / len(block)) for side in block] for block in self.eigenvalues]
        return replace(self, eigenvalues=values)

    __radd__ = __add__
    __rmul__ = __mul__

    def to(self, dtype: torch.dtype) -> KronDecomposed:
        """The same in another precision; shared eigenvectors stay shared."""
        assert self.deltas is not None, "filled in on construction"
        known = {id(side): side.to(dtype) for block in self.eigenvectors for side in block if side is not None}
        vectors = [[None if side is None else known[id(side)] for side in block] for block in self.eigenvectors]
        values = [[side.to(dtype) for side in block] for block in self.eigenvalues]
        return KronDecomposed(vectors, values, self.deltas.to(dtype), self.damping)

    def detach(self) -> KronDecomposed:
        """The same, cut off the graph."""
        values = [[side.detach() for side in block] for block in self.eigenvalues]
        vectors = [[None if side is None else side.detach() for side in block] for block in self.eigenvectors]
        assert self.deltas is not None, "filled in on construction"
        return KronDecomposed(vectors, values, self.deltas.detach(), self.damping)

    @property
    def spectrum(self) -> list[Tensor]:
        """Eigenvalues of each block with the prior added: ``[rows, columns]``, or ``[rows]`` with one factor."""
        assert self.deltas is not None, "filled in on construction"
        spectrum: list[Tensor] = []
        for block, delta in zip(self.eigenvalues, self.deltas, strict=True):
            delta = delta.to(block[0].device)  # factors may have been moved by hand
            if len(block) == 1:
                spectrum.append(block[0] + delta)
            elif self.damping:
                spectrum.append(torch.outer(block[0] + delta.sqrt(), block[1] + delta.sqrt()))
            else:
                spectrum.append(torch.outer(block[0], block[1]) + delta)
        return spectrum

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Sizes of the sides of each block."""
        return [tuple(len(side) for side in block) for block in self.eigenvalues]
