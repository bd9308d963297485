"""Hessians in the outputs, kept in factors."""

from __future__ import annotations

from collections.abc import Sequence
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

    def select(self, rows: slice) -> OutputHessian:
        """Those of some rows."""
        parts = (None if part is None else part[rows] for part in (self.diagonal, self.root, self.total))
        diagonal, root, total = parts
        return OutputHessian(self.n_outputs, diagonal, root, self.sign, total)

    @classmethod
    def followed_by(cls, parts: Sequence[OutputHessian]) -> OutputHessian:
        """The rows of all, which are of one kind."""
        first = parts[0]

        def joined(name: str) -> Tensor | None:
            return None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts])

        return cls(first.n_outputs, joined("diagonal"), joined("root"), first.sign, joined("total"))

    def averaged(self, n_samples: int) -> OutputHessian:
        """The mean over samples, of rows that come sample by sample: all their roots side by side, no C×C matrices."""
        diagonal, total = (
            None if part is None else part.unflatten(0, (n_samples, -1)).mean(0) for part in (self.diagonal, self.total)
        )
        root = self.root
        if root is not None:
            root = root.unflatten(0, (n_samples, -1)).permute(1, 2, 0, 3).flatten(2) / n_samples**0.5
        return OutputHessian(self.n_outputs, diagonal, root, self.sign, total)

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
