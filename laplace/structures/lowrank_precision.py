"""A diagonal plus a matrix of low rank, factorized: the precision of ``hessian_structure="lowrank"``.

A = diag(δ) + W̃ W̃ᵀ = diag(δ)^½ (I + W Wᵀ) diag(δ)^½,   W = Q R with orthonormal Q,   I + R Rᵀ = K Kᵀ

A⁻¹ = diag(δ)^(−½) [(I − Q Qᵀ) + Q (K Kᵀ)⁻¹ Qᵀ] diag(δ)^(−½)

Variances are sums of the squares of these two parts, so that none comes out negative where the curvature is strong and
the identity of Woodbury would subtract nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.linalg import CHUNK_ELEMENTS
from laplace.structures.base import AbstractPrecision
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.head_block import HeadBlock, head_of
from laplace.structures.jacobian import JacobianBlock, sum_parts
from laplace.types import Scalar


@dataclass(frozen=True)
class LowRankPrecision(AbstractPrecision):
    """A diagonal plus s·U diag(λ) Uᵀ. Factorized on first use; time O(P r²), memory O(P r).

    Attributes
    ----------
    vectors
        U, ``[P, r]``.
    values
        λ, ``[r]``, not negative.
    scale
        s.
    delta
        δ, ``[P]``, positive.
    isotropic
        U has orthonormal columns and all of δ is one number: nothing has to be factorized.
    """

    vectors: Float[Tensor, "params rank"]
    values: Float[Tensor, " rank"]
    scale: Scalar | float
    delta: Float[Tensor, " params"]
    isotropic: bool = False

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.vectors)

    @property
    def eigenvalues(self) -> Float[Tensor, " rank"]:
        """Those of the scaled curvature."""
        return self.values * self.scale

    @property
    def public(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """``(eigenvectors, eigenvalues)`` of the scaled curvature, and the diagonal of the prior."""
        return (self.vectors, self.eigenvalues), self.delta

    @property
    def _whitened(self) -> Float[Tensor, "params rank"]:
        """W = diag(δ)^(−½) U (s λ)^½."""
        scale = torch.as_tensor(self.scale, dtype=self.values.dtype, device=self.values.device)
        return self.vectors * (self.values.sqrt() * scale.sqrt()) / self.delta.sqrt().unsqueeze(1)

    @cached_property
    @linalg.lasting
    def frame(self) -> tuple[Float[Tensor, "params rank"], Float[Tensor, "rank rank"]]:
        """Q and the lower triangular K."""
        if self.isotropic:
            return self.vectors, torch.diag((1 + self.eigenvalues / self.delta[0]).sqrt())
        Q, R = torch.linalg.qr(self._whitened)
        wide = R.to(linalg.wide_dtype(R))
        eye = torch.eye(len(R), dtype=wide.dtype, device=wide.device)
        return Q, linalg.cholesky(eye + wide @ wide.mT, "posterior precision").to(R)

    @property
    def _determinant(self) -> tuple[Float[Tensor, "params rank"], Float[Tensor, "rank rank"]]:
        """W, and the Cholesky factor of I + Wᵀ W, in float64."""
        W = self._whitened.to(linalg.wide_dtype(self.values))
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        return W, linalg.cholesky(eye + W.mT @ W, "posterior precision")

    @cached_property
    @linalg.lasting
    def correction(self) -> Float[Tensor, "params rank"]:
        """T with A⁻¹ = diag(1/δ) − T Tᵀ, in float64, where nearly equal numbers may be subtracted."""
        W = self._whitened.to(linalg.wide_dtype(self.values))
        factor = linalg.cholesky(
            torch.eye(W.shape[1], dtype=W.dtype, device=W.device) + W.mT @ W, "posterior precision"
        )
        half = torch.linalg.solve_triangular(factor, W.mT, upper=False).mT
        return half / self.delta.to(W).sqrt().unsqueeze(1)

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """Within the span of Q by K, outside of it by the prior alone."""
        Q, K = self.frame
        root = self.delta.sqrt()
        x = v / root
        inside = x @ Q
        moved = torch.cholesky_solve(inside.reshape(-1, len(K)).mT, K).mT.reshape(inside.shape)
        return (x + (moved - inside) @ Q.mT) / root

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """Σ δ v² + Σ s λ (Uᵀ v)²."""
        return (self.delta * v.square()).sum(-1) + ((v @ self.vectors).square() * self.eigenvalues).sum(-1)

    def logdet(self) -> Scalar:
        """Σ log δ + log |I + Wᵀ W|: the determinant lemma."""
        return self.delta.log().sum() + self.log_det_ratio()

    def log_det_ratio(self) -> Scalar:
        """log |I + Wᵀ W|: what the curvature adds to the prior's."""
        if self.isotropic:
            return torch.log1p(self.eigenvalues / self.delta[0]).sum()
        W = self._whitened.to(linalg.wide_dtype(self.values))
        factor = linalg.cholesky(
            torch.eye(W.shape[1], dtype=W.dtype, device=W.device) + W.mT @ W, "posterior precision"
        )
        return (2 * factor.diagonal().log().sum()).to(self.delta)

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """1/δ − Σ T²."""
        return (1 / self.delta.to(self.correction) - self.correction.square().sum(1)).to(self.delta)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Standard normal numbers, narrowed within the span of Q, then divided by √δ."""
        Q, K = self.frame
        noise = torch.randn(n, len(Q), dtype=Q.dtype, device=Q.device, generator=generator)
        inside = noise @ Q
        narrowed = torch.linalg.solve_triangular(K.mT, inside.mT, upper=True).mT
        return (noise + (narrowed - inside) @ Q.mT) / self.delta.sqrt()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``."""
        return (self.vectors * self.eigenvalues) @ self.vectors.mT + torch.diag(self.delta)

    def _halves(self, J: Tensor) -> tuple[Tensor, Tensor]:
        """J A^(−½) outside and inside the span of Q: the sum of their squares is J A⁻¹ Jᵀ."""
        Q, K = self.frame
        x = J / self.delta.sqrt()
        inside = x @ Q
        return x - inside @ Q.mT, torch.linalg.solve_triangular(K.mT, inside, upper=True, left=False)

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """The sum of two squares, symmetric to the last bit."""
        check_jacobians(J, self.n_params)
        outside, inside = self._halves(J)
        return outside @ outside.mT + inside @ inside.mT

    def functional_covariance(self, J: Tensor) -> Float[Tensor, "joint joint"]:
        """The same across inputs."""
        check_jacobians(J, self.n_params)
        outside, inside = self._halves(J.flatten(0, 1))
        return outside @ outside.mT + inside @ inside.mT

    # -- whole networks -----------------------------------------------------------------------------------------------

    def _inside(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "rank columns batch"]:
        """Qᵀ diag(δ)^(−½) Jᵀ, without J."""
        Q, _ = self.frame
        sides = (Q / self.delta.sqrt().unsqueeze(1)).split([block.n_params for block in blocks])
        return sum_parts([block.apply(side.T.contiguous()) for block, side in zip(blocks, sides, strict=True)])

    def _narrowed(self, inside: Float[Tensor, "rank columns batch"]) -> Float[Tensor, "rank columns batch"]:
        """K⁻¹ times that."""
        return torch.linalg.solve_triangular(self.frame[1], inside.flatten(1), upper=False).view(inside.shape)

    def _outside(
        self, blocks: Sequence[JacobianBlock], inside: Tensor, *, whole_batch: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "columns rows weights"]]]:
        """What of J diag(δ)^(−½) is outside the span of Q: some data and some weights of a group at a time."""
        sizes = [block.n_params for block in blocks]
        groups = zip(blocks, self.frame[0].split(sizes), self.delta.sqrt().split(sizes), strict=True)
        for block, Q, root in groups:
            for rows, weights, J in block.pieces(whole_batch=whole_batch):
                yield rows, J / root[weights] - torch.einsum("rqb,pr->qbp", inside[:, :, rows], Q[weights])

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """The sum of two squares, piece by piece; of a head by its closed form."""
        if (head := head_of(blocks)) is not None:
            return self._head_variance(head)
        inside = self._inside(blocks)
        total = self._narrowed(inside).square().sum(0)
        for rows, part in self._outside(blocks, inside):
            total[:, rows] += part.square().sum(-1)
        return total

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """The same between columns."""
        if (head := head_of(blocks)) is not None:
            return self._head_covariance(head)
        inside = self._inside(blocks)
        half = self._narrowed(inside).permute(2, 1, 0)
        total = half @ half.mT
        for rows, part in self._outside(blocks, inside):
            half = part.transpose(0, 1)
            total[rows] += half @ half.mT
        return total

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        head = head_of(blocks)
        if head is not None and head.outer is None:
            return self._head_kernel(head)
        inside = self._inside(blocks)
        half = self._narrowed(inside).permute(2, 1, 0).flatten(0, 1)
        total = half @ half.mT
        for _, part in self._outside(blocks, inside, whole_batch=True):
            half = part.transpose(0, 1).flatten(0, 1)
            total = total + half @ half.mT
        return total

    # -- heads --------------------------------------------------------------------------------------------------------

    def _corrections(self, head: HeadBlock) -> Iterator[tuple[Tensor, Tensor]]:
        """For some rows at a time the prior variances ``[rows, C]`` and J T, ``[rows, C, r]``, in float64."""
        T = self.correction
        sides, prior = T[head.order], head.to(T.dtype)
        phi, step = prior.augmented, max(1, CHUNK_ELEMENTS // max(1, head.n_outputs * T.shape[1]))
        strength = replace(prior, outer=None).variance(1 / self.delta.to(T)).T
        for prior_variance, rows in linalg.some_rows(step, strength, phi):
            yield prior_variance, torch.einsum("nd,cdr->ncr", rows, sides)

    def _head_variance(self, head: HeadBlock) -> Float[Tensor, "columns batch"]:
        """J diag(1/δ) Jᵀ − (J T)(J T)ᵀ, from features: O(rows · C · D · r)."""
        if head.outer is not None:
            return self._head_covariance(head).diagonal(dim1=1, dim2=2).T
        parts = [prior - narrowed.square().sum(-1) for prior, narrowed in self._corrections(head)]
        return torch.cat(parts).to(head.sample).T

    def _head_covariance(self, head: HeadBlock) -> Float[Tensor, "batch columns columns"]:
        """The same between columns."""
        parts = [torch.diag_embed(prior) - narrowed @ narrowed.mT for prior, narrowed in self._corrections(head)]
        covariance = torch.cat(parts).to(head.sample)
        return covariance if head.outer is None else head.outer @ covariance @ head.outer.T

    def _head_kernel(self, head: HeadBlock) -> Float[Tensor, "joint joint"]:
        """The same across data, of outputs."""
        T = self.correction
        prior = head.to(T.dtype).kernel(1 / self.delta.to(T))
        narrowed = torch.cat([part.flatten(0, 1) for _, part in self._corrections(head)])
        return (prior - narrowed @ narrowed.mT).to(head.sample)
