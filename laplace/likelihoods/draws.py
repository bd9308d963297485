"""Draws from batches of possibly singular Gaussians over outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from laplace import linalg
from laplace.errors import ShapeError
from laplace.linalg import CHUNK_ELEMENTS


def draw(
    mean: Float[Tensor, "rows outputs"],
    cov: Tensor,
    n_samples: int,
    generator: torch.Generator | None = None,
    *,
    spread: bool = False,
) -> Iterator[Float[Tensor, "samples rows outputs"]]:
    """Draw outputs, chunk by chunk. All rows share their base samples, so that curves over inputs are smooth.

    Parameters
    ----------
    mean
        ``[rows, C]``.
    cov
        Variance ``[rows, C]`` (independent outputs) or covariance ``[rows, C, C]``.
    n_samples
        Total number of samples.
    generator
        Source of randomness.
    spread
        Spread the base samples evenly (``sobol_normals``), for averages; they are not independent of each other then.

    Yields
    ------
    Samples, ``[samples, rows, C]``, ``n_samples`` in all.

    Notes
    -----
    Exact. Covariances cost one Cholesky factorization each, O(rows · C³).
    """
    scale = cov.clamp(min=0).sqrt() if cov.dim() == mean.dim() else linalg.root(cov)
    n_outputs = mean.shape[-1]
    points = sobol_normals(n_samples, n_outputs, generator, mean) if spread and n_outputs <= MAX_SOBOL else None
    start = 0
    for size in chunks(n_samples, mean.numel()):
        if points is None:
            base = torch.randn(size, n_outputs, dtype=mean.dtype, device=mean.device, generator=generator)
        else:
            base = points[start : start + size]
        start += size
        if scale.dim() == mean.dim():
            yield mean + scale * base.unsqueeze(1)
        else:
            yield mean + torch.einsum("nck,sk->snc", scale, base)


MAX_SOBOL = 1024
"""Outputs beyond which points are independent draws: even spreading gains little there and takes long to set up."""


def sobol_normals(
    n_points: int, n_outputs: int, generator: torch.Generator | None, like: Tensor
) -> Float[Tensor, "points outputs"]:
    """Standard normal points from a scrambled Sobol sequence, where ``like`` is.

    References
    ----------
    Owen (1998), "Scrambling Sobol' and Niederreiter–Xing points".
    """
    # Without a generator the seed is the host's, which waits for no device.
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    uniform = SobolEngine(n_outputs, scramble=True, seed=seed).draw(n_points, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(2.0**-32, 1 - 2.0**-32)).to(like, non_blocking=True)


def antithetic_normals(
    n_points: int, n_rows: int, n_outputs: int, generator: torch.Generator, like: Tensor
) -> Float[Tensor, "points rows outputs"]:
    """Standard normal points in pairs ±z, each row with its own random shift of one scrambled Sobol sequence.

    Rows err in different directions then, so that sums over rows err less; like ``sobol_normals`` where ``like`` is.

    References
    ----------
    Cranley & Patterson (1976), "Randomization of number theoretic methods for multiple integration".
    """
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    uniform = SobolEngine(n_outputs, scramble=True, seed=seed).draw(n_points // 2, dtype=torch.float64)
    shift = torch.rand(n_rows, n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = torch.special.ndtri(((uniform.unsqueeze(1) + shift) % 1).clamp(2.0**-32, 1 - 2.0**-32)).to(like)
    return torch.cat([points, -points])


def chunks(total: int, elements_each: int) -> Iterator[int]:
    """Split ``total`` items of ``elements_each`` numbers into chunks of bounded size."""
    # Not by the memory that is free: random numbers would be others.
    step = max(1, CHUNK_ELEMENTS // max(elements_each, 1))
    for start in range(0, total, step):
        yield min(step, total - start)


def normal_samples(
    mean: Tensor, var: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Float[Tensor, "samples rows outputs"]:
    """Samples of a batch of Gaussians, ``[samples, rows, C]``; all rows share their base samples.

    Parameters
    ----------
    mean
        ``[rows, C]``.
    var
        Variance ``[rows, C]`` or covariance ``[rows, C, C]``, possibly singular.
    n_samples
        How many.
    generator
        Source of randomness.

    Raises
    ------
    ShapeError
        If mean and variance do not fit together.

    Notes
    -----
    Exact. Memory O(n_samples · rows · C).
    """
    if mean.dim() != 2 or var.shape not in (mean.shape, (*mean.shape, mean.shape[-1])):
        msg = (
            "Expected a mean [rows, C] with a variance of the same shape or a covariance [rows, C, C]; got "
            f"{list(mean.shape)} and {list(var.shape)}."
        )
        raise ShapeError(msg)
    return torch.cat(list(draw(mean, var, n_samples, generator)))
