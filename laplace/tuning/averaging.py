"""Candidates, temperature (or noise) and scale of foreign inputs: all that validation data leave open, averaged.

A *point* is a candidate with a scale s² and the best log T (log σ) for both. Its criterion is the negative log
predictive density of the validation rows, of a temperature with a standard normal prior on its logarithm: without one T
runs to its limit where no row is wrong. Points are weighed by exp(−criterion), each with the width of its optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
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

Evaluate = Callable[[int, float, float], "float | Tensor"]
"""Candidate, log T or log σ, and s² → negative log predictive density of all validation rows, in nats."""
Search = Generator[list[float], list[float], "Point"]
"""Yields values of log T, is sent the criterion there, and returns the best point."""


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

    def best(starts: Sequence[tuple[int, float | None]], scale: float) -> list[Point]:
        """Of candidates, each from a log T that may be known, side by side."""
        searches = [_search(k, scale, limits, near) for k, near in starts]
        return _side_by_side(searches, lambda i, t: evaluate(starts[i][0], t, scale), prior=prior)

    found = best([(0, None)], scales[0])
    near = found[0].log_width if math.isfinite(found[0].criterion) else None
    found += best([(k, near) for k in range(1, n_candidates)], scales[0])
    finite = [point.criterion for point in found if math.isfinite(point.criterion)]
    if not finite:
        msg = (
            "The negative log predictive density of the validation data is finite nowhere. Check the validation data; "
            "nothing was changed."
        )
        raise InputError(msg)
    least = min(finite)
    before, wider = [point for point in found if point.criterion < least + LEFT_OUT], []
    for scale in scales[1:]:
        before = best([(point.candidate, point.log_width) for point in before], scale)
        wider += before
    every = [*found, *sorted(wider, key=lambda point: point.candidate)]
    return [point for point in every if math.isfinite(point.criterion)]


def _side_by_side(
    searches: Sequence[Search], evaluate: Callable[[int, float], float | Tensor], *, prior: bool
) -> list[Point]:
    """Run searches step by step, so that their numbers are read together; ``prior``: with that on log T."""
    found: dict[int, Point] = {}
    asked = {i: next(search) for i, search in enumerate(searches)}
    while asked:
        read = iter(_read([evaluate(i, t) for i, widths in asked.items() for t in widths]))
        answers = {i: [next(read) + (0.5 * t * t if prior else 0.0) for t in widths] for i, widths in asked.items()}
        asked = {}
        for i, answer in answers.items():
            try:
                asked[i] = searches[i].send(answer)
            except StopIteration as end:
                found[i] = end.value
    return [found[i] for i in range(len(searches))]


def _read(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers, of which those on a device are read at once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else value for value in values]


def _search(candidate: int, scale: float, limits: tuple[float, float], near: float | None) -> Search:
    """The optimum in log T: the best of a grid, or downhill from ``near``, then by parabolas."""
    low, high = limits
    if low == high:
        (value,) = yield [low]
        return Point(candidate, low, 0.0, scale, value)
    values: dict[float, float] = {}

    def within(t: float) -> float:
        return min(max(t, low), high)

    def at(t: float) -> float:
        return values[within(t)]

    def ask(*widths: float) -> Generator[list[float], list[float], None]:
        new = [t for t in dict.fromkeys(map(within, widths)) if t not in values]
        if new:
            answer = yield new
            values.update(
                (t, value if math.isfinite(value) else math.inf) for t, value in zip(new, answer, strict=True)
            )

    step = min(COARSE, (high - low) / 4)
    if near is not None:
        yield from ask(near - step, near, near + step)
    if near is None or not math.isfinite(at(near)):
        count = math.ceil((high - low) / step)
        grid = [low + i * (high - low) / count for i in range(count + 1)]
        yield from ask(*grid)
        near = min(grid, key=at)
    best = near
    yield from ask(best - step, best, best + step)
    for way in (step, -step):
        while low < best + way < high:
            yield from ask(best + way)
            if not at(best + way) < at(best):
                break
            best += way
    bend, inside = math.nan, False
    for _ in range(ROUNDS):
        yield from ask(best - step, best, best + step)
        bend = (at(best - step) - 2 * at(best) + at(best + step)) / step**2
        rise = (at(best + step) - at(best - step)) / (2 * step)
        inside = low < best - step and best + step < high and math.isfinite(bend) and bend > 0
        move = min(max(-rise / bend, -step), step) if inside else 0.0
        yield from ask(best + move)
        best = min((best, best + move, best - step, best + step), key=at)
        best = min(max(best, low), high)
        step /= FINE
    yield from ask(best)
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
