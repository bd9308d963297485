"""Numerical safety in one place: Cholesky factors that announce their jitter, eigenvalues clamped at rounding level.

Nothing here knows about models, priors or likelihoods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import free_memory, pending
from laplace.errors import InputError, NotPositiveDefiniteError, NumericalWarning, ShapeError, warn
from laplace.free_memory import CHUNK_ELEMENTS, chunk_elements

_JITTER_STEPS = 6
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def lasting(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Leave ``torch.inference_mode`` while a function runs whose tensors are kept.

    An inference tensor can never be differentiated through: one that is kept would break later calls.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def check_finite(values: Tensor, name: str, advice: str) -> None:
    """Raise unless all values, ``[..., n]`` with one datum or position per row, are finite."""
    if not values.is_floating_point():
        return
    found = (values.detach() * 0).sum(-1).isnan()  # zero of finite numbers, NaN of others
    n_rows = found.numel()
    pending.refuse(
        found.any(),
        InputError,
        lambda bad: f"{name} must be finite; {int(bad)} of {n_rows} rows hold NaN or infinite values. {advice}",
        lambda: [found.sum()],
    )


def number(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number as a tensor ``[]`` on a device, which is not waited for."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, device=device, dtype=dtype)


def piece_elements(device: torch.device) -> int:
    """How many numbers are computed, used and dropped at a time: as many as a CPU's cache holds, more elsewhere."""
    return chunk_elements(device, 2**18 if device.type == "cpu" else CHUNK_ELEMENTS)


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether what runs becomes a graph for batches of any size."""


def some_rows(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors, so many at a time; all of them in a graph, which cannot depend on how many there are."""
    return iter([values]) if is_exporting() else zip(*(value.split(size) for value in values), strict=True)


def memory_of(device: torch.device) -> int | None:
    """Memory that is free on a device, in bytes; ``None`` where it is not known."""
    memory = free_memory.of_device(device)
    return None if memory is None else memory.free


