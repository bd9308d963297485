"""Pictures of ``metrics.py`` and ``regression.py``, and of regression bands, as figures of pyplot.

Each function draws on the axes it is given or on a new figure, and returns the figure: a notebook shows it, a script
calls ``matplotlib.pyplot.show()`` or the ``savefig`` of the figure. As with any figure of pyplot, who draws many closes
them (``matplotlib.pyplot.close``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import InputError, ShapeError
from laplace.evaluation import metrics, regression
from laplace.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # imported when drawing; until then annotations are not checked
    Axes = Figure = Any

_MARKERS = "osD^vPX*"
"""Shapes besides colors, so that lines are told apart in gray, too."""
_LARGEST_MARKER = 160.0
"""Area, in points², of the marker of a bin that holds all predictions."""
_SMALLEST_MARKER = 12.0


def reliability_diagram(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    *,
    n_bins: int = 15,
    title: str = "Reliability",
    ax: Axes | None = None,
) -> Figure:
    """Accuracy against confidence: on the diagonal, probabilities can be taken at their word.

    Parameters
    ----------
    predictions
        Class probabilities ``[..., C]`` and class indices ``[...]`` by the name of the method. Points below the
        diagonal are overconfident. The area of a point is the share of the predictions in its bin; empty bins have
        none.
    n_bins
        Number of bins of equal width.
    title
        Title of the axes.
    ax
        Where to draw; a new figure when ``None``.

    Returns
    -------
    The figure. Its legend gives the calibration error (ECE) of each method.

    Raises
    ------
    InputError
        If there are no predictions, or they are no probabilities.
    BackendUnavailableError
        If matplotlib or torchmetrics is not installed.
    """
    _check_any(predictions)
    found = [
        (metrics.reliability(probs, y, n_bins=n_bins), metrics.calibration_error(probs, y, n_bins=n_bins))
        for probs, y in predictions.values()
    ]
    axes = _axes(ax)
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated", zorder=1)
    for i, (name, (bins, error)) in enumerate(zip(predictions, found, strict=True)):
        held = bins.count > 0
        share = (bins.count[held] / bins.count.sum()).cpu()
        x, height = bins.confidence[held].cpu().numpy(), bins.accuracy[held].cpu().numpy()
        color, marker = f"C{i}", _MARKERS[i % len(_MARKERS)]
        axes.plot(x, height, color=color, linewidth=1.5, alpha=0.8, zorder=2, clip_on=False)
        area = (_LARGEST_MARKER * share).clamp(min=_SMALLEST_MARKER).numpy()
        axes.scatter(x, height, s=area, color=color, marker=marker, alpha=0.8, zorder=3, clip_on=False)
        # An empty artist of constant size, so that the legend does not depend on the size of a bin.
        axes.plot([], [], color=color, marker=marker, markersize=5, linewidth=1.5, label=f"{name} (ECE {error:.3f})")
    axes.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="confidence (mean of the largest probability)", ylabel="accuracy", title=title
    )
    axes.set_box_aspect(1)
    _legend_below(axes)
    return axes.figure


def risk_coverage_curve(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    *,
    title: str = "Risk and coverage",
    ax: Axes | None = None,
) -> Figure:
    """Share of errors among the predictions that are kept, against the share that is kept.

    Parameters
    ----------
    predictions
        Class probabilities ``[..., C]`` and class indices ``[...]`` by the name of the method.
    title
        Title of the axes.
    ax
        Where to draw; a new figure when ``None``.

    Returns
    -------
    The figure. Its legend gives the area under each curve (smaller is better).

    Raises
    ------
    InputError
        If there are no predictions, or they are no probabilities.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    _check_any(predictions)
    curves = {name: metrics.risk_coverage(probs, y) for name, (probs, y) in predictions.items()}
    axes = _axes(ax)
    for i, (name, curve) in enumerate(curves.items()):
        label = f"{name} (area {curve.area:.3f})"
        axes.plot(curve.coverage.cpu().numpy(), curve.risk.cpu().numpy(), color=f"C{i}", linewidth=1.5, label=label)
    axes.set(
        xlim=(0, 1), xlabel="coverage (share of the predictions kept)", ylabel="risk (share of errors)", title=title
    )
    axes.set_ylim(bottom=0)
    axes.set_box_aspect(1)
    _legend_below(axes)
    return axes.figure


