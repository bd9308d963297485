"""Closed forms for the last layer: its curvature from features and output Hessians. No Jacobian, no backward pass.

The last layer is linear, ``f = W φ + b``: its derivatives are blocks ``I_C ⊗ φ``, one for each parameter group, that of
the bias with φ = 1. So every curvature is a sum of ``Λ ⊗ φφᵀ`` over rows, with ``Λ = diag(d) ± r rᵀ`` the Hessian of the
negative log-likelihood in the outputs (or an outer product of gradients, for a Fisher). The outputs are linear in these
weights, so the generalized Gauss–Newton matrix *is* the Hessian.

All results are sums over rows, in public order: group by group, the weight row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.likelihoods import OutputHessian
from laplace.linalg import CHUNK_ELEMENTS
from laplace.structures import Kron
from laplace.structures.head_block import HeadBlock
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from laplace.types import Scalar


def diag(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> Float[Tensor, " params"]:
    """Diagonal of Σ Λ ⊗ φφᵀ: for each block one product of ``[C, rows]`` with ``[rows, D]``.

    Notes
    -----
    Exact. Time O(rows · C · D), memory O(C · D).
    """
    strength = hessian.diag().T
    return torch.cat([(strength @ block.phi.square()).flatten() for block in blocks])


def kron(
    blocks: Sequence[HeadBlock], hessian: OutputHessian, of_bias: Callable[[Tensor], Tensor] | None = None
) -> Kron:
    """Factors ``[Σ Λ, Σ φφᵀ]`` of the weight, raw sums; of the bias the same first one, ``[Σ Λ]``, or ``of_bias`` of it.

    Notes
    -----
    Approximate as a matrix, exact as sums. Time O(rows · (C² + D²)), memory O(C² + D²).

    References
    ----------
    Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature".
    arXiv:1503.05671; Ritter, Botev & Barber (2018), "A scalable Laplace approximation for neural networks".
    """
    outer = hessian.sum()
    alone = outer if of_bias is None else of_bias(outer)
    return Kron([[outer, block.phi.T @ block.phi] if len(block.group) > 1 else [alone] for block in blocks])


def full(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> Float[Tensor, "params params"]:
    """Σ Λ ⊗ φφᵀ, dense and symmetric: C products for the diagonal blocks, one for the outer products.

    Notes
    -----
    Time O(rows · (C D)²), memory O((C D)²).
    """
    phi, widths = joined(blocks)
    n_outputs, width = hessian.n_outputs, phi.shape[1]
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


def blockdiag(blocks: Sequence[HeadBlock], hessian: OutputHessian) -> list[Tensor]:
    """The blocks of weight ``[C·D, C·D]`` and bias ``[C, C]`` of ``full``.

    Notes
    -----
    Exact blocks. Time O(rows · (C D)²), memory O((C D)²).
    """
    return [full([block], hessian) for block in blocks]


def ekfac(
    blocks: Sequence[HeadBlock], hessian: OutputHessian, basis: Sequence[Sequence[Tensor | None]]
) -> list[Tensor]:
    """The diagonal in the basis U ⊗ V of the weight, ``Σ (Uᵀ Λ U)_ii (φ V)_j²`` ``[C, D]``, and in that U of the bias.

    Notes
    -----
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
        diagonals.append((diagonal_in(hessian, outer).T @ phi.square()).view(block.group))
    return diagonals


def diagonal_in(hessian: OutputHessian, basis: Tensor | None) -> Float[Tensor, "rows outputs"]:
    """Diagonals of Uᵀ Λ U, ``[rows, C]``: two products with ``[C, C]``; ``None`` is the identity."""
    if basis is None:
        return hessian.diag()
    parts: list[Tensor] = []
    if hessian.diagonal is not None:
        parts.append(hessian.diagonal.expand(-1, hessian.n_outputs) @ basis.square())
    if hessian.root is not None:
        parts.append(hessian.sign * (hessian.root.mT @ basis).square().sum(1))
    # A difference of two sums of squares may come out below zero by rounding.
    return torch.stack(parts).sum(0).clamp(min=0)


def lowrank(
    blocks: Sequence[HeadBlock], hessian: OutputHessian, directions: Float[Tensor, "params k"]
) -> tuple[Float[Tensor, "params k"], Scalar]:
    """Products (Σ Λ ⊗ φφᵀ) V and the trace, Σ tr Λ · |φ|²: through the outputs, ``Jᵀ (Λ (J V))``.

    Notes
    -----
    Exact. Time O(rows · C · D · k), memory O(P k) beside chunks of rows.
    """
    phi, widths = joined(blocks)
    n_outputs, n_directions = hessian.n_outputs, directions.shape[1]
    parts = directions.split([n_outputs * width for width in widths])
    sides = torch.cat([part.unflatten(0, (n_outputs, -1)) for part in parts], 1)  # [C, D, k]
    total = torch.zeros_like(sides)
    step = max(1, CHUNK_ELEMENTS // max(1, n_outputs * n_directions))
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


def outer_products(
    phi: Float[Tensor, "rows features"], root: Float[Tensor, "rows outputs samples"]
) -> Float[Tensor, "internal internal"]:
    """Σ z zᵀ over rows and samples with z = r ⊗ φ, in chunks of rows; output by output."""
    n_rows, n_outputs, n_samples = root.shape
    width = n_outputs * phi.shape[1]
    total = phi.new_zeros(width, width)
    step = max(1, CHUNK_ELEMENTS // (width * n_samples))
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
    blocks: Sequence[HeadBlock], gradient: Float[Tensor, "rows outputs"], datum: Int[Tensor, " rows"]
) -> Iterator[list[JacobianBlock]]:
    """Gradients of each datum in the weights, summed over its positions first: one column, some data at a time.

    Parameters
    ----------
    blocks
        Of the head.
    gradient
        Gradients in the outputs, ``[rows, C]``.
    datum
        Which datum each row belongs to, ascending.
    """
    positions = torch.unique_consecutive(datum, return_counts=True)[1].tolist()
    step = max(1, CHUNK_ELEMENTS // sum(block.n_params for block in blocks))
    gradients, features = gradient.split(positions), [block.phi.split(positions) for block in blocks]
    for start in range(0, len(positions), step):
        # Padded with zeros to [chunk, positions, ·]: the sum over positions becomes a batched product.
        padded, *phis = (
            torch.nn.utils.rnn.pad_sequence(list(rows[start : start + step]), batch_first=True)
            for rows in (gradients, *features)
        )
        yield [DenseBlock((padded.mT @ phi).flatten(1).unsqueeze(0)) for phi in phis]
