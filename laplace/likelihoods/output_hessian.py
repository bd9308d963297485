"""Hessians in the outputs, kept in factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class OutputHessian:
    """Hessians of −log p(y|f) in ``f``, one per row, kept as ``diag(d) ± r rᵀ``; C×C matrices are never built."""

    n_outputs: int
    """C."""
    diagonal: Tensor | None = None
    """``d``: ``[rows, C]``, or ``[rows, 1]`` when all outputs share it, or ``None`` for zero."""
    root: Tensor | None = None
    """``r``: ``[rows, C, k]``, or ``None`` for zero."""
    sign: int = 1
    """Sign of the product ``r rᵀ``: 1 or −1."""
    total: Tensor | None = None
    """The diagonal of the whole, ``[rows, C]``, given where ``d − r²`` would cancel; it is then used instead."""

    def diag(self) -> Float[Tensor, "rows outputs"]:
        """Diagonals, ``[rows, C]``."""
        if self.total is not None:
            return self.total
        total: Tensor | float = 0.0
        if self.root is not None:
            root = self.root.squeeze(-1)
            total = self.sign * (root.square() if root.dim() == 2 else root.square().sum(-1))
        if self.diagonal is not None:
            total = total + self.diagonal.expand(-1, self.n_outputs)
        assert isinstance(total, Tensor), "one of the two parts is there"
        return total

    def sum(self) -> Float[Tensor, "outputs outputs"]:
        """Sum over rows, ``[C, C]``: one product of a ``[rows·k, C]`` matrix with itself."""
        total: Tensor | float = 0.0
        if self.root is not None:
            flat = self.root.transpose(1, 2).reshape(-1, self.n_outputs)
            total = self.sign * (flat.T @ flat)
        if self.diagonal is not None:
            total = total + torch.diag(self.diagonal.sum(0).expand(self.n_outputs))
        assert isinstance(total, Tensor), "one of the two parts is there"
        if self.total is not None:
            total.diagonal().copy_(self.total.sum(0))
        return total

    def dense(self) -> Float[Tensor, "rows outputs outputs"]:
        """All of them, ``[rows, C, C]``: for small problems and tests."""
        total: Tensor | float = 0.0
        if self.root is not None:
            total = self.sign * (self.root @ self.root.transpose(1, 2))
        if self.diagonal is not None:
            total = total + torch.diag_embed(self.diagonal.expand(-1, self.n_outputs))
        assert isinstance(total, Tensor), "one of the two parts is there"
        if self.total is not None:
            total.diagonal(dim1=1, dim2=2).copy_(self.total)
        return total
