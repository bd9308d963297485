"""How hyperparameters are chosen: a function for each method of ``optimize_prior_precision``, and that of ``tune``.

Each takes a ``Problem`` (what was learned), ``Settings`` (what was asked for) and a way to read data, and returns a
``Tuning``; nothing is assigned here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace import checks
from laplace.enums import CurvatureKind, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import InputError, UnsupportedError
from laplace.fit import Fit
from laplace.network import full_precision
from laplace.prior import GaussianPrior
from laplace.tuning.cached import CachedData
from laplace.tuning.elbo import NOTES, best_gaussian, check_family
from laplace.tuning.gridsearch import log_grid, search, warn_at_end
from laplace.tuning.head import HeadData, check_same_data, fit_at, fit_at_own
from laplace.tuning.joint import LIMITS, Joint, tune
from laplace.tuning.kfold import cross_validation_scores
from laplace.tuning.loo import refitted_leave_one_out_scores
from laplace.tuning.marglik import maximize_evidence, warn_of_interpolation
from laplace.tuning.newton import Head, mode
from laplace.tuning.problem import Problem
from laplace.tuning.result import Tuning
from laplace.tuning.scores import Score, choose_score, seed_of
from laplace.tuning.settings import Collect, Found, Settings, spread


def by_evidence(problem: Problem, asked: Settings, collect: Collect) -> Found:
    """The log marginal likelihood of the training data."""
    assert asked.start is not None, "the caller says where to start"
    _check_refit(asked.refit, TuningMethod.MARGLIK)
    start, structure, sizes = asked.start, asked.structure, problem.sizes
    if start.numel() > 1 and structure is PriorStructure.SCALAR:  # several values bring their structure with them
        brought = {len(sizes): PriorStructure.LAYERWISE, sum(sizes): PriorStructure.DIAG}
        structure = brought.get(start.numel(), structure)
    start = spread(structure, start, problem)
    problem.check_prior(problem.prior(start))
    best, sigma, value, n_clipped = maximize_evidence(
        problem,
        start,
        _first_noise(problem, asked.noise),
        n_steps=asked.n_steps,
        lr=asked.lr,
        bounds=asked.bounds,
        progress_bar=asked.progress_bar,
    )
    chosen = {"prior_precision": best}
    if sigma is not None:
        chosen["sigma_noise"] = sigma
        warn_of_interpolation(problem, best, sigma, partial(collect, None, "training"))
    curve = best.reshape(-1)[:1].cpu(), torch.tensor([value])
    return Tuning("marglik", "log marginal likelihood", value, chosen, *curve, n_clipped=n_clipped), problem.fit


def by_grid(method: TuningMethod, problem: Problem, asked: Settings, collect: Collect) -> Found:
    """The point of a grid with the lowest loss, by one of ``SCORES``."""
    assert asked.grid is not None, "the caller says what to try"
    _refuse_noise(asked)
    _check_refit(asked.refit, method)
    score = choose_score(asked.loss, problem.likelihood(), asked.options.pred_type)
    grid = asked.grid.to(problem.fit.mean)
    shaped = partial(spread, asked.structure, problem=problem)
    problem.check_prior(problem.prior(shaped(grid[:1])))
    what, keyword = ("validation", "val_loader") if method is TuningMethod.GRIDSEARCH else ("training", "train_loader")
    loader = getattr(asked, keyword)
    if loader is None:
        msg = f'method="{method.value}" scores hyperparameters on {what} data: pass {keyword}=.'
        raise InputError(msg)
    data = collect(loader, what)
    with torch.no_grad(), full_precision(grid.device):
        scored = SCORES[method](problem, asked, data, score, grid)
        point, scores = search(scored, grid, progress_bar=asked.progress_bar)
        precision, fit = shaped(point.reshape(1)), problem.fit
        if method is TuningMethod.LOO:
            fit = refitted(problem, HeadData.collect(data, grid.dtype), problem.prior(precision), asked.refit)
    value = float(scores[torch.isfinite(scores)].min())
    return Tuning(method.value, score.name, value, {"prior_precision": precision}, grid.cpu(), scores), fit


def by_elbo(problem: Problem, asked: Settings, collect: Collect) -> Found:
    """The evidence lower bound of a Gaussian that is fitted to the posterior of a head, over a grid."""
    assert asked.grid is not None, "the caller says what to try"
    _refuse_noise(asked)
    _check_refit(asked.refit, TuningMethod.ELBO)
    if asked.refit is False:
        msg = 'method="elbo" fits mean and covariance together: leave out refit=False, or use method="marglik".'
        raise UnsupportedError(msg)
    likelihood, structure, mean = problem.likelihood(), problem.structure, problem.fit.mean
    _check_head(problem, "elbo")
    likelihood.check_rows()
    likelihood.check_variational_head(problem.fit.n_outputs)
    check_family(structure, len(mean))
    shaped = partial(spread, asked.structure, problem=problem)
    grid = asked.grid.to(mean)
    problem.check_prior(problem.prior(shaped(grid[:1])))
    data = HeadData.collect(collect(asked.train_loader, "training"), mean.dtype)
    with torch.no_grad(), full_precision(grid.device):
        check_same_data(problem.fit, data, likelihood)
        seed = seed_of(asked.options.generator)
        found = best_gaussian(problem, data, [shaped(point) for point in grid.split(1)], seed, asked.progress_bar)
    warn_at_end(grid, found.best)
    chosen = {"prior_precision": shaped(grid[found.best : found.best + 1])}
    curve = grid[list(found.values)].cpu(), torch.tensor(list(found.values.values()), dtype=torch.float64)
    score = "evidence lower bound"
    return Tuning("elbo", score, found.values[found.best], chosen, *curve, notes=NOTES), found.fit


def refitted(problem: Problem, data: HeadData, prior: GaussianPrior, wanted: bool | None) -> Fit:
    """The fit at the mode of the head under a prior; at that of the model where no other is wanted or possible."""
    fit, likelihood = problem.fit, problem.likelihood()
    if fit.is_unknown:
        if wanted:
            msg = "refit=True: weights or curvature were assigned by hand, which another head would replace. Fit again."
            raise UnsupportedError(msg)
        return fit
    if wanted is False and fit.trained is None:
        return fit
    check_same_data(fit, data, likelihood)
    if wanted is False:
        return fit_at_own(fit, data, likelihood, problem.structure)
    data = data.to(fit.mean)
    theta = mode(Head(data.phi, data.y, data.shapes, likelihood, prior), fit.mean)
    return fit_at(fit, data, theta, likelihood, problem.structure)


REFITS = (TuningMethod.LOO, TuningMethod.ELBO)
"""Methods that move the head."""


def _check_refit(refit: Any, method: TuningMethod) -> None:
    if refit is None:
        return
    checks.flag("refit", refit)
    if method not in REFITS:
        msg = (
            f'refit= goes with method="loo"; method="{method.value}" leaves the weights as they are. Leave it out, or '
            'use tune(val_loader), which refits the head, method="loo" or method="elbo".'
        )
        raise UnsupportedError(msg)


def _refuse_noise(asked: Settings) -> None:
    if asked.noise != "keep":
        msg = f"noise={asked.noise!r} goes with method='marglik'; by validation tune(val_loader) chooses it, too."
        raise UnsupportedError(msg)


def _on_validation_data(
    problem: Problem, asked: Settings, data: CachedData, score: Score, grid: Tensor
) -> Callable[[Tensor], Tensor]:
    """From points of a grid to their scores on validation data, in the coordinates that all posteriors share."""
    likelihood, fresh = problem.likelihood(), asked.repeated(grid.device)
    basis = problem.basis(grid[:1]) if asked.options.pred_type is PredType.GLM else None
    rotated = data.rotated(basis, grid.dtype)

    def scores(points: Tensor) -> Tensor:
        posteriors = [problem.posterior(point, likelihood, basis) for point in points.split(1)]
        return rotated.scores(score, posteriors, [likelihood] * len(posteriors), fresh, grid.dtype)

    return scores


def _left_out(
    method: TuningMethod, problem: Problem, asked: Settings, data: CachedData, score: Score, grid: Tensor
) -> Callable[[Tensor], Tensor]:
    """From points of a grid to their scores on training data that were left out, the head at its best weights."""
    likelihood, fresh = problem.likelihood(), asked.repeated(grid.device)
    _check_head(problem, method.value)
    head, common = HeadData.collect(data, grid.dtype), {"initial": problem.fit.mean}
    seed = seed_of(asked.options.generator)

    def refitted(points: Tensor) -> Tensor:
        priors = [problem.prior(point) for point in points.split(1)]
        arguments = head, score, priors, likelihood, problem.structure, fresh
        if method is TuningMethod.LOO:
            return refitted_leave_one_out_scores(*arguments, **common)
        dealt = torch.Generator().manual_seed(seed)  # the same folds for all of the grid
        return cross_validation_scores(*arguments, n_folds=asked.n_folds, generator=dealt, **common, **problem.options)

    return refitted


def _check_head(problem: Problem, method: str) -> None:
    """Raise unless there is a head whose curvature can be taken again; ``"cv"`` says of other weights what it needs."""
    if method != TuningMethod.CV.value and problem.fit.head is None:
        msg = (
            f'method="{method}" compares priors each at its own best weights, which takes a last layer: where weights '
            "stay as they are, the score tends to the training loss and favors the strongest prior, whatever the "
            'data say. Use method="marglik", or validation data: tune(val_loader).'
        )
        raise UnsupportedError(msg)
    if problem.kind is not CurvatureKind.GGN:
        msg = (
            f'method="{method}" takes the curvature of the head again at other weights, by the generalized '
            "Gauss–Newton matrix; this back end computes an empirical Fisher. Use a GGN back end, or gridsearch."
        )
        raise UnsupportedError(msg)


SCORES: Mapping[TuningMethod, Callable[..., Callable[[Tensor], Tensor]]] = {
    TuningMethod.GRIDSEARCH: _on_validation_data,
    TuningMethod.LOO: partial(_left_out, TuningMethod.LOO),
    TuningMethod.CV: partial(_left_out, TuningMethod.CV),
}
"""From problem, settings, data, score and grid to the score of each point."""

METHODS: Mapping[TuningMethod, Callable[[Problem, Settings, Collect], Found]] = {
    TuningMethod.MARGLIK: by_evidence,
    TuningMethod.ELBO: by_elbo,
    **{method: partial(by_grid, method) for method in SCORES},
}
"""The methods of ``optimize_prior_precision``; each finds hyperparameters, and the fit that belongs to them."""


def check_val_loader(asked: Settings) -> None:
    """Raise where there are no validation data."""
    if asked.val_loader is None:
        msg = "tune scores hyperparameters on validation data: pass val_loader=."
        raise InputError(msg)


def by_validation(
    problem: Problem,
    asked: Settings,
    collect: Collect,
    output_temperature: Any,
    limits: Mapping[str, tuple[float, float]],
    *,
    leave_out: bool = False,
) -> Tuning:
    """Prior precision and noise, or output temperature, together, by a proper score of validation data (``tune``)."""
    second, n_values = beside_prior(problem, asked.noise, output_temperature)
    measure = choose_score(asked.loss, problem.likelihood(), asked.options.pred_type, keyword="score")
    if measure.name == "ece":
        msg = (
            "tune needs a proper score; the calibration error is best for a network that predicts shares of "
            'classes. Use score="nll" or "brier", or optimize_prior_precision(method="gridsearch", loss="ece").'
        )
        raise UnsupportedError(msg)
    n_precisions = 1 if asked.structure is PriorStructure.SCALAR else len(problem.sizes)
    problem.check_prior(problem.prior(problem.fit.mean.new_ones(n_precisions)))
    check_val_loader(asked)
    data = collect(asked.val_loader, "validation")
    if n_values > 1:
        n_values = problem.fit.n_outputs
    mean = problem.fit.mean
    with torch.no_grad(), full_precision(mean.device):
        joint = Joint(problem, data, measure, asked.repeated(mean.device), mean.dtype, second, n_values)
        return tune(
            joint, n_precisions, limits, n_steps=asked.n_steps, progress_bar=asked.progress_bar, leave_out=leave_out
        )


def beside_prior(problem: Problem, noise: Any, output_temperature: Any) -> tuple[str | None, int]:
    """The hyperparameter that goes with the prior precision, and whether it has one value or several."""
    if not (noise is None or (isinstance(noise, str) and noise in ("keep", "scalar", "per_output"))):
        msg = f"noise must be 'keep', 'scalar' or 'per_output'; got {noise!r}."
        raise UnsupportedError(msg)
    if output_temperature is not None:
        output_temperature = checks.flag("output_temperature", output_temperature)
    found = problem.likelihood().beside_prior(noise, output_temperature)
    if noise == "per_output" and problem.fit.head is None:
        msg = (
            "noise='per_output' is chosen where each random weight belongs to one output: with a last layer, except "
            "for LLELLA, whose features outputs share. Use noise='scalar'; or, except for ELLA and LLELLA, assign a "
            "sigma_noise for each output and call fit again."
        )
        raise UnsupportedError(msg)
    return found


def _first_noise(problem: Problem, noise: Any) -> Tensor | None:
    """The residuals' size, if the noise is to be chosen."""
    if noise == "keep":
        return None
    if noise is None:
        msg = "noise must be 'keep', 'scalar' or 'per_output'; got None."
        raise UnsupportedError(msg)
    beside_prior(problem, noise, None)
    found = problem.residual_noise(per_output=noise == "per_output")
    if not bool((found > 0).all()):
        msg = "The model fits every training target exactly: no observation noise is best. Keep a noise of your own."
        raise InputError(msg)
    return found


