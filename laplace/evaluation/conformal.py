"""Sets and intervals that hold the target with a chosen probability, on top of any fitted estimator.

Split conformal prediction: predictions at rows that nothing was fitted to are compared with their targets, and the
quantile of these comparisons says how large sets and intervals must be. The model may be wrong and the posterior too
narrow: the guarantee needs exchangeable rows and nothing else.

The quantile and the scores are written here, in torch: they are a sort each, take any number of outputs and stay on
the device. MAPIE 1.6 has the same methods for scikit-learn, and the tests compare with it where both mean the same.
Its sets of ``aps`` and ``raps`` leave out classes whose probability rounds to zero, and so miss the level where such
classes are right; they refuse two classes; its intervals take one output. For what is not here, such as risk control,
the page *Decisions* of the documentation hands the predictions of an estimator to MAPIE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from typing_extensions import Unpack

from laplace import checks
from laplace.errors import InputError, UnsupportedError
from laplace.evaluation.temperature import device_of
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.network import batches
from laplace.predictive.keywords import PredictionKeywords
from laplace.types import Inputs

Method: TypeAlias = Literal["lac", "aps", "raps", "scaled", "cqr", "absolute"]
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
"""λ of ``raps`` that are tried: those of the paper."""
CHOOSING = 5
"""``raps`` chooses its two numbers on one of so many calibration rows, and the threshold on the others."""
_WATCHED = (
    "prior_precision", "prior_mean", "sigma_noise", "temperature", "output_temperature", "weight_uncertainty",
    "distance_scale", "mean", "n_data", "loss",
)  # fmt: skip
"""What predictions depend on: these must be what they were, where the estimator has them."""


@dataclass(frozen=True)
class ConformalPredictor:
    """Sets of classes, or intervals, that hold the target with a probability of at least ``level``.

    Made by ``conformal``; call it with the inputs of a batch.

    Attributes
    ----------
    la
        The estimator that predicts. It must stay as it was when ``conformal`` was called.
    level
        Probability that the target is covered.
    method
        How predictions and targets are compared.
    threshold
        The quantile of the scores, ``[]`` for classes; for regression ``[C]``, one for each output.
    n_rows
        Number of rows that it was found on.
    penalty, n_free
        Of ``"raps"``: λ, what each class beyond the first ``n_free`` adds to the score; 0 for other methods.
    options
        What ``la`` is called with beside the inputs.
    """

    la: Any
    level: float
    method: str
    threshold: Float[Tensor, "*outputs"]
    n_rows: int
    penalty: float
    n_free: int
    options: Mapping[str, Any]
    _watched: Mapping[str, Any]

    def __call__(self, x: Inputs) -> Bool[Tensor, "batch classes"] | tuple[Tensor, Tensor]:
        """Sets or intervals at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs, as ``la`` takes them.

        Returns
        -------
        Classification: which classes are in the set, ``[batch, C]``; binary: whether 0 and 1 are, ``[batch, 2]``. A set
        of ``"lac"`` is empty where no class is probable enough. Regression: lower and upper ends, ``[batch, C]`` each,
        in target units; they belong to the interval.

        Raises
        ------
        InputError
            If fit, hyperparameters or settings of ``la`` are others than at calibration, or its outputs are not finite.
        """
        for name, before in self._watched.items():
            now = _plain(getattr(self.la, name, 0.0))
            if not torch.equal(now, before):
                msg = (
                    f"{name} of the estimator is no longer what it was when conformal(...) was called, so the coverage "
                    "is no longer known. Call conformal again, with calibration rows that nothing was chosen on."
                )
                raise InputError(msg)
        if self.method in SETS:
            scores = SETS[self.method](_probabilities(self.la, x, self.options), self.penalty, self.n_free)
            return scores <= self.threshold.to(scores.device)
        mean, sigma = _moments(self.la, x, self.options)
        half = INTERVALS[self.method].half_width(self.threshold.to(sigma.device), sigma, _normal_quantile(self.level))
        return (mean - half).to(mean.dtype), (mean + half).to(mean.dtype)


def conformal(
    la: Any,
    calibration_loader: Iterable[Any],
    level: float = 0.9,
    method: Method | None = None,
    *,
    progress_bar: bool = False,
    **options: Unpack[PredictionKeywords],
) -> ConformalPredictor:
    """Turn predictions into sets or intervals that hold the target with probability ``level`` or more.

    The probability is over calibration rows and the new row together, all drawn alike (exchangeable): on average over
    inputs, not at each of them. It is between ``level`` and ``level + 1/(n + 1)``, the upper bound where no scores are
    equal; on the rows of one test set the share that is covered varies around it by about ``√(level (1 − level)/n)``, n
    the number of calibration rows.

    Parameters
    ----------
    la
        A fitted estimator: what ``Laplace(...)`` returns, of any structure, for regression or classes.
    calibration_loader
        Yields batches ``(x, y)`` as ``fit`` takes them, of rows that played no part before: **not those given to**
        ``tune`` **or** ``optimize_prior_precision``, nor training data. Predictions are better on such rows than on new
        ones, and sets and intervals would be too small.
    level
        Probability, between 0 and 1.
    method
        Classification: ``"lac"`` (default), ``"aps"`` or ``"raps"``. Regression: ``"scaled"`` (default), ``"cqr"`` or
        ``"absolute"``. See the notes.
    progress_bar
        Show a progress bar over batches.
    **options
        How ``la`` predicts, here and afterwards: ``pred_type``, ``link_approx``, ``n_samples`` and so on. Where
        predictions are sampled (``"mc"``, ``"nn"``) rows of a batch share draws, so that they are exchangeable only as
        far as ``n_samples`` leaves no noise.

    Returns
    -------
    A function of inputs: ``found(x)`` is a mask ``[batch, C]`` for classes and ``(lower, upper)``, ``[batch, C]`` each,
    for regression. With several outputs each has its own threshold, and the level holds for each output by
    itself, not for all of them together (for that, take 1 − (1 − level)/C).

    Raises
    ------
    InputError
        If there are too few rows for the level (the message says how many it takes: ``level / (1 − level)``, with
        ``"raps"`` a quarter more), targets are masked or soft labels, or hold no number of the right kind.
    UnsupportedError
        If the likelihood has neither class probabilities nor an observation noise, outputs have positions (those of a
        sequence are not exchangeable), or method or options do not exist here.

    Notes
    -----
    p are the predicted probabilities, σ² is the variance of the prediction plus that of the noise, and q the
    ⌈(n + 1) · level⌉-th smallest score of the calibration rows:

    - ``"lac"``: score 1 − p_y, the set of all classes with p ≥ 1 − q. The smallest sets on average; may be empty.
    - ``"aps"``: score Σ p over the classes before y in the order of p; grows with the doubt about an input.
    - ``"raps"``: the same, plus λ (rank of y − k)⁺: without the long tail of many classes.
    - ``"scaled"``: score ``|y − μ| / σ(x)``, interval μ ± q σ(x).
    - ``"cqr"``: score ``|y − μ| − z σ(x)`` with z the normal quantile, interval μ ± max(0, z σ(x) + q).
    - ``"absolute"``: score ``|y − μ|``, interval μ ± q, as wide everywhere.

    The posterior enters by σ(x) and by the probabilities; where it is wrong, sets and intervals grow, and still cover.
    ``"lac"`` is the default because it has no numbers to choose, uses all rows for the threshold and has the smallest
    sets where the probabilities are right. It covers hard inputs less often than easy ones, which ``"aps"`` and
    ``"raps"`` even out. These two are without the randomization of the papers (u = 0): an input has one set, the most
    probable class is in it, and coverage exceeds the level where that class alone is right more often. λ and k of
    ``"raps"`` are chosen on a fifth of the rows, drawn with a fixed seed: k is the rank that is enough for the level, λ
    that with the smallest sets.

    Time: one prediction for each calibration row and one sort.

    References
    ----------
    Vovk, Gammerman & Shafer (2005), "Algorithmic learning in a random world", Springer (the guarantee).

    Lei, G'Sell, Rinaldo, Tibshirani & Wasserman (2018), "Distribution-free predictive inference for regression", JASA
    113, section 5.2 (scaled). arXiv:1604.04173

    Sadinle, Lei & Wasserman (2019), "Least ambiguous set-valued classifiers with bounded error levels", JASA 114 (lac).
    arXiv:1609.00451

    Romano, Patterson & Candès (2019), "Conformalized quantile regression" (cqr). arXiv:1905.03222

    Romano, Sesia & Candès (2020), "Classification with valid and adaptive coverage" (aps). arXiv:2006.02544

    Angelopoulos, Bates, Malik & Jordan (2021), "Uncertainty sets for image classifiers using conformal prediction"
    (raps). arXiv:2009.14193
    """
    checks.loader("calibration_loader", calibration_loader)
    level = checks.number("level", level)
    if not 0 < level < 1:
        msg = f"level must be a probability between 0 and 1, such as 0.9; got {level}."
        raise InputError(msg)
    likelihood: AbstractLikelihood | None = getattr(la, "likelihood_", None)
    if likelihood is None:
        msg = f"la must be a fitted estimator, as Laplace(...) makes them; got {type(la).__name__}."
        raise InputError(msg)
    of_classes = isinstance(likelihood, PredictsProbabilities)
    how = _checked_method(method, likelihood, of_classes=of_classes)
    _check_options(options, of_classes=of_classes)
    read = _read_classes if of_classes else _read_numbers
    text: dict[str, Any] = {"progress_bar": checks.flag("progress_bar", progress_bar), "description": "[Calibrating]"}
    keys: dict[str, Any] = {"dict_key_x": la.dict_key_x, "dict_key_y": la.dict_key_y}
    keys["shift_labels"] = getattr(la, "shift_labels", None)
    rows = batches.iterate(calibration_loader, **keys, **text, device=device_of(la.model))
    parts = [[part.detach() for part in read(la, x, y, options)] for x, y in rows]
    n_rows = sum(len(part[0]) for part in parts)
    _check_rows(n_rows, level, how)
    predicted, compared = (torch.cat(column) for column in zip(*parts, strict=True))
    penalty, n_free = 0.0, 0
    if how == "raps":
        penalty, n_free, predicted, compared = _apart(predicted, compared, level)
    if of_classes:
        scores = _of_target(SETS[how](predicted, penalty, n_free), compared)
    else:
        scores = INTERVALS[how].score(compared, predicted, _normal_quantile(level))
    watched = {name: _plain(getattr(la, name, 0.0)) for name in _WATCHED}
    threshold = _smallest(scores, _rank(len(scores), level))
    return ConformalPredictor(la, level, how, threshold, len(scores), penalty, n_free, options, watched)


# -- scores -----------------------------------------------------------------------------------------------------------

Probabilities = Float[Tensor, "rows classes"]
SetScore = Callable[[Tensor, float, int], Tensor]
"""Probabilities ``[rows, C]``, λ and k → how strange each class would be as the target, ``[rows, C]``."""


def _doubt(p: Probabilities, penalty: float, n_free: int) -> Probabilities:  # noqa: ARG001 - a method of sets
    return 1 - p


def _mass_above(p: Probabilities, penalty: float, n_free: int) -> Probabilities:
    """Probability of the classes that come before each, plus λ for each rank beyond k."""
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # of the first exactly zero
    rank = torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device)
    return torch.empty_like(p).scatter(-1, order, before + penalty * (rank - n_free).clamp(min=0))


SETS: Mapping[str, SetScore] = {"lac": _doubt, "aps": _mass_above, "raps": _mass_above}
"""Methods of classification; the first is the default."""


@dataclass(frozen=True)
class Interval:
    """A method of regression."""

    score: Callable[[Tensor, Tensor, float], Tensor]
    """``|y − μ|`` and σ ``[rows, C]`` and the normal quantile → scores ``[rows, C]``."""
    half_width: Callable[[Tensor, Tensor, float], Tensor]
    """Threshold ``[C]``, σ ``[rows, C]`` and the normal quantile → half the width ``[rows, C]``."""


INTERVALS: Mapping[str, Interval] = {
    "scaled": Interval(lambda r, sigma, _z: r / sigma, lambda q, sigma, _z: q * sigma),
    "cqr": Interval(lambda r, sigma, z: r - z * sigma, lambda q, sigma, z: (q + z * sigma).clamp(min=0)),
    "absolute": Interval(lambda r, _sigma, _z: r, lambda q, sigma, _z: q.expand_as(sigma)),
}
"""Methods of regression; the first is the default."""


def _apart(p: Probabilities, y: Int[Tensor, " rows"], level: float) -> tuple[float, int, Tensor, Tensor]:
    """λ and k of ``raps`` from some rows, and the others, on which nothing was chosen; drawn whatever the order."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    some, others = order[: len(y) // CHOOSING], order[len(y) // CHOOSING :]
    return *_least_sets(p[some], y[some], level), p[others], y[others]


