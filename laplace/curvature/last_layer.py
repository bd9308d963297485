"""Closed forms for the last layer: its curvature from features and output Hessians. No Jacobian, no backward pass.

The last layer is linear, ``f = W φ + b``: its derivatives are blocks ``I_C ⊗ φ``, one for each parameter group, that of
the bias with φ = 1. So every curvature is a sum of ``Λ ⊗ φφᵀ`` over rows, with ``Λ = diag(d) ± r rᵀ`` the Hessian of
the negative log-likelihood in the outputs (or an outer product of gradients, for a Fisher). The outputs are linear in
these weights, so the generalized Gauss–Newton matrix *is* the Hessian.

All results are sums over rows, in public order: group by group, the weight row by row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace import linalg
from laplace.curvature.columns import ColumnSums, Sums
from laplace.curvature.curvature import CurvatureInterface
from laplace.curvature.replay import Features, Replay
from laplace.curvature.structured import Basis
from laplace.enums import HessianStructure
from laplace.likelihoods import OutputHessian, Positions
from laplace.linalg import chunk_elements
from laplace.network.modes import full_precision
from laplace.structures import Kron
from laplace.structures.head_block import HeadBlock
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from laplace.structures.wide_kron import WideKron, is_wide
from laplace.types import Inputs, Jacobians, Scalar


def diag(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> Float[Tensor, " params"]:
    """Diagonal of Σ Λ ⊗ φφᵀ: for each block one product of ``[C, rows]`` with ``[rows, D]``.

    Notes
    -----
    Exact. Time O(rows · C · D), memory O(C · D).
    """
    strength = hessian.diag().T
    return torch.cat([(strength @ block.phi.square()).flatten() for block in blocks])


def kron(blocks: Sequence[HeadBlock], hessian: OutputHessian, constant: float = 1.0) -> Kron | WideKron:
    """Factors ``[Σ Λ, Σ φφᵀ]`` of the weight, raw sums; of the bias, which multiplies a constant, its block.

    Notes
    -----
    Approximate as a matrix, exact as sums. Time O(rows · (C² + D²)), memory O(C² + D²).

    References
    ----------
    Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature".
    arXiv:1503.05671; Ritter, Botev & Barber (2018), "A scalable Laplace approximation for neural networks".
    """
    if is_wide(hessian.n_outputs):
        return wide_kron(blocks, hessian)
    outer = hessian.sum()
    of_bias = bias_block(outer, constant)
    return Kron([[outer, block.phi.T @ block.phi] if len(block.shape) > 1 else [of_bias] for block in blocks])


def wide_kron(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> WideKron:
    """The same of very many outputs: the diagonal of Σ Λ, and a block of it.

    Nothing is made that is larger than the outputs. Time O(rows · (C + m² + D²)), m the outputs that are kept.
    """
    phi = next((block.phi for block in blocks if len(block.shape) > 1), None)
    wide, shapes = linalg.wide_dtype(blocks[0].phi), [block.shape for block in blocks]
    step = max(1, chunk_elements(blocks[0].phi.device) // hessian.n_outputs)
    parts = [slice(start, start + step) for start in range(0, blocks[0].n_rows, step)]
    diagonal = torch.stack([hessian.select(rows).diag().sum(0, dtype=wide) for rows in parts]).sum(0)

    def block_of(kept: Int[Tensor, " kept"]) -> Float[Tensor, "kept kept"]:
        if hessian.root is None:
            return torch.diag(diagonal[kept])
        block = diagonal.new_zeros(len(kept), len(kept))
        for rows in parts:
            flat = hessian.root[rows][:, kept].mT.reshape(-1, len(kept)).to(wide)
            block.addmm_(flat.mT, flat, alpha=hessian.sign)
        return block  # its diagonal is known

    inputs = None if phi is None else phi.to(wide).mT @ phi.to(wide)
    return WideKron.of(diagonal, block_of, inputs, shapes, torch.finfo(blocks[0].phi.dtype).eps)


def bias_block(outer: Float[Tensor, "outputs outputs"], constant: float) -> Float[Tensor, "outputs outputs"]:
    """Σ Λ φ² for the constant φ that a bias multiplies: of 1 the same tensor, which is then decomposed once."""
    return outer if constant == 1 else constant**2 * outer


def full(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> Float[Tensor, "params params"]:
    """Σ Λ ⊗ φφᵀ, dense and symmetric: C products for the diagonal blocks, one for the outer products.

    Where Λ has several roots a row, one product of all its entries with those of φφᵀ.

    Notes
    -----
    Time O(rows · (C D)²), memory O((C D)²).
    """
    phi, widths = joined(blocks)
    n_outputs, width = hessian.n_outputs, phi.shape[1]
    if hessian.root is not None and hessian.root.shape[2] > 1:
        return public_order(products(phi, hessian), n_outputs, widths)
    if hessian.root is None:
        matrix = phi.new_zeros(n_outputs * width, n_outputs * width)
    else:
        matrix = hessian.sign * outer_products(phi, hessian.root)
    strength = hessian.diagonal if hessian.total is None else hessian.total
    if strength is not None:
        # [1 or C, D, D]: one block serves all outputs when they share their diagonal.
        parts = torch.einsum("nd,nc,ne->cde", phi, strength, phi).permute(1, 2, 0)
        diagonal = matrix.view(n_outputs, width, n_outputs, width).diagonal(dim1=0, dim2=2)
        # Where the whole diagonal is known it replaces what the outer products left there.
        diagonal.add_(parts) if hessian.total is None else diagonal.copy_(parts)
    return public_order(matrix, n_outputs, widths)


def blockdiag(blocks: Sequence[HeadBlock], hessian: OutputHessian, constant: float = 1.0) -> list[Tensor]:
    """The blocks of weight ``[C·D, C·D]`` and bias ``[C, C]`` of ``full``.

    Exact blocks. Time O(rows · (C D)²), memory O((C D)²).
    """
    return [full([block], hessian) if len(block.shape) > 1 else bias_block(hessian.sum(), constant) for block in blocks]


def ekfac(
    blocks: Sequence[HeadBlock], hessian: OutputHessian, basis: Sequence[Sequence[Tensor | None]]
) -> list[Tensor]:
    """The diagonal in the basis U ⊗ V of the weight, ``Σ (Uᵀ Λ U)_ii (φ V)_j²`` ``[C, D]``, and in that U of the bias.

    Exact; ``None`` is the identity. Time O(rows · (C² + D² + C D)), memory O(rows · (C + D) + C D).

    References
    ----------
    George et al. (2018), arXiv:1806.03884.
    """
    diagonals: list[Tensor] = []
    for block, (outer, *inner) in zip(blocks, basis, strict=True):
        phi = block.phi
        for side in inner:
            phi = phi if side is None else phi @ side
        diagonals.append((diagonal_in(hessian, outer).T @ phi.square()).view(block.shape))
    return diagonals


def diagonal_in(hessian: OutputHessian, basis: Tensor | None) -> Float[Tensor, "rows outputs"]:
    """Diagonals of Uᵀ Λ U, ``[rows, C]``: two products with ``[C, C]``; ``None`` is the identity."""
    if basis is None:
        return hessian.diag()
    parts: list[Tensor] = []
    if hessian.diagonal is not None:
        parts.append(hessian.diagonal.expand(-1, hessian.n_outputs) @ basis.square())
    if hessian.root is not None:
        rows, _, width = hessian.root.shape
        # One product: a product of each row takes four times as long.
        rotated = hessian.root.mT.reshape(rows * width, hessian.n_outputs) @ basis
        parts.append(hessian.sign * rotated.view(rows, width, basis.shape[1]).square().sum(1))
    # A difference of two sums of squares may come out below zero by rounding.
    return torch.stack(parts).sum(0).clamp(min=0)


def lowrank(
    blocks: Sequence[HeadBlock], hessian: OutputHessian, directions: Float[Tensor, "params k"]
) -> tuple[Float[Tensor, "params k"], Scalar]:
    """Products (Σ Λ ⊗ φφᵀ) V and the trace, Σ tr Λ · |φ|²: through the outputs, ``Jᵀ (Λ (J V))``.

    Exact. Time O(rows · C · D · k), memory O(P k) beside chunks of rows.
    """
    phi, widths = joined(blocks)
    n_outputs, n_directions = hessian.n_outputs, directions.shape[1]
    parts = directions.split([n_outputs * width for width in widths])
    sides = torch.cat([part.unflatten(0, (n_outputs, -1)) for part in parts], 1)  # [C, D, k]
    total = torch.zeros_like(sides)
    step = max(1, chunk_elements(directions.device) // max(1, n_outputs * n_directions))
    for start in range(0, len(phi), step):
        rows = slice(start, start + step)
        moved = torch.einsum("nd,cdk->nck", phi[rows], sides)
        weighed = torch.zeros_like(moved)
        if hessian.diagonal is not None:
            weighed = hessian.diagonal[rows].unsqueeze(-1) * moved
        if hessian.root is not None:
            root = hessian.root[rows]
            weighed = weighed + hessian.sign * (root @ (root.mT @ moved))
        total += torch.einsum("nck,nd->cdk", weighed, phi[rows])
    products = torch.cat([part.flatten(0, 1) for part in total.split(widths, 1)])
    return products, (hessian.diag().sum(1) * phi.square().sum(1)).sum()


def joined(blocks: Sequence[HeadBlock]) -> tuple[Float[Tensor, "rows all_features"], list[int]]:
    """The features of all blocks side by side, such as [φ, 1], and how many there are of each."""
    widths = [block.phi.shape[1] for block in blocks]
    return blocks[0].phi if len(blocks) == 1 else torch.cat([block.phi for block in blocks], 1), widths


def products(phi: Float[Tensor, "rows features"], hessian: OutputHessian) -> Float[Tensor, "internal internal"]:
    """Σ Λ ⊗ φφᵀ over rows with Λ as matrices, in chunks of rows; output by output."""
    n_outputs, width = hessian.n_outputs, phi.shape[1]
    total = phi.new_zeros(n_outputs**2, width**2)
    step = max(1, chunk_elements(phi.device) // (n_outputs**2 + width**2))
    for start in range(0, len(phi), step):
        rows = slice(start, start + step)
        squares = phi[rows].unsqueeze(2) * phi[rows].unsqueeze(1)
        total.addmm_(hessian.select(rows).dense().flatten(1).T, squares.flatten(1))
    shape = n_outputs, n_outputs, width, width
    return total.view(shape).transpose(1, 2).reshape(n_outputs * width, n_outputs * width)


def outer_products(
    phi: Float[Tensor, "rows features"], root: Float[Tensor, "rows outputs samples"]
) -> Float[Tensor, "internal internal"]:
    """Σ z zᵀ over rows and samples with z = r ⊗ φ, in chunks of rows; output by output."""
    n_rows, n_outputs, n_samples = root.shape
    width = n_outputs * phi.shape[1]
    total = phi.new_zeros(width, width)
    step = max(1, chunk_elements(phi.device) // (width * n_samples))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        z = torch.einsum("nck,nd->nkcd", root[rows], phi[rows]).reshape(-1, width)
        total.addmm_(z.T, z)
    return total


def public_order(
    matrix: Float[Tensor, "internal internal"], n_outputs: int, widths: Sequence[int]
) -> Float[Tensor, "params params"]:
    """From the weights of one output after another to one parameter group after another."""
    if len(widths) == 1:
        return matrix
    spans = [
        (slice(start, stop), slice(n_outputs * start, n_outputs * stop))
        for start, stop in pairwise(accumulate(widths, initial=0))
    ]
    parts = matrix.view(n_outputs, sum(widths), n_outputs, sum(widths))
    ordered = torch.empty_like(matrix)
    # Slices of one view instead of an index: a copy at memory speed.
    for of_rows, rows in spans:
        for of_columns, columns in spans:
            part = parts[:, of_rows, :, of_columns]
            ordered[rows, columns].unflatten(1, part.shape[2:]).unflatten(0, part.shape[:2]).copy_(part)
    return ordered


def datum_columns(
    blocks: Sequence[HeadBlock], gradient: Float[Tensor, "rows outputs"], positions: Sequence[int]
) -> Iterator[list[JacobianBlock]]:
    """Gradients of each datum in the weights, summed over its ``positions`` first: one column, some data at a time."""
    step = max(1, chunk_elements(gradient.device) // sum(block.n_params for block in blocks))
    gradients, features = gradient.split(positions), [block.phi.split(positions) for block in blocks]
    for start in range(0, len(positions), step):
        # Padded with zeros to [chunk, positions, ·]: the sum over positions becomes a batched product.
        padded, *phis = (
            torch.nn.utils.rnn.pad_sequence(list(rows[start : start + step]), batch_first=True)
            for rows in (gradients, *features)
        )
        yield [DenseBlock((padded.mT @ phi).flatten(1).unsqueeze(0)) for phi in phis]


def _positions_of_each(positions: Positions, n_data: int) -> list[int]:
    """How many rows each datum has, of those that have some."""
    if positions.kept is None:
        return [len(positions.f) // max(n_data, 1)] * n_data
    return torch.unique_consecutive(positions.datum, return_counts=True)[1].tolist()


@dataclass(frozen=True)
class HeadSums:
    """The curvature of the last layer in a batch, by the closed forms."""

    backend: CurvatureInterface
    """Gives the output Hessians."""
    positions: Positions
    """Outputs and targets."""
    blocks: Sequence[HeadBlock]
    """Derivatives of the head at the same rows, one block for each parameter group."""
    constant: float
    """What the bias multiplies."""

    def full(self) -> Tensor:
        """Dense curvature ``[P, P]``: O(rows · (C D)²)."""
        return full(self.blocks, self.hessian(self.positions))

    def diag(self) -> Tensor:
        """Diagonal ``[P]``: O(rows · C D)."""
        return diag(self.blocks, self.hessian(self.positions))

    def kron(self) -> Kron | WideKron:
        """Kronecker factors, raw sums in float64: O(rows · (C² + D²))."""
        if is_wide(self.positions.f.shape[1]):
            return kron(self.blocks, self.hessian(self.positions), self.constant)
        return kron(*self._wide(), self.constant)

    def blockdiag(self) -> list[Tensor]:
        """The blocks of weight and bias: O(rows · (C D)²)."""
        return blockdiag(self.blocks, self.hessian(self.positions), self.constant)

    def ekfac(self, basis: Basis, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:  # noqa: ARG002 - of the blocks
        """The diagonal of the curvature in a basis, computed in float64: O(rows · (C² + D² + C D))."""
        blocks, hessian = self._wide()
        sides = [[None if side is None else side.to(blocks[0].phi) for side in group] for group in basis]
        return [diagonal.to(self.positions.f.dtype) for diagonal in ekfac(blocks, hessian, sides)]

    def lowrank(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the curvature with directions ``[P, k]``, and its trace: O(rows · C · D · k)."""
        return lowrank(self.blocks, self.hessian(self.positions), directions.to(self.positions.f.dtype))

    def _wide(self) -> tuple[list[HeadBlock], OutputHessian]:
        """Blocks and output Hessians in float64."""
        wide = linalg.wide_dtype(self.positions.f)
        blocks = [block.to(wide) for block in self.blocks]
        return blocks, self.hessian(self.positions.to(wide))

    def hessian(self, positions: Positions) -> OutputHessian:
        """In the outputs of the head."""
        return self.backend.output_likelihood.head_hessian(self.backend.output_hessian(positions))


