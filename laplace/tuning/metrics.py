"""Scores of predictions on validation data: a running negative log-likelihood, and ``validate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, ShapeError
from laplace.network.batches import iterate
from laplace.tuning.scores import RunningMetric, takes


class RunningNLLMetric:
    """Mean negative log-likelihood of class probabilities, in nats, over batches.

    Parameters
    ----------
    ignore_index
        Targets that do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sum, self._count = 0.0, 0

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Take a batch.

        Parameters
        ----------
        probs
            Class probabilities, ``[..., C]``.
        targets
            Class indices, ``[...]``.

        Raises
        ------
        ShapeError
            If shapes do not fit.
        """
        total, count = _nll(probs, targets, self.ignore_index)
        self._sum, self._count = self._sum + float(total), self._count + count

    def compute(self) -> Tensor:
        """Mean over all targets that count, ``[]``; infinite where a target had probability zero.

        Raises
        ------
        InputError
            If there were none.
        """
        if not self._count:
            msg = "There are no targets to average over: call update(probs, targets) first."
            raise InputError(msg)
        return torch.tensor(self._sum / self._count)

    def __call__(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Take a batch and return the score of that batch alone."""
        total, count = _nll(probs, targets, self.ignore_index)
        mean = _mean(total, count)
        self._sum, self._count = self._sum + float(total), self._count + count
        return mean


def _nll(probs: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Sum of −log p over the targets that count, and their number."""
    if targets.shape != probs.shape[:-1]:
        msg = f"Expected targets of shape {list(probs.shape[:-1])} for probabilities {list(probs.shape)}; got "
        raise ShapeError(msg + f"{list(targets.shape)}.")
    flat = targets.reshape(-1)
    log_probs = probs.reshape(-1, probs.shape[-1]).log()
    return F.nll_loss(log_probs, flat, ignore_index=ignore_index, reduction="sum"), int((flat != ignore_index).sum())


def _mean(total: Tensor, count: int) -> Tensor:
    if not count:
        msg = "There are no targets to average over: all of them are masked, or there are none."
        raise InputError(msg)
    return total / count


def get_nll(out_dist: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of class probabilities, in nats.

    Parameters
    ----------
    out_dist
        Class probabilities, ``[..., C]``.
    targets
        Class indices, ``[...]``; −100 does not count.

    Returns
    -------
    ``[]``; infinite where a target has probability zero.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    InputError
        If no target counts.
    ShapeError
        If shapes do not fit.
    """
    total, count = _nll(out_dist, targets, -100)
    return _mean(total, count)


def validate(
    laplace: Any,
    val_loader: Iterable[Any],
    loss: RunningMetric | Callable[..., Any],
    pred_type: PredType | str = PredType.GLM,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    dict_key_y: str = "labels",
) -> float:
    """Score an estimator's predictions on a loader.

    Parameters
    ----------
    laplace
        A fitted estimator.
    val_loader
        Yields validation batches.
    loss
        A running metric (torchmetrics, ``RunningNLLMetric``) or a function of all predictions and targets:
        ``loss(probabilities, targets)``, for regression ``loss(means, covariances, targets)``. A running metric of two
        arguments gets means and targets.
    pred_type, link_approx, n_samples
        How to predict.
    dict_key_y
        Where mappings hold their targets.

    Returns
    -------
    The score, in the units of ``loss``.

    Raises
    ------
    InputError
        If the loader is empty.
    """
    running = isinstance(loss, RunningMetric)
    if running:
        loss.reset()
    batches: list[tuple[Tensor, ...]] = []
    count = 0
    told: dict[str, Any] = {"dict_key_y": dict_key_y, "shift_labels": getattr(laplace, "shift_labels", None)}
    for x, y in iterate(val_loader, **told, device=next(laplace.model.parameters()).device):
        result = laplace(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)
        row = (*(result if isinstance(result, tuple) else (result,)), y)
        count += 1
        if running:
            # A metric of two arguments (a mean squared error, say) scores the means.
            loss.update(*(row if takes(loss.update, row) else (row[0], row[-1])))
        else:
            batches.append(row)
    if not count:
        msg = "The validation loader is empty: there is nothing to score."
        raise InputError(msg)
    if running:
        return float(loss.compute())
    return float(loss(*(torch.cat(column) for column in zip(*batches, strict=True))))
