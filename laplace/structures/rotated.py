"""A precision whose parameter groups are diagonal in bases that are orthogonal, or Kronecker products of such.

A = (U ⊗ V) diag(spectrum) (U ⊗ V)ᵀ group by group: what ``hessian_structure="kron"`` and ``"ekfac"`` have in common.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import ShapeError
from laplace.network.parameters import split_sizes
from laplace.structures.base import AbstractPrecision
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.head_block import joined
from laplace.structures.jacobian import JacobianBlock, sum_parts
from laplace.types import Scalar


class RotatedPrecision(AbstractPrecision):
    """Orthogonal bases and a spectrum for each parameter group; subclasses say where the spectrum comes from."""

    eigenvectors: Sequence[Sequence[Tensor | None]]
    """For each group one or two orthogonal matrices; ``None`` is the identity."""

    @property
    @abstractmethod
    def spectrum(self) -> list[Tensor]:
        """Eigenvalues of A, group by group: ``[rows, columns]``, or ``[rows]`` with one basis."""

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Sizes of the bases of each group."""

    @property
    def n_params(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def public(self) -> RotatedPrecision:
        """Itself."""
        return self

    def logdet(self) -> Scalar:
        """Σ log of the spectrum."""
        return torch.stack([values.log().sum() for values in self.spectrum]).sum()

    def bmm(self, W: Float[Tensor, "*batch params"], exponent: float = -1) -> Float[Tensor, "*batch params"]:
        """Multiply rows by a power of the matrix.

        Parameters
        ----------
        W
            ``[..., P]``.
        exponent
            The power: −1 solves, −½ whitens.

        Returns
        -------
        ``[..., P]``.

        Raises
        ------
        ShapeError
            If rows have another number of weights.

        Notes
        -----
        Exact. O(C D (C + D)) per row.
        """
        if W.shape[-1] != self.n_params:
            msg = f"Expected rows of {self.n_params} weights; got the shape {list(W.shape)}."
            raise ShapeError(msg)
        transposed = [[None if side is None else side.T for side in block] for block in self.eigenvectors]
        rotated = apply_blocks(W, transposed, self.shapes)
        scaled = rotated * torch.cat([values.flatten() for values in self.spectrum]) ** exponent
        return apply_blocks(scaled, self.eigenvectors, self.shapes)

    def inv_square_form(self, W: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """W A⁻¹ Wᵀ for each row of the batch.

        Parameters
        ----------
        W
            ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``.

        Raises
        ------
        ShapeError
            If rows have another number of weights.
        """
        return self.functional_variance(W)

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """A⁻¹ v."""
        return self.bmm(v, -1)

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """VᵀAv."""
        return (self.bmm(v, 1) * v).sum(-1)

    def diag(self, exponent: float = 1) -> Float[Tensor, " params"]:
        """Diagonal of a power of the matrix, ``[P]``.

        Parameters
        ----------
        exponent
            The power; −1 gives the marginal variances.
        """
        squares = [[None if q is None else q.square() for q in block] for block in self.eigenvectors]
        powers = torch.cat([(values**exponent).flatten() for values in self.spectrum])
        return apply_blocks(powers, squares, self.shapes)

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Marginal variances of the weights."""
        return self.diag(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """A^(−½) times standard normal numbers."""
        first = self.spectrum[0]
        noise = torch.randn(n, self.n_params, dtype=first.dtype, device=first.device, generator=generator)
        return self.bmm(noise, -0.5)

    def to_matrix(self, exponent: float = 1) -> Float[Tensor, "params params"]:
        """A power of the matrix, written out, ``[P, P]``."""
        first = self.spectrum[0]
        return self.bmm(torch.eye(self.n_params, dtype=first.dtype, device=first.device), exponent)

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``."""
        return self.to_matrix()

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """The square of A^(−½) Jᵀ, so that it is symmetric to the last bit."""
        check_jacobians(J, self.n_params)
        half = self.bmm(J, -0.5)
        return half @ half.mT

    def _by_block(self, blocks: Sequence[JacobianBlock]) -> list[tuple[JacobianBlock, Tensor]]:
        """Each block in the eigenbasis, with the variances there."""
        spectrum = self.spectrum
        groups = zip(blocks, self.eigenvectors, spectrum, strict=True)
        turned = [block.rotate(vectors, values.shape) for block, vectors, values in groups]
        inverse, together = [values.reciprocal().view(-1) for values in spectrum], joined(turned)
        return list(zip(together, inverse if len(together) == len(inverse) else [torch.cat(inverse)], strict=True))

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """Σ_ij (Uᵀ J V)²_ij / spectrum_ij, block by block."""
        return sum_parts([block.variance(w) for block, w in self._by_block(blocks)])

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """The same between columns."""
        return sum_parts([block.covariance(w) for block, w in self._by_block(blocks)])

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        return sum_parts([block.kernel(w) for block, w in self._by_block(blocks)])


def apply_blocks(W: Tensor, blocks: Sequence[Sequence[Tensor | None]], shapes: Sequence[Sequence[int]]) -> Tensor:
    """Multiply each part of ``W [..., P]`` by its block ``L ⊗ R``: ``L w Rᵀ`` with ``w`` as a matrix."""
    parts = split_sizes(W, [math.prod(shape) for shape in shapes])
    done = []
    for part, block, shape in zip(parts, blocks, shapes, strict=True):
        if len(block) == 2:
            left, right = block
            matrix = part.unflatten(-1, tuple(shape))
            matrix = matrix if right is None else matrix @ right.T
            done.append((matrix if left is None else left @ matrix).flatten(-2))
        else:
            done.append(part if block[0] is None else part @ block[0].T)
    return torch.cat(done, -1)
