"""How good are error bars: metrics of predicted means and standard deviations, and a table that compares regressors.

Every function takes means and standard deviations of targets, noise included, of any predictor: those of a Laplace
approximation are ``p = la.predict(x)``, ``p.mean`` and ``p.total_variance.sqrt()``. Numbers are computed in float64.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import checks
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation.report import Report
from laplace.evaluation.temperature import device_of
from laplace.network import batches, evaluating
from laplace.network.outputs import Reading
from laplace.types import Inputs

Regressor: TypeAlias = Callable[[Inputs], "tuple[Tensor, Tensor]"]
"""Inputs of one batch to means and standard deviations of targets; a fitted estimator ``la`` may stand for one."""
Loader: TypeAlias = Iterable[Any]

_NORMAL = torch.distributions.Normal(0.0, 1.0)


def checked(mean: Tensor, std: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations and targets of equal shapes in float64; positive and finite."""
    shapes = tuple(mean.shape), tuple(std.shape), tuple(y.shape)
    if len(set(shapes)) > 1 or not mean.numel():
        msg = f"Expected means, standard deviations and targets of one shape, at least one each; got {shapes}."
        raise ShapeError(msg)
    mean, std, y = (value.detach().double() for value in (mean, std, y))
    if not bool(torch.isfinite(mean).all() & torch.isfinite(y).all() & torch.isfinite(std).all() & (std > 0).all()):
        msg = "Means and targets must be finite, standard deviations positive and finite."
        raise InputError(msg)
    return mean, std, y