# -- what users pass --------------------------------------------------------------------------------------------------


def checked_steps(verbose: Any, progress_bar: Any, n_steps: Any, lr: Any = 1.0) -> tuple[bool, int, float]:
    """What every way of tuning is told: ``verbose``, ``n_steps`` and ``lr``; ``progress_bar`` must be a flag, too."""
    checks.flag("progress_bar", progress_bar)
    return checks.flag("verbose", verbose), checks.whole("n_steps", n_steps, 0), checks.number("lr", lr, positive=True)


def checked_grid(low: Any, high: Any, size: Any, base: Any) -> Tensor:
    """The grid of prior precisions that exponents, a number of points and a base of a user say."""
    return log_grid(
        checks.number("log_prior_prec_min", low),
        checks.number("log_prior_prec_max", high),
        checks.whole("grid_size", size),
        checks.number("log_prior_prec_base", base, positive=True),
    )


def chosen_method(method: Any) -> TuningMethod:
    """A method by its name, as in ``optimize_prior_precision``."""
    if method == "CV":
        msg = (
            "method='CV' was the old name of laplace-torch for grid search on validation data: pass "
            "method='gridsearch', val_loader=loader. Cross-validation on training data is method='cv', "
            "train_loader=loader."
        )
        raise UnsupportedError(msg)
    return choose(TuningMethod, method, "method")


