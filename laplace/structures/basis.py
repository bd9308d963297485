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

from laplace.linalg import CHUNK_ELEMENTS
from laplace.network.parameters import augment, output_index
from laplace.prior import GaussianPrior
from laplace.structures.base import AbstractPrecision
from laplace.structures.jacobian import JacobianBlock


class Basis(ABC):
    """Coordinates in which features or derivatives are rotated once, and posteriors are made for any prior."""

    posterior: Callable[..., AbstractPrecision]
    """From a curvature (scaled), a prior and options to the posterior in these coordinates."""

    @abstractmethod
    def features(self, phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool) -> Any:
        """Features in these coordinates.

        Parameters
        ----------
        phi
            Features, ``[rows, D]``.
        n_outputs
            C.
        bias
            Whether the layer has a bias.
        """

    @abstractmethod
    def blocks(self, blocks: Sequence[JacobianBlock]) -> Any:
        """Derivatives in these coordinates.

        Parameters
        ----------
        blocks
            One for each parameter group.
        """


@dataclass(frozen=True)
class RotatedGroups(Basis):
    """Each parameter group has coordinates of its own: features stay features, blocks stay blocks.

    Attributes
    ----------
    posterior
        As in ``Basis``.
    eigenvectors
        For each group one or two orthogonal matrices; ``None`` is the identity.
    shapes
        Sizes of the sides of each group.
    """

    posterior: Callable[..., AbstractPrecision]
    eigenvectors: Sequence[Sequence[Tensor | None]]
    shapes: Sequence[tuple[int, ...]]

    @classmethod
    def of(
        cls, eigenvectors: Sequence[Sequence[Tensor | None]], shapes: Sequence[tuple[int, ...]], *, features: bool
    ) -> RotatedGroups:
        """The coordinates of a curvature whose posteriors are ``RotatedPrecision`` in ``eigenvectors``.

        Parameters
        ----------
        eigenvectors, shapes
            Of the curvature.
        features
            Only the inputs' side is rotated: outputs of a last layer stay as they are.
        """

        def posterior(curvature: Any, prior: GaussianPrior, **options: Any) -> AbstractPrecision:
            # Where two groups share their first side they still do.
            kept = [[block[0] if features else None, *[None] * (len(block) - 1)] for block in eigenvectors]
            return replace(curvature.posterior(prior, **options), eigenvectors=kept)

        return cls(posterior, eigenvectors, shapes)

    def features(self, phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool) -> Tensor:  # noqa: ARG002
        """Φ V, ``[rows, D]``: the side of the inputs."""
        inner = self.eigenvectors[0][1]
        return phi if inner is None else phi @ inner

    def blocks(self, blocks: Sequence[JacobianBlock]) -> list[JacobianBlock]:
        """Lᵀ J R, group by group."""
        groups = zip(blocks, self.eigenvectors, self.shapes, strict=True)
        return [block.rotate(vectors, shape) for block, vectors, shape in groups]


@dataclass(frozen=True)
class DenseBasis(Basis):
    """One orthogonal matrix for all weights: in it the posterior is diagonal.

    Attributes
    ----------
    posterior
        As in ``Basis``.
    eigenvectors
        Q, ``[P, P]``.
    """

    posterior: Callable[..., AbstractPrecision]
    eigenvectors: Float[Tensor, "params params"]

    def features(
        self, phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool
    ) -> Iterator[Float[Tensor, "chunk outputs params"]]:
        """J Q for a bounded number of rows at a time, without J."""
        order = output_index(n_outputs, len(self.eigenvectors), bias).to(phi.device)
        sides = self.eigenvectors[order].transpose(0, 1).flatten(1)  # [D, C · P]
        step = max(1, CHUNK_ELEMENTS // sides.shape[1])
        for rows in augment(phi, bias).split(step):
            yield (rows @ sides).view(len(rows), n_outputs, -1)

    def blocks(self, blocks: Sequence[JacobianBlock]) -> Iterator[Float[Tensor, "chunk columns params"]]:
        """J Q for a bounded number of data at a time, group by group."""
        parts = self.eigenvectors.split([block.n_params for block in blocks])
        step = max(1, CHUNK_ELEMENTS // max(1, blocks[0].n_columns * len(self.eigenvectors)))
        for start in range(0, blocks[0].n_rows, step):
            rows = slice(start, start + step)
            products = [block.dense(rows) @ side for block, side in zip(blocks, parts, strict=True)]
            yield torch.stack(products).sum(0).transpose(0, 1)
