"""The plain network, the network with a fitted temperature, and Laplace estimators in one table.

``side_by_side`` evaluates them on the same batches; the ``Report`` it returns prints as a Markdown table and averages
over repetitions. Each number is one of ``metrics.py``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace import checks
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import metrics
from laplace.evaluation.temperature import SoftmaxPredictor, class_indices, device_of, fit_temperature
from laplace.likelihoods.categorical import IGNORED
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.network import batches
from laplace.optional import require
from laplace.types import Inputs

Predictor: TypeAlias = Callable[[Inputs], Tensor]
"""Inputs of one batch to class probabilities ``[batch, ..., C]``: a fitted estimator ``la`` is one as it stands."""
Loader: TypeAlias = Iterable[Any]
"""A ``DataLoader`` or any other iterable of batches that can be looped over more than once."""


@dataclass(frozen=True)
class Predictions:
    """What a predictor says about the rows of a loader.

    Attributes
    ----------
    probs
        Class probabilities, ``[rows, C]``, float64 on the CPU.
    y
        Targets, ``[rows]``.
    seconds
        Time in the predictor, all batches together, without loading them.
    """

    probs: Float[Tensor, "rows outputs"]
    y: Int[Tensor, " rows"]
    seconds: float


def predict(
    predictor: Predictor,
    loader: Loader,
    *,
    device: torch.device | str = "cpu",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
    description: str = "[Predicting]",
) -> Predictions:
    """Run a predictor over a loader.

    Parameters
    ----------
    predictor
        Anything that turns the inputs of a batch into class probabilities; an estimator of ``likelihood="binary"``,
        too, which gives two columns.
    loader
        Batches ``(x, y)``, ``(x1, …, xk, y)`` or mappings. The targets, class indices, are handed on, not used.
    device
        Where the predictor expects its inputs.
    dict_key_y
        Entry of mapping batches that holds the targets.
    progress_bar, description
        Show a progress bar over batches, and its text.

    Returns
    -------
    Probabilities and targets of all rows (positions of a sequence model count as rows), and the time taken.

    Raises
    ------
    InputError
        If the loader is empty, or targets are no class indices.
    ShapeError
        If a function has a single column, or there is not one target for each row.
    UnsupportedError
        If an estimator predicts no class probabilities, or those of independent labels.
    """
    shown: dict[str, Any] = {"progress_bar": progress_bar, "description": description}
    return _predict(predictor, loader, device, dict_key_y, targeted=True, **shown)


def _predict(
    predictor: Predictor, loader: Loader, device: torch.device | str, dict_key_y: str, *, targeted: bool, **shown: Any
) -> Predictions:
    """The same; where nothing is asked of the targets they are all -100."""
    probs: list[Tensor] = []
    targets: list[Tensor] = []
    seconds = 0.0
    _check_exclusive(predictor)
    shown["shift_labels"] = getattr(predictor, "shift_labels", None)
    for x, y in batches.iterate(loader, dict_key_y=dict_key_y, device=torch.device(device), **shown):
        start = time.perf_counter()
        p = _tensor(predictor, predictor(x)).detach().cpu()  # the copy to the CPU waits for an accelerator to finish
        seconds += time.perf_counter() - start
        # Where an estimator puts classes; the network itself puts them last.
        axis = -1 if isinstance(predictor, SoftmaxPredictor) else getattr(predictor, "output_dim", None) or -1
        p = p.movedim(axis, -1) if p.dim() > 2 else p
        rows = _probabilities(predictor, p)
        probs.append(rows.double())
        targets.append(class_indices(y.cpu(), p.shape[:-1]) if targeted else torch.full((len(rows),), IGNORED))
    if not targets:
        msg = "The loader is empty: it yields no batch, or it was an iterator that had been used up."
        raise InputError(msg)
    return Predictions(torch.cat(probs), torch.cat(targets), seconds)


def _read_by(predictor: Predictor) -> dict[str, Any]:
    """How an estimator reads outputs and labels; the rows of the network itself do the same."""
    names = ("output_key", "output_fn", "output_dim", "shift_labels")
    return {name: getattr(predictor, name) for name in names if hasattr(predictor, name)}


def _check_exclusive(predictor: Predictor) -> None:
    """Raise for an estimator of independent labels."""
    likelihood = getattr(predictor, "likelihood_", None)
    if isinstance(likelihood, PredictsProbabilities) and not likelihood.exclusive:
        msg = (
            f"likelihood={likelihood.name!r} has several right labels for a row; these metrics are of classes of which "
            "one is right. Evaluate one label c at a time: pass a function that returns "
            "torch.stack([1 - p[:, c], p[:, c]], -1) with p = la(x), and that label alone as target."
        )
        raise UnsupportedError(msg)


def _tensor(predictor: Predictor, prediction: Any) -> Tensor:
    """A prediction that is no pair of moments."""
    if isinstance(prediction, Tensor):
        return prediction
    likelihood = getattr(predictor, "likelihood_", None)
    name = f"likelihood={likelihood.name!r}" if likelihood is not None else "A predictor"
    msg = (
        f"{name} predicts no class probabilities [batch, ..., C], which these metrics are of, but "
        f"{type(prediction).__name__}. Pass an estimator of classes, or a function that returns probabilities."
    )
    raise UnsupportedError(msg)


def _probabilities(predictor: Predictor, p: Float[Tensor, "..."]) -> Float[Tensor, "rows outputs"]:
    """Predictions ``[batch, ..., C]`` as rows with one column for each class."""
    likelihood = getattr(predictor, "likelihood_", None)
    if p.dim() < 2:
        msg = (
            f"Expected class probabilities [batch, ..., C]; a predictor returned {list(p.shape)}. Of two classes, with "
            "p the probability of class 1, return both: torch.stack([1 - p, p], -1)."
        )
        raise ShapeError(msg)
    rows = p.reshape(-1, p.shape[-1])
    if isinstance(likelihood, PredictsProbabilities):
        return likelihood.probabilities(rows)
    metrics.check_columns(rows)
    return rows


@dataclass(frozen=True)
class Report:
    """A table: one row per method, one column per metric.

    Attributes
    ----------
    rows
        ``rows[method][metric]``, in the order in which they print.
    errors
        Standard errors of the same entries, where ``rows`` are averages.
    """

    rows: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the metrics."""
        return list(dict.fromkeys(column for row in self.rows.values() for column in row))

    def with_column(self, name: str, values: Mapping[str, float]) -> Report:
        """Add a column.

        Parameters
        ----------
        name
            Its heading.
        values
            One number per method; methods may be left out.

        Raises
        ------
        InputError
            If a method is not in the table.
        """
        unknown = set(values) - set(self.rows)
        if unknown:
            msg = f"The table has no rows {sorted(unknown)}; it has {list(self.rows)}."
            raise InputError(msg)
        rows = {
            method: {**row, **({name: values[method]} if method in values else {})} for method, row in self.rows.items()
        }
        return Report(rows, self.errors)

    @classmethod
    def average(cls, reports: Sequence[Report]) -> Report:
        """Mean of several reports with the same rows and columns, and its standard error.

        Parameters
        ----------
        reports
            At least two, such as one for each of several trained networks.

        Returns
        -------
        A report whose ``errors`` are the standard deviations over the reports, divided by the root of their number.

        Raises
        ------
        InputError
            If there are fewer than two, or their rows or columns differ.
        """
        if len(reports) < 2:
            msg = f"A standard error needs at least two reports; got {len(reports)}."
            raise InputError(msg)
        first = reports[0]
        shape = {method: set(row) for method, row in first.rows.items()}
        if any({method: set(row) for method, row in report.rows.items()} != shape for report in reports):
            msg = "Reports can be averaged only when they have the same rows and the same columns."
            raise InputError(msg)
        values = {m: {c: [report.rows[m][c] for report in reports] for c in row} for m, row in first.rows.items()}
        mean = {m: {c: statistics.fmean(v) for c, v in row.items()} for m, row in values.items()}
        root = math.sqrt(len(reports))
        error = {m: {c: statistics.stdev(v) / root for c, v in row.items()} for m, row in values.items()}
        return cls(mean, error)

    def table(self, columns: Sequence[str] | None = None, *, digits: int = 3) -> str:
        """Print as a Markdown table that is aligned in plain text, too.

        Parameters
        ----------
        columns
            Which metrics, in which order; all when ``None``.
        digits
            Digits after the point.

        Returns
        -------
        Lines separated by newlines, without one at the end. Averages print as ``mean ± standard error``.

        Raises
        ------
        InputError
            If a column is unknown.
        """
        columns = self.columns if columns is None else list(columns)
        unknown = [column for column in columns if column not in self.columns]
        if unknown:
            msg = f"The table has no columns {unknown}; it has {self.columns}."
            raise InputError(msg)
        grid = [["", *columns]]
        grid += [[method, *(self._cell(method, column, digits) for column in columns)] for method in self.rows]
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        lines = [
            "| "
            + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            + " |"
            for line in grid
        ]
        rule = ["-" * (w + 1) + ":" if i else ":" + "-" * (w + 1) for i, w in enumerate(widths)]
        return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])

    def __str__(self) -> str:
        """The whole table."""
        return self.table()

    def _repr_html_(self) -> str:
        """The whole table, where notebooks show it."""
        head = "".join(f"<th>{escape(column)}</th>" for column in ("", *self.columns))
        body = "".join(
            f"<tr><th>{escape(method)}</th>"
            + "".join(f"<td>{self._cell(method, column, 3)}</td>" for column in self.columns)
            + "</tr>"
            for method in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"

    def to_frame(self) -> Any:
        """The rows as a ``pandas.DataFrame``, methods down and metrics across; errors are left out.

        Raises
        ------
        BackendUnavailableError
            If pandas is not installed.
        """
        frame: Any = require("pandas", "evaluation").DataFrame.from_dict(self.rows, orient="index")
        return frame[self.columns]

    def _cell(self, method: str, column: str, digits: int) -> str:
        value = self.rows[method].get(column)
        if value is None:
            return ""
        error = None if self.errors is None else self.errors.get(method, {}).get(column)
        return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def side_by_side(
    model: nn.Module,
    estimators: Mapping[str, Predictor],
    test_loader: Loader,
    *,
    val_loader: Loader | None = None,
    shifted: Mapping[str, Loader] | None = None,
    ood_loader: Loader | None = None,
    n_bins: int = 15,
    timed: bool = True,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> Report:
    """Evaluate a network, the network with a fitted temperature, and other predictors on the same data.

    Parameters
    ----------
    model
        The trained classifier, with one logit for each class, or one for two classes; it gives the row ``MAP`` and,
        with ``val_loader``, ``MAP, temperature T``.
    estimators
        Further rows by name: fitted Laplace estimators, or any function from inputs to class probabilities.
    test_loader
        Data like those the network was trained on. Loaders are read several times: pass no iterators.
    val_loader
        Chooses the temperature, and nothing else.
    shifted
        Further test data by name, such as corrupted images: gives the columns ``NLL name`` and ``ECE name``.
    ood_loader
        Inputs that belong to no class; their targets are ignored. Gives the columns ``OOD AUROC``, ``OOD AUPR`` and
        ``OOD FPR95``: how well 1 − max_c p_c tells them from the test data.
    n_bins
        Bins of the calibration error.
    timed
        Measure ``predict ms``, which takes three more passes over the test data.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.
    progress_bar
        Show a progress bar over batches for each pass: which row, on which data.

    Returns
    -------
    Rows as described; columns ``accuracy``, ``NLL`` (nats per row), ``ECE``, ``Brier``, ``AURC`` (the area under
    ``risk_coverage``), those above, and ``predict ms`` (milliseconds in the predictor for all test data, the median of
    three passes after a first one).

    Raises
    ------
    InputError
        If a loader is empty, a predictor returns no probabilities, targets are no class indices, or no temperature is
        best on the validation data.
    ShapeError
        If a function returns a single column, or there is not one target for each row.
    UnsupportedError
        If an estimator predicts no class probabilities, or those of independent labels.
    BackendUnavailableError
        If torchmetrics is not installed.
    """
    timed = checks.flag("timed", timed)
    device = device_of(model)
    read = next((known for one in estimators.values() if (known := _read_by(one))), {})
    plain = SoftmaxPredictor(model, dict_key_x=dict_key_x, dict_key_y=dict_key_y, **read)
    predictors: dict[str, Predictor] = {"MAP": plain}
    if val_loader is not None:
        predictors["MAP, temperature T"] = fit_temperature(
            model, val_loader, dict_key_x=dict_key_x, dict_key_y=dict_key_y, progress_bar=progress_bar, **read
        )
    repeated = set(predictors) & set(estimators)
    if repeated:
        msg = f"The names {sorted(repeated)} are taken by the rows of the network itself; choose others."
        raise InputError(msg)
    predictors.update(estimators)

    for predictor in estimators.values():
        _check_exclusive(predictor)

    def run(name: str, data: str, loader: Loader, *, targeted: bool = True) -> Predictions:
        shown: dict[str, Any] = {"progress_bar": progress_bar, "description": f"[Predicting {data}: {name}]"}
        return _predict(predictors[name], loader, device, dict_key_y, targeted=targeted, **shown)

    rows: dict[str, dict[str, float]] = {}
    for name in predictors:
        test = run(name, "test data", test_loader)
        row = {
            "accuracy": metrics.accuracy(test.probs, test.y),
            "NLL": metrics.mean_nll(test.probs, test.y),
            "ECE": metrics.calibration_error(test.probs, test.y, n_bins=n_bins),
            "Brier": metrics.brier_score(test.probs, test.y),
            "AURC": metrics.risk_coverage(test.probs, test.y).area,
        }
        for shift, loader in (shifted or {}).items():
            result = run(name, shift, loader)
            row[f"NLL {shift}"] = metrics.mean_nll(result.probs, result.y)
            row[f"ECE {shift}"] = metrics.calibration_error(result.probs, result.y, n_bins=n_bins)
        if ood_loader is not None:
            foreign = run(name, "foreign data", ood_loader, targeted=False)
            doubts = metrics.uncertainty(test.probs), metrics.uncertainty(foreign.probs)
            row["OOD AUROC"] = metrics.ood_auroc(*doubts)
            row["OOD AUPR"] = metrics.ood_average_precision(*doubts)
            row["OOD FPR95"] = metrics.ood_false_positives(*doubts)
        if timed:
            times = (run(name, "test data again", test_loader).seconds for _ in range(3))
            row["predict ms"] = 1e3 * statistics.median(times)
        rows[name] = row
    return Report(rows)