def checked_limits(name: str, edges: Any) -> tuple[float, float]:
    """Two positive finite numbers in order."""
    try:
        low, high = (checks.number(name, edge) for edge in edges)
    except (TypeError, ValueError) as error:
        msg = f"{name} must be two numbers (low, high); got {edges!r}."
        raise InputError(msg) from error
    if not 0 < low < high < float("inf"):
        msg = f"{name} must be (low, high) with 0 < low < high, both finite; got ({low}, {high})."
        raise InputError(msg)
    return low, high


def not_diagonal(structure: PriorStructure) -> PriorStructure:
    """A prior structure that validation data can choose."""
    if structure is PriorStructure.DIAG:
        msg = (
            "A precision for each weight has as many values as validation data can never tell apart: choose it by "
            'evidence, optimize_prior_precision(method="marglik", prior_structure="diag").'
        )
        raise UnsupportedError(msg)
    return structure


def checked_limits_by_name(limits: Any) -> dict[str, tuple[float, float]]:
    """Limits of hyperparameters, by their names."""
    given = {}
    for name, edges in checks.keywords("limits", limits).items():
        if name not in LIMITS:
            msg = f"limits has no hyperparameter {name!r}; it may hold {', '.join(map(repr, LIMITS))}."
            raise UnsupportedError(msg)
        given[name] = checked_limits(f"limits[{name!r}]", edges)
    return given


def refuse_temperature(temperature: Any) -> None:
    """Raise where a temperature is to be chosen by evidence."""
    if checks.flag("temperature", temperature):
        msg = (
            "The evidence grows without end with the temperature of the likelihood, which is not normalized: no "
            "value is best. Choose the output temperature on validation data instead: tune(val_loader)."
        )
        raise UnsupportedError(msg)


__all__ = [
    "METHODS",
    "by_validation",
    "checked_grid",
    "checked_limits",
    "checked_limits_by_name",
    "checked_steps",
    "chosen_method",
    "refuse_temperature",
]