def cholesky(matrix: Float[Tensor, "*batch n n"], name: str = "matrix") -> Float[Tensor, "*batch n n"]:
    """Lower Cholesky factor ``L`` of a symmetric matrix, with ``L Lᵀ = matrix``.

    Tries the matrix in its own dtype, then in float64, then in float64 with a jitter of ``eps · mean(diagonal)``
    times 1, 10, … 10⁵ of the original dtype; a ``NumericalWarning`` says how large a jitter was.

    Differentiable. Time O(n³).

    Raises
    ------
    NotPositiveDefiniteError
        If it is not finite, or no jitter helps.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    # With an infinite entry no failure is reported: look at the factor, too.
    if bool(torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all() & ~info.any()):
        return factor
    if not bool(torch.isfinite(matrix).all()):
        msg = (
            f"The {name} holds NaN or infinite entries. Check the training inputs and outputs for them, and the "
            "prior precision and noise for overflow."
        )
        raise NotPositiveDefiniteError(msg)
    wide = matrix.double()
    factor, info = torch.linalg.cholesky_ex(wide)
    if not bool(info.any()):
        return factor.to(matrix.dtype)
    level = torch.finfo(matrix.dtype).eps * wide.diagonal(dim1=-2, dim2=-1).abs().mean().detach()
    eye = torch.eye(matrix.shape[-1], dtype=wide.dtype, device=wide.device)
    for step in range(_JITTER_STEPS):
        jitter = level * 10**step
        factor, info = torch.linalg.cholesky_ex(wide + jitter * eye)
        if not bool(info.any()):
            msg = (
                f"The {name} ({matrix.shape[-1]}×{matrix.shape[-1]}, {matrix.dtype}) is not positive definite to "
                f"working precision; added {float(jitter):.2e} to its diagonal. A larger prior precision "
                f"{'' if matrix.dtype == torch.float64 else 'or curvature_dtype=torch.float64 '}avoids this."
            )
            warn(msg, NumericalWarning)
            return factor.to(matrix.dtype)
    smallest = float(torch.linalg.eigvalsh(wide.detach()).min())
    msg = (
        f"The {name} ({matrix.shape[-1]}×{matrix.shape[-1]}) is not positive definite: its smallest eigenvalue is "
        f"{smallest:.3e}. Likely causes, in order: a true Hessian away from a minimum (use a GGN back end), a prior "
        "precision that is too small, a model that is not trained."
    )
    raise NotPositiveDefiniteError(msg)


UNRELIABLE = 1e-2
"""Relative rounding error of variances above which there is a warning."""


@torch.no_grad()
def condition(matrix: Float[Tensor, "n n"], factor: Float[Tensor, "n n"], steps: int = 4) -> float:
    """Lower estimate of a condition number from the Cholesky ``factor``, by a few power iterations: O(n²)."""
    if not len(matrix):
        return 1.0
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    largest = smallest = start.to(matrix) / start.norm()
    for _ in range(steps):
        largest = torch.nn.functional.normalize(matrix @ largest, dim=0)
        smallest = torch.nn.functional.normalize(torch.cholesky_solve(smallest, factor), dim=0)
    inverse = torch.cholesky_solve(smallest, factor)
    return float((largest * (matrix @ largest)).sum() * (smallest * inverse).sum())


_trying: ContextVar[bool] = ContextVar("trying", default=False)


@contextmanager
def trying() -> Generator[None]:
    """Give no warning of condition in the body: its posteriors are candidates, of which one is chosen."""
    token = _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)


def warn_of_condition(number: float, dtype: torch.dtype) -> None:
    """Warn if rounding makes a hundredth of the smallest eigenvalue of a precision, but not within ``trying``."""
    error = number * torch.finfo(dtype).eps
    if UNRELIABLE < error < float("inf") and not _trying.get():
        wider = "" if dtype == torch.float64 else " Pass curvature_dtype=torch.float64, or"
        msg = (
            f"The posterior precision has a condition number of about {number:.1e}, so that variances computed in "
            f"{dtype} may be off by {min(error, 1):.0%} of themselves.{wider or ' Choose'} a larger prior precision."
        )
        warn(msg, NumericalWarning)


def eigh(
    matrix: Float[Tensor, "n n"], name: str = "Kronecker factor", resolution: float = 0.0, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of a positive semi-definite matrix.

    Negative eigenvalues of rounding size are set to zero; larger ones mean that the matrix is not semi-definite.
    ``resolution`` is the relative precision that the matrix was computed in, where it is coarser than that of its
    dtype: eigenvalues below eight times that, relative to the largest, are set to zero as well, and one in float64 that
    has no more digits than float32 is decomposed in float32, in half the time. ``rank`` says that it is a sum of so
    many outer products: where these are few the range is found by products with random vectors, and checked by others.

    Time O(n³), O(n² rank) of few outer products. In float32 a failure to converge is retried in float64.

    Raises
    ------
    NotPositiveDefiniteError
        If it is not finite, or clearly indefinite.
    LinAlgError
        If the iteration does not converge in float64 either.
    """
    if not bool(torch.isfinite(matrix).all()):
        msg = f"The {name} holds NaN or infinite entries; check the training inputs and the model's outputs for them."
        raise NotPositiveDefiniteError(msg)
    found = _of_rank(matrix, rank, resolution) if rank is not None and is_few(rank, len(matrix)) else None
    values, vectors = found or _eigenpairs(matrix, is_coarse(matrix.dtype, resolution))
    largest = values.abs().max() if values.numel() else values.sum()
    rounding = 1e3 * matrix.shape[-1] * max(torch.finfo(matrix.dtype).eps, resolution) * largest
    if bool((values < -rounding).any()):
        msg = f"The {name} has a negative eigenvalue, {float(values.min()):.3e}, so it is no sum of outer products."
        raise NotPositiveDefiniteError(msg)
    return torch.where(values <= 8 * resolution * largest, 0.0, values), vectors


PROBES = 8
"""Random vectors beyond the rank, and those that check what was found."""


def is_few(rank: int, size: int) -> bool:
    """Whether a sum of so many outer products is better decomposed by its range."""
    return 4 * (rank + PROBES) <= size


def is_coarse(dtype: torch.dtype, resolution: float) -> bool:
    """Whether a matrix of a dtype holds numbers of no higher resolution than float32."""
    return dtype == torch.float64 and resolution >= torch.finfo(torch.float32).eps


def eigh_work(size: int, rank: int, dtype: torch.dtype, resolution: float = 0.0) -> float:
    """How much ``eigh`` has to do, in units of n³ in float64."""
    if is_few(rank, size):
        return 2.0 * size**2 * (rank + PROBES)
    return size**3 * (0.5 if dtype == torch.float32 or is_coarse(dtype, resolution) else 1.0)


