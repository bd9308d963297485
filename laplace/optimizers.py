"""Optimizers for a few numbers, since those of PyTorch load its compiler on their first step.

That takes seconds and tens of megabytes, and an interruption in that moment breaks every later call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""A function from a point ``[n]`` to a differentiable number."""

SUFFICIENT, FLAT = 1e-4, 0.9
"""Wolfe conditions: shares of the first slope that a step must gain at least, and may leave at most."""
TRIALS = 25
"""The most trials of a line search."""


@dataclass
class Memory:
    """Products with an approximate inverse Hessian, from the last steps."""

    size: int
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Add a step and the change of the gradient, if the curvature they show is reliable."""
        if float(step @ change) > 1e-12 * float(step.norm() * change.norm()):
            self.pairs = [*self.pairs, (step, change)][-self.size :]

    def times(self, gradient: Tensor) -> Tensor:
        """The product with a gradient, by the two loops of Nocedal (1980)."""
        q, weights = gradient.clone(), list[Tensor]()
        for step, change in reversed(self.pairs):
            weights.append((step @ q) / (step @ change))
            q -= weights[-1] * change
        if self.pairs:
            step, change = self.pairs[-1]
            q *= (step @ change) / (change @ change)
        for (step, change), weight in zip(self.pairs, reversed(weights), strict=True):
            q += (weight - (change @ q) / (step @ change)) * step
        return q


@dataclass(frozen=True)
class _Trial:
    """A point on the line: its distance, and the value, the gradient and the slope along the line there."""

    length: float
    value: float
    gradient: Tensor
    slope: float


def lbfgs(
    objective: Objective,
    start: Float[Tensor, " n"],
    *,
    max_iter: int,
    first_step: float = 1.0,
    tolerance_grad: float = 1e-6,
    tolerance_change: float = 1e-12,
    history: int = 20,
) -> Float[Tensor, " n"]:
    """Minimize a smooth function of a few numbers; the last point, ``[n]`` in float64.

    Line searches end at the strong Wolfe conditions, by bracketing and cubic interpolation. A step takes O(history · n)
    beside the evaluations. The first trial is at most ``first_step`` long, in the sum of its entries. The search ends
    where no entry of the gradient exceeds ``tolerance_grad``, or neither step nor value changes by more than
    ``tolerance_change``.

    References
    ----------
    Nocedal & Wright (2006), "Numerical optimization", algorithms 3.5, 3.6 and 7.5.
    """
    wide = start.dtype if start.device.type == "mps" else torch.float64
    x, memory = start.detach().to(wide, copy=True), Memory(history)

    def evaluate(point: Tensor) -> tuple[float, Tensor, float]:
        """Value and gradient, and the rounding of a value of 1."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            found = objective(point)
            (gradient,) = torch.autograd.grad(found, point)
        return float(found.detach()), gradient, torch.finfo(found.dtype).eps

    value, gradient, resolution = evaluate(x)
    for iteration in range(max_iter):
        if float(gradient.abs().max()) <= tolerance_grad:
            break
        direction = -memory.times(gradient)
        slope = float(gradient @ direction)
        if slope > -tolerance_change:
            break
        first = 1.0 if iteration else min(1.0, 1 / float(gradient.abs().sum())) * first_step

        def at(length: float, x: Tensor = x, direction: Tensor = direction) -> _Trial:
            found, g, _ = evaluate(x + length * direction)
            return _Trial(length, found, g, float(g @ direction))

        best = _line_search(at, _Trial(0.0, value, gradient, slope), first, resolution)
        if best.length == 0 and memory.pairs:
            memory.pairs.clear()  # once more along the gradient
            continue
        step = best.length * direction
        memory.add(step, best.gradient - gradient)
        change = best.value - value
        x, value, gradient = x + step, best.value, best.gradient
        if float(step.abs().max()) <= tolerance_change or abs(change) < tolerance_change:
            break
    return x


def _line_search(at: Callable[[float], _Trial], origin: _Trial, first: float, resolution: float) -> _Trial:
    """A point that meets the strong Wolfe conditions, else the lowest found; ``origin`` if rounding hides all gain."""
    previous, length = origin, first
    for _ in range(TRIALS):
        trial = at(length)
        enough = trial.value <= origin.value + SUFFICIENT * length * origin.slope
        if not enough or (previous is not origin and trial.value > previous.value):
            return _zoom(at, origin, previous, trial, resolution)
        if abs(trial.slope) <= -FLAT * origin.slope:
            return trial
        if trial.slope >= 0:
            return _zoom(at, origin, trial, previous, resolution)
        length = min(max(_lowest_between(previous, trial), 2 * trial.length), 10 * trial.length)
        previous = trial
    return previous


def _zoom(at: Callable[[float], _Trial], origin: _Trial, low: _Trial, high: _Trial, resolution: float) -> _Trial:
    """A point that meets them between two that enclose one; ``low`` is the lowest so far that gained enough."""
    for _ in range(TRIALS):
        width = high.length - low.length
        if abs(width * low.slope) <= resolution * max(1.0, abs(low.value)):
            break  # no more is to be gained than rounding
        share = min(max((_lowest_between(low, high) - low.length) / width, 0.1), 0.9)
        trial = at(low.length + share * width)
        enough = trial.value <= origin.value + SUFFICIENT * trial.length * origin.slope
        if not enough or trial.value > low.value:
            high = trial
            continue
        if abs(trial.slope) <= -FLAT * origin.slope:
            return trial
        if trial.slope * width >= 0:
            high = low
        low = trial
    return low


def _lowest_between(a: _Trial, b: _Trial) -> float:
    """Minimum of the cubic through two points with their slopes; their middle if it has none."""
    width = b.length - a.length
    first = a.slope + b.slope - 3 * (b.value - a.value) / width
    square = first**2 - a.slope * b.slope
    if square < 0:
        return a.length + 0.5 * width
    second = math.copysign(math.sqrt(square), width)
    divisor = b.slope - a.slope + 2 * second
    return a.length + 0.5 * width if divisor == 0 else b.length - width * (b.slope + second - first) / divisor


class Adam:
    """Steps along gradients divided by their size so far; parameters are changed in place.

    References
    ----------
    Kingma & Ba (2015), "Adam: a method for stochastic optimization". arXiv:1412.6980
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self.lr, self._parameters, self._n_steps = lr, list(parameters), 0
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Go down."""
        self._n_steps += 1
        scale = self.lr / (1 - 0.9**self._n_steps), math.sqrt(1 - 0.999**self._n_steps)
        with torch.no_grad():
            for parameter, gradient, (mean, square) in zip(self._parameters, gradients, self._moments, strict=True):
                mean.lerp_(gradient, 0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                parameter.addcdiv_(mean, (square.sqrt() / scale[1]).add_(1e-8), value=-scale[0])


class SGD:
    """Gradient descent in place with momentum and weight decay, as ``torch.optim.SGD``."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        self._parameters, self._lr, self._momentum, self._decay = list(parameters), lr, momentum, weight_decay
        self._velocities: dict[int, Tensor] = {}

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Go down."""
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
                if gradient is None:
                    continue
                change = gradient.add(parameter, alpha=self._decay)
                if number in self._velocities:
                    change = self._velocities[number].mul_(self._momentum).add_(change)
                self._velocities[number] = change
                parameter.add_(change, alpha=-self._lr)


__all__ = ["SGD", "Adam", "lbfgs"]
