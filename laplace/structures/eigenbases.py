"""Eigendecompositions of Kronecker factors: each once, in the precision that they have, and never without a word."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace import linalg
from laplace.errors import PerformanceWarning, warn

LONG = 5.0
"""Seconds beyond which the time is told before, and progress shown."""
SECONDS = 3e-10
"""Of an eigendecomposition in float64, for each n³: what one thread of a processor takes."""
PROBE = 384
"""Size of the matrix by which the time is measured where it may be long."""


def eigenbases(
    kfacs: Sequence[Sequence[Tensor]],
    resolution: float = 0.0,
    counts: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[list[Tensor | None]], list[list[Tensor]]]:
    """Eigenvectors and eigenvalues of the factors of each block; one that occurs in several is decomposed once.

    ``resolution`` as in ``Kron``. ``counts``: the factors of the inputs are sums over so many rows, which bounds their
    rank; their eigenvalues are divided by it. ``dtype``: of the results, if not that of the factors.
    """
    bounds: dict[int, int] = {}
    numbers: dict[int, int] = {}
    unique: dict[int, Tensor] = {}
    for index, block in enumerate(kfacs):
        for place, side in enumerate(block):
            unique[id(side)] = side
            bound = side.shape[0] if counts is None or place == 0 else counts[index]
            bounds[id(side)] = min(bound, bounds.get(id(side), bound))
            numbers[id(side)] = 1 if counts is None or place == 0 else counts[index] or 1
    dense = {key: side for key, side in unique.items() if side.dim() == 2}
    diagonals = {key: side for key, side in unique.items() if side.dim() == 1}
    known: dict[int, tuple[Tensor, Tensor | None]] = {k: (v / numbers[k], None) for k, v in diagonals.items()}
    work = {key: linalg.eigh_work(len(side), bounds[key], side.dtype, resolution) for key, side in dense.items()}
    largest = max(map(len, dense.values()), default=0)
    seconds = expected_seconds(sum(work.values()), largest, kfacs[0][0])
    if seconds > LONG:
        msg = (
            f"{len(dense)} Kronecker factors of up to {largest}×{largest} numbers are decomposed, once for this fit: "
            f"expect about {seconds:.0f} seconds. What takes none of it: hessian_structure='diag'; or fewer random "
            "weights (requires_grad_(False) on wide layers, subset_of_weights='last_layer')."
        )
        warn(msg, PerformanceWarning)
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # in units that nobody reads
    hidden = seconds <= LONG
    with tqdm(total=sum(work.values()), desc="[Eigendecompositions]", disable=hidden, bar_format=form) as bar:
        for key, side in dense.items():
            spectrum, basis = linalg.eigh(
                side if numbers[key] == 1 else side / numbers[key], resolution=resolution, rank=bounds[key]
            )
            known[key] = spectrum, basis if dtype is None else basis.to(dtype)
            bar.update(work[key])
    values = [[known[id(side)][0] for side in block] for block in kfacs]
    if dtype is not None:
        values = [[side.to(dtype) for side in block] for block in values]
    return [[known[id(side)][1] for side in block] for block in kfacs], values


def expected_seconds(work: float, largest: int, like: Tensor) -> float:
    """How long decompositions take, by the time of a small one on this device where it may be long."""
    rate = SECONDS
    if rate * work > LONG and largest > PROBE:
        probe = torch.eye(PROBE, dtype=like.dtype, device=like.device)
        torch.linalg.eigh(probe)  # without the time in which a library is loaded
        probe = torch.randn(PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(probe)
        start = time.perf_counter()
        float(torch.linalg.eigh(probe + probe.T)[0].sum())
        rate = (time.perf_counter() - start) / PROBE**3
    return rate * work