def _least_sets(p: Probabilities, y: Int[Tensor, " rows"], level: float) -> tuple[float, int]:
    """λ and k of ``raps``: k so that a share ``level`` of the targets is among the first k, λ by the size of sets."""
    rank = min(_rank(len(y), level), len(y))
    order = p.sort(dim=-1, descending=True, stable=True).indices
    n_free = 1 + int(_smallest((order == y.unsqueeze(-1)).long().argmax(-1), rank))
    sizes: list[float] = []
    for penalty in PENALTIES:
        scores = _mass_above(p, penalty, n_free)
        sizes.append(float((scores <= _smallest(_of_target(scores, y), rank)).sum()))
    return PENALTIES[sizes.index(min(sizes))], n_free


def _of_target(scores: Probabilities, y: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return scores.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


# -- the quantile -----------------------------------------------------------------------------------------------------


def _rank(n_rows: int, level: float) -> int:
    """⌈(n + 1) · level⌉, of the decimal number that was written: 0.1 · 30 is 3 and not a little more."""
    return math.ceil((n_rows + 1) * Fraction(repr(level)))


def _smallest(scores: Tensor, rank: int) -> Tensor:
    """The score of this rank, from 1 for the smallest."""
    return scores.sort(0).values[rank - 1]


def rows_needed(level: float, method: str) -> int:
    """The least number of calibration rows with a finite threshold."""
    exact = Fraction(repr(level))
    least = math.ceil(exact / (1 - exact))
    return max(CHOOSING, least + (least - 1) // (CHOOSING - 1)) if method == "raps" else least


def _check_rows(n_rows: int, level: float, method: str) -> None:
    if not n_rows:
        msg = "The calibration loader is empty: it yields no batch, or it was an iterator that had been used up."
        raise InputError(msg)
    needed = rows_needed(level, method)
    if n_rows < needed:
        msg = (
            f"A level of {level} with method={method!r} takes at least {needed} calibration rows, and the loader has "
            f"{n_rows}: with fewer, only sets of all classes and intervals without ends are that sure. Give more rows, "
            "or lower the level."
        )
        raise InputError(msg)


# -- predictions and targets ------------------------------------------------------------------------------------------


def _probabilities(la: Any, x: Inputs, options: Mapping[str, Any]) -> Probabilities:
    """Class probabilities in float64."""
    return la.likelihood_.probabilities(_predicted(la, x, options)).double()


def _predicted(la: Any, x: Inputs, options: Mapping[str, Any]) -> Float[Tensor, "rows outputs"]:
    """Predictions of the estimator, a row each."""
    prediction = la(x, **options)
    _check_no_positions(prediction)
    return prediction


def _moments(la: Any, x: Inputs, options: Mapping[str, Any]) -> tuple[Float[Tensor, "rows outputs"], Tensor]:
    """Means, and standard deviations of targets in float64: of weights and noise."""
    mean, variance = la(x, diagonal_output=True, **options)
    _check_no_positions(mean)
    noise = la.likelihood_.noise_variance(mean.detach().double(), variance.detach().double())
    return mean, (variance.double() + noise).sqrt()


def _read_classes(la: Any, x: Inputs, y: Shaped[Tensor, "..."], options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Probabilities and class indices of a batch."""
    prediction, likelihood = _predicted(la, x, options), la.likelihood_
    positions = likelihood.flatten(torch.zeros_like(prediction.detach()), y)  # in place of outputs: targets are checked
    if positions.kept is not None:
        msg = "Calibration targets are masked: a row without a target says nothing about coverage. Leave it out."
        raise InputError(msg)
    label = likelihood.label(positions.y)
    if label.is_floating_point():
        if not bool(((label == 0) | (label == 1)).all()):
            msg = "Calibration targets are soft labels: coverage is that of one right class. Pass class indices."
            raise InputError(msg)
        label = label.argmax(-1)
    return likelihood.probabilities(prediction).double(), label


def _read_numbers(la: Any, x: Inputs, y: Shaped[Tensor, "..."], options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """σ and ``|y − μ|`` of a batch, ``[rows, C]``."""
    mean, sigma = _moments(la, x, options)
    positions = la.likelihood_.flatten(mean.detach(), y)
    return sigma, (positions.y.double() - mean.double()).abs()


def _check_no_positions(prediction: Shaped[Tensor, "..."]) -> None:
    if prediction.dim() != 2:
        msg = (
            f"Predictions [batch, C] can be calibrated; these are {list(prediction.shape)}. Positions of one input "
            "depend on each other and are not exchangeable: let the model return one row for each input."
        )
        raise UnsupportedError(msg)


def _checked_method(method: str | None, likelihood: AbstractLikelihood, *, of_classes: bool) -> str:
    """The name of a method that the likelihood has."""
    if isinstance(likelihood, PredictsProbabilities) and not likelihood.exclusive:
        msg = (
            f"likelihood={likelihood.name!r} has several right labels for a row; conformal makes sets of classes of "
            "which one is right. Calibrate one label at a time, as likelihood='binary'."
        )
        raise UnsupportedError(msg)
    if not of_classes and "sigma_noise" not in likelihood.hyperparameters:
        msg = (
            f"likelihood={likelihood.name!r} has neither class probabilities nor an observation noise for each target; "
            "conformal makes sets of classes and intervals around means."
        )
        raise UnsupportedError(msg)
    names = list(SETS if of_classes else INTERVALS)
    if method is None:
        return names[0]
    if method not in names:
        msg = f"method must be one of {', '.join(map(repr, names))} for {likelihood.name}; got {checks.shown(method)}."
        raise UnsupportedError(msg)
    return method


def _check_options(options: Mapping[str, Any], *, of_classes: bool) -> None:
    """Raise for options of predictions that are no rows of their own."""
    for name in ("joint", "fitting") if of_classes else ("joint", "fitting", "diagonal_output"):
        if name in options:
            msg = f"conformal predicts each row by itself, with its variances: leave out {name}=."
            raise UnsupportedError(msg)


def _plain(value: Any) -> Tensor:
    """A hyperparameter as a tensor that can be compared wherever the estimator is."""
    return torch.as_tensor(value).detach().cpu().nan_to_num()
