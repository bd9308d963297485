"""How good are predicted class probabilities: metrics of probabilities ``[..., C]`` and class indices ``[...]``.

Every function takes the probabilities of any predictor (a softmax, ``la(x)``, an average of samples), with leading
positions as in a sequence model; the target ``-100`` marks a position to leave out. Numbers are computed in float64.
AUROC, AUPR and FPR95 are those of torchmetrics, imported at the first call; its accuracy and calibration error round to
float32, so these are not. Pictures of the same quantities are in ``plots.py``, whole tables in ``report.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from laplace.errors import InputError, ShapeError
from laplace.likelihoods.categorical import IGNORED
from laplace.optional import require

_CLASSIFICATION = "torchmetrics.functional.classification"


@dataclass(frozen=True)
class ReliabilityBins:
    """Predictions sorted by confidence into bins of equal width.

    Attributes
    ----------
    edges
        Borders of the bins, ``[bins + 1]``, from 0 to 1.
    confidence
        Mean probability of the predicted class in each bin, ``[bins]``; NaN where a bin is empty.
    accuracy
        Share of right predictions in each bin, ``[bins]``; NaN where a bin is empty.
    count
        Number of predictions in each bin, ``[bins]``.
    """

    edges: Float[Tensor, " borders"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]


@dataclass(frozen=True)
class RiskCoverage:
    """Share of errors among the most confident predictions, for every share that could be kept.

    Attributes
    ----------
    coverage
        Share of the predictions that are kept, ``[rows]``: 1/N, 2/N, …, 1.
    risk
        Share of errors among those that are kept, ``[rows]``.
    """

    coverage: Float[Tensor, " rows"]
    risk: Float[Tensor, " rows"]

    @property
    def area(self) -> float:
        """Area under the curve: the mean risk over all coverages, between 0 and 1; smaller is better."""
        return float(self.risk.mean())


def flatten(
    probs: Float[Tensor, "..."], y: Shaped[Tensor, "..."]
) -> tuple[Float[Tensor, "rows outputs"], Int[Tensor, " rows"]]:
    """Unmasked probabilities, ``[rows, C]`` in float64, and class indices, ``[rows]``; checked."""
    if probs.ndim < 1 or probs.shape[:-1] != y.shape:
        msg = (
            f"Expected probabilities [..., C] and class indices [...] with the same leading axes; got "
            f"{tuple(probs.shape)} and {tuple(y.shape)}."
        )
        raise ShapeError(msg)
    check_probabilities(probs)
    if y.is_floating_point():
        msg = f"Targets must be class indices, of an integer dtype; got {y.dtype}."
        raise InputError(msg)
    y = y.to(probs.device).reshape(-1).long()
    kept = y != IGNORED
    rows, y = probs.detach().reshape(-1, probs.shape[-1]).double()[kept], y[kept]
    if not len(y):
        msg = f"There is nothing to evaluate: no row has a target other than {IGNORED}."
        raise InputError(msg)
    if bool((y < 0).any()) or bool((y >= rows.shape[-1]).any()):
        msg = (
            f"Targets must be class indices from 0 to {rows.shape[-1] - 1} (or {IGNORED} to leave a position out); "
            f"got values from {int(y.min())} to {int(y.max())}."
        )
        raise InputError(msg)
    return rows, y


def check_probabilities(probs: Float[Tensor, "*positions outputs"]) -> None:
    """Raise unless the last axis holds probabilities that sum to one within the rounding of their dtype."""
    check_columns(probs)
    # Not left to torchmetrics: it takes whatever lies outside [0, 1] for logits, without a warning.
    sums = probs.double().sum(-1)
    tolerance = max(1e-6, 4 * probs.shape[-1] * torch.finfo(probs.dtype).eps)
    if bool((probs >= 0).all()) and bool(((sums - 1).abs() <= tolerance).all()):
        return
    msg = (
        f"Expected probabilities: finite, not negative, with sum 1 over the last axis. Got entries from "
        f"{float(probs.min()):.3g} to {float(probs.max()):.3g} and sums from {float(sums.min()):.3g} to "
        f"{float(sums.max()):.3g}. If these are logits, apply softmax(-1) first."
    )
    raise InputError(msg)


def check_columns(probs: Float[Tensor, "..."]) -> None:
    """Raise unless there is a column for each of two or more classes."""
    if probs.ndim and probs.shape[-1] == 1:
        msg = (
            f"Expected one column for each class; got {list(probs.shape)}, a single one. Of two classes, with p the "
            "probability of class 1, pass both: torch.cat([1 - p, p], -1)."
        )
        raise ShapeError(msg)


def accuracy(probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."]) -> float:
    """Share of rows whose most probable class is the right one.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``.
    y
        Class indices, ``[...]``; -100 leaves a position out.

    Returns
    -------
    A number between 0 and 1.

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities or ``y`` no class indices.
    """
    probs, y = flatten(probs, y)
    return float((probs.argmax(-1) == y).double().mean())


def mean_nll(probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."]) -> float:
    """Mean negative log-likelihood: how much probability the right class was denied.

    −(1/N) Σ_n log p(y_n | x_n). A proper score: only the true probabilities minimize its expectation.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``. In float32 a probability below 1e-45 is zero, and its score infinite.
    y
        Class indices, ``[...]``; -100 leaves a position out.

    Returns
    -------
    Nats per row, at least 0.

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities or ``y`` no class indices.
    """
    probs, y = flatten(probs, y)
    return float(-probs.gather(-1, y.unsqueeze(-1)).log().mean())


def brier_score(probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."]) -> float:
    """Brier score: mean squared distance between the probabilities and the one-hot target.

    (1/N) Σ_n Σ_c (p_nc − [y_n = c])². A proper score that, unlike the log-likelihood, cannot be ruined by one row.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``.
    y
        Class indices, ``[...]``; -100 leaves a position out.

    Returns
    -------
    A number between 0 and 2 (the sum over classes, as in the original; some libraries divide it by 2 or by C).

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities or ``y`` no class indices.

    References
    ----------
    Brier (1950), "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78(1).
    """
    probs, y = flatten(probs, y)
    target = torch.nn.functional.one_hot(y, probs.shape[-1])
    return float((probs - target).square().sum(-1).mean())


def calibration_error(
    probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."], *, n_bins: int = 15
) -> float:
    """Expected calibration error (ECE): by how much confidence and accuracy differ, on average.

    Σ_m (n_m / N) · |accuracy_m − confidence_m| over ``n_bins`` bins of equal width in the confidence max_c p_c.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``.
    y
        Class indices, ``[...]``; -100 leaves a position out.
    n_bins
        Number of bins.

    Returns
    -------
    A number between 0 and 1. No proper score: predicting the share of every class for all inputs makes it zero. It is
    biased upward when bins hold few rows, so compare only values from the same rows and bins.

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities, ``y`` no class indices or ``n_bins`` not positive.

    References
    ----------
    Guo, Pleiss, Sun & Weinberger (2017), "On calibration of modern neural networks", section 2, eq. (3).
    arXiv:1706.04599
    """
    # torchmetrics counts confidences of exactly 1 in a bin of their own; these are the bins of the diagram.
    bins = reliability(probs, y, n_bins=n_bins)
    return float(((bins.accuracy - bins.confidence).abs() * bins.count).nansum() / bins.count.sum())


def reliability(
    probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."], *, n_bins: int = 15
) -> ReliabilityBins:
    """Accuracy and mean confidence in bins of confidence: what a reliability diagram shows.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``.
    y
        Class indices, ``[...]``; -100 leaves a position out.
    n_bins
        Number of bins of equal width. Bins are closed below and open above, the last is closed.

    Returns
    -------
    Edges, confidence, accuracy and count of the bins, in float64.

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities, ``y`` no class indices or ``n_bins`` not positive.
    """
    if n_bins < 1:
        msg = f"n_bins must be at least 1; got {n_bins}."
        raise InputError(msg)
    probs, y = flatten(probs, y)
    confidence, predicted = probs.max(-1)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=probs.dtype, device=probs.device)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=n_bins - 1)
    count = torch.bincount(index, minlength=n_bins)
    mean_confidence = torch.bincount(index, weights=confidence, minlength=n_bins) / count
    mean_accuracy = torch.bincount(index, weights=(predicted == y).double(), minlength=n_bins) / count
    return ReliabilityBins(edges, mean_confidence, mean_accuracy, count)


def uncertainty(probs: Float[Tensor, "*positions outputs"]) -> Float[Tensor, "*positions"]:
    """Probability that the most probable class is not the right one, 1 − max_c p_c.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``.

    Returns
    -------
    ``[...]`` in float64, between 0 and 1 − 1/C. Computed as the sum of the other classes, so that probabilities close
    to one keep their order: in float32, 1 − p is zero for each p above 1 − 6e-8.

    Raises
    ------
    InputError
        If ``probs`` are no probabilities.

    References
    ----------
    Hendrycks & Gimpel (2017), "A baseline for detecting misclassified and out-of-distribution examples in neural
    networks". arXiv:1610.02136
    """
    check_probabilities(probs)
    return _others(probs.detach().double())


def _others(probs: Float[Tensor, "*positions outputs"]) -> Float[Tensor, "*positions"]:
    return probs.sort(-1).values[..., :-1].sum(-1)


def ood_auroc(in_distribution: Float[Tensor, " inside"], out_of_distribution: Float[Tensor, " outside"]) -> float:
    """Area under the ROC curve when a score is used to tell foreign inputs from familiar ones.

    The probability that a random foreign input has a larger score than a random familiar one, ties counting half.

    Parameters
    ----------
    in_distribution
        Scores of familiar inputs, such as ``uncertainty(probs)``; any unit, larger meaning more foreign.
    out_of_distribution
        Scores of foreign inputs.

    Returns
    -------
    A number between 0 and 1; 0.5 for a score that knows nothing.

    Raises
    ------
    InputError
        If either is empty or holds values that are not finite.
    """
    rank, foreign = _ranked(in_distribution, out_of_distribution)
    return float(require(_CLASSIFICATION, "evaluation").binary_auroc(rank, foreign, validate_args=False))


def ood_average_precision(
    in_distribution: Float[Tensor, " inside"], out_of_distribution: Float[Tensor, " outside"]
) -> float:
    """Area under the precision-recall curve (AUPR) when foreign inputs are what is looked for.

    Parameters
    ----------
    in_distribution, out_of_distribution
        As of ``ood_auroc``.

    Returns
    -------
    A number between 0 and 1; for a score that knows nothing, the share of foreign inputs.

    Raises
    ------
    InputError
        If either is empty or holds values that are not finite.
    """
    rank, foreign = _ranked(in_distribution, out_of_distribution)
    found = require(_CLASSIFICATION, "evaluation").binary_average_precision(rank, foreign, validate_args=False)
    return float(found)


def ood_false_positives(
    in_distribution: Float[Tensor, " inside"], out_of_distribution: Float[Tensor, " outside"], found: float = 0.95
) -> float:
    """Share of familiar inputs that are called foreign where this share of foreign ones is found.

    Parameters
    ----------
    in_distribution, out_of_distribution
        As of ``ood_auroc``.
    found
        Share of the foreign inputs that must be found, above 0 and at most 1.

    Returns
    -------
    A number between 0 and 1, smaller is better; about ``found`` for a score that knows nothing.

    Raises
    ------
    InputError
        If either is empty or holds values that are not finite, or ``found`` is no share.
    """
    if not 0 < found <= 1:
        msg = f"found is a share above 0 and at most 1; got {found!r}."
        raise InputError(msg)
    rank, foreign = _ranked(in_distribution, out_of_distribution)
    curve = require(_CLASSIFICATION, "evaluation").binary_specificity_at_sensitivity
    return 1 - float(curve(rank, foreign, min_sensitivity=found, validate_args=False)[0])


def _ranked(in_distribution: Tensor, out_of_distribution: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as ranks in [0, 1], for beyond it a sigmoid would merge large ones into ties; and which are foreign."""
    for name, scores in (("in_distribution", in_distribution), ("out_of_distribution", out_of_distribution)):
        if not scores.numel() or not bool(torch.isfinite(scores).all()):
            msg = f"{name} must hold at least one score, all of them finite; got {scores.numel()} scores."
            raise InputError(msg)
    distinct, rank = torch.cat([in_distribution, out_of_distribution.to(in_distribution)]).unique(return_inverse=True)
    foreign = torch.zeros_like(rank)
    foreign[len(in_distribution) :] = 1
    return rank.double() / len(distinct), foreign


