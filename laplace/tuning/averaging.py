"""Candidates, temperature (or noise) and scale of foreign inputs: all that validation data leave open, averaged.

A *point* is a candidate with a scale s² and the best log T (log σ) for both. Its criterion is the negative log
predictive density of the validation rows, of a temperature with a standard normal prior on its logarithm: without one T
runs to its limit where no row is wrong. Points are weighed by exp(−criterion), each with the width of its optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace.errors import InputError

SCALES = (0.0, 1.0, 3.0, 10.0, 30.0)
"""Values of s²; the last one from ``ENOUGH_ROWS`` validation rows on."""
ENOUGH_ROWS = 50
LEFT_OUT = 30.0
"""Nats above the best criterion at s² = 0 from which on other scales of a candidate are not tried."""
COARSE, FINE, ROUNDS = 0.7, 4, 4
"""The first step in logarithms, what it is divided by, and how often a parabola through three points is taken."""
MOST_POINTS = 32
"""Points of a mixture."""

Evaluate = Callable[[int, float, float], float]
"""Candidate, log T or log σ, and s² → negative log predictive density of all validation rows, in nats."""


@dataclass(frozen=True)
class Point:
    """One choice."""

    candidate: int
    log_width: float
    """log T, or log σ."""
    spread: float
    """Its variance, as the curvature of the criterion says; 0 where it is fixed."""
    scale: float
    """s²."""
    criterion: float
    """In nats; less is better."""


def scales_for(n_rows: int) -> tuple[float, ...]:
    """Values of s² that so many validation rows can tell apart."""
    return SCALES if n_rows >= ENOUGH_ROWS else SCALES[:-1]


def points(
    evaluate: Evaluate,
    n_candidates: int,
    scales: Sequence[float],
    limits: tuple[float, float],
    *,
    prior: bool,
) -> list[Point]:
    """The best log T of every candidate and scale, within limits; ``prior``: with that on log T."""

    def criterion(candidate: int, scale: float) -> Callable[[float], float]:
        return lambda t: evaluate(candidate, t, scale) + (0.5 * t * t if prior else 0.0)

    found: list[Point] = []
    for k in range(n_candidates):
        near = found[-1].log_width if found and math.isfinite(found[-1].criterion) else None
        found.append(_best(criterion(k, scales[0]), k, scales[0], limits, near))
    finite = [point.criterion for point in found if math.isfinite(point.criterion)]
    if not finite:
        msg = (
            "The negative log predictive density of the validation data is finite nowhere. Check the validation data; "
            "nothing was changed."
        )
        raise InputError(msg)
    least = min(finite)
    for start in [point for point in found if point.criterion < least + LEFT_OUT]:
        before = start
        for scale in scales[1:]:
            before = _best(criterion(start.candidate, scale), start.candidate, scale, limits, before.log_width)
            found.append(before)
    return [point for point in found if math.isfinite(point.criterion)]


def _best(
    criterion: Callable[[float], float], candidate: int, scale: float, limits: tuple[float, float], near: float | None
) -> Point:
    """The optimum in log T: the best of a grid, or downhill from ``near``, then by parabolas."""
    low, high = limits
    if low == high:
        return Point(candidate, low, 0.0, scale, criterion(low))
    values: dict[float, float] = {}

    def at(t: float) -> float:
        t = min(max(t, low), high)
        if t not in values:
            value = criterion(t)
            values[t] = value if math.isfinite(value) else math.inf
        return values[t]

    step = min(COARSE, (high - low) / 4)
    if near is None:
        count = math.ceil((high - low) / step)
        near = min((low + i * (high - low) / count for i in range(count + 1)), key=at)
    best = near
    for way in (step, -step):
        while low < best + way < high and at(best + way) < at(best):
            best += way
    bend, inside = math.nan, False
    for _ in range(ROUNDS):
        bend = (at(best - step) - 2 * at(best) + at(best + step)) / step**2
        rise = (at(best + step) - at(best - step)) / (2 * step)
        inside = low < best - step and best + step < high and math.isfinite(bend) and bend > 0
        move = min(max(-rise / bend, -step), step) if inside else 0.0
        best = min((best, best + move, best - step, best + step), key=at)
        best = min(max(best, low), high)
        step /= FINE
    return Point(candidate, best, 1 / bend if inside else step**2, scale, at(best))


def weights(found: Sequence[Point]) -> Tensor:
    """What share each point has, ``[points]``, in float64; they sum to one."""
    logs = [-point.criterion + 0.5 * math.log(point.spread) if point.spread else -point.criterion for point in found]
    return torch.tensor(logs, dtype=torch.float64).softmax(0)


def most_likely(found: Sequence[Point], shares: Tensor) -> tuple[tuple[float, int, float, float], ...]:
    """The points of a mixture, at most ``MOST_POINTS``: share, candidate, T (σ) and s² of each."""
    order = shares.argsort(descending=True)[:MOST_POINTS].tolist()
    kept = (shares[order] / shares[order].sum()).tolist()
    points = [found[index] for index in order]
    return tuple((w, p.candidate, math.exp(p.log_width), p.scale) for w, p in zip(kept, points, strict=True))


def averaged(
    found: Sequence[Point], shares: Tensor, thetas: Sequence[Tensor], *, divided: bool
) -> tuple[Tensor, float, float]:
    """The average of parameters: weights, log T (log σ) and s².

    With ``divided`` outputs are divided by T: θ/T is averaged, θ = T̄ Σ w θ/T with log T̄ = Σ w log T.
    """
    log_width = float(shares @ torch.tensor([point.log_width for point in found], dtype=shares.dtype))
    scale = float(shares @ torch.tensor([point.scale for point in found], dtype=shares.dtype))
    total = torch.zeros_like(thetas[0])
    for point, share in zip(found, shares.tolist(), strict=True):
        factor = math.exp(log_width - point.log_width + 0.5 * min(point.spread, 1.0)) if divided else 1.0
        total = total + share * factor * thetas[point.candidate]
    return total, log_width, scale


__all__ = ["SCALES", "Point", "averaged", "most_likely", "points", "scales_for", "weights"]