def _eigenpairs(matrix: Float[Tensor, "n n"], coarse: bool) -> tuple[Tensor, Tensor]:
    """In float32 where that holds all digits, else in the dtype of the matrix; in float64 where that fails."""
    scale = matrix.diagonal().abs().max() if len(matrix) else matrix.new_ones(())
    try:
        if coarse and bool(scale > 0):
            values, vectors = torch.linalg.eigh((matrix / scale).to(torch.float32))
            return values.to(matrix) * scale, vectors.to(matrix)
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if matrix.dtype == torch.float64 and not coarse:
            raise
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _of_rank(matrix: Float[Tensor, "n n"], rank: int, resolution: float) -> tuple[Tensor, Tensor] | None:
    """Eigenpairs of a matrix of low rank, ascending, with a basis of what it leaves at zero; ``None`` if it is higher.

    Halko, Martinsson & Tropp (2011), arXiv:0909.4061: algorithms 4.1 and 5.3, and the check of section 4.3.
    """
    size, noise = len(matrix), torch.Generator().manual_seed(0)
    wide = matrix.to(wide_dtype(matrix))
    directions = torch.randn(size, rank + PROBES, generator=noise).to(wide)
    basis = torch.linalg.qr(wide @ directions, mode="complete").Q
    some = basis[:, : rank + PROBES]
    inner = some.mT @ (wide @ some)
    values, turn = torch.linalg.eigh((inner + inner.mT) / 2)
    checks = wide @ torch.randn(size, PROBES, generator=noise).to(wide)
    left = (checks - some @ (some.mT @ checks)).square().sum(0).mean().sqrt()  # about the Frobenius norm of the rest
    level = max(8 * resolution, size * torch.finfo(matrix.dtype).eps)
    if bool(left > level * values[-1].abs()):
        return None
    zeros = values.new_zeros(size - len(values))
    vectors = torch.cat([basis[:, rank + PROBES :], some @ turn], 1)
    values, order = torch.cat([zeros, values]).sort(stable=True)
    return values.to(matrix), vectors[:, order].to(matrix)


def wide_dtype(like: Tensor) -> torch.dtype:
    """Float64, or the dtype of ``like`` on a device that lacks it."""
    return like.dtype if like.device.type == "mps" else torch.float64


def is_diagonal(matrix: Float[Tensor, "n n"]) -> bool:
    """Whether all entries off the diagonal are zero."""
    return bool((matrix == torch.diag(matrix.diagonal())).all())


def root(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """A square root ``R`` with ``R Rᵀ = matrix`` of a positive semi-definite, possibly singular, batch of matrices.

    It is the Cholesky factor if there is one, else the symmetric root by eigenvalues, clamped at zero. Exact up to
    rounding; O(n³) per matrix.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def invsqrt_precision(M: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lower-triangular ``L`` with ``L Lᵀ = M⁻¹``: from a precision to the scale of its Gaussian.

    Parameters
    ----------
    M
        Symmetric positive definite, ``[n, n]``.

    Returns
    -------
    ``[n, n]``.

    Raises
    ------
    NotPositiveDefiniteError
        If it is not.

    Notes
    -----
    O(n³): a Cholesky factorization and a triangular solve.
    """
    # M = R Rᵀ with R upper triangular (Cholesky with rows and columns reversed), hence M⁻¹ = R⁻ᵀ R⁻¹.
    upper = cholesky(M.flip(0, 1), "precision").flip(0, 1)
    eye = torch.eye(len(M), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True).mT


def symeig(M: Float[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at zero) and eigenvectors of a positive semi-definite matrix.

    Parameters
    ----------
    M
        Symmetric positive semi-definite, ``[n, n]``.

    Returns
    -------
    Eigenvalues ``[n]`` and eigenvectors ``[n, n]`` in columns.

    Raises
    ------
    NotPositiveDefiniteError
        If it is not finite, or clearly indefinite.

    Notes
    -----
    O(n³).
    """
    return eigh(M, "matrix")


def kron(t1: Float[Tensor, "n m"], t2: Float[Tensor, "k l"]) -> Float[Tensor, "nk ml"]:
    """Kronecker product of two matrices.

    Parameters
    ----------
    t1, t2
        Matrices, ``[n, m]`` and ``[k, l]``.

    Returns
    -------
    ``[n·k, m·l]``.
    """
    return torch.kron(t1, t2)


def block_diag(blocks: Sequence[Tensor]) -> Float[Tensor, "n m"]:
    """Block-diagonal matrix of blocks.

    Parameters
    ----------
    blocks
        Matrices; they need not be square.

    Returns
    -------
    A matrix as high and as wide as the blocks together.
    """
    return torch.block_diag(*blocks)


def diagonal_add_scalar(X: Tensor, value: float | Tensor) -> Float[Tensor, "n n"]:
    """Add a number to the diagonal; a new matrix.

    Parameters
    ----------
    X
        Square, ``[n, n]``.
    value
        The number.

    Returns
    -------
    ``[n, n]``.

    Raises
    ------
    ShapeError
        If the matrix is not square.
    """
    if X.dim() != 2 or X.shape[0] != X.shape[1]:
        msg = f"Expected a square matrix; got the shape {list(X.shape)}."
        raise ShapeError(msg)
    return X + value * torch.eye(len(X), dtype=X.dtype, device=X.device)
