"""Derivatives of a linear head ``f = W φ + b`` as blocks like any others: ``J_q = outer_q ⊗ φ``, never written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.structures.jacobian import DenseBlock, JacobianBlock, sum_parts


@dataclass(frozen=True)
class HeadBlock(JacobianBlock):
    """Derivatives in the weights of a linear head, ``[Q, rows, p]``; a row is a position, a column an output.

    The weights are those of one parameter group, or of several one after another (``joined``): the weight row by row,
    then the bias, whose feature is 1 (0 where it cancels).

    Attributes
    ----------
    phis
        Features of each group, ``[rows, D]``.
    groups
        Shape of each, ``(C, D)``, or ``(C,)`` of a bias.
    outer
        What the columns are, as directions in the outputs, ``[Q, C]``; ``None``: the C outputs themselves.
    """

    phis: tuple[Float[Tensor, "rows _"], ...]
    groups: tuple[tuple[int, ...], ...]
    outer: Float[Tensor, "columns outputs"] | None = None

    @property
    def phi(self) -> Float[Tensor, "rows features"]:
        """Features of the first group, as a rule the only one."""
        return self.phis[0]

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.groups[0][0]

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.n_outputs if self.outer is None else len(self.outer)

    @property
    def n_rows(self) -> Any:
        """Positions; a symbol in a graph for any number of them."""
        return self.phis[0].shape[0]

    @property
    def sizes(self) -> list[int]:
        """Number of weights in each group."""
        return [self.n_outputs * phi.shape[1] for phi in self.phis]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one group; of several their number of weights."""
        return self.groups[0] if len(self.groups) == 1 else (sum(self.sizes),)

    @property
    def sample(self) -> Tensor:
        """The features."""
        return self.phis[0]

    @property
    def size(self) -> int:
        """That of features and directions."""
        return sum(phi.numel() for phi in self.phis) + (0 if self.outer is None else self.outer.numel())

    @property
    def n_units(self) -> int:
        """The outputs, of one group."""
        return self.n_outputs if len(self.phis) == 1 else 1

    @property
    def augmented(self) -> Float[Tensor, "rows augmented"]:
        """Features of all groups side by side."""
        return self.phis[0] if len(self.phis) == 1 else torch.cat(self.phis, 1)

    @property
    def order(self) -> Int[Tensor, "outputs augmented"]:
        """Where the weights of each output lie, ``[C, D]`` with D over all groups."""
        parts, start = [], 0
        for phi, size in zip(self.phis, self.sizes, strict=True):
            parts.append(torch.arange(start, start + size, device=phi.device).view(self.n_outputs, -1))
            start += size
        return torch.cat(parts, 1)

    def matrices(self, v: Float[Tensor, "*batch params"]) -> list[Float[Tensor, "*batch outputs _"]]:
        """Vectors over the weights as matrices ``[..., C, D]``, one for each group."""
        parts = torch.split_with_sizes(v, self.sizes, -1) if len(self.phis) > 1 else (v,)
        return [part.reshape(*v.shape[:-1], self.n_outputs, -1) for part in parts]

    def _mixed(self, values: Float[Tensor, "rows outputs"], power: int = 1) -> Float[Tensor, "columns rows"]:
        """From outputs to columns, by a power of the directions."""
        return values.T if self.outer is None else (values @ (self.outer**power).T).T

    def _directions(self) -> Float[Tensor, "columns outputs"]:
        """The directions, written out."""
        if self.outer is not None:
            return self.outer
        return torch.eye(self.n_outputs, dtype=self.sample.dtype, device=self.sample.device)

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """A part of J, written out."""
        outer = self._directions() if len(self.phis) > 1 else self._directions()[:, units]
        return torch.cat([torch.einsum("qc,bd->qbcd", outer, phi[rows]).flatten(2) for phi in self.phis], 2)

    def entries(self, rows: slice, index: Int[Tensor, " part"]) -> Float[Tensor, "columns batch part"]:
        """Products of a direction and a feature."""
        if len(self.phis) > 1:
            return super().entries(rows, index)
        phi, width = self.phi, self.phi.shape[1]
        return torch.einsum("qp,bp->qbp", self._directions()[:, index // width], phi[rows][:, index % width])

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> JacobianBlock:
        """``outer L`` and ``φ R``; one matrix for all weights of a group with features is written out."""
        if len(sides) == 1 and self.shape != (self.n_outputs,):
            return DenseBlock(self.dense()).rotate(sides, shape)
        left, right = sides[0], sides[1] if len(sides) == 2 else None
        phis = self.phis if right is None else (self.phi @ right,)
        if left is None:
            return HeadBlock(phis, self.groups, self.outer)
        return HeadBlock(phis, self.groups, left if self.outer is None else self.outer @ left)

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> HeadBlock:
        """Other directions in the outputs."""
        return replace(self, outer=weights if self.outer is None else weights @ self.outer)

    def select(self, rows: Tensor | slice) -> HeadBlock:
        """Some of the rows."""
        return replace(self, phis=tuple(phi[rows] for phi in self.phis))

    def differences(self) -> HeadBlock:
        """Of each pair of rows that follow one another, the first less the second; a bias cancels."""
        return replace(self, phis=tuple(phi[::2] - phi[1::2] for phi in self.phis))

    def to(self, dtype: torch.dtype) -> HeadBlock:
        """In another precision."""
        if self.sample.dtype == dtype:
            return self
        outer = None if self.outer is None else self.outer.to(dtype)
        return replace(self, phis=tuple(phi.to(dtype) for phi in self.phis), outer=outer)

    # -- closed forms -------------------------------------------------------------------------------------------------

    def squares(self) -> Float[Tensor, " params"]:
        """Σ_q outer² ⊗ Σ_b φ²."""
        strength = self.sample.new_ones(self.n_outputs) if self.outer is None else self.outer.square().sum(0)
        return torch.cat([torch.outer(strength, phi.square().sum(0)).flatten() for phi in self.phis])

    def _strength(self, w: Float[Tensor, " params"]) -> Float[Tensor, "rows outputs"]:
        """Σ_d w_cd φ_d²: one product of ``[rows, D]`` with ``[D, C]`` for each group; a sum where weights are alike."""
        if not w.stride(0):
            common = sum_parts([_distinct(phi).square().sum(1, keepdim=True) for phi in self.phis])
            return (w[:1] * common).expand(self.n_rows, self.n_outputs)
        total: Tensor | None = None
        for phi, v in zip(self.phis, self.matrices(w), strict=True):
            squares = _distinct(phi).square()
            part = squares @ v.T if squares.shape[1] > 1 else squares * v.T
            total = part if total is None else total + part
        assert total is not None, "there are groups"
        return total if total.shape[0] == self.n_rows else total.expand(self.n_rows, -1)

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """``outer² · (φ² Wᵀ)``."""
        return self._mixed(self._strength(w), 2)

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """``outer diag(φ² Wᵀ) outerᵀ``: diagonal where the columns are outputs."""
        strength = self._strength(w)
        if self.outer is None:
            return torch.diag_embed(strength)
        return (self.outer * strength.unsqueeze(1)) @ self.outer.T

    def kernel(self, w: Float[Tensor, " params"]) -> Float[Tensor, "joint joint"]:
        """One ``[rows, rows]`` matrix for each output, or one for all where weights are alike; mixed."""
        if not w.stride(0):
            between = self._directions() if self.outer is None else self.outer @ self.outer.T
            return torch.kron(w[:1] * self.products(self), between)
        parts = [(_distinct(phi), v) for phi, v in zip(self.phis, self.matrices(w), strict=True)]
        kernels = sum_parts([torch.einsum("nd,cd,md->cnm", phi, v, phi) for phi, v in parts])
        kernels, outer = kernels.expand(-1, self.n_rows, self.n_rows), self._directions()
        return torch.einsum("ci,inm,ki->ncmk", outer, kernels, outer).reshape(self.n_rows * len(outer), -1)

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """``outer (W φ)``."""
        parts = zip(self.phis, self.matrices(v), strict=True)
        moved = sum_parts([torch.einsum("nd,scd->snc", phi, matrix) for phi, matrix in parts]).mT
        return moved if self.outer is None else self.outer @ moved

    def apply_transposed(self, w: Float[Tensor, "samples columns batch"]) -> Float[Tensor, "samples params"]:
        """Σ_b (outerᵀ w)_b ⊗ φ_b."""
        weights = w if self.outer is None else self.outer.T @ w
        return torch.cat([(weights @ phi).flatten(1) for phi in self.phis], 1)

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """``outer outer'ᵀ`` times the products of the features."""
        if isinstance(other, OneOutputBlock):
            outputs = torch.arange(self.n_outputs, device=other.output.device).unsqueeze(1)
            sides = outputs == other.output if self.outer is None else self.outer[:, other.output]
            return (self.products(other.head).unsqueeze(1) * sides).transpose(0, 1).unsqueeze(2)
        if not isinstance(other, HeadBlock):
            return super().cross(other)
        between = self._directions() @ other._directions().T
        return torch.einsum("qk,nm->qnkm", between, self.products(other))

    def products(self, other: HeadBlock) -> Float[Tensor, "rows others"]:
        """``φ φ'ᵀ``, added over the groups: the kernel that all outputs share."""
        return sum_parts([phi @ point.T for phi, point in zip(self.phis, other.phis, strict=True)])


@dataclass(frozen=True)
class OneOutputBlock(JacobianBlock):
    """One output of each row of a head, the only column: ``J_b = e_{c_b} ⊗ φ_b``."""

    head: HeadBlock
    """Derivatives of all outputs, the columns."""
    output: Int[Tensor, " rows"]
    """Which one is meant."""

    @property
    def n_columns(self) -> int:
        """One."""
        return 1

    @property
    def n_rows(self) -> int:
        """Positions."""
        return self.head.n_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the head."""
        return self.head.shape

    @property
    def sample(self) -> Tensor:
        """The features."""
        return self.head.sample

    @property
    def n_units(self) -> int:
        """All weights together."""
        return 1

    @property
    def size(self) -> int:
        """That of features and outputs."""
        return self.head.size + self.output.numel()

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:  # noqa: ARG002 - one unit
        """Features where the weights of their output are."""
        some = OneOutputBlock(self.head.select(rows), self.output[rows])
        unit = torch.eye(some.n_rows, dtype=self.sample.dtype, device=self.sample.device)
        return some.apply_transposed(unit.unsqueeze(1)).unsqueeze(0)

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> JacobianBlock:
        """Written out."""
        return DenseBlock(self.dense()).rotate(sides, shape)

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> JacobianBlock:
        """Written out."""
        return DenseBlock(self.dense()).mix(weights)

    def _by_output(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each output that is meant: its rows, their features, and where its weights lie."""
        features, order = self.head.augmented, self.head.order
        for c in self.output.unique().tolist():
            rows = self.output == c
            yield rows, features[rows], order[c]

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """The weights of each output with the features of its rows."""
        result = v.new_empty(len(v), 1, self.n_rows)
        for rows, features, weights in self._by_output():
            result[:, 0, rows] = v[:, weights] @ features.T
        return result

    def apply_transposed(self, w: Float[Tensor, "samples columns batch"]) -> Float[Tensor, "samples params"]:
        """Added output by output."""
        total = w.new_zeros(len(w), self.n_params)
        for rows, features, weights in self._by_output():
            total[:, weights] = w[:, 0, rows] @ features
        return total

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """Products of features where the outputs agree."""
        if not isinstance(other, OneOutputBlock):
            return super().cross(other)
        same = self.output.unsqueeze(1) == other.output
        return (self.head.products(other.head) * same).unsqueeze(1).unsqueeze(0)


def _distinct(phi: Float[Tensor, "rows features"]) -> Float[Tensor, "distinct features"]:
    """One of rows that are all the same by construction, as those of a bias."""
    return phi if phi.stride(0) else phi[:1]


def head_blocks(phi: Float[Tensor, "rows features"], shapes: Sequence[tuple[int, ...]]) -> list[HeadBlock]:
    """The blocks of a head, one for each parameter group: weight ``(C, D)`` and, if there is one, bias ``(C,)``."""
    ones = phi.new_ones(1, 1).expand(phi.shape[0], 1)
    return [HeadBlock((phi if len(shape) > 1 else ones,), (shape,)) for shape in shapes]


def follow(parts: Sequence[Sequence[HeadBlock]]) -> list[HeadBlock]:
    """The blocks of a head at the inputs of several batches, one after the other."""
    groups = zip(*parts, strict=True)
    return [replace(group[0], phis=(torch.cat([block.phis[0] for block in group]),)) for group in groups]


def joined(blocks: Sequence[JacobianBlock]) -> Sequence[JacobianBlock]:
    """The blocks of a head that have the same directions as one; others as they are.

    This is the one place that asks for the type of a block: structures that couple groups, or mix directions, have
    closed forms for a whole head.
    """
    heads = [block for block in blocks if isinstance(block, HeadBlock)]
    if len(heads) != len(blocks) or any(head.outer is not heads[0].outer for head in heads):
        return blocks
    phis = tuple(phi for head in heads for phi in head.phis)
    return [HeadBlock(phis, tuple(group for head in heads for group in head.groups), heads[0].outer)]


def head_of(blocks: Sequence[JacobianBlock]) -> HeadBlock | None:
    """A whole head as one block; ``None`` if the blocks are not of one."""
    (first, *others) = joined(blocks)
    return first if not others and isinstance(first, HeadBlock) else None
