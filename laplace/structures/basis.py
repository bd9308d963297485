"""Coordinates of the weights that all posteriors of one curvature share: what tuning computes once.

A prior precision that only shifts eigenvalues leaves the eigenvectors of the curvature alone. Inputs that are rotated
into them once are then predicted at under any such prior by products with the new eigenvalues.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.linalg import chunk_elements
from laplace.prior import GaussianPrior
from laplace.structures.base import AbstractPrecision
from laplace.structures.head_block import head_of
from laplace.structures.jacobian import JacobianBlock


class Basis(ABC):
    """Coordinates in which features or derivatives are rotated once, and posteriors are made for any prior."""

    posterior: Callable[..., AbstractPrecision]
    """From a curvature (scaled), a prior and options to the posterior in these coordinates."""

    @abstractmethod
    def blocks(self, blocks: Sequence[JacobianBlock]) -> Any:
        """Derivatives in these coordinates."""


@dataclass(frozen=True)
class RotatedGroups(Basis):
    """Each parameter group has coordinates of its own: features stay features, blocks stay blocks."""

    posterior: Callable[..., AbstractPrecision]
    """As in ``Basis``."""
    eigenvectors: Sequence[Sequence[Tensor | None]]
    """For each group one or two orthogonal matrices; ``None`` is the identity."""
    shapes: Sequence[tuple[int, ...]]
    """Sizes of the sides of each group."""

    @classmethod
    def of(cls, eigenvectors: Sequence[Sequence[Tensor | None]], shapes: Sequence[tuple[int, ...]]) -> RotatedGroups:
        """The coordinates of a curvature whose posteriors are ``RotatedPrecision`` in ``eigenvectors``."""

        def posterior(curvature: Any, prior: GaussianPrior, **options: Any) -> AbstractPrecision:
            return replace(curvature.posterior(prior, **options), eigenvectors=[[None] * len(b) for b in eigenvectors])

        return cls(posterior, eigenvectors, shapes)

    def blocks(self, blocks: Sequence[JacobianBlock]) -> list[JacobianBlock]:
        """Lᵀ J R, group by group."""
        groups = zip(blocks, self.eigenvectors, self.shapes, strict=True)
        return [block.rotate(vectors, shape) for block, vectors, shape in groups]


@dataclass(frozen=True)
class DenseBasis(Basis):
    """One orthogonal matrix for all weights: in it the posterior is diagonal."""

    posterior: Callable[..., AbstractPrecision]
    """As in ``Basis``."""
    eigenvectors: Float[Tensor, "params params"]
    """Q, ``[P, P]``."""

    def blocks(self, blocks: Sequence[JacobianBlock]) -> Iterator[Float[Tensor, "chunk columns params"]]:
        """J Q for a bounded number of data at a time, group by group; of a head without J."""
        head = head_of(blocks)
        if head is not None:
            sides = self.eigenvectors[head.order].transpose(0, 1).flatten(1)  # [D, C · P]
            step = max(1, chunk_elements(sides.device) // sides.shape[1])
            for rows in head.augmented.split(step):
                yield (rows @ sides).view(len(rows), head.n_outputs, -1)
            return
        parts = self.eigenvectors.split([block.n_params for block in blocks])
        step = max(1, chunk_elements(self.eigenvectors.device) // max(1, blocks[0].n_columns * len(self.eigenvectors)))
        for start in range(0, blocks[0].n_rows, step):
            rows = slice(start, start + step)
            products = [block.dense(rows) @ side for block, side in zip(blocks, parts, strict=True)]
            yield torch.stack(products).sum(0).transpose(0, 1)
