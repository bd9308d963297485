"""The modes of a linear head's weights under several priors, each from those before.

Outputs are linear in the weights. So a search along any direction costs no product with the features beyond one for the
direction itself, and one in the span of earlier modes costs none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.curvature import last_layer
from laplace.likelihoods import AbstractLikelihood
from laplace.optimizers import Memory
from laplace.prior import GaussianPrior
from laplace.structures.wide_kron import is_wide
from laplace.tuning.head import ROWS_AT_ONCE, HeadData
from laplace.tuning.newton import DENSE_PARAMS, Head, check_start, mode, multiply, warn_of_rest
from laplace.types import Features, Outputs

SHARE = 1e-5
"""A head is done where one step more would lower its loss by less than this share of it."""
ROUNDING = 0.02
"""Or by less than so many rounding units for each row."""
MAX_STEPS, MAX_TRIALS, HISTORY = 200, 12, 8
"""Steps for one head, trials along one direction, and steps from which curvature is learned."""
SPAN, SPAN_STEPS = 2, 3
"""How many moves between earlier modes span the first search, and how many steps it takes at most."""
FLAT = 0.3
"""A search along a direction ends where the slope is at most this share of the first one."""
STEPS_OF_PRIOR = 5
"""About how many steps a prior takes, for ``cost``."""


def heads_along(
    data: HeadData,
    likelihood: AbstractLikelihood,
    priors: Sequence[GaussianPrior],
    initial: Float[Tensor, " params"] | None = None,
    share: float = SHARE,
) -> list[Float[Tensor, " params"]]:
    """The weights ``[P]`` that minimize the regularized loss under each prior, in the order given, in public order.

    Parameters
    ----------
    data
        Features and targets, in the precision of the result.
    likelihood
        With its noise and temperature.
    priors
        Best from strong to weak, in even steps of the logarithm: each start is made of the modes before.
    initial
        Start of the first, ``[P]``; by default its prior mean.
    share
        Where a head is done. Beyond ``newton.DENSE_PARAMS`` weights the last step is one from which a decrease of the
        loss by less than this share of it was expected, or by a fiftieth of a rounding unit for each row.

    Raises
    ------
    InputError
        If the loss is not finite at a start.

    Notes
    -----
    Up to ``newton.DENSE_PARAMS`` weights, and where every weight has a prior precision of its own, this is
    ``newton.mode`` for one prior after the other. Otherwise weights are rotated into the eigenbasis of the features'
    second moments, a bias being the weight of a constant feature, and into that of the summed Hessians in the outputs
    where a search starts: L-BFGS, preconditioned with the diagonal of the Hessian in those coordinates. For a Gaussian
    likelihood that is the whole Hessian: one step is the ridge estimate.

    How tight the default is: from one of nine prior precisions to the next, factors of 7.5 apart, losses of heads that
    fit their data change by factors of 2 to 7. They end within parts in 10⁴ of their minimum, in float32 within a few
    percent where they are below 10⁻⁴ nats for each row, which is what a change of the precision by as much does.

    Time O(rows · D² + D³) once, O(rows · C · (C + D) + C³) for each prior and O(rows · C · D + C² D) for each of a few
    steps; memory O(rows · (C + D) + C D + C² + D²).

    References
    ----------
    Nocedal & Wright (2006), "Numerical optimization", algorithm 7.5; Narkiss & Zibulevsky (2005), "Sequential subspace
    optimization method for large-scale unconstrained problems" (searches in the span of earlier steps).
    """
    found: list[Tensor] = []
    for digits, group in groupby(priors, key=lambda prior: f"{_ratio(prior):.6g}"):
        run, start = list(group), found[-1] if found else initial
        if digits == "nan" or run[0].n_params <= DENSE_PARAMS:
            for prior in run:
                start = mode(Head(data.phi, data.y, data.shapes, likelihood, prior), start)
                found.append(start)
        else:
            found += _in_basis(Coordinates.of(data, _ratio(run[0])), data, likelihood, run, start, share)
    return found


def cost(n_rows: int, n_features: int, n_outputs: int, n_priors: int) -> float:
    """About how many floating-point operations ``heads_along`` takes beyond ``newton.DENSE_PARAMS`` weights.

    Parameters
    ----------
    n_rows, n_features, n_outputs, n_priors
        Sizes of the problem.
    """
    once = 4 * n_rows * n_features**2 + 10 * n_features**3
    return float(once + n_priors * (STEPS_OF_PRIOR + 1) * 4 * n_rows * n_features * n_outputs)


def _ratio(prior: GaussianPrior) -> float:
    """√(δ of the weight / δ of the bias); NaN where every weight has a precision of its own."""
    if prior.is_per_weight:
        return math.nan
    first, last = prior.per_layer()[[0, -1]].tolist()
    return math.sqrt(first / last)


# -- coordinates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of a head in which second moments of features are diagonal, and all weights have one prior precision.

    Weights are ``[W, b / r] U``, with U the eigenvectors of ``Σ φ̃ φ̃ᵀ``, ``φ̃ = [φ, r]``. Where r² is the ratio of the
    precisions of weight and bias, the prior of ``b / r`` is that of a weight.
    """

    phi: Features
    """φ̃ U, ``[rows, k]``, with k = D + 1, or D without a bias."""
    vectors: Float[Tensor, "k k"]
    """U."""
    ratio: float | None
    """r; ``None`` without a bias."""
    n_outputs: int
    """C."""

    @classmethod
    def of(cls, data: HeadData, ratio: float) -> Coordinates:
        """That of some features; second moments are summed in float64."""
        phi, bias = data.phi, len(data.shapes) > 1
        if bias:
            phi = torch.cat([phi, phi.new_full((len(phi), 1), ratio)], 1)
        wide = linalg.wide_dtype(phi)
        moments = phi.new_zeros(phi.shape[1], phi.shape[1], dtype=wide)
        for part in phi.split(ROWS_AT_ONCE):
            moments += part.to(wide).T @ part.to(wide)
        vectors = linalg.eigh(moments, "second moments of the features")[1].to(phi)
        return cls(phi @ vectors, vectors, ratio if bias else None, data.shapes[0][0])

    def rotate(self, theta: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """From public order."""
        if self.ratio is None:
            return (theta.view(self.n_outputs, -1) @ self.vectors).flatten()
        weight, bias = theta[: -self.n_outputs].view(self.n_outputs, -1), theta[-self.n_outputs :]
        return (torch.cat([weight, bias.unsqueeze(1) / self.ratio], 1) @ self.vectors).flatten()

    def rotate_back(self, theta: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """To public order."""
        joined = theta.view(self.n_outputs, -1) @ self.vectors.T
        if self.ratio is None:
            return joined.flatten()
        return torch.cat([joined[:, :-1].flatten(), joined[:, -1] * self.ratio])

    def head(self, y: Tensor, likelihood: AbstractLikelihood, prior: GaussianPrior) -> Head:
        """The same regularized loss in these coordinates."""
        mean = self.rotate(prior.mean.to(self.phi).expand(prior.n_params))
        shape = (self.n_outputs, len(self.vectors))
        rotated = GaussianPrior(mean, prior.precision[:1].to(self.phi), (math.prod(shape),))
        return Head(self.phi, y, [shape], likelihood, rotated)


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Iterate:
    """Weights in some coordinates, and what is known there."""

    theta: Float[Tensor, " params"]
    f: Outputs
    """Outputs, ``[rows, C]``."""
    slopes: Outputs
    """Gradient of the loss in them, without the prior."""
    value: float
    """The regularized loss."""

    @classmethod
    def at(cls, head: Head, theta: Float[Tensor, " params"], f: Outputs) -> Iterate:
        """At weights whose outputs are known."""
        return cls(theta, f, head.output_gradient(f), float(head.objective(theta, f)))

    def gradient(self, head: Head) -> Float[Tensor, " params"]:
        """In the weights."""
        return head.pull_back(self.slopes) + head.prior.diagonal() * (self.theta - head.prior.mean)


@dataclass(frozen=True)
class Move:
    """A direction of the weights (or weights), and what it does to outputs."""

    theta: Float[Tensor, " params"]
    f: Outputs


def _in_basis(
    basis: Coordinates,
    data: HeadData,
    likelihood: AbstractLikelihood,
    priors: Sequence[GaussianPrior],
    initial: Float[Tensor, " params"] | None,
    share: float,
) -> Iterator[Float[Tensor, " params"]]:
    """Yield the mode under each of the priors, which have one ratio of precisions."""
    start = priors[0].mean.expand(priors[0].n_params) if initial is None else initial
    theta = basis.rotate(start.to(data.phi))
    known = [Move(theta, basis.phi @ theta.view(basis.n_outputs, -1).T)]
    for prior in priors:
        head = basis.head(data.y, likelihood, prior)
        point = Iterate.at(head, known[-1].theta, known[-1].f)
        check_start(torch.tensor(point.value))
        moves = [Move(b.theta - a.theta, b.f - a.f) for a, b in pairwise(known)]
        point = _minimize(head, _in_span(head, point, moves, share), share)
        known = [*known, Move(point.theta, point.f)][-SPAN - 1 :]
        yield basis.rotate_back(point.theta)


def _enough(point: Iterate, share: float) -> float:
    """Nats that may be left."""
    return share * abs(point.value) + ROUNDING * torch.finfo(point.f.dtype).eps * len(point.f)


def _in_span(head: Head, point: Iterate, moves: Sequence[Move], share: float) -> Iterate:
    """Newton's method in the span of a few moves."""
    if not moves:
        return point
    thetas = torch.stack([move.theta for move in moves])
    decay = thetas @ (head.prior.diagonal() * thetas).T
    for _ in range(SPAN_STEPS):
        hessian = head.output_hessian(point.f)
        images = [multiply(hessian, move.f) for move in moves]
        curvature = torch.stack([torch.stack([(image * move.f).sum() for move in moves]) for image in images]) + decay
        pull = head.prior.diagonal() * (point.theta - head.prior.mean)
        slopes = torch.stack([(move.f * point.slopes).sum() for move in moves]) + thetas @ pull
        curvature, slopes = curvature.cpu().double(), slopes.cpu().double()
        shares = -torch.linalg.pinv(curvature, hermitian=True) @ slopes
        slope = float(shares @ slopes)
        if not -0.5 * slope > _enough(point, share):
            break
        weights = shares.to(thetas)
        f = torch.stack([weight * move.f for weight, move in zip(weights, moves, strict=True)]).sum(0)
        point, _ = _search(head, point, Move(weights @ thetas, f), slope)
    return point


@dataclass(frozen=True)
class Scaling:
    """Coordinates in which the Hessian of a loss has ones on its diagonal."""

    vectors: Float[Tensor, "outputs outputs"] | None
    """Eigenvectors of the sum of the Hessians in the outputs; ``None`` of very many outputs: the outputs themselves."""
    width: Float[Tensor, "outputs k"]
    """Of a unit of these coordinates."""

    @classmethod
    def of(cls, head: Head, f: Outputs) -> Scaling:
        """Where outputs are ``f``."""
        hessian = head.output_hessian(f)
        n, vectors = hessian.n_outputs, None
        if not is_wide(n):
            vectors = linalg.eigh(hessian.sum(), "sum of the Hessians in the outputs")[1]
        (diagonal,) = last_layer.ekfac(head.blocks(head.phi), hessian, [(vectors, None)])
        return cls(vectors, (diagonal.view(n, -1) + head.prior.precision).rsqrt())

    def weights(self, x: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """From these coordinates."""
        scaled = self.width * x.view_as(self.width)
        return (scaled if self.vectors is None else self.vectors @ scaled).flatten()

    def gradient(self, gradient: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """In these coordinates, from one in the weights."""
        turned = gradient.view_as(self.width)
        return (self.width * (turned if self.vectors is None else self.vectors.T @ turned)).flatten()


def _minimize(head: Head, point: Iterate, share: float) -> Iterate:
    """L-BFGS in coordinates in which the Hessian at the start is nearly the identity."""
    scaling = Scaling.of(head, point.f)
    memory, gradient, left = Memory(HISTORY), scaling.gradient(point.gradient(head)), math.inf
    for _ in range(MAX_STEPS):
        direction = -memory.times(gradient)
        slope = float(gradient @ direction)
        if slope >= 0:
            return point
        left, weights = -0.5 * slope, scaling.weights(direction)
        after, step = _search(head, point, Move(weights, head.outputs(weights)), slope)
        if left <= _enough(point, share):
            return after
        if step == 0:
            break
        reached = scaling.gradient(after.gradient(head))
        memory.add(step * direction, reached - gradient)
        point, gradient = after, reached
    if not left <= torch.finfo(point.f.dtype).eps ** 0.5 * max(1.0, abs(point.value)):  # also where it is NaN
        warn_of_rest(left)
    return point


def _search(head: Head, origin: Iterate, move: Move, slope: float) -> tuple[Iterate, float]:
    """A point along a direction where the slope is a share of the first one, and how far; 0 if rounding hides all gain.

    The loss is convex, so that slopes tell where the minimum is: unlike differences of losses, they do not cancel. A
    point where the slope is still negative is lower than the origin, whatever losses say; any other has to be.
    """
    pull = head.prior.diagonal() * move.theta
    decay, first = float(pull @ move.theta), float(pull @ (origin.theta - head.prior.mean))
    slack = torch.finfo(move.f.dtype).eps * len(move.f) + 32 * torch.finfo(move.f.dtype).eps * abs(origin.value)
    low, at_low, high, at_high, step = 0.0, slope, math.inf, math.inf, 1.0
    for _ in range(MAX_TRIALS):
        f = origin.f + step * move.f
        slopes = head.output_gradient(f)
        found = float((slopes * move.f).sum()) + first + step * decay
        if abs(found) <= -FLAT * slope:
            theta = origin.theta + step * move.theta
            point = Iterate(theta, f, slopes, float(head.objective(theta, f)))
            if found <= 0 or point.value <= origin.value + slack:
                return point, step
        if found < 0:
            low, at_low, before = step, found, (low, at_low)
            if high == math.inf:
                rise = found - before[1]
                secant = step - found * (step - before[0]) / rise if rise > 0 else math.inf
                step = min(max(secant, 1.5 * step), 4 * step)
                continue
        else:  # too far, also where it is NaN
            high, at_high = step, found
        width = high - low
        inner = low - at_low * width / (at_high - at_low) if math.isfinite(at_high) else low + 0.5 * width
        step = min(max(inner, low + 0.1 * width), high - 0.1 * width)
    if low == 0:
        return origin, 0.0
    return Iterate.at(head, origin.theta + low * move.theta, origin.f + low * move.f), low


__all__ = ["cost", "heads_along"]
