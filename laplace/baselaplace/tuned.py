"""What tuning sees of an estimator's data, and what it assigns."""

# Functions of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from laplace import processes, tuning
from laplace.baselaplace import untuned
from laplace.baselaplace.adjustments import Adjustments
from laplace.enums import TuningMethod
from laplace.errors import UnsupportedError, warn
from laplace.network import evaluating
from laplace.network.shards import in_turn, is_collective
from laplace.predictive import Linearization
from laplace.types import Inputs

if TYPE_CHECKING:
    from laplace.baselaplace.fitted import FittedLaplace


def by_method(
    la: FittedLaplace, method: TuningMethod | None, asked: tuning.Settings, *further: Any, verbose: bool
) -> tuning.Tuning:
    """Choose by a method, or by validation data, and assign it; the caller brings all back where that fails."""
    problem, collect = la._problem(), partial(collected, la, asked)
    if method in tuning.REFITS and (asked.refit is not False or problem.fit.trained is not None):
        problem = replace(problem, output_temperature=1.0)  # another head: a temperature of the present one is not its
    if method is None:
        found, fit = tuning.by_validation(problem, asked, collect, *further), problem.fit
    else:
        found, fit = tuning.METHODS[method](problem, asked, collect)
    if fit is not problem.fit:
        likelihood = la._unit_likelihood
        # A classifier is predicted best by the refitted mode alone.
        classes = "output_temperature" in likelihood.hyperparameters
        alone = method is TuningMethod.LOO and fit.trained is not None and classes
        adjustments = Adjustments(not alone, contrasts=fit.averaged and likelihood.ignores_shifts)
        vars(la).update(_fit=fit, _adjustments=adjustments)
    if problem.output_temperature != la._output_temperature:
        la.output_temperature = problem.output_temperature
    if method not in (None, *tuning.REFITS) and not getattr(la, "weight_uncertainty", True):
        msg = (
            f"method={method.value!r} chose a prior precision, but predictions leave the posterior's variance out, "
            "as tune or loo chose. They change with la.weight_uncertainty = True."
        )
        warn(msg, UserWarning)
    return assign(la, found, verbose=verbose)


def collected(la: FittedLaplace, asked: tuning.Settings, loader: Iterable[Any] | None, what: str) -> tuning.CachedData:
    """Linearized data of a loader, after their one pass; without one, features that ``fit`` kept."""
    if loader is None:
        kept: tuning.HeadData | None = getattr(la, "_kept", None)
        if kept is None:
            reason = getattr(la, "_why_not", ("", "A posterior over functions keeps none."))[1]
            msg = f"The features of the {what} data are needed. {reason} Pass train_loader=, the loader that fit had."
            raise UnsupportedError(msg)
        return kept.at(kept.outputs(la._fitted.mean))

    def linearize(x: Inputs) -> Linearization:
        with evaluating(la.model):
            return la._for_tuning(asked.options.pred_type, x)

    with processes.agreed() as team, evaluating(la.model):
        batches = la._iterate(loader, asked.progress_bar, f"[Linearizing at {what} data]")
        if team is not None and not _sees_features(la):
            batches, team = in_turn(team, batches, la._device), None
        return tuning.CachedData.collect(batches, linearize, la._frozen_likelihood, what, team, la._device)


def _sees_features(la: FittedLaplace) -> bool:
    """Whether tuning sees features of a last layer, that each process can make of its own data."""
    likelihood, over_weights = la._unit_likelihood, hasattr(la, "_kept")
    alone = over_weights and not is_collective(la.model) and likelihood.for_targets() is likelihood
    return la._random_weights.of_head and alone


def assign(la: FittedLaplace, found: tuning.Tuning, *, verbose: bool) -> tuning.Tuning:
    """Take over what tuning chose; the caller brings all back where it fails."""
    for name, value in found.hyperparameters.items():
        setattr(la, name, value.detach())
    la.tuning_ = found
    if verbose:
        print(f"Optimized {found}")
    untuned.hint_once(found.method, la._unit_likelihood)
    return found


__all__ = ["assign", "by_method", "collected"]
