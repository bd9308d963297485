"""Closed forms for the last layer: its curvature from features and output Hessians. No Jacobian, no backward pass.

The last layer is linear, ``f = W φ + b``, so ``J = I_C ⊗ [φ, 1]ᵀ`` and every curvature is a sum of ``Λ ⊗ φφᵀ``, with
``Λ = diag(d) ± r rᵀ`` the Hessian of the negative log-likelihood in the outputs (or an outer product of gradients, for
a Fisher). The outputs are linear in these weights, so the generalized Gauss–Newton matrix *is* the Hessian.

All results are sums over rows, in public order: the weight row by row, then the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.likelihoods import OutputHessian
from laplace.linalg import CHUNK_ELEMENTS
from laplace.network.parameters import augment, output_index
from laplace.structures import Kron
from laplace.types import Scalar


def diag(phi: Float[Tensor, "rows features"], hessian: OutputHessian, bias: bool) -> Float[Tensor, " params"]:
    """Diagonal of Σ Λ ⊗ φφᵀ: one product of ``[C, rows]`` with ``[rows, D]``.

    Parameters
    ----------
    phi
        Features, ``[rows, D]``.
    hessian
        Output Hessians of the same rows.
    bias
        Whether the layer has a bias.

    Returns
    -------
    ``[P]``, in public order.

    Notes
    -----
    Exact. Time O(rows · C · D), memory O(C · D).
    """
    strength = hessian.diag()
    weight = (strength.T @ phi.square()).flatten()
    return torch.cat([weight, strength.sum(0)]) if bias else weight


def kron(phi: Float[Tensor, "rows features"], hessian: OutputHessian, bias: bool) -> Kron:
    """Factors Σ Λ and Σ φφᵀ, both raw sums; the bias block shares the first.

    Parameters
    ----------
    phi
        Features, ``[rows, D]``.
    hessian
        Output Hessians of the same rows.
    bias
        Whether the layer has a bias.

    Returns
    -------
    A block ``[Σ Λ, Σ φφᵀ]`` for the weight and ``[Σ Λ]`` for the bias.

    Notes
    -----
    Approximate as a matrix, exact as sums. Time O(rows · (C² + D²)), memory O(C² + D²).

    References
    ----------
    Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature".
    arXiv:1503.05671; Ritter, Botev & Barber (2018), "A scalable Laplace approximation for neural networks".
    """
    outer = hessian.sum()
    return Kron([[outer, phi.T @ phi], [outer]] if bias else [[outer, phi.T @ phi]])


def full(phi: Float[Tensor, "rows features"], hessian: OutputHessian, bias: bool) -> Float[Tensor, "params params"]:
    """Σ Λ ⊗ φφᵀ, dense: C products for the diagonal blocks, one for the outer products.

    Parameters
    ----------
    phi
        Features, ``[rows, D]``.
    hessian
        Output Hessians of the same rows.
    bias
        Whether the layer has a bias.

    Returns
    -------
    ``[P, P]``, symmetric, in public order.

    Notes
    -----
    Time O(rows · (C D)²), memory O((C D)²).
    """
    augmented = augment(phi, bias)
    n_outputs, width = hessian.n_outputs, augmented.shape[1]
    if hessian.root is None:
        matrix = phi.new_zeros(n_outputs * width, n_outputs * width)
    else:
        matrix = hessian.sign * outer_products(augmented, hessian.root)
    strength = hessian.diagonal if hessian.total is None else hessian.total
    if strength is not None:
        # [1 or C, D, D]: one block serves all outputs when they share their diagonal.
        blocks = torch.einsum("nd,nc,ne->cde", augmented, strength, augmented).permute(1, 2, 0)
        diagonal = matrix.view(n_outputs, width, n_outputs, width).diagonal(dim1=0, dim2=2)
        # Where the whole diagonal is known it replaces what the outer products left there.
        diagonal.add_(blocks) if hessian.total is None else diagonal.copy_(blocks)
    return public_order(matrix, n_outputs, bias)


def blockdiag(phi: Float[Tensor, "rows features"], hessian: OutputHessian, bias: bool) -> list[Tensor]:
    """The exact blocks of weight and bias of ``full``: Σ Λ ⊗ φφᵀ, ``[C·D, C·D]``, and Σ Λ, ``[C, C]``.

    Time O(rows · (C D)²), memory O((C D)²).
    """
    weight = full(phi, hessian, bias=False)
    return [weight, hessian.sum()] if bias else [weight]


def ekfac(
    phi: Float[Tensor, "rows features"],
    hessian: OutputHessian,
    bias: bool,
    basis: Sequence[Sequence[Tensor | None]],
) -> list[Tensor]:
    """The diagonal of Σ Λ ⊗ φφᵀ in the basis U ⊗ V, ``Σ (Uᵀ Λ U)_ii (φ V)_j²``, and of Σ Λ in its basis U.

    ``[C, D]``, and ``[C]`` with a bias. Exact. Time O(rows · (C² + D² + C D)), memory O(rows · (C + D) + C D).

    References
    ----------
    George et al. (2018), arXiv:1806.03884.
    """
    outer, inner = basis[0]
    strength = diagonal_in(hessian, outer)
    weight = strength.T @ (phi if inner is None else phi @ inner).square()
    return [weight, diagonal_in(hessian, basis[1][0]).sum(0)] if bias else [weight]


def diagonal_in(hessian: OutputHessian, basis: Tensor | None) -> Float[Tensor, "rows outputs"]:
    """Diagonals of Uᵀ Λ U, ``[rows, C]``, by two products with U, ``[C, C]``; ``None`` stands for the identity."""
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
    phi: Float[Tensor, "rows features"], hessian: OutputHessian, bias: bool, directions: Float[Tensor, "params k"]
) -> tuple[Float[Tensor, "params k"], Scalar]:
    """Products (Σ Λ ⊗ φφᵀ) V and the trace, Σ tr Λ · |φ|²: through the outputs, ``Jᵀ (Λ (J V))``.

    Exact. Time O(rows · C · D · k), memory O(P k) beside chunks of rows.
    """
    augmented = augment(phi, bias)
    n_outputs, n_directions = hessian.n_outputs, directions.shape[1]
    order = output_index(n_outputs, len(directions), bias).to(directions.device)
    sides = directions[order]  # [C, D, k]
    total = torch.zeros_like(sides)
    step = max(1, CHUNK_ELEMENTS // max(1, n_outputs * n_directions))
    for start in range(0, len(phi), step):
        rows = slice(start, start + step)
        moved = torch.einsum("nd,cdk->nck", augmented[rows], sides)
        weighed = torch.zeros_like(moved)
        if hessian.diagonal is not None:
            weighed = hessian.diagonal[rows].unsqueeze(-1) * moved
        if hessian.root is not None:
            root = hessian.root[rows]
            weighed = weighed + hessian.sign * (root @ (root.mT @ moved))
        total += torch.einsum("nck,nd->cdk", weighed, augmented[rows])
    products = torch.empty_like(directions)
    products[order.flatten()] = total.flatten(0, 1)
    return products, (hessian.diag().sum(1) * augmented.square().sum(1)).sum()


def outer_products(
    augmented: Float[Tensor, "rows augmented"], root: Float[Tensor, "rows outputs samples"]
) -> Float[Tensor, "internal internal"]:
    """Σ z zᵀ over rows and samples with z = r ⊗ φ, in chunks of rows; row-major order of ``[W, b]``."""
    n_rows, n_outputs, n_samples = root.shape
    width = n_outputs * augmented.shape[1]
    total = augmented.new_zeros(width, width)
    step = max(1, CHUNK_ELEMENTS // (width * n_samples))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        z = torch.einsum("nck,nd->nkcd", root[rows], augmented[rows]).reshape(-1, width)
        total.addmm_(z.T, z)
    return total


def public_order(
    matrix: Float[Tensor, "internal internal"], n_outputs: int, bias: bool
) -> Float[Tensor, "params params"]:
    """A matrix in the row-major order of ``[W, b]``, put into public order: the weight row by row, then the bias."""
    if not bias:
        return matrix
    width = len(matrix) // n_outputs
    size = len(matrix) - n_outputs
    blocks = matrix.view(n_outputs, width, n_outputs, width)
    ordered = torch.empty_like(matrix)
    # Slices of one view instead of an index: a copy at memory speed.
    shape = (n_outputs, width - 1, n_outputs, width - 1)
    ordered[:size, :size].unflatten(1, shape[2:]).unflatten(0, shape[:2]).copy_(blocks[:, :-1, :, :-1])
    ordered[:size, size:].unflatten(0, shape[:2]).copy_(blocks[:, :-1, :, -1])
    ordered[size:, :size].unflatten(1, shape[2:]).copy_(blocks[:, -1, :, :-1])
    ordered[size:, size:].copy_(blocks[:, -1, :, -1])
    return ordered


def per_datum_gradients(
    phi: Float[Tensor, "rows features"],
    gradient: Float[Tensor, "rows outputs"],
    datum: Int[Tensor, " rows"],
    bias: bool,
) -> Iterator[Float[Tensor, "chunk params"]]:
    """Gradients of each datum, summed over its positions, as ``[chunk, P]`` in order of the data; ``datum`` ascends."""
    positions = torch.unique_consecutive(datum, return_counts=True)[1].tolist()
    step = max(1, CHUNK_ELEMENTS // ((phi.shape[1] + int(bias)) * gradient.shape[1]))
    phis, gradients = phi.split(positions), gradient.split(positions)
    for start in range(0, len(positions), step):
        part = slice(start, start + step)
        # Padded with zeros to [chunk, positions, ·]: the sum over positions becomes a batched product.
        padded_phi = torch.nn.utils.rnn.pad_sequence(list(phis[part]), batch_first=True)
        padded_gradient = torch.nn.utils.rnn.pad_sequence(list(gradients[part]), batch_first=True)
        weight = (padded_gradient.mT @ padded_phi).flatten(1)
        yield torch.cat([weight, padded_gradient.sum(1)], 1) if bias else weight
