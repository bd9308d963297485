"""Prior precision and noise, or output temperature, chosen together by a proper score on validation data (``tune``).

A grid finds the basin, L-BFGS on logarithms the optimum. The network without weight uncertainty, at its best
temperature or noise, is a candidate like any other: on the data it was tuned on, the result is never worse.

A temperature below 1 makes predictions more certain than the network's logits. It is allowed as far as the network
alone is better for it. Beside uncertain weights a lower one would only undo what they add, and where every row is
classified right nothing in these data speaks against a temperature near 0, which is ruinous at the first error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace.errors import InputError, warn
from laplace.likelihoods import AbstractLikelihood
from laplace.predictive.pushforward import Options
from laplace.tuning.cached import CachedData
from laplace.tuning.marglik import optimize
from laplace.tuning.problem import Problem
from laplace.tuning.result import Tuning
from laplace.tuning.scores import Score, check_differentiable

LIMITS: dict[str, tuple[float, float]] = {
    "prior_precision": (1e-8, 1e12),
    "output_temperature": (1e-3, 1e3),
    "sigma_noise": (1e-4, 1e4),
}
"""Within which values are looked for; the noise in units of the residuals on the validation data."""

_NO_TEMPERATURE = (
    "The network's score on the validation data improves as the output temperature falls to 0, as it does where every "
    "row is classified right: no temperature is best, and none below 1 was tried. Use more validation data, or pass "
    'limits={"output_temperature": (low, high)}.'
)

SAME_SCORE = 1e-6
"""Relative difference of scores of predictions with and without the posterior's variance that is none."""
Found = tuple[float, Tensor, Tensor | None]
"""A score, and the prior precisions and the second hyperparameter that it belongs to."""

POINTS_PER_DECADE = 2
VALUES_PER_DECADE = 3


@dataclass(frozen=True)
class Joint:
    """The score of hyperparameters on validation data."""

    problem: Problem
    """The fit."""
    data: CachedData
    """Linearized validation data."""
    score: Score
    """What to minimize."""
    fresh_options: Callable[[], Options]
    """How to predict, with the same random numbers every time."""
    dtype: torch.dtype
    """The floating-point type to compute in."""
    second: str | None
    """The hyperparameter chosen beside the prior precision: ``"sigma_noise"``, ``"output_temperature"`` or ``None``."""
    n_values: int
    """How many values it has."""

    @cached_property
    def rotated(self) -> tuple[Any, CachedData]:
        """Coordinates that posteriors with a scalar prior share, and the data in them."""
        if self.second == "sigma_noise" and self.n_values > 1:
            return None, self.data  # each output scales its weights in its own way
        basis = self.problem.basis(torch.ones(1, dtype=self.dtype, device=self.problem.fit.mean.device))
        return basis, self.data.rotated(basis, self.dtype)

    def likelihood(self, value: Tensor | None) -> AbstractLikelihood:
        """With one value of the second hyperparameter."""
        return self.problem.likelihood(**({} if value is None or self.second is None else {self.second: value}))

    def __call__(self, precision: Tensor, value: Tensor | None) -> Tensor:
        """Score at one choice, differentiable."""
        return self.each([precision], [value])[0]

    def each(self, precisions: list[Tensor], values: list[Tensor | None], *, description: str | None = None) -> Tensor:
        """Scores of several choices, which share a posterior where they share a precision and the curvature's scale."""
        # Precisions that are no scalar have no common coordinates unless the structure says so.
        basis, data = self.rotated
        if basis is not None and precisions[0].numel() > 1:
            basis = self.problem.basis(precisions[0])
            data = self.data if basis is None else data
        likelihoods = [self.likelihood(value) for value in values]
        posteriors: dict[Any, Any] = {}
        found = []
        for precision, value, likelihood in zip(precisions, values, likelihoods, strict=True):
            key = (id(precision), id(value) if self.second == "sigma_noise" else None)
            if key not in posteriors:
                posteriors[key] = self.problem.posterior(precision, likelihood, basis)
            found.append(posteriors[key])
        return data.scores(self.score, found, likelihoods, self.fresh_options, self.dtype, description)

    def on_graph(self) -> Tensor:
        """The score somewhere, on the graph of the hyperparameters."""
        like = self.problem.fit.mean
        value = like.new_ones(self.n_values if self.n_values > 1 else ()).requires_grad_()
        with torch.enable_grad():
            return self(like.new_ones(1).requires_grad_(), value)