def rmse(mean: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> float:
    """Root of the mean squared error, in target units.

    Parameters
    ----------
    mean, y
        Predicted means and targets, of one shape.

    Returns
    -------
    A number from 0.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If a value is not finite.
    """
    mean, _, y = checked(mean, torch.ones_like(mean), y)
    return float((mean - y).square().mean().sqrt())


def gaussian_nll(mean: Float[Tensor, "..."], std: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> float:
    """Mean of −log N(y; mean, std²), in nats for each target.

    Parameters
    ----------
    mean, std, y
        Predicted means, standard deviations and targets, of one shape.

    Returns
    -------
    The mean over targets. It changes by log s where targets are in units s times as small.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If a value is not finite, or a standard deviation is not positive.
    """
    mean, std, y = checked(mean, std, y)
    z = (y - mean) / std
    return float((0.5 * z.square() + std.log()).mean() + 0.5 * math.log(2 * math.pi))


def crps(mean: Float[Tensor, "..."], std: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> float:
    """Continuous ranked probability score of Gaussian predictions, in target units: an absolute error of distributions.

    Parameters
    ----------
    mean, std, y
        As of ``gaussian_nll``.

    Returns
    -------
    The mean over targets, from 0; of a prediction without error bars it is the mean absolute error.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If a value is not finite, or a standard deviation is not positive.

    References
    ----------
    Gneiting & Raftery (2007), "Strictly proper scoring rules, prediction, and estimation", equation 21.
    """
    mean, std, y = checked(mean, std, y)
    z = (y - mean) / std
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return float((std * (z * (2 * _NORMAL.cdf(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))).mean())


def coverage(
    mean: Float[Tensor, "..."], std: Float[Tensor, "..."], y: Float[Tensor, "..."], level: float = 0.9
) -> float:
    """Share of the targets within the central interval of a Gaussian prediction.

    Parameters
    ----------
    mean, std, y
        As of ``gaussian_nll``.
    level
        Probability that the interval claims, between 0 and 1.

    Returns
    -------
    ``level``, for error bars that can be taken at their word.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If a value is not finite, a standard deviation is not positive, or ``level`` is not between 0 and 1.
    """
    mean, std, y = checked(mean, std, y)
    return float(((y - mean).abs() <= half_width(level) * std).double().mean())


def half_width(level: float) -> float:
    """Half the central interval of a standard normal that holds this probability."""
    if not 0 < level < 1:
        msg = f"level is a probability between 0 and 1; got {level!r}."
        raise InputError(msg)
    return float(_NORMAL.icdf(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def calibration_curve(
    mean: Float[Tensor, "..."], std: Float[Tensor, "..."], y: Float[Tensor, "..."], n_levels: int = 19
) -> tuple[Float[Tensor, " levels"], Float[Tensor, " levels"]]:
    """Levels between 0 and 1, and the share of targets below the quantile that a prediction gives to each.

    Parameters
    ----------
    mean, std, y
        As of ``gaussian_nll``.
    n_levels
        How many, evenly spaced.

    Returns
    -------
    Levels and shares, ``[n_levels]`` each in float64; equal for error bars that can be taken at their word.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If a value is not finite, a standard deviation is not positive, or there is no level.

    References
    ----------
    Kuleshov, Fenner & Ermon (2018), "Accurate uncertainties for deep learning using calibrated regression",
    arXiv:1807.00263.
    """
    mean, std, y = checked(mean, std, y)
    if n_levels < 1:
        msg = f"n_levels is a number from 1; got {n_levels}."
        raise InputError(msg)
    levels = torch.arange(1, n_levels + 1, dtype=torch.float64) / (n_levels + 1)
    below = _NORMAL.cdf((y - mean) / std).flatten().cpu()
    return levels, (below.unsqueeze(1) <= levels).double().mean(0)


def compare_regressors(
    model: nn.Module,
    estimators: Mapping[str, Any],
    test_loader: Loader,
    *,
    val_loader: Loader,
    level: float = 0.9,
    timed: bool = True,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
) -> Report:
    """Evaluate a network with one noise for all inputs, and other regressors, on the same data.

    Parameters
    ----------
    model
        The trained regressor. It gives the row ``MAP``, with the noise of each output that is most likely on the
        validation data.
    estimators
        Further rows by name: fitted Laplace estimators, or functions from inputs to means and standard deviations.
    test_loader
        Data like those the network was trained on. Loaders are read several times: pass no iterators.
    val_loader
        Chooses the noise of ``MAP``, and nothing else.
    level
        Of the intervals whose coverage and width are columns.
    timed
        Measure ``predict ms``, which takes three more passes over the test data.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.

    Returns
    -------
    Columns ``RMSE``, ``NLL`` (nats per target), ``CRPS``, ``coverage 90 %`` and ``width 90 %`` (both of the central
    interval; RMSE, CRPS and width in target units), and ``predict ms`` (for all test data).

    Raises
    ------
    InputError
        If a loader is empty, or predictions or targets are not finite.
    ShapeError
        If predictions and targets have different shapes.
    UnsupportedError
        If an estimator predicts no numbers.
    """
    timed = checks.flag("timed", timed)
    device = device_of(model)
    known = next((e for e in estimators.values() if isinstance(e, SupportsReading)), None)
    reading = Reading.of(*(None,) * 3) if known is None else Reading.of(known.output_key, known.output_fn, None)

    def outputs(x: Inputs) -> Tensor:
        with evaluating(model), torch.no_grad():
            found = reading.tensor(batches.call(model, x, dict_key_x=dict_key_x, dict_key_y=dict_key_y))
            return found.unsqueeze(-1) if found.dim() == 1 else found

    def predictions(predictor: Regressor, loader: Loader) -> tuple[Tensor, Tensor, Tensor, float]:
        """Means, standard deviations and targets of all rows, and the seconds in the predictor."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        seconds = 0.0
        for x, y in batches.iterate(loader, dict_key_y=dict_key_y, device=device):
            start = time.perf_counter()
            mean, std = (value.detach().cpu() for value in predictor(x))
            seconds += time.perf_counter() - start
            found.append((mean, std, y.cpu().reshape(mean.shape) if y.numel() == mean.numel() else y.cpu()))
        if not found:
            msg = "The loader is empty: it yields no batch, or it was an iterator that had been used up."
            raise InputError(msg)
        mean, std, y = (torch.cat(part) for part in zip(*found, strict=True))
        return mean, std, y, seconds

    mean, _, y, _ = predictions(lambda x: ((f := outputs(x)), torch.ones_like(f)), val_loader)
    noise = (mean - y).double().square().mean(0).sqrt().to(mean)
    predictors: dict[str, Regressor] = {"MAP": lambda x: ((f := outputs(x)), noise.to(f).expand_as(f))}
    if "MAP" in estimators:
        msg = "The name 'MAP' is taken by the network itself; choose another."
        raise InputError(msg)
    predictors.update({name: regressor(name, one) for name, one in estimators.items()})
    percent, rows = f"{100 * level:g} %", dict[str, dict[str, float]]()
    for name, predictor in predictors.items():
        mean, std, y, _ = predictions(predictor, test_loader)
        rows[name] = {
            "RMSE": rmse(mean, y),
            "NLL": gaussian_nll(mean, std, y),
            "CRPS": crps(mean, std, y),
            f"coverage {percent}": coverage(mean, std, y, level),
            f"width {percent}": 2 * half_width(level) * float(std.double().mean()),
        }
        if timed:
            times = (predictions(predictor, test_loader)[3] for _ in range(3))
            rows[name]["predict ms"] = 1e3 * statistics.median(times)
    return Report(rows)


def regressor(name: str, predictor: Any) -> Regressor:
    """An estimator, or a function, as a function from inputs to means and standard deviations of targets."""
    if not hasattr(predictor, "likelihood_"):
        return predictor

    def moments(x: Inputs) -> tuple[Tensor, Tensor]:
        told = predictor.predict(x)
        if told.total_variance is None:
            msg = (
                f"{name}: likelihood={predictor.likelihood!r} predicts no variance of a target. Classifiers are "
                "compared by side_by_side."
            )
            raise UnsupportedError(msg)
        return told.mean, told.total_variance.sqrt()

    return moments


@runtime_checkable
class SupportsReading(Protocol):
    """What says where the outputs are in what a model returns."""

    output_key: str | int | None
    output_fn: Callable[[Any], Tensor] | None


__all__ = ["calibration_curve", "compare_regressors", "coverage", "crps", "gaussian_nll", "rmse"]
