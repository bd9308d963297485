"""Derivatives in chosen weights of a parameter group (``subset_of_weights="subnetwork"``).

Where few of the weights of a group are chosen, their derivatives are gathered from its factors; where most are, the
group's own formulas are used, with zeros for the others. Either way nothing as large as the derivatives in the whole
group is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from laplace.network.parameters import ParameterSubset
from laplace.structures.jacobian import DenseBlock, JacobianBlock, sum_parts

FEW = 8
"""Chosen weights are few if they are at most one in so many: gathering costs memory traffic, formulas are products."""


def chosen(blocks: Sequence[JacobianBlock], subset: ParameterSubset) -> list[JacobianBlock]:
    """The derivatives in the random weights, in their order."""
    choice = subset.choice
    if choice is None:
        return list(blocks)
    parts = [b if w is None else EntriesBlock(b, w) for b, w in zip(blocks, choice.within, strict=True)]
    return parts if choice.order is None else [ReorderedBlock(tuple(parts), subset)]


@dataclass(frozen=True)
class EntriesBlock(JacobianBlock):
    """The block of chosen weights of a group."""

    block: JacobianBlock
    """Derivatives in the whole group."""
    index: Int[Tensor, " params"]
    """Which of its weights, ``[p]``."""

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.block.n_columns

    @property
    def n_rows(self) -> int:
        """B."""
        return self.block.n_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p,)``."""
        return (len(self.index),)

    @property
    def sample(self) -> Tensor:
        """That of the group."""
        return self.block.sample

    @property
    def n_units(self) -> int:
        """Each weight is one."""
        return len(self.index)

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """Gathered from the factors of the group."""
        return self.block.entries(rows, self.index[units])

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> EntriesBlock:
        """Of the group."""
        return replace(self, block=self.block.mix(weights))

    @property
    def size(self) -> int:
        """That of the group."""
        return self.block.size

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> DenseBlock:
        """Written out."""
        return DenseBlock(self.dense()).rotate(sides, shape)

    @property
    def _few(self) -> bool:
        return len(self.index) * FEW <= self.block.n_params

    def _filled_up(self, values: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch all"]:
        """Values of the chosen weights among zeros."""
        return values.new_zeros(*values.shape[:-1], self.block.n_params).index_copy(-1, self.index, values)

    def squares(self) -> Float[Tensor, " params"]:
        """Of the group where most are chosen."""
        return super().squares() if self._few else self.block.squares()[self.index]

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """Of the group where most are chosen."""
        return super().variance(w) if self._few else self.block.variance(self._filled_up(w))

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """Of the group where most are chosen."""
        return super().covariance(w) if self._few else self.block.covariance(self._filled_up(w))

    def kernel(self, w: Float[Tensor, " params"]) -> Float[Tensor, "joint joint"]:
        """Of the group where most are chosen."""
        return super().kernel(w) if self._few else self.block.kernel(self._filled_up(w))

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """Of the group where most are chosen."""
        return super().apply(v) if self._few else self.block.apply(self._filled_up(v))


@dataclass(frozen=True)
class ReorderedBlock(JacobianBlock):
    """The block of a subnetwork whose weights are not listed tensor by tensor."""

    parts: tuple[JacobianBlock, ...]
    """The chosen weights of each parameter tensor."""
    subset: ParameterSubset
    """Knows where they are in the subnetwork."""

    @property
    def _places(self) -> tuple[Tensor, ...]:
        assert self.subset.choice is not None, "made of chosen weights"
        return self.subset.choice.places

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.parts[0].n_columns

    @property
    def n_rows(self) -> int:
        """B."""
        return self.parts[0].n_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p,)``."""
        return (sum(part.n_params for part in self.parts),)

    @property
    def sample(self) -> Tensor:
        """That of a part."""
        return self.parts[0].sample

    @property
    def n_units(self) -> int:
        """All weights at once."""
        return 1

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:  # noqa: ARG002 - there is one
        """The parts side by side, in order."""
        assert self.subset.choice is not None, "made of chosen weights"
        return self.subset.choice.join([part.dense(rows) for part in self.parts])

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> ReorderedBlock:
        """Of the parts."""
        return replace(self, parts=tuple(part.mix(weights) for part in self.parts))

    @property
    def size(self) -> int:
        """That of the parts."""
        return sum(part.size for part in self.parts)

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> DenseBlock:
        """Written out."""
        return DenseBlock(self.dense()).rotate(sides, shape)

    def squares(self) -> Float[Tensor, " params"]:
        """Of the parts."""
        assert self.subset.choice is not None, "made of chosen weights"
        return self.subset.choice.join([part.squares() for part in self.parts])

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """Added over the parts."""
        return sum_parts([p.variance(w[place]) for p, place in zip(self.parts, self._places, strict=True)])

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """Added over the parts."""
        return sum_parts([p.covariance(w[place]) for p, place in zip(self.parts, self._places, strict=True)])

    def kernel(self, w: Float[Tensor, " params"]) -> Float[Tensor, "joint joint"]:
        """Added over the parts."""
        return sum_parts([p.kernel(w[place]) for p, place in zip(self.parts, self._places, strict=True)])

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """Added over the parts."""
        return sum_parts([p.apply(v[:, place]) for p, place in zip(self.parts, self._places, strict=True)])
