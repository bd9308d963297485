"""Means over one Gaussian output at a time, by Gauss–Hermite quadrature that looks where the integrand is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

ORDER = 40
"""Nodes."""
STEPS = 30
"""Newton steps to the maximum of the integrand."""
LONGEST = 2.0
"""Longest of them, in outputs: exponentials do not overflow on the way."""


def nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and log weights of the mean over a standard normal number, ``[ORDER]`` each."""
    points, weights = np.polynomial.hermite_e.hermegauss(ORDER)
    return torch.as_tensor(points).to(like), torch.as_tensor(np.log(weights / weights.sum())).to(like)


def mean(function: Callable[[Tensor], Tensor], center: Tensor, variance: Tensor) -> Tensor:
    """``E[g(f)]`` for ``f ~ N(center, variance)``, elementwise, for smooth g."""
    points, log_weights = nodes(center)
    shape = (-1, *[1] * center.dim())
    f = center + variance.clamp(min=0).sqrt() * points.reshape(shape)
    return (log_weights.exp().reshape(shape) * function(f)).sum(0)


def log_mean_exp(
    log_p: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    curvature: Callable[[Tensor], Tensor],
    center: Tensor,
    variance: Tensor,
) -> Tensor:
    """``log E[p(f)]`` for ``f ~ N(center, variance)``, elementwise, for a log-concave p, however narrow.

    The nodes are put around the maximum of ``p(f) N(f)``, at a distance that its curvature says; the integral does not
    depend on where they are, and so no gradient is taken of that.
    """
    std = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    with torch.no_grad():
        u = torch.zeros_like(center)  # in units of the standard deviation
        longest = LONGEST / std
        for _ in range(STEPS):
            f = center + std * u
            step = (std * slope(f) - u) / (1 + std**2 * curvature(f))
            u = u + torch.minimum(torch.maximum(step, -longest), longest)
        width = (1 + std**2 * curvature(center + std * u)).rsqrt()
    points, log_weights = nodes(center)
    shape = (-1, *[1] * center.dim())
    points, log_weights = points.reshape(shape), log_weights.reshape(shape)
    at = u + width * points
    # N(at) / N(points) is the weight of a node that was moved.
    moved = 0.5 * (points.square() - at.square()) + width.log()
    return (log_weights + moved + log_p(center + std * at)).logsumexp(0)