def risk_coverage(probs: Float[Tensor, "*positions outputs"], y: Shaped[Tensor, "..."]) -> RiskCoverage:
    """Share of errors that remains when the most uncertain predictions are handed to someone else.

    Parameters
    ----------
    probs
        Class probabilities, ``[..., C]``; rows are ranked by ``uncertainty(probs)``.
    y
        Class indices, ``[...]``; -100 leaves a position out.

    Returns
    -------
    Coverage and risk ``[rows]`` in float64, and the area under the curve. Rows with the same uncertainty share their
    errors evenly, which is the expectation over the ways to order them.

    Raises
    ------
    ShapeError
        If the leading axes differ.
    InputError
        If ``probs`` are no probabilities or ``y`` no class indices.

    References
    ----------
    Geifman & El-Yaniv (2017), "Selective classification for deep neural networks", section 2. arXiv:1705.08500
    """
    probs, y = flatten(probs, y)
    _, group = _others(probs).unique(return_inverse=True)
    wrong = (probs.argmax(-1) != y).double()
    errors = (torch.bincount(group, weights=wrong) / torch.bincount(group))[group.sort().values]
    kept = torch.arange(1, len(y) + 1, dtype=errors.dtype, device=errors.device)
    return RiskCoverage(kept / len(y), errors.cumsum(0) / kept)