def regression_band(
    x: Float[Tensor, "..."],
    mean: Float[Tensor, "..."],
    std: Float[Tensor, "..."],
    *,
    data: tuple[Tensor, Tensor] | None = None,
    n_std: float = 2.0,
    title: str = "Prediction",
    ax: Axes | None = None,
) -> Figure:
    """Mean of a one-dimensional regression and a band around it: ``regression_band(x, *la(x))``.

    Parameters
    ----------
    x
        Inputs, ``[rows]`` or ``[rows, 1]``, in any order.
    mean
        Predicted means, ``[rows]`` or ``[rows, 1]``, in target units.
    std
        Standard deviations of the same shape, in target units, or variances ``[rows, 1, 1]``, in those squared, as
        ``la(x)`` returns them: of the function. For a band of new data, noise included: ``la.predict_std(x)``.
    data
        Points ``(x, y)`` to draw, such as the training data.
    n_std
        Half the width of the band in standard deviations: about 95 % of a Gaussian lie within 2.
    title
        Title of the axes.
    ax
        Where to draw; a new figure when ``None``.

    Returns
    -------
    The figure.

    Raises
    ------
    ShapeError
        If ``x``, ``mean`` and ``std`` do not hold one number for each row.
    InputError
        If a standard deviation is negative.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    if std.ndim == 3 and std.shape[1:] == (1, 1):
        std = std[:, 0].sqrt()
    x, mean, std = (value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value for value in (x, mean, std))
    if x.ndim != 1 or x.shape != mean.shape or x.shape != std.shape:
        msg = f"Expected three vectors of one length; got {tuple(x.shape)}, {tuple(mean.shape)} and {tuple(std.shape)}."
        raise ShapeError(msg)
    if bool((std < 0).any()):
        msg = f"Standard deviations cannot be negative; the smallest is {float(std.min()):.3g}."
        raise InputError(msg)
    axes = _axes(ax)
    order = x.argsort()
    line, center, half = (v.detach().double().cpu()[order.cpu()] for v in (x, mean, n_std * std))
    band = f"± {n_std:g} standard deviations"
    axes.fill_between(line.numpy(), (center - half).numpy(), (center + half).numpy(), color="C0", alpha=0.2, label=band)
    axes.plot(line.numpy(), center.numpy(), color="C0", linewidth=1.5, label="mean")
    if data is not None:
        points, values = (torch.as_tensor(v).detach().cpu().numpy() for v in data)
        axes.scatter(points, values, s=10, color="0.2", zorder=3, label="data")
    axes.set(xlabel="input", ylabel="target", title=title)
    axes.legend(loc="best", fontsize="small")
    return axes.figure


def regression_calibration(
    predictions: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    *,
    n_levels: int = 19,
    title: str = "Calibration of error bars",
    ax: Axes | None = None,
) -> Figure:
    """Share of targets below each predicted quantile: on the diagonal, error bars can be taken at their word.

    Parameters
    ----------
    predictions
        Means, standard deviations (noise included) and targets, of one shape, by the name of the method. A curve that
        is flatter than the diagonal in the middle is of error bars that are too narrow.
    n_levels
        How many quantiles, evenly spaced.
    title
        Title of the axes.
    ax
        Where to draw; a new figure when ``None``.

    Returns
    -------
    The figure. Its legend gives the coverage of the central 90 % intervals of each method.

    Raises
    ------
    ShapeError
        If shapes differ.
    InputError
        If there are no predictions, or they are no means and positive standard deviations.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    _check_any(predictions)
    curves = [regression.calibration_curve(*parts, n_levels=n_levels) for parts in predictions.values()]
    axes = _axes(ax)
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated", zorder=1)
    for i, ((name, parts), curve) in enumerate(zip(predictions.items(), curves, strict=True)):
        label = f"{name} (90 % intervals hold {100 * regression.coverage(*parts):.0f} %)"
        axes.plot(*curve, color=f"C{i}", marker=_MARKERS[i % len(_MARKERS)], markersize=5, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted quantile", ylabel="share of targets below it", title=title)
    axes.set_box_aspect(1)
    _legend_below(axes)
    return axes.figure


def _axes(ax: Axes | None) -> Any:
    """The axes to draw on: those given, or those of a new figure."""
    if ax is not None:
        return ax
    pyplot: Any = require("matplotlib.pyplot", "evaluation")
    return pyplot.subplots(figsize=(5, 6.5), layout="constrained")[1]


def _legend_below(axes: Any) -> None:
    """Put the legend under the axes: within them, some method's curve passes through every corner."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize="small", frameon=False)


def _check_any(predictions: Mapping[str, Any]) -> None:
    if not predictions:
        msg = "There is nothing to draw: predictions is empty."
        raise InputError(msg)
