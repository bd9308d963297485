"""``hessian_structure="blockdiag"``: one dense block per parameter group, and nothing between groups.

A = blockdiag(s·H_gg + diag(δ_g))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import HessianStructure
from laplace.network.parameters import split_sizes
from laplace.prior import GaussianPrior
from laplace.schema import Table, groups, symmetric
from laplace.structures.base import AbstractCurvature, AbstractPrecision, SupportsCurvature
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.full import FullCurvature, FullPrecision
from laplace.structures.jacobian import JacobianBlock, sum_parts
from laplace.types import Scalar


@dataclass(frozen=True)
class BlockDiagCurvature(AbstractCurvature):
    """The diagonal blocks of the curvature: a dense curvature for each parameter group."""

    parts: Sequence[FullCurvature]
    """One per parameter group, in their order."""

    name: ClassVar[HessianStructure] = HessianStructure.BLOCKDIAG

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, BlockDiagCurvature]:
        """Ask the back end for the blocks."""
        nll, blocks = backend.blockdiag(x, y, **options)
        return nll, cls([FullCurvature(block) for block in blocks])

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Three matrices per parameter group."""
        return 3 * dtype.itemsize * sum(math.prod(shape) ** 2 for shape in shapes)

    @property
    def n_params(self) -> int:
        """P."""
        return sum(part.n_params for part in self.parts)

    @property
    def is_finite(self) -> bool:
        """Whether all blocks are."""
        return all(part.is_finite for part in self.parts)

    @property
    def public(self) -> list[Tensor]:
        """The blocks, ``[p, p]`` each."""
        return [part.public for part in self.parts]

    entries: ClassVar[Table] = {"blocks": groups(symmetric("p"))}

    def state(self) -> dict[str, Any]:
        """The blocks."""
        return {"blocks": [part.matrix for part in self.parts]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> BlockDiagCurvature:
        """From the blocks."""
        return cls([FullCurvature(block.to(dtype)) for block in state["blocks"]])

    def merge(self, other: BlockDiagCurvature) -> BlockDiagCurvature:
        """Sum of the two."""
        return replace(self, parts=[mine.merge(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)])

    def summands(self) -> list[Tensor]:
        """The blocks."""
        return [part.matrix for part in self.parts]

    def with_summands(self, parts: Sequence[Tensor]) -> BlockDiagCurvature:
        """Of other blocks."""
        return replace(self, parts=[FullCurvature(block) for block in parts])

    def subtract(self, other: BlockDiagCurvature, *, squares: bool = True) -> BlockDiagCurvature:
        """Difference of the two."""
        pairs = zip(self.parts, other.parts, strict=True)
        return replace(self, parts=[mine.subtract(theirs, squares=squares) for mine, theirs in pairs])

    def __mul__(self, factor: float | Tensor) -> BlockDiagCurvature:
        """Scale the blocks; their eigenvalues are shared."""
        return replace(self, parts=[part * factor for part in self.parts])

    def scale_weights(self, factors: Float[Tensor, " params"]) -> BlockDiagCurvature:
        """√f_i H_ij √f_j within groups."""
        pieces = split_sizes(factors, [part.n_params for part in self.parts])
        return replace(self, parts=[part.scale_weights(f) for part, f in zip(self.parts, pieces, strict=True)])

    def posterior(self, prior: GaussianPrior, **options: Any) -> BlockDiagPrecision:
        """Add the prior, group by group; any prior fits."""
        parts = zip(self.parts, prior.groups(), strict=True)
        return BlockDiagPrecision([part.posterior(its_prior, **options) for part, its_prior in parts])

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(s λ + δ) where a group has one precision: O(P) once the eigenvalues are known."""
        parts = zip(self.parts, prior.groups(), strict=True)
        return torch.stack([part.posterior_logdet(its_prior, **options) for part, its_prior in parts]).sum()

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """The sum over groups."""
        parts = zip(self.parts, prior.groups(), strict=True)
        return torch.stack([part.log_det_ratio(its_prior, **options) for part, its_prior in parts]).sum()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """With zeros between groups."""
        return torch.block_diag(*(part.to_dense() for part in self.parts))


@dataclass(frozen=True)
class BlockDiagPrecision(AbstractPrecision):
    """A dense precision for each parameter group. Factorized on first use; time O(Σ p³), memory O(Σ p²)."""

    parts: Sequence[FullPrecision]
    """One per parameter group."""

    @property
    def n_params(self) -> int:
        """P."""
        return sum(part.n_params for part in self.parts)

    @property
    def public(self) -> list[Tensor]:
        """The blocks, ``[p, p]`` each."""
        return [part.public for part in self.parts]

    def _split(self, v: Float[Tensor, "*batch params"]) -> Iterator[tuple[FullPrecision, Tensor]]:
        """Each part with its weights."""
        yield from zip(self.parts, split_sizes(v, [part.n_params for part in self.parts]), strict=True)

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """Group by group."""
        return torch.cat([part.solve(piece) for part, piece in self._split(v)], -1)

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """The sum over groups."""
        return sum_parts([part.quadratic(piece) for part, piece in self._split(v)])

    def logdet(self) -> Scalar:
        """The sum over groups."""
        return torch.stack([part.logdet() for part in self.parts]).sum()

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Group by group."""
        return torch.cat([part.diagonal_of_inverse() for part in self.parts])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Groups are independent."""
        return torch.cat([part.sample(n, generator) for part in self.parts], 1)

    def to_dense(self) -> Float[Tensor, "params params"]:
        """With zeros between groups."""
        return torch.block_diag(*(part.to_dense() for part in self.parts))

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """The sum over groups."""
        check_jacobians(J, self.n_params)
        return sum_parts([part.functional_variance(piece) for part, piece in self._split(J)])

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """The sum over groups: J is written out for one group and some data at a time."""
        return sum_parts([part.block_variance([block]) for part, block in zip(self.parts, blocks, strict=True)])

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """The same between columns."""
        return sum_parts([part.block_covariance([block]) for part, block in zip(self.parts, blocks, strict=True)])

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        return sum_parts([part.block_kernel([block]) for part, block in zip(self.parts, blocks, strict=True)])