class LastLayerEngine:
    """Curvature and Jacobians of the last layer: one forward pass per batch, no backward pass."""

    def __init__(self, backend: CurvatureInterface) -> None:
        self.backend = backend

    @contextmanager
    def sums(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Sums], None, None]:
        """Loss and curvature of a batch; the body runs in full precision and builds no graph."""
        with torch.no_grad():
            f, phi = self.features(x)
            with full_precision(f.device):
                positions = self.backend.positions(f, y, whole=True)
                likelihood, shapes = self.backend.output_likelihood, self.backend.shapes
                phi, constant = likelihood.head_rows(positions, phi.to(positions.f.dtype))
                of_bias = phi.new_full((len(phi), 1), constant)
                blocks = [HeadBlock((phi if len(shape) > 1 else of_bias,), (shape,)) for shape in shapes]
                head, loss = HeadSums(self.backend, positions, blocks, constant), self.backend.loss(positions)
                if not self.backend.adds_over_positions or positions.datum is None:
                    yield loss, head
                    return
                # Gradients of the positions of a datum add up before they are squared.
                root = head.hessian(positions).root
                assert root is not None, "gradients are roots"
                columns = datum_columns(blocks, root.squeeze(-1), _positions_of_each(positions, len(f)))
                yield loss, ColumnSums(columns, [block.n_params for block in blocks], positions.f, head.kron)

    def jacobians(self, x: Inputs, enable_backprop: bool) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, written out."""
        return self.backend.last_layer_jacobians(x, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        return CurvatureInterface.gradients(self.backend, x, y)

    def record(self, x: Inputs, *, create_graph: bool = False, **model_kwargs: Any) -> Any:
        """Outputs and their derivatives, written out."""
        return CurvatureInterface.derivatives(self.backend, x, create_graph, **model_kwargs)

    def repeatable(
        self,
        batches: Iterable[tuple[Inputs, Tensor]],
        structure: HessianStructure,  # noqa: ARG002 - any
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """The features, made in the first pass."""
        return Replay(batches, self.features)

    def features(self, x: Inputs) -> Features:
        """Outputs and features, which may take the place of the inputs of ``sums``."""
        if isinstance(x, Features):
            return x
        with torch.no_grad():
            return Features(*self.backend.model.forward_with_features(x))
