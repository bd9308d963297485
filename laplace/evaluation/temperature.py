"""Temperature scaling: the one-number recalibration that every other method should be compared with.

A network's logits are divided by one scalar T, chosen on validation data after training. Classes keep their order, so
accuracy does not change. (The keyword ``temperature=`` of the estimators is another thing: it tempers the likelihood.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from laplace.errors import InputError, ShapeError
from laplace.likelihoods.categorical import IGNORED, check_logits
from laplace.network import batches
from laplace.network.axes import Axes
from laplace.network.modes import evaluating
from laplace.network.outputs import Reading
from laplace.optimizers import lbfgs
from laplace.types import Inputs


@dataclass(frozen=True)
class SoftmaxPredictor:
    """A network as it is, as a predictor: the softmax of its logits, divided by a temperature.

    Attributes
    ----------
    model
        The trained network, evaluated in evaluation mode; it returns logits or a mapping with ``logits``.
    temperature
        What the logits are divided by; 1 is the network itself.
    dict_key_x, dict_key_y
        Entries of mapping inputs that hold the main input and the targets.
    output_key, output_fn, output_dim, shift_labels
        Where the outputs are in what the model returns, the axis of the classes, and whether labels are those of the
        positions after, as an estimator takes them.
    """

    model: nn.Module
    temperature: float = 1.0
    dict_key_x: str = "input_ids"
    dict_key_y: str = "labels"
    output_key: str | int | None = None
    output_fn: Callable[[Any], Tensor] | None = None
    output_dim: int | None = None
    shift_labels: bool | None = None

    def logits(self, x: Inputs) -> Float[Tensor, "*positions outputs"]:
        """Logits ``[batch, ..., C]`` in float64, before the temperature; one logit f is that of two classes, (0, f).

        Raises
        ------
        UnsupportedError
            If the model returns neither a tensor nor a mapping with the tensor ``logits``, and nothing else is said.
        """
        reading = Reading.of(self.output_key, self.output_fn, self.output_dim)
        with evaluating(self.model), Axes() as axes:
            returned = batches.call(self.model, x, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)
            outputs = reading.tensor(returned)
        reading.see(outputs.dim(), axes.of(outputs))
        outputs = reading.last(outputs)
        return two_classes(outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs).double()

    def __call__(self, x: Inputs) -> Float[Tensor, "*positions outputs"]:
        """Class probabilities ``[batch, ..., C]`` in float64: overconfident logits underflow in float32."""
        return (self.logits(x) / self.temperature).softmax(-1)


def fit_temperature(
    model: nn.Module,
    val_loader: Iterable[Any],
    *,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
    output_key: str | int | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    output_dim: int | None = None,
    shift_labels: bool | None = None,
) -> SoftmaxPredictor:
    """Choose the temperature of a network on validation data.

    Parameters
    ----------
    model
        The trained network, with one logit for each class, or one for two classes.
    val_loader
        Batches that the network was not trained on.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.
    progress_bar
        Show a progress bar over batches.
    output_key, output_fn, output_dim, shift_labels
        As in ``SoftmaxPredictor``.

    Returns
    -------
    The network as a predictor, with ``temperature`` set.

    Raises
    ------
    InputError
        If no temperature is best on these data, or targets are no class indices; see ``best_temperature``.
    ShapeError
        If there is not one target for each row, as where several labels of a row may be right.
    UnsupportedError
        If the model returns probabilities.

    References
    ----------
    Guo, Pleiss, Sun & Weinberger (2017), "On calibration of modern neural networks", section 4.2. arXiv:1706.04599
    """
    read: dict[str, Any] = {"output_key": output_key, "output_fn": output_fn, "output_dim": output_dim}
    plain = SoftmaxPredictor(model, 1.0, dict_key_x, dict_key_y, **read, shift_labels=shift_labels)
    keys: dict[str, Any] = {"dict_key_x": dict_key_x, "dict_key_y": dict_key_y, "device": device_of(model)}
    keys["shift_labels"] = shift_labels
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    text = "[Fitting the temperature]"
    for x, y in batches.iterate(val_loader, **keys, progress_bar=progress_bar, description=text):
        f = plain.logits(x)
        logits.append(f.reshape(-1, f.shape[-1]))
        targets.append(class_indices(y, f.shape[:-1]))
    if not targets:
        msg = "The validation loader is empty."
        raise InputError(msg)
    check_logits(torch.cat(logits))
    temperature = best_temperature(torch.cat(logits), torch.cat(targets))
    return replace(plain, temperature=temperature)


def best_temperature(logits: Float[Tensor, "rows outputs"], y: Int[Tensor, "..."]) -> float:
    """Temperature that minimizes the negative log-likelihood, T* = argmin_T −Σ_n log softmax(f_n / T)[y_n].

    Parameters
    ----------
    logits
        ``[rows, C]``; one column is the logit of class 1 of two.
    y
        Class indices, ``[rows]``; -100 leaves a row out.

    Returns
    -------
    T*, positive, with no unit. T* > 1 where the network is overconfident.

    Raises
    ------
    ShapeError
        If there is not one target per row.
    InputError
        If there is no row, a logit is not finite, a target is no class index, or the minimum is at no positive
        temperature: T = 0 when every row is classified correctly, T = ∞ when the logits know nothing about the targets.

    Notes
    -----
    The likelihood is convex in 1/T, so the minimum is unique; one scalar is fitted by L-BFGS in log T, in float64.
    """
    if len(logits) != len(y):
        msg = f"Expected one target per row; got {len(logits)} rows of logits and {len(y)} targets."
        raise ShapeError(msg)
    y = class_indices(y, y.shape)
    kept = y != IGNORED
    logits, y = two_classes(logits.detach().double())[kept], y[kept]
    if not len(y) or not bool(torch.isfinite(logits).all()):
        msg = f"Expected at least one row, and finite logits; got {len(y)} rows."
        raise InputError(msg)
    if bool((y < 0).any()) or bool((y >= logits.shape[-1]).any()):
        msg = (
            f"Targets must be class indices from 0 to {logits.shape[-1] - 1} (or {IGNORED} to leave a row out); got "
            f"values from {int(y.min())} to {int(y.max())}."
        )
        raise InputError(msg)
    _check_minimum_exists(logits, y)
    unit = logits.std(-1).mean()  # T* is proportional to the logits; in this unit it is near 1

    def loss(log_t: Tensor) -> Tensor:
        return F.cross_entropy(logits / unit * (-log_t).exp(), y)

    log_t = lbfgs(loss, logits.new_zeros(1), max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)
    return float(log_t.exp() * unit)


def _check_minimum_exists(logits: Float[Tensor, "rows outputs"], y: Int[Tensor, " rows"]) -> None:
    """Raise unless the convex function of 1/T falls at first and rises in the end."""
    right = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    if bool((right >= logits.amax(-1)).all()):
        msg = (
            f"Every one of the {len(y)} validation rows is classified correctly, so the likelihood grows without end "
            "as the temperature falls to 0. Use more validation data, and none that the network was trained on."
        )
        raise InputError(msg)
    if float((right - logits.mean(-1)).mean()) <= 0:
        msg = (
            "The logits do not favor the right classes, so the likelihood is best at an infinite temperature. Check "
            "that the classes of the targets are in the order of the outputs, and that the network is trained."
        )
        raise InputError(msg)


def two_classes(logits: Float[Tensor, "*positions outputs"]) -> Float[Tensor, "*positions classes"]:
    """Logits ``[..., C]``; one logit f is the log odds of class 1, and those of both classes are (0, f)."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits


def class_indices(y: Shaped[Tensor, "..."], positions: Sequence[int]) -> Int[Tensor, " rows"]:
    """Targets of one batch as class indices ``[rows]``, one for each position; raise for any others."""
    if y.numel() != math.prod(positions):
        msg = (
            f"Expected one class index for each row, {list(positions)}; got targets {list(y.shape)}. Where several "
            "labels of a row may be right (likelihood='multilabel'), evaluate one label at a time, with the "
            "probabilities [1 - p, p]; of soft labels, pass the class that was observed."
        )
        raise ShapeError(msg)
    if y.is_complex() or (y.is_floating_point() and not bool((y.isfinite() & (y == y.round())).all())):
        msg = (
            f"Targets must be class indices, whole numbers from 0; got {y.dtype} with others, such as NaN, soft labels "
            f"or those of a regression. Pass the class of each row, and {IGNORED} where there is none."
        )
        raise InputError(msg)
    return y.reshape(-1).long()


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
