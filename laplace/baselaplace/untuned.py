"""What an object says of hyperparameters that nobody has chosen, or that leave confidence out of account."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

from laplace.enums import TuningMethod
from laplace.errors import UntunedWarning, warn
from laplace.likelihoods import AbstractLikelihood

HYPERPARAMETERS = frozenset({"prior_precision", "prior_mean", "sigma_noise", "temperature", "output_temperature"})
"""Whoever assigns one of these has chosen."""
LESS_CONFIDENT, CHANGED = 0.02, 0.01
"""From which difference of the mean confidence, or share of other decisions, on a comparison is worth a warning."""
_SAID = threading.Lock()
"""Held for good once the hint was printed."""


def seems(la: Any) -> bool:
    """Whether hyperparameters are the defaults."""
    precision = la.prior_precision.detach()
    return precision.numel() == 1 and float(precision) == 1 and la.output_temperature == 1


def compare(outputs: Tensor, predicted: Any, likelihood: AbstractLikelihood) -> None:
    """Warn if the first predictions of an untuned classifier are far from those of the network."""
    if not isinstance(predicted, Tensor):  # of a regression
        return
    with torch.no_grad():
        both = likelihood.expectation(outputs.detach()), predicted.detach()
        before, after = (likelihood.probabilities(p.reshape(-1, p.shape[-1])) for p in both)
        confidence, label = before.max(-1)
        now, other = after.max(-1)
        was, is_, changed = (float(v) for v in (confidence.mean(), now.mean(), (label != other).double().mean()))
    if abs(was - is_) < LESS_CONFIDENT and changed < CHANGED:
        return
    msg = (
        "Nobody has tuned this posterior: the prior precision is its default of 1. On these "
        f"{len(before)} predictions the mean confidence is {is_:.2f} where the network has {was:.2f}, and "
        f"{changed:.1%} of the decisions are others. Choose hyperparameters on data that the network was not trained "
        "on: la.tune(val_loader). To keep them as they are: la.accept_untuned()."
    )
    warn(msg, UntunedWarning)


def hint_once(method: str, likelihood: AbstractLikelihood) -> None:
    """Print, once per process, what calibrates a classifier whose temperature a method leaves as it is."""
    if method not in (TuningMethod.MARGLIK.value, TuningMethod.GRIDSEARCH.value):
        return
    if "output_temperature" in likelihood.hyperparameters and _SAID.acquire(blocking=False):
        print(
            f"Hint: method={method!r} chooses a prior precision and leaves the confidence of a classifier to it. "
            "Calibrate it on validation data: la.tune(val_loader). (Said once.)",
            file=sys.stderr,
        )


__all__ = ["HYPERPARAMETERS", "compare", "hint_once", "seems"]
