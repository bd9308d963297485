"""What a validation score is (``loss=`` of grid search, ``score=`` of ``tune``).

Scores that are sums over rows are differentiable and never hold all predictions; others (a callable, a metric, the
calibration error) see all predictions at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace.enums import PredType
from laplace.errors import InputError, UnsupportedError, quiet
from laplace.evaluation.metrics import calibration_error
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.base import Link

Additive = Callable[[AbstractLikelihood, Tensor, Tensor, Tensor, Link], Tensor]
"""Likelihood, mean, (co)variance, targets and link → sum over rows, ``[]``."""

Loss = Callable[..., Any]
"""``loss(probabilities, targets)``, or ``loss(means, covariances, targets)`` for regression → a number to minimize."""


@runtime_checkable
class RunningMetric(Protocol):
    """A score that is fed batch by batch, as those of torchmetrics are."""

    def update(self, *args: Any) -> None:
        """Take a batch of predictions and targets."""
        ...

    def compute(self) -> Any:
        """The score of all batches so far."""
        ...

    def reset(self) -> None:
        """Start again."""
        ...


@dataclass(frozen=True)
class Score:
    """A number to minimize over validation data."""

    name: str
    """As users write it."""
    additive: Additive | None = None
    """Sum over rows, differentiable; ``None`` if the score needs all predictions."""
    whole: Loss | None = None
    """Function of all predictions and targets; ``None`` if the score is a sum."""
    sign: int = 1
    """−1 for a metric of which more is better: its negative is minimized."""


def choose_score(loss: Any, likelihood: AbstractLikelihood, pred_type: PredType, *, keyword: str = "loss") -> Score:
    """Turn a name, a function of all predictions and targets, or a metric into a score; ``None`` is ``"nll"``."""
    if loss is None:
        return Score("nll", additive=partial(_additive, "nll"))
    if isinstance(loss, str):
        return _named(loss, likelihood, keyword)
    if isinstance(loss, RunningMetric):
        return _metric(loss, likelihood, pred_type)
    if not callable(loss) or isinstance(loss, type):
        msg = f"{keyword} must be a name, a function or a metric with update() and compute(); got {loss!r}."
        raise InputError(msg)
    return Score(getattr(loss, "__name__", type(loss).__name__), whole=loss)


def _named(name: str, likelihood: AbstractLikelihood, keyword: str) -> Score:
    likelihood = likelihood.for_targets()
    known = likelihood.scores()
    if name == "mse" and name not in known and "sigma_noise" in likelihood.hyperparameters:
        msg = (
            f"{keyword}='mse': the squared error of the mean does not depend on prior precision or noise, so there is "
            f"nothing to choose by it. Use one of {', '.join(map(repr, known))}."
        )
        raise UnsupportedError(msg)
    if name not in known:
        names = ", ".join(map(repr, known))
        msg = f"{keyword} must be one of {names} for {likelihood.name}, or a function; got {name!r}."
        raise UnsupportedError(msg)
    if known[name] is None:
        return Score(name, whole=partial(WHOLE[name], likelihood))
    return Score(name, additive=partial(_additive, name))


def _additive(name: str, likelihood: AbstractLikelihood, mean: Tensor, cov: Tensor, y: Tensor, link: Link) -> Tensor:
    """A score that is a sum over rows."""
    score = likelihood.scores()[name]
    assert score is not None, "chosen above"
    return score(mean, cov, y, link)


def _calibration_error(likelihood: AbstractLikelihood, prediction: Tensor, y: Tensor) -> float:
    """The expected calibration error; of soft labels the largest class counts."""
    probabilities, label = likelihood.probabilities(prediction).double(), likelihood.label(y)
    if label.is_floating_point():
        known = label.sum(-1) > 0  # of a missing label nothing is
        probabilities, label = probabilities[known], label[known]
    return calibration_error(probabilities, label.argmax(-1) if label.is_floating_point() else label)


WHOLE: dict[str, Callable[..., float]] = {"ece": _calibration_error}
"""Scores that need all predictions: likelihood, predictions, targets."""


def _metric(metric: RunningMetric, likelihood: AbstractLikelihood, pred_type: PredType) -> Score:
    """A metric of torchmetrics or of its kind, computed from scratch at each point."""
    name = type(metric).__name__
    only_means = likelihood.for_targets().check_metric(name, takes(metric.update, (None,) * 3), pred_type)

    def whole(*predictions: Tensor) -> float:
        metric.reset()
        metric.update(*((predictions[0], predictions[-1]) if only_means else predictions))
        return float(metric.compute())

    return Score(name, whole=whole, sign=-1 if getattr(metric, "higher_is_better", None) else 1)


def check_differentiable(score: Score, evaluate: Callable[[], Tensor]) -> None:
    """Raise if no gradient goes through a score: what it returns says so, before any search."""
    if score.additive is not None:
        return  # one of ours
    msg = (
        f"tune needs a differentiable score: {score.name!r} returned a number without a gradient. Use torch "
        'operations, or optimize_prior_precision(method="gridsearch", loss=...), which needs none.'
    )
    try:
        with quiet("Converting a tensor with requires_grad"):
            found = evaluate()
    except RuntimeError as error:
        if "requires grad" not in str(error):  # torch's words where a tensor becomes an array of NumPy
            raise
        raise InputError(msg) from error
    if not found.requires_grad:
        raise InputError(msg)


def seed_of(generator: torch.Generator | None) -> int:
    """A seed of the random numbers that all points share: 0 without a generator; the global one is left alone."""
    return 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))


def takes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    """Whether a function can be called with these positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True
