"""``hessian_structure="full"``: the dense matrix and its Cholesky factor.

A = s·H + diag(δ) = L Lᵀ
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.enums import HessianStructure
from laplace.errors import NotPositiveDefiniteError
from laplace.prior import GaussianPrior
from laplace.schema import Table, symmetric
from laplace.structures.base import AbstractCurvature, AbstractPrecision, SupportsCurvature
from laplace.structures.basis import DenseBasis
from laplace.structures.diag import DiagPrecision
from laplace.structures.head_block import HeadBlock, head_of
from laplace.structures.jacobian import JacobianBlock
from laplace.structures.remainder import remainder
from laplace.types import Scalar


@dataclass(frozen=True)
class FullCurvature(AbstractCurvature):
    """The dense curvature."""

    matrix: Float[Tensor, "params params"]
    """H, ``[P, P]``, symmetric."""
    scale: Scalar | float = 1.0
    """Factor of it."""
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[HessianStructure] = HessianStructure.FULL

    @classmethod
    def from_batch(cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, FullCurvature]:
        """Ask the back end for the dense matrix."""
        nll, matrix = backend.full(x, y, **options)
        return nll, cls(matrix)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Three dense matrices."""
        return 3 * dtype.itemsize * sum(math.prod(shape) for shape in shapes) ** 2

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.matrix)

    @property
    def is_finite(self) -> bool:
        """Whether the matrix is."""
        return bool(torch.isfinite(self.matrix.diagonal()).all())

    @property
    def public(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``."""
        return self.matrix

    entries: ClassVar[Table] = {"matrix": symmetric("P")}

    def state(self) -> dict[str, Any]:
        """The matrix."""
        return {"matrix": self.matrix}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> FullCurvature:
        """From the matrix."""
        return cls(state["matrix"].to(dtype))

    def merge(self, other: FullCurvature) -> FullCurvature:
        """Sum of the two."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are merged unscaled"
        return replace(self, matrix=self.matrix + other.matrix, _cache={})

    def summands(self) -> list[Tensor]:
        """The matrix."""
        return [self.matrix]

    def with_summands(self, parts: Sequence[Tensor]) -> FullCurvature:
        """Of another matrix."""
        return replace(self, matrix=parts[0], _cache={})

    def subtract(self, other: FullCurvature, *, squares: bool = True) -> FullCurvature:
        """Difference of the two."""
        return replace(self, matrix=remainder(self.matrix, other.matrix, squares=squares), _cache={})

    def __mul__(self, factor: float | Tensor) -> FullCurvature:
        """Scale the matrix; its eigenvalues are shared."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> FullCurvature:
        """√f_i H_ij √f_j."""
        root = factors.sqrt()
        return replace(self, matrix=root.unsqueeze(1) * self.matrix * root, _cache={})

    def posterior(self, prior: GaussianPrior, **options: Any) -> FullPrecision:
        """Add the prior; any prior fits."""
        assert not options, "the dense matrix has no options"
        return FullPrecision(self.matrix * self.scale + torch.diag(prior.diagonal()))

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(s λ + δ) for a scalar prior: O(P) once the eigenvalues are known; else by Cholesky, O(P³)."""
        # Eigenvalues are kept for all calls, so that no gradient goes through the matrix itself.
        if prior.precision.numel() == 1 and not self.matrix.requires_grad:
            shifted = self.eigenvalues * self.scale + prior.precision
            if bool((shifted > 0).all()):
                return shifted.log().sum()
        return self.posterior(prior, **options).logdet()

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(1 + s λ/δ) for a scalar prior, where the eigenvalues are known or may be kept."""
        if prior.precision.numel() == 1 and not self.matrix.requires_grad:
            ratios = self.eigenvalues * self.scale / prior.precision
            if bool((ratios > -1).all()):
                return torch.log1p(ratios).sum()
        return super().log_det_ratio(prior, **options)

    @property
    @linalg.lasting
    def eigenvalues(self) -> Float[Tensor, " params"]:
        """Eigenvalues of the unscaled matrix, zero where they are rounding; computed once, O(P³)."""
        if "eigenvalues" not in self._cache:
            with torch.no_grad():
                self._cache["eigenvalues"] = _without_rounding(torch.linalg.eigvalsh(self.matrix))
        return self._cache["eigenvalues"]

    @property
    @linalg.lasting
    def eigenvectors(self) -> Float[Tensor, "params params"]:
        """Eigenvectors, ``[P, P]``; computed once with the eigenvalues, O(P³)."""
        if "eigenvectors" not in self._cache:
            with torch.no_grad():
                values, self._cache["eigenvectors"] = torch.linalg.eigh(self.matrix)
                # Eigenvalues that were computed alone differ in their last bits, and have been handed out.
                self._cache.setdefault("eigenvalues", _without_rounding(values))
        return self._cache["eigenvectors"]

    def basis(self, prior: GaussianPrior) -> DenseBasis | None:
        """The eigenvectors, which a scalar prior leaves alone; none where weights have different precisions."""
        return DenseBasis(_spectral, self.eigenvectors) if prior.precision.numel() == 1 else None

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix, scaled."""
        return self.matrix * self.scale


def _without_rounding(values: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
    """Zero where eigenvalues are below what the largest one leaves room for: no curvature, and none to subtract."""
    level = 10 * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values.abs() <= level, 0.0, values)


def _spectral(curvature: FullCurvature, prior: GaussianPrior) -> DiagPrecision:
    """``s λ + δ``: the posterior in the eigenbasis of the curvature."""
    spectrum = curvature.eigenvalues * curvature.scale + prior.precision
    if bool((spectrum <= 0).any()):
        msg = (
            f"The posterior precision is not positive definite: its smallest eigenvalue is "
            f"{float(spectrum.min()):.3e}. A true Hessian away from a minimum is indefinite: use a GGN back end, or a "
            "larger prior precision."
        )
        raise NotPositiveDefiniteError(msg)
    return DiagPrecision(spectrum)


@dataclass(frozen=True)
class FullPrecision(AbstractPrecision):
    """A dense precision. Factorized on first use; time O(P³), memory O(P²).

    Attributes
    ----------
    matrix
        A, ``[P, P]``, symmetric positive definite.
    """

    matrix: Float[Tensor, "params params"]
    _blocks: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.matrix)

    @property
    def public(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``."""
        return self.matrix

    @cached_property
    @linalg.lasting
    def factor(self) -> Float[Tensor, "params params"]:
        """Lower Cholesky factor L of A; warns where variances are rounding."""
        factor = linalg.cholesky(self.matrix, "posterior precision")
        linalg.warn_of_condition(linalg.condition(self.matrix, factor), self.matrix.dtype)
        return factor

    @cached_property
    @linalg.lasting
    def covariance(self) -> Float[Tensor, "params params"]:
        """Σ = A⁻¹, ``[P, P]``."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    @linalg.lasting
    def root(self) -> Float[Tensor, "params params"]:
        """Lower-triangular ``S`` with ``S Sᵀ = Σ``."""
        return linalg.invsqrt_precision(self.matrix)

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """Two triangular solves."""
        flat = v.reshape(-1, self.n_params)
        return torch.cholesky_solve(flat.mT, self.factor).mT.reshape(v.shape)

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """vᵀ A v."""
        return ((v @ self.matrix) * v).sum(-1)

    def logdet(self) -> Scalar:
        """2 Σ log L_ii."""
        return 2 * self.factor.diagonal().log().sum()

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Diagonal of Σ."""
        return self.covariance.diagonal()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Solve Lᵀ z = ε for standard normal ε: its covariance is L⁻ᵀ L⁻¹ = A⁻¹."""
        factor = self.factor
        noise = torch.randn(n, self.n_params, dtype=factor.dtype, device=factor.device, generator=generator)
        return torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix itself."""
        return self.matrix

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """Of a head ``φᵀ Σ_cc φ``, from the C diagonal blocks of Σ alone."""
        head = head_of(blocks)
        if head is None:
            return super().block_variance(blocks)
        if head.outer is not None:
            return self.block_covariance(blocks).diagonal(dim1=1, dim2=2).T
        phi = head.augmented
        # [rows, D] @ [D, C·D], then a dot product with φ: no [rows, C, C] and no Jacobian.
        left = (phi @ self._diagonal_blocks(head)).view(phi.shape[0], head.n_outputs, -1)
        return (left * phi.unsqueeze(1)).sum(-1).T

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """Of a head ``φᵀ Σ_ck φ`` for each pair of outputs."""
        head = head_of(blocks)
        if head is None:
            return super().block_covariance(blocks)
        phi = head.augmented
        if phi.shape[1] == 1:
            covariance = phi.square().unsqueeze(2) * self.covariance
        else:
            covariance = torch.stack([torch.einsum("nke,ne->nk", left, phi) for left in self._left_products(head)], 1)
        return covariance if head.outer is None else head.outer @ covariance @ head.outer.T

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """Of a head ``Φ Σ_ck Φᵀ`` for each pair of outputs."""
        head = head_of(blocks)
        if head is None or head.outer is not None:
            return super().block_kernel(blocks)
        phi = head.augmented
        if phi.shape[1] == 1:
            joint = torch.einsum("nm,ck->ncmk", phi @ phi.T, self.covariance)
            return joint.reshape(len(phi) * head.n_outputs, -1)
        parts = [torch.einsum("nke,me->nmk", left, phi) for left in self._left_products(head)]
        return torch.stack(parts, 1).reshape(len(phi) * head.n_outputs, -1)

    def _left_products(self, head: HeadBlock) -> Iterator[Tensor]:
        """Φ Σ_ck for one output c at a time and all k: ``[rows, C, D]`` each."""
        phi, key = head.augmented, ("all", head.n_outputs, len(head.phis))
        if key not in self._blocks:
            order = head.order.flatten()
            self._blocks[key] = self.covariance[order][:, order].unflatten(0, (head.n_outputs, -1))
        for rows in self._blocks[key]:
            yield (phi @ rows).view(phi.shape[0], head.n_outputs, -1)

    def _diagonal_blocks(self, head: HeadBlock) -> Tensor:
        """The blocks Σ_cc side by side, ``[D, C·D]``."""
        key = ("diagonal", head.n_outputs, len(head.phis))
        if key not in self._blocks:
            order = head.order
            blocks = self.covariance[order.unsqueeze(2), order.unsqueeze(1)]
            self._blocks[key] = blocks.transpose(0, 1).reshape(order.shape[1], -1)
        return self._blocks[key]
