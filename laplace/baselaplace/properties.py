"""Attributes of estimators: what they were given, which cannot be assigned, and what ``tune`` chooses, which can."""

# Of estimators, in their own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace import checks
from laplace.network import FeatureExtractor
from laplace.network.outputs import Reading


def reading_of(model: nn.Module, key: Any, function: Any, dim: Any, shift: Any) -> Reading:
    """How the outputs of a model are read, checked; a ``FeatureExtractor`` knows."""
    return model.reading if isinstance(model, FeatureExtractor) else Reading.of(key, function, dim, shift)


@property
def backend_kwargs(self: Any) -> dict[str, Any]:
    """What the back end is constructed with, a copy."""
    return dict(self._backend_kwargs)


@property
def asdl_fisher_kwargs(self: Any) -> dict[str, Any]:
    """What methods of an ASDL back end are given, a copy.

    Kept for code written for laplace-torch.
    """
    return dict(self._asdl_fisher_kwargs)


@property
def curvature_dtype(self: Any) -> torch.dtype | None:
    """The precision that was asked for; ``None`` for that of the model, at least float32."""
    return self._curvature_dtype


@property
def output_key(self: Any) -> str | int | None:
    """Where the outputs are in what the model returns; ``None``: the tensor itself, or ``"logits"``."""
    return self._reading.key


@property
def output_fn(self: Any) -> Callable[[Any], Tensor] | None:
    """The function from what the model returns to its outputs, if there is one."""
    return self._reading.function


@property
def output_dim(self: Any) -> int | None:
    """The axis of the outputs that holds the C outputs, as given or, after a pass, as seen; ``None`` before."""
    return self._reading.found


@property
def shift_labels(self: Any) -> bool | None:
    """Whether labels are those of the positions after; ``None``: the labels of each loader tell."""
    return self._reading.shift


@property
def weight_uncertainty(self: Any) -> bool:
    """Whether predictions use the posterior's variance; ``tune`` chooses, and it may be assigned.

    Samples of weights and functions, covariances and the evidence are those of the posterior in any case.
    """
    return self._adjustments.weight_uncertainty


@weight_uncertainty.setter
def weight_uncertainty(self: Any, value: bool) -> None:
    """Check and keep it."""
    self._adjustments = replace(self._adjustments, weight_uncertainty=checks.flag("weight_uncertainty", value))


@property
def distance_scale(self: Any) -> float:
    """s²: how much wider predictions are where inputs are foreign, in units of them; ``tune`` chooses it.

    Logits divided by the output temperature get the variance s² e(x), a regression σ² s² e(x)², with e the excess of
    the distance of features over that of 95 % of the validation rows. May be assigned: 0 turns it off. Another value
    must be positive (``InputError``) and needs a ``tune`` before, which looks at validation rows
    (``UnsupportedError``).
    """
    return self._adjustments.scale


@distance_scale.setter
def distance_scale(self: Any, value: float) -> None:
    """Check and keep it."""
    self._adjustments = self._adjustments.scaled(checks.number("distance_scale", value, from_zero=True))


__all__ = [
    "asdl_fisher_kwargs",
    "backend_kwargs",
    "curvature_dtype",
    "distance_scale",
    "output_dim",
    "output_fn",
    "output_key",
    "reading_of",
    "shift_labels",
    "weight_uncertainty",
]
