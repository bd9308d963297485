"""What ``tune`` does with validation data: another head, temperature or noise, and width where inputs are foreign."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import checks
from laplace.enums import LinkApprox, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Ask, Positions
from laplace.likelihoods.base import Link
from laplace.predictive import Options
from laplace.predictive.pushforward import asked, moments
from laplace.prior import GaussianPrior
from laplace.tuning import averaging
from laplace.tuning.averaging import Point
from laplace.tuning.cached import CachedData, select
from laplace.tuning.head import HeadData
from laplace.tuning.path import cost, heads_along
from laplace.tuning.problem import Problem
from laplace.tuning.settings import Settings
from laplace.types import Scalar

N_PRECISIONS, STRONGEST, WEAKEST = 9, 10.0, 1e-6
"""How many prior precisions heads are fitted with, and from which to which: in units of the mean curvature of a weight
where all outputs are equally likely."""
ROWS_TO_TIME = 2048
"""As many are passed through the head to tell how long it takes to refit it."""
LOG_TEMPERATURES = (math.log(0.05), math.log(20.0))
LOG_NOISES = (math.log(1e-3), math.log(1e3))
"""Limits of log T, and of log σ in units of the residuals."""
ENLARGED = 1024.0
"""Residuals are measured at so many times their size, about the inverse of the least noise."""


@dataclass(frozen=True)
class Recipe:
    """What a user asked of ``tune`` beside the hyperparameters."""

    train_loader: Any = None
    refit: bool | None = None
    """``None``: where it can be."""
    average: str | bool = "parameters"
    distance_aware: bool | None = None
    """``None``: where it can be."""
    max_rows: int | None = None
    """Of the training data, that heads are refitted on."""

    def check_alone(self, whose: str) -> None:
        """Raise if more was asked of a posterior over functions than its hyperparameters."""
        asked = self.refit or self.distance_aware or self.average != "parameters" or self.max_rows is not None
        if asked or self.train_loader is not None:
            msg = (
                "refit=True, distance_aware=True, average=, max_rows= and train_loader= need a Gaussian over weights; "
                f"{whose} is a posterior over functions, of which tune chooses the hyperparameters alone."
            )
            raise UnsupportedError(msg)


@dataclass(frozen=True)
class Candidate:
    """Weights of a head, and which variance the posterior has with them."""

    theta: Float[Tensor, " params"]
    precision: Tensor | None = None
    """Prior precision that they belong to, at unit noise; ``None``: that of the model's own head, whatever it is."""
    variance: Tensor | None = None
    """The posterior's variance at the validation rows, ``[rows, C]`` or ``[rows, C, C]``; ``None``: not used."""


@dataclass(frozen=True)
class Chosen:
    """What validation data chose, beside the hyperparameters."""

    theta: Float[Tensor, " params"]
    log_width: float
    """log T, or log σ."""
    scale: float
    """s²."""
    precision: Tensor | None
    """The average precision of the refitted heads, at unit noise; ``None`` where there are none."""
    value: float
    """Negative log predictive density of a validation row, in nats."""
    points: tuple[tuple[float, int, float, float], ...]
    """Share, candidate, T (σ) and s² of each point of a mixture."""
    by_candidate: tuple[float, ...]
    """The best criterion of each candidate at s² = 0, for a row, in nats."""


def refitted_heads(
    problem: Problem,
    data: HeadData,
    shape: Tensor,
    likelihood: AbstractLikelihood,
    max_rows: int | None = None,
    limits: tuple[float, float] = (0.0, math.inf),
) -> list[Candidate]:
    """The best head under each prior, from strong ones to weak ones, each from the one before.

    Of more than ``max_rows`` rows as many are drawn at random; each then stands for several. Precisions are within
    limits where the usual ones are, else all of what the limits allow.
    """
    data, n_rows = data.to(problem.fit.mean), len(data.phi)
    if max_rows is not None and n_rows > max_rows:
        chosen = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))[:max_rows]
        data = data.rows(chosen.sort().values.to(data.phi.device))
    share = len(data.phi) / n_rows
    n_outputs, tiny = data.shapes[0][0], torch.finfo(data.phi.dtype).tiny
    size = float(data.phi.double().square().mean()) * n_rows / n_outputs * float(likelihood.scale.mean())
    strongest, weakest = (bound * max(size, tiny) for bound in (STRONGEST, WEAKEST))
    first, last = min(strongest, limits[1]), max(weakest, limits[0])
    if first < last:
        last, first = limits
    steps = [step / (N_PRECISIONS - 1) for step in range(N_PRECISIONS)]
    deltas = [shape * first ** (1 - step) * last**step for step in steps]
    priors = [GaussianPrior(problem.prior_mean, share * delta, problem.sizes) for delta in deltas]
    heads = heads_along(data, likelihood, priors)
    return [Candidate(theta, delta) for theta, delta in zip(heads, deltas, strict=True)]