def tune(
    joint: Joint,
    n_precisions: int,
    limits: Mapping[str, tuple[float, float]],
    *,
    n_steps: int,
    progress_bar: bool = False,
    leave_out: bool = False,
) -> Tuning:
    """Choose hyperparameters by validation; with ``leave_out`` the posterior's variance may be left out of account."""
    check_differentiable(joint.score, joint.on_graph)
    unit = _unit(joint)
    within = {**LIMITS, **limits}
    least, most = within["sigma_noise"]
    within["sigma_noise"] = least * unit, most * unit
    alone, coldest = _network_alone(joint, within, n_steps, progress_bar)
    if joint.second == "output_temperature" and "output_temperature" not in limits:
        if coldest is None:
            warn(_NO_TEMPERATURE, UserWarning)
        within["output_temperature"] = min(1.0, coldest or 1.0), within["output_temperature"][1]

    precisions, values, scores = _grid(joint, within, unit, progress_bar)
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        msg = (
            f"The validation score {joint.score.name!r} is not finite at any of {scores.numel()} points. Check the "
            "validation data and the score; no hyperparameter was changed."
        )
        raise InputError(msg)
    scores = torch.where(finite, scores, torch.inf)
    best = divmod(int(scores.argmin()), scores.shape[1])
    start = precisions[best[0]].reshape(1), None if values is None else values[best[1]].reshape(1)
    found = [_refine(joint, *start, within, n_steps, progress_bar)]
    if n_precisions > 1:
        # From the best single precision, so that more of them are never worse.
        start = found[0][1].expand(n_precisions), found[0][2]
        found.append(_refine(joint, *start, within, n_steps, progress_bar))
    certain = [
        (score, at.expand(n_precisions).clone(), second)
        for score, at, second in alone.values()
        if _allows(within, joint.second, at, second)
    ]
    value, precision, second = min(found + certain, key=lambda item: item[0])
    with_variance, without = (min((item[0] for item in some), default=math.inf) for some in (found, certain))
    uses_variance = not (leave_out and certain) or with_variance < without - SAME_SCORE * abs(without)
    chosen = {"prior_precision": precision.detach()} if uses_variance else {}
    if second is not None and joint.second is not None:
        chosen[joint.second] = second.detach()
    _warn_at_limits(chosen, within, limits, list(alone))
    curve = scores.min(1).values.detach().cpu()
    candidates = {name: score for name, (score, _, _) in alone.items()}
    tried = precisions.detach().cpu()
    return Tuning("validation", joint.score.name, value, chosen, tried, curve, candidates, uses_variance=uses_variance)


def _network_alone(
    joint: Joint, limits: Mapping[str, tuple[float, float]], n_steps: int, progress_bar: bool
) -> tuple[dict[str, Found], float | None]:
    """The network without weight uncertainty: as it is, and at its best temperature or noise.

    Beside them that temperature or noise; ``None`` if it is no optimum but the least that is allowed.
    """
    like = joint.problem.fit.mean
    certain = like.new_full((1,), LIMITS["prior_precision"][1])
    one = torch.ones_like(certain[0]) if joint.second == "output_temperature" else None
    found: dict[str, Found] = {"MAP": (float(joint(certain, one).detach()), certain, one)}
    if joint.second is None:
        return found, None
    least = limits[joint.second][0]
    values = _log_space(*limits[joint.second], VALUES_PER_DECADE, like)
    text = "[Scoring the network alone]" if progress_bar else None
    row = joint.each([certain] * len(values), list(values), description=text).detach()
    if not bool(torch.isfinite(row).any()):
        return found, least  # nothing is known about it
    best = int(torch.where(torch.isfinite(row), row, torch.inf).argmin())
    if joint.second == "output_temperature" and best == 0:
        return found, None
    refined = _refine(joint, certain, values[best].reshape(1), limits, n_steps, progress_bar, fixed=True)
    found[f"MAP with its {joint.second.replace('_', ' ')}"] = refined
    return found, least if refined[2] is None else float(refined[2].min())


def _allows(
    limits: Mapping[str, tuple[float, float]], name: str | None, precision: Tensor, second: Tensor | None
) -> bool:
    """Whether a candidate is within the limits."""
    given = {"prior_precision": precision} | ({} if second is None or name is None else {name: second})
    return all(
        bool(((value >= limits[key][0] * 0.999) & (value <= limits[key][1] * 1.001)).all())
        for key, value in given.items()
    )


def _unit(joint: Joint) -> float:
    """What values of the second hyperparameter are measured in: residuals for the noise."""
    if joint.second != "sigma_noise":
        return 1.0
    likelihood, nll, count = joint.problem.likelihood(), 0.0, 0
    for _, positions in joint.data.batches:
        nll += float(likelihood.nll(positions.f.double(), positions.y.double()))
        count += positions.f.numel()
    unit = float(likelihood.residual_noise(torch.tensor(nll, dtype=torch.float64), count))
    if not unit:
        msg = (
            "The model predicts every validation target exactly, so that no observation noise is best. Use other data."
        )
        raise InputError(msg)
    return unit


