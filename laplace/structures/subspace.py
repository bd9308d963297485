"""Subspaces in which a matrix that is only multiplied with has its leading eigenpairs.

References
----------
Halko, Martinsson & Tropp (2011), "Finding structure with randomness: probabilistic algorithms for constructing
approximate matrix decompositions", arXiv:0909.4061: algorithms 4.4, 5.3 and (``nystrom``) 5.5.
Tropp, Yurtsever, Udell & Cevher (2017), "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data", arXiv:1706.05736: algorithm 3, the shift that makes ``nystrom`` stable.
Musco & Musco (2015), "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition", arXiv:1504.05477: earlier directions are kept (``extended(..., beside=)``).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg, processes
from laplace.enums import HessianStructure
from laplace.errors import OutOfMemoryError
from laplace.structures.supports import SupportsCurvature

MATRIX_ELEMENTS = 2**24
"""A matrix of so many numbers (4,096 weights: 64 MB in float32) is formed where the first directions are too few."""
DIRECTIONS_OF_MATRIX = 8
"""The matrix is formed where a pass would have more directions than one of so many weights."""


def pays_as_matrix(backend: SupportsCurvature, like: Float[Tensor, " params"], wanted: int, *, small: bool) -> bool:
    """Whether a curvature is better formed than multiplied with so many more directions.

    Forming it takes 2 P² operations for each column of a datum, a product with k directions 4 P k, and there are two
    passes with k at least, and as a rule one with twice as many. ``small``: a small matrix is formed in any case.
    """
    provides = getattr(backend, "provides", None)
    if not callable(getattr(backend, "full", None)) or (provides and not provides(HessianStructure.FULL)):
        return False
    n_params, available = len(like), linalg.memory_of(like.device)
    fits = available is None or 4 * like.itemsize * n_params**2 <= available
    pays = fits and (DIRECTIONS_OF_MATRIX * wanted > n_params or (small and n_params**2 <= MATRIX_ELEMENTS))
    team = processes.summed_over()  # free memory differs between processes, which must do the same
    return pays if team is None else all(record["pays"] for record in team.exchange("matrix", pays=pays))


def check_directions(wanted: int, like: Float[Tensor, " params"]) -> None:
    """Raise if so many directions, their products and an orthonormal basis of these have no room."""
    needed, available = 6 * like.itemsize * len(like) * wanted, linalg.memory_of(like.device)
    if available is not None and needed > available:
        msg = (
            f"{wanted} directions for {len(like)} weights take about {needed / 1e9:.1f} GB; "
            f"{available / 1e9:.1f} GB are free. Keep fewer eigenpairs: rank=, or a smaller captured_trace=; or take "
            "hessian_structure='kron' or 'diag'."
        )
        raise OutOfMemoryError(msg)


def extended(
    products: Float[Tensor, "params found"] | None,
    wanted: int,
    like: Float[Tensor, " params"],
    noise: torch.Generator,
    beside: Float[Tensor, "params earlier"] | None = None,
) -> Float[Tensor, "params wanted"]:
    """An orthonormal basis of the span of some products and of random directions."""
    n_beside = 0 if beside is None else beside.shape[1]
    check_directions(wanted + n_beside, like)
    known = [part for part in (beside, products) if part is not None]
    n_random = wanted + n_beside - sum(part.shape[1] for part in known)
    random = torch.randn(len(like), n_random, generator=noise, dtype=torch.float32).to(like)
    return torch.linalg.qr(torch.cat([*known, random], 1)).Q[:, n_beside:]


def ritz(
    basis: Float[Tensor, "params found"], products: Float[Tensor, "params found"]
) -> tuple[Float[Tensor, " found"], Float[Tensor, "params found"]]:
    """Eigenpairs of a symmetric matrix within the span of a basis, largest first."""
    wide = linalg.wide_dtype(basis)
    inner = basis.mT.to(wide) @ products.to(wide)
    values, rotation = torch.linalg.eigh((inner + inner.mT) / 2)
    return values.flip(0).to(basis), basis @ rotation.flip(1).to(basis)


def nystrom(
    basis: Float[Tensor, "params found"], products: Float[Tensor, "params found"]
) -> tuple[Float[Tensor, " found"], Float[Tensor, "params found"]]:
    """Eigenpairs of ``H Q (Qᵀ H Q)⁻¹ Qᵀ H``, largest first: all of a positive H of no higher rank than Q has columns.

    Nothing but the products enters, so that they may be of a matrix that was not seen before.
    """
    wide = linalg.wide_dtype(basis)
    Q, known = basis.to(wide), products.to(wide)
    # Adding ν I to H makes the inner matrix definite; it is taken off again.
    shift = torch.finfo(basis.dtype).eps * torch.linalg.matrix_norm(known)
    if not bool(shift > 0):
        return products.new_zeros(products.shape[1]), basis
    shifted = known + shift * Q
    inner = Q.mT @ shifted
    factor = linalg.cholesky((inner + inner.mT) / 2, "curvature within its leading directions")
    half = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return (singular.square() - shift).clamp(min=0).to(basis), vectors.to(basis)