def seconds(data: HeadData, theta: Tensor, max_rows: int | None) -> float:
    """About how long ``refitted_heads`` takes, from how long one pass over some rows does."""
    n_outputs, n_features = data.shapes[0]
    some = data.rows(torch.arange(min(len(data.phi), ROWS_TO_TIME), device=data.phi.device)).to(theta)
    some.outputs(theta)  # the first product of a thread loads a library
    start = time.perf_counter()
    some.outputs(theta)
    passed = time.perf_counter() - start
    n_rows = min(len(data.phi), max_rows or len(data.phi))
    products = cost(n_rows, n_features, n_outputs, N_PRECISIONS) * passed / (2 * len(some.phi) * n_features * n_outputs)
    return 2 * products  # functions of outputs take about as long as products


@dataclass(frozen=True)
class Validation:
    """Validation rows, how far they lie, and how predictions are made of them."""

    problem: Problem
    data: CachedData
    positions: Positions
    """Of all batches."""
    options: Callable[[], Options]
    """The same random numbers whenever asked."""
    excess: Float[Tensor, " rows"] | None = None
    """e of every row; ``None``: there is no density."""

    @classmethod
    def of(cls, problem: Problem, data: CachedData, asked: Settings) -> Validation:
        """Without distances."""
        positions = data.positions.to(problem.fit.mean.dtype)
        fresh = asked.repeated(positions.f.device)

        def options() -> Options:
            # Networks whose weights are drawn are averaged over draws: a head's outputs have the same distribution.
            found = fresh()
            of_network = found.pred_type is PredType.NN
            return replace(found, pred_type=PredType.GLM, link=LinkApprox.MC if of_network else found.link)

        return cls(problem, data, positions, options)

    def outputs(self, theta: Tensor) -> Tensor:
        """Outputs of a head at the rows."""
        if torch.equal(theta, self.problem.fit.mean):
            return self.positions.f
        return self.data.with_weights(theta).positions.f.to(self.positions.f)

    def variance(self, precision: Tensor, likelihood: AbstractLikelihood) -> Tensor:
        """The posterior's (co)variance at the rows, as predictions use it."""
        posterior, dtype = self.problem.posterior(precision, likelihood), self.positions.f.dtype
        parts = [
            select(positions, moments(get(), posterior, likelihood, self.options(), dtype)[1])
            for get, positions in self.data.batches
        ]
        return torch.cat(parts)

    def nll(self, f: Tensor, variance: Tensor | None, likelihood: AbstractLikelihood, scale: float = 0.0) -> float:
        """Negative log predictive density of all rows, in nats."""
        return float(self.unread_nll(f, variance, likelihood, scale))

    def unread_nll(self, f: Tensor, variance: Tensor | None, likelihood: AbstractLikelihood, scale: float) -> Scalar:
        """The same, where it was computed."""
        return likelihood.for_targets().predictive_nll(f, *self._seen(f, variance, likelihood, scale))

    def nll_of_mixture(self, points: Sequence[tuple[float, Tensor, Tensor | None, float, float]]) -> float:
        """The same of average probabilities: share, outputs, variance, T and s² of each point."""
        total, likelihood = torch.zeros(()), self.problem.likelihood()
        for share, f, variance, t, scale in points:
            at = self.problem.likelihood(output_temperature=t)
            spread, _, link = self._seen(f, variance, at, scale)
            found = at.predict(f, spread, link)
            assert isinstance(found, Tensor), "of classes"
            total = total.to(found) + share * likelihood.probabilities(found)
        label, logs = likelihood.label(self.positions.y), total.clamp(min=torch.finfo(total.dtype).tiny).log()
        chosen = logs.gather(1, label.unsqueeze(1)) if label.dim() == 1 else label.to(logs) * logs
        return -float(chosen.sum())

    def _seen(
        self, f: Tensor, variance: Tensor | None, likelihood: AbstractLikelihood, scale: float
    ) -> tuple[Tensor, Tensor, Link]:
        """(Co)variance as predictions have it, targets and link."""
        likelihood, options = likelihood.for_targets(), self.options()
        spread = torch.zeros_like(f) if variance is None else variance
        if scale and self.excess is not None:
            extra = likelihood.foreign_variance(scale, self.excess).expand_as(f)
            spread = spread + (extra if spread.dim() == f.dim() else torch.diag_embed(extra))
        if spread.dim() == f.dim() and asked(likelihood, options) is Ask.COVARIANCE:
            spread = torch.diag_embed(spread)
        return spread, self.positions.y, likelihood.link(options.link, options.n_samples, options.generator)


