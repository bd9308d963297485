"""Means over one Gaussian output at a time, by quadrature that looks where the integrand is."""

from __future__ import annotations

import math
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
GRID = 128
"""Points of the trapezoid rule where there may be several maxima."""
HALVINGS, POLISHES = 20, 3
"""Bisections, and Newton steps after them, to each of the points."""
DROP = 45.0
"""Nats below its maximum where an integrand ends."""


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


def log_mean_exp_of_modes(
    log_p: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    curvature: Callable[[Tensor], Tensor],
    center: Tensor,
    variance: Tensor,
    starts: Tensor,
    tilt: Tensor,
) -> Tensor:
    """``log E[p(f)]`` for ``f ~ N(center, variance)``, elementwise, for a p with several maxima.

    Newton's method goes uphill from each of ``starts`` ``[starts, *center]``, and ``log p(f) <= -tilt f`` says how far
    the integrand reaches. With the maxima ``u_k``, in standard deviations, and their widths ``w_k``, the trapezoid rule
    has even steps in ``x(u) = sum_k asinh((u - u_k) / w_k)``: fine around each maximum, and nowhere blind.
    """
    std = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    with torch.no_grad():

        def log_integrand(u: Tensor) -> Tensor:
            return (log_p(center + std * u) - 0.5 * u.square()).nan_to_num(nan=-torch.inf)

        def limit(best: Tensor) -> Tensor:
            half = tilt * std
            return half + (half.square() + 2 * (DROP - tilt * center - best).clamp(min=0)).sqrt()

        u = torch.cat([torch.zeros_like(starts[:1]), (starts - center) / std])
        end = limit(log_integrand(u[:1]).amax(0))
        u = torch.minimum(torch.maximum(u, -end), end)
        end = limit(log_integrand(u).amax(0))
        u = torch.minimum(torch.maximum(u, -end), end)
        longest = LONGEST / std
        for _ in range(STEPS):
            f = center + std * u
            bend = (1 + std.square() * curvature(f)).abs().clamp(min=0.1)
            step = (std * slope(f) - u) / bend
            u = u + torch.minimum(torch.maximum(step, -longest), longest)
            u = torch.minimum(torch.maximum(u, -end), end)
        width = (1 + std.square() * curvature(center + std * u)).clamp(min=1).rsqrt()
        shape = (-1, *[1] * center.dim())
        # Where the integrand ends, on either side.
        far = torch.linspace(-1, 1, GRID // 2 + 1, dtype=center.dtype, device=center.device).reshape(-1, *[1] * u.dim())
        probes = u + width * (far * torch.asinh(2 * end / width)).sinh()
        probes = torch.minimum(torch.maximum(probes, -end), end).flatten(0, 1)
        heights = log_integrand(probes)
        best, top = heights.max(0)
        drop = DROP + 4 * torch.finfo(best.dtype).eps * best.abs()
        inside = heights >= best - drop
        low = probes.where(inside, torch.inf).amin(0)
        high = probes.where(inside, -torch.inf).amax(0)
        low = torch.maximum(probes.where(probes < low, -torch.inf).amax(0), -end)
        high = torch.minimum(probes.where(probes > high, torch.inf).amin(0), end)
        peak = probes.gather(0, top.unsqueeze(0))

        def x_of(at: Tensor) -> Tensor:
            return sum(((at - u_k) / w_k).asinh() for u_k, w_k in zip(u, width, strict=True))  # pyright: ignore[reportReturnType]

        def density(at: Tensor) -> Tensor:
            return sum(((at - u_k).square() + w_k.square()).rsqrt() for u_k, w_k in zip(u, width, strict=True))  # pyright: ignore[reportReturnType]

        first, last = x_of(low), x_of(high)
        x = first + (last - first) * torch.linspace(0, 1, GRID, dtype=center.dtype, device=center.device).reshape(shape)
        left, right = low.expand_as(x), high.expand_as(x)
        for _ in range(HALVINGS):
            middle = 0.5 * (left + right)
            below = x_of(middle) < x
            left, right = middle.where(below, left), right.where(below, middle)
        at = 0.5 * (left + right)
        for _ in range(POLISHES):
            at = at + (x - x_of(at)) / density(at)
            at = torch.minimum(torch.maximum(at, low), high)
        log_weights = (
            ((last - first) / (GRID - 1) / density(at)).log() - 0.5 * at.square() - 0.5 * math.log(2 * math.pi)
        )
        # Points far below would overflow in gradients.
        lost = ~(log_integrand(at) >= best - 2 * drop)
        at, log_weights = peak.where(lost, at), log_weights.masked_fill(lost, -torch.inf)
    return (log_weights + log_p(center + std * at)).logsumexp(0)
