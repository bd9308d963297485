"""``hessian_structure="diag"``: one number per weight; everything is elementwise.

H = diag(h),   A = diag(s·h + δ)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import HessianStructure
from laplace.errors import NotPositiveDefiniteError
from laplace.prior import GaussianPrior
from laplace.schema import Table, signed_vector
from laplace.structures.base import AbstractCurvature, AbstractPrecision, SupportsCurvature
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.head_block import joined
from laplace.structures.jacobian import JacobianBlock, sum_parts
from laplace.structures.remainder import remainder
from laplace.types import Scalar


@dataclass(frozen=True)
class DiagCurvature(AbstractCurvature):
    """The diagonal of the curvature."""

    vector: Float[Tensor, " params"]
    """h, ``[P]``."""

    name: ClassVar[HessianStructure] = HessianStructure.DIAG

    @classmethod
    def from_batch(cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, DiagCurvature]:
        """Ask the back end for the diagonal."""
        nll, vector = backend.diag(x, y, **options)
        return nll, cls(vector)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Three vectors."""
        return 3 * dtype.itemsize * sum(math.prod(shape) for shape in shapes)

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.vector)

    @property
    def is_finite(self) -> bool:
        """Whether the matrix is."""
        return bool(torch.isfinite(self.vector).all())

    @property
    def public(self) -> Float[Tensor, " params"]:
        """The vector, ``[P]``."""
        return self.vector

    entries: ClassVar[Table] = {"vector": signed_vector("P")}

    def state(self) -> dict[str, Any]:
        """The vector."""
        return {"vector": self.vector}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> DiagCurvature:
        """From the vector."""
        return cls(state["vector"].to(dtype))

    def merge(self, other: DiagCurvature) -> DiagCurvature:
        """Sum of the two."""
        return replace(self, vector=self.vector + other.vector)

    def summands(self) -> list[Tensor]:
        """The vector."""
        return [self.vector]

    def with_summands(self, parts: Sequence[Tensor]) -> DiagCurvature:
        """Of another vector."""
        return replace(self, vector=parts[0])

    def subtract(self, other: DiagCurvature, *, squares: bool = True) -> DiagCurvature:
        """Difference of the two."""
        return replace(self, vector=remainder(self.vector, other.vector, squares=squares))

    def __mul__(self, factor: float | Tensor) -> DiagCurvature:
        """Elementwise."""
        return replace(self, vector=self.vector * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> DiagCurvature:
        """f h."""
        return replace(self, vector=self.vector * factors)

    def posterior(self, prior: GaussianPrior, **options: Any) -> DiagPrecision:
        """Add the prior; any prior fits."""
        assert not options, "the diagonal has no options"
        vector = self.vector + prior.diagonal()
        if bool((vector <= 0).any()):
            msg = (
                f"The posterior precision of a weight is {float(vector.min()):.3e}, not positive: the back end gave a "
                "negative curvature. Use a GGN or Fisher back end, or a larger prior precision."
            )
            raise NotPositiveDefiniteError(msg)
        return DiagPrecision(vector)

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(1 + h/δ): nothing is lost where many weights are known by their prior alone."""
        self.posterior(prior, **options)  # refuses what is not positive
        return torch.log1p(self.vector / prior.diagonal()).sum()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """As a matrix."""
        return torch.diag(self.vector)


@dataclass(frozen=True)
class DiagPrecision(AbstractPrecision):
    """A diagonal precision.

    Attributes
    ----------
    vector
        a, ``[P]``, positive.
    """

    vector: Float[Tensor, " params"]

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.vector)

    @property
    def public(self) -> Float[Tensor, " params"]:
        """The vector, ``[P]``."""
        return self.vector

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """v / a."""
        return v / self.vector

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """Σ a v²."""
        return (self.vector * v.square()).sum(-1)

    def logdet(self) -> Scalar:
        """Σ log a."""
        return self.vector.log().sum()

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """1 / a."""
        return 1 / self.vector

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Standard normal numbers divided by √a."""
        a = self.vector
        return torch.randn(n, len(a), dtype=a.dtype, device=a.device, generator=generator) * a.rsqrt()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """As a matrix."""
        return torch.diag(self.vector)

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """J diag(1/a) Jᵀ by one batched product."""
        check_jacobians(J, self.n_params)
        return (J / self.vector) @ J.mT

    def _by_block(self, blocks: Sequence[JacobianBlock]) -> list[tuple[JacobianBlock, Tensor]]:
        """Each block with the variances of its weights."""
        blocks, variances = joined(blocks), self.vector.reciprocal()
        parts = (variances,) if len(blocks) == 1 else variances.split([block.n_params for block in blocks])
        return list(zip(blocks, parts, strict=True))

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """Σ_p J_p² / a_p, block by block."""
        return sum_parts([block.variance(w) for block, w in self._by_block(blocks)])

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """Σ_p J_qp J_kp / a_p, block by block."""
        return sum_parts([block.covariance(w) for block, w in self._by_block(blocks)])

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        return sum_parts([block.kernel(w) for block, w in self._by_block(blocks)])
