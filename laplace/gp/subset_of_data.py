"""The posterior of a subset of the data, in function space: no matrix is as large as the weights.

With K the kernel of the subset at unit prior precision, R roots of its output Hessians and G = s Rᵀ K R, the posterior
precision of the weights is ``A = δ' I + s Jᵀ R Rᵀ J`` and, with v = 1/δ',

    cov(x, x') = v k(x, x') − v² s k(x, ·) R (I + v G)⁻¹ Rᵀ k(·, x')
    log |A| = P log δ' + log |I + v G|

The roots, not the Hessians, are inverted around: the Hessian of a softmax is singular. δ' = δ N/M: the prior precision
grows by how much smaller the subset is than the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.errors import UnsupportedError
from laplace.gp.kernel import SubsetKernel
from laplace.linalg import chunk_elements
from laplace.structures import AbstractPrecision
from laplace.structures.dense_jacobian import check_jacobians
from laplace.types import Scalar


@dataclass(frozen=True)
class SubsetPrecision(AbstractPrecision):
    """``A = I / v + Jᵀ R Rᵀ J``, through the factor of ``I + v G``; R holds noise and temperature."""

    kernel: SubsetKernel
    """Of the subset."""
    root: Tensor
    """R."""
    gram: Float[Tensor, "parts columns columns"]
    """G."""
    variance: Tensor
    """v, the prior variance of each weight, ``[]``."""

    @property
    def n_params(self) -> int:
        """P."""
        return self.kernel.n_params

    @property
    def public(self) -> SubsetPrecision:
        """Itself."""
        return self

    @cached_property
    @linalg.lasting
    def factor(self) -> Float[Tensor, "parts columns columns"]:
        """Lower Cholesky factor L of ``I + v G``, part by part."""
        eye = torch.eye(self.gram.shape[1]).to(self.gram)
        return linalg.cholesky(eye + self.variance * self.gram, "kernel of the subset")

    @property
    def _factors(self) -> Tensor:
        """One for each output where outputs do not meet."""
        return self.factor.expand(self.kernel.n_outputs, -1, -1) if self.root.dim() == 2 else self.factor

    def whitened(self, projected: Float[Tensor, "parts points columns"]) -> Float[Tensor, "parts points columns"]:
        """v L⁻¹ Rᵀ k(·, x): what the data take from the prior is the product of these with themselves."""
        factor = self.factor if len(projected) == len(self.factor) else self._factors
        return self.variance * torch.linalg.solve_triangular(factor, projected.mT, upper=False).mT

    @cached_property
    @linalg.lasting
    def taken(self) -> Float[Tensor, "parts smaller smaller"]:
        """For a last layer: the matrices whose squares with ``SubsetKernel.cross`` are what the data take."""
        blocks = []
        for number, side in enumerate(self.kernel.sides(self.root)):
            factor = self.factor[number if self.root.dim() == 2 else 0]
            half = self.variance * torch.linalg.solve_triangular(factor, side, upper=False)
            blocks.append(half.T @ half)
        return torch.stack(blocks)

    # -- over weights --------------------------------------------------------------------------------------------------

    def _columns(self, v: Float[Tensor, "vectors params"]) -> Float[Tensor, "parts vectors columns"]:
        """``Rᵀ J v``."""
        self._check_weights()
        at = self.kernel.apply(v)
        if self.root.dim() == 2:
            return (at * self.root).permute(2, 0, 1)
        return torch.einsum("vnc,nck->vnk", at, self.root).flatten(1).unsqueeze(0)

    def _weights(self, columns: Float[Tensor, "parts vectors columns"]) -> Float[Tensor, "vectors params"]:
        """``Jᵀ R u``."""
        if self.root.dim() == 2:
            return self.kernel.combine(columns.permute(1, 2, 0) * self.root)
        u = columns[0].unflatten(1, (len(self.root), -1))
        return self.kernel.combine(torch.einsum("vnk,nck->vnc", u, self.root))

    def _check_weights(self) -> None:
        if self.kernel.independent:
            msg = (
                "independent_outputs=True leaves out what outputs have in common: this is a posterior over functions, "
                "and over no weights. Pass independent_outputs=False."
            )
            raise UnsupportedError(msg)

    def _corrected(self, v: Float[Tensor, "vectors params"], noise: Tensor | None = None) -> Tensor:
        """``v − v Jᵀ R (I + v G)⁻¹ (Rᵀ J v + noise)``."""
        columns = self._columns(v)
        columns = columns if noise is None else columns + noise
        solved = torch.cholesky_solve(columns.mT, self._factors).mT
        return v - self.variance * self._weights(solved)

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """By the matrix inversion lemma."""
        return (self.variance * self._corrected(v.reshape(-1, self.n_params))).reshape(v.shape)

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """‖v‖² / v + ‖Rᵀ J v‖²."""
        columns = self._columns(v.reshape(-1, self.n_params)).square().sum((0, 2))
        return v.square().sum(-1) / self.variance + columns.reshape(v.shape[:-1])

    def logdet(self) -> Scalar:
        """P log δ' + log |I + v G|."""
        repeats = self.kernel.n_outputs // len(self.factor) if self.root.dim() == 2 else 1
        ratio = 2 * repeats * self.factor.diagonal(dim1=1, dim2=2).log().sum()
        return ratio - self.n_params * self.variance.log()

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Marginal variances of weights: one row of weights for each column of R."""
        self._check_weights()
        total = self.variance.expand(self.n_params).clone()
        n_parts, size = len(self._factors), self.gram.shape[1]
        step = max(1, chunk_elements(self.gram.device) // self.n_params)
        for number, factor in enumerate(self._factors):
            for columns in torch.arange(size, device=factor.device).split(step):
                unit = torch.zeros(size, len(columns)).to(factor)
                unit[columns, torch.arange(len(columns))] = 1
                u = factor.new_zeros(n_parts, len(columns), size)
                u[number] = torch.linalg.solve_triangular(factor.T, unit, upper=True).T
                total -= (self.variance * self._weights(u)).square().sum(0)
        return total

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draws from the prior, corrected by what they miss of noisy zeros at the data (Matheron's rule)."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=self.root.dtype, device=self.root.device, generator=generator)

        prior = self.variance.sqrt() * normal(n, self.n_params)
        return self._corrected(prior, normal(len(self._factors), n, self.gram.shape[1]))

    def to_dense(self) -> Float[Tensor, "params params"]:
        """A, for small problems and tests."""
        self._check_weights()
        rows = torch.cat(list(weight_rows(self.kernel, self.root)))
        return rows.T @ rows + torch.eye(self.n_params).to(rows) / self.variance

    def functional_covariance(self, J: Tensor) -> Float[Tensor, "joint joint"]:
        """J A⁻¹ Jᵀ across inputs, from products of J with the derivatives of the subset."""
        check_jacobians(J, self.n_params)
        flat = J.flatten(0, 1)
        z = self.whitened(self._columns(flat)).transpose(0, 1).flatten(1)
        return self.variance * flat @ flat.T - z @ z.T

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """The same for each input."""
        check_jacobians(J, self.n_params)
        if self.kernel.independent:
            at = self.kernel.apply(J.flatten(0, 1)).unflatten(0, J.shape[:2]).diagonal(dim1=1, dim2=3)
            z = self.whitened(self.kernel.project(at.permute(2, 0, 1), self.root))
            return torch.diag_embed(self.variance * J.square().sum(-1) - z.square().sum(-1).T)
        z = self.whitened(self._columns(J.flatten(0, 1))).transpose(0, 1).flatten(1).unflatten(0, J.shape[:2])
        return self.variance * J @ J.mT - z @ z.mT


def weight_rows(kernel: SubsetKernel, root: Tensor) -> Iterator[Float[Tensor, "chunk params"]]:
    """``Rᵀ J``, a bounded number of rows at a time."""
    whole = root
    if root.dim() == 2:
        whole = torch.diag_embed(root.expand(-1, kernel.n_outputs))
    n, width, k = whole.shape
    step = max(1, chunk_elements(root.device) // max(kernel.n_params, n * width))
    for columns in torch.arange(n * k, device=root.device).split(step):
        u = whole.new_zeros(len(columns), n, width)
        u[torch.arange(len(columns)), columns // k] = whole[columns // k, :, columns % k]
        yield kernel.combine(u)


__all__ = ["SubsetPrecision", "weight_rows"]
