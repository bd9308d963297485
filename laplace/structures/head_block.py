"""Derivatives of a linear head ``f = W φ + b`` as blocks like any others: ``J_q = outer_q ⊗ φ``, never written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.structures.jacobian import DenseBlock, JacobianBlock


@dataclass(frozen=True)
class HeadBlock(JacobianBlock):
    """Derivatives in one parameter group of a linear head; a row is a position, a column an output.

    Attributes
    ----------
    phi
        Features, ``[rows, D]``; of a bias a column of ones, ``[rows, 1]`` (zeros where it cancels).
    outer
        What the columns are, as directions in the outputs, ``[Q, C]``; ``None``: the C outputs themselves.
    group
        The shape of the parameter group, ``(C, D)``, or ``(C,)`` of a bias.
    """

    phi: Float[Tensor, "rows features"]
    outer: Float[Tensor, "columns outputs"] | None
    group: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter group."""
        return self.group

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.group[0] if self.outer is None else len(self.outer)

    @property
    def n_rows(self) -> int:
        """Positions."""
        return len(self.phi)

    @property
    def sample(self) -> Tensor:
        """The features."""
        return self.phi

    @property
    def size(self) -> int:
        """The features', and the directions' if there are any."""
        return self.phi.numel() + (0 if self.outer is None else self.outer.numel())

    @property
    def n_units(self) -> int:
        """Each output is one."""
        return self.group[0]

    def _outer(self) -> Tensor:
        """The directions, written out."""
        eye = torch.eye(self.group[0], dtype=self.phi.dtype, device=self.phi.device)
        return eye if self.outer is None else self.outer

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """A part of J, written out."""
        return torch.einsum("qc,bd->qbcd", self._outer()[:, units], self.phi[rows]).flatten(2)

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> JacobianBlock:
        """``outer L`` and ``φ R``; of a bias ``outer R``; written out where all weights share one matrix."""
        if len(sides) == 1 and len(self.group) == 2:
            return DenseBlock(self.dense()).rotate(sides, shape)
        left, right = sides[0], sides[1] if len(sides) == 2 else None
        outer = self.outer if left is None else (left if self.outer is None else self.outer @ left)
        return HeadBlock(self.phi if right is None else self.phi @ right, outer, self.group)

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> HeadBlock:
        """Other directions in the outputs."""
        return HeadBlock(self.phi, weights if self.outer is None else weights @ self.outer, self.group)

    def select(self, rows: Tensor) -> HeadBlock:
        """Some of the rows."""
        return HeadBlock(self.phi[rows], self.outer, self.group)


def head_blocks(phi: Float[Tensor, "rows features"], shapes: Sequence[tuple[int, ...]]) -> list[HeadBlock]:
    """The blocks of a head, one for each parameter group: weight ``(C, D)`` and, if there is one, bias ``(C,)``."""
    ones = phi.new_ones(len(phi), 1)
    return [HeadBlock(phi if len(shape) > 1 else ones, None, tuple(shape)) for shape in shapes]
