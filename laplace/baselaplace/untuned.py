"""What an object says of hyperparameters that nobody has chosen, or that leave confidence out of account."""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

from laplace.errors import UntunedWarning, warn
from laplace.likelihoods import AbstractLikelihood

HYPERPARAMETERS = frozenset({"prior_precision", "prior_mean", "sigma_noise", "temperature", "output_temperature"})
"""Whoever assigns one of these has chosen."""
LESS_CONFIDENT, CHANGED = 0.02, 0.01
"""From which difference of the mean confidence, or share of other decisions, on a comparison is worth a warning."""
_SAID = threading.Lock()
"""Held for good once the hint was printed."""


def compare(network: Tensor, predicted: Tensor, likelihood: AbstractLikelihood) -> None:
    """Warn if the first predictions of an untuned object are far from those of the network."""
    with torch.no_grad():
        before, after = (likelihood.probabilities(p.detach().reshape(-1, p.shape[-1])) for p in (network, predicted))
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


def hint_once(method: str) -> None:
    """Print, once per process, what calibrates a classifier that was tuned by another method."""
    if _SAID.acquire(blocking=False):
        print(
            f"Hint: method={method!r} chooses a prior precision and leaves the confidence of a classifier to it. "
            "Calibrate it on validation data: la.tune(val_loader). (Said once.)",
            file=sys.stderr,
        )


__all__ = ["HYPERPARAMETERS", "compare", "hint_once"]