def choose(
    rows: Validation,
    candidates: Sequence[Candidate],
    limits: tuple[float, float],
    average: str | bool,
    unit: Tensor | None,
) -> Chosen:
    """Weigh heads, temperatures (noises) and scales by how well they predict the rows.

    Parameters
    ----------
    rows, candidates
        The data, and the heads.
    limits
        Of log T, or of log σ in units of ``unit``.
    average
        ``"parameters"``, ``"mixture"`` or ``False``.
    unit
        Noise of each output, ``[]`` or ``[C]``, of which a multiple is chosen; ``None``: a temperature is.
    """
    outputs = [rows.outputs(candidate.theta) for candidate in candidates]
    scales_with_noise = rows.problem.likelihood().scales_with_noise

    def predicted(f: Tensor, variance: Tensor | None, t: float, scale: float) -> Scalar:
        if unit is None:
            return rows.unread_nll(f, variance, rows.problem.likelihood(output_temperature=math.exp(t)), scale)
        # Precisions are those at unit noise, under which variances grow with the noise.
        variance = None if variance is None else math.exp(2 * t) * variance
        return rows.unread_nll(f, variance, rows.problem.likelihood(math.exp(t) * unit), scale)

    @cache
    def parts(candidate: int, scale: float) -> tuple[Scalar, Scalar]:
        """At unit noise: what residuals add, and what is left without any."""
        f, variance = outputs[candidate], candidates[candidate].variance
        y = rows.positions.y.to(f)
        rest = predicted(y, variance, 0.0, scale)
        # Made large, as what is left would else round away residuals that are small beside the unit.
        return (predicted(y + ENLARGED * (f - y), variance, 0.0, scale) - rest) / ENLARGED**2, rest

    def evaluate(candidate: int, t: float, scale: float) -> Scalar:
        if not scales_with_noise:
            return predicted(outputs[candidate], candidates[candidate].variance, t, scale)
        # Noise, variances and widths grow together: two scores are enough for all noises.
        residuals, rest = parts(candidate, scale)
        return math.exp(-2 * t) * residuals + outputs[candidate].numel() * t + rest

    n_rows = len(rows.positions.f)
    scales = averaging.scales_for(n_rows) if rows.excess is not None else (0.0,)
    every = averaging.points(evaluate, len(candidates), scales, limits, prior=unit is None)
    best = min(every, key=lambda point: point.criterion)
    found = [replace(best, spread=0.0)] if average is False else every
    shares = averaging.weights(found)
    thetas = [candidate.theta for candidate in candidates]
    theta, log_width, scale = averaging.averaged(found, shares, thetas, divided=unit is None)
    theta = theta if len(thetas) > 1 else thetas[0]
    mixture = averaging.most_likely(found, shares) if average == "mixture" else ()
    if mixture:
        value = rows.nll_of_mixture([(w, outputs[k], candidates[k].variance, t, s2) for w, k, t, s2 in mixture])
    else:
        value = float(predicted(rows.outputs(theta), candidates[best.candidate].variance, log_width, scale))
    return Chosen(
        theta,
        log_width,
        scale,
        _precision(found, shares, candidates),
        value / n_rows,
        mixture,
        tuple(
            min((p.criterion for p in every if p.candidate == k and not p.scale), default=math.inf) / n_rows
            for k in range(len(candidates))
        ),
    )


def _precision(found: Sequence[Point], shares: Tensor, candidates: Sequence[Candidate]) -> Tensor | None:
    """The geometric mean of the precisions of refitted heads, by their shares."""
    pairs = [
        (share, candidates[point.candidate].precision) for share, point in zip(shares.tolist(), found, strict=True)
    ]
    known = [(share, precision) for share, precision in pairs if precision is not None]
    total = sum(share for share, _ in known)
    if not known or total <= 1e-6:
        return None
    logs = sum((share / total * precision.log() for share, precision in known), torch.zeros_like(known[0][1]))
    return logs.exp()


AVERAGES = ("parameters", "mixture", False)


def checked_recipe(train_loader: Any, refit: Any, average: Any, distance_aware: Any, max_rows: Any) -> Recipe:
    """What a user passed."""
    refit = None if refit is None else checks.flag("refit", refit)
    distance_aware = None if distance_aware is None else checks.flag("distance_aware", distance_aware)
    if not any(average is known or (isinstance(average, str) and average == known) for known in AVERAGES):
        msg = f"average must be 'parameters', 'mixture' or False; got {average!r}."
        raise UnsupportedError(msg)
    if train_loader is not None:
        checks.loader("train_loader", train_loader)
    max_rows = None if max_rows is None else checks.whole("max_rows", max_rows, 1)
    return Recipe(train_loader, refit, average, distance_aware, max_rows)


__all__ = ["Candidate", "Chosen", "Recipe", "Validation", "checked_recipe", "choose", "refitted_heads", "seconds"]