def _log_space(low: float, high: float, per_decade: int, like: Tensor) -> Tensor:
    """Powers of ten from ``low`` to ``high``, evenly spaced in the exponent."""
    span = torch.tensor([low, high], dtype=torch.float64).log10()
    n_points = max(2, round(float(span[1] - span[0]) * per_decade) + 1)
    return torch.logspace(float(span[0]), float(span[1]), n_points, dtype=torch.float64).to(like)


def _grid(
    joint: Joint, limits: Mapping[str, tuple[float, float]], unit: float, progress_bar: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Points of both hyperparameters, and scores ``[precisions, values]``; extended while the best is at an end."""
    like = joint.problem.fit.mean
    low, high = (
        float(min(max(edge, limits["prior_precision"][0]), limits["prior_precision"][1])) for edge in (1e-4, 1e4)
    )
    edges = None
    if joint.second is not None:
        least, most = limits[joint.second]
        edges = max(least, min(0.1 * unit, most / 10)), min(most, max(10 * unit, least * 10))
    while True:
        precisions = _log_space(low, high, POINTS_PER_DECADE, like)
        values = None if edges is None else _log_space(*edges, VALUES_PER_DECADE, like)
        seconds: list[Tensor | None] = [None] if values is None else list(values)
        points = [(precision, value) for precision in precisions.split(1) for value in seconds]
        text = f"[Scoring {len(points)} hyperparameters]" if progress_bar else None
        found = joint.each([precision for precision, _ in points], [value for _, value in points], description=text)
        scores = found.detach().reshape(len(precisions), len(seconds))
        best = divmod(int(torch.where(torch.isfinite(scores), scores, torch.inf).argmin()), scores.shape[1])
        moved = _extended(best[0], len(precisions), (low, high), limits["prior_precision"], 1e4)
        wider = edges
        if edges is not None and values is not None and joint.second is not None:
            wider = _extended(best[1], len(values), edges, limits[joint.second], 10.0)
        if moved == (low, high) and wider == edges:
            return precisions, values, scores
        (low, high), edges = moved, wider


def _extended(
    best: int, size: int, edges: tuple[float, float], limits: tuple[float, float], factor: float
) -> tuple[float, float]:
    """A wider bracket where the best point is at an end that is not the limit."""
    low, high = edges
    if best == 0 and low > limits[0]:
        low = max(limits[0], low / factor)
    elif best == size - 1 and high < limits[1]:
        high = min(limits[1], high * factor)
    return low, high


def _refine(
    joint: Joint,
    start: Tensor,
    value: Tensor | None,
    limits: Mapping[str, tuple[float, float]],
    n_steps: int,
    progress_bar: bool,
    *,
    fixed: bool = False,
) -> Found:
    """The optimum near a point of the grid; with ``fixed`` over the second hyperparameter alone."""
    second = start.new_zeros(0) if value is None else value.reshape(-1).expand(joint.n_values)
    n_free = 0 if fixed else len(start)

    def split(v: Tensor) -> tuple[Tensor, Tensor | None]:
        free = start if fixed else v[:n_free]
        if value is None:
            return free, None
        return free, v[n_free:] if joint.n_values > 1 else v[n_free:].reshape(())

    def objective(v: Tensor) -> Tensor:
        return -joint(*split(v))

    low, high = (torch.full_like(start[:n_free], edge) for edge in limits["prior_precision"])
    if joint.second is not None and value is not None:
        least, most = limits[joint.second]
        low = torch.cat([low, torch.full_like(second, least)])
        high = torch.cat([high, torch.full_like(second, most)])
    values, best = optimize(
        objective,
        torch.cat([start[:n_free], second]),
        n_steps=n_steps,
        lr=0.3,
        bounds=(low, high),
        progress_bar=progress_bar,
        description="[Refining hyperparameters]",
    )
    return -best, *split(values)


def _warn_at_limits(
    chosen: Mapping[str, Tensor],
    limits: Mapping[str, tuple[float, float]],
    given: Mapping[str, tuple[float, float]],
    alone: list[str],
) -> None:
    for name, value in chosen.items():
        low, high = limits[name]
        if name == "prior_precision" and bool((value >= LIMITS[name][1] * 0.999).all()):
            msg = (
                f"The validation score is best without weight uncertainty: the prior precision stays at its limit "
                f"{high:.3g}, and predictions are those of the network ({', '.join(alone)})."
            )
        elif name == "output_temperature" and name not in given and bool((value <= low * 1.001).all()):
            continue  # the least temperature is the network's own, or the default of 1: not one to move
        elif bool(((value <= low * 1.001) | (value >= high * 0.999)).any()):
            msg = (
                f"The best {name.replace('_', ' ')} stays at its limits ({low:.3g} to {high:.3g}); the score may "
                f"improve beyond them. Pass other limits={{{name!r}: (low, high)}}."
            )
        else:
            continue
        warn(msg, UserWarning)


__all__ = ["LIMITS", "Joint", "tune"]
