"""Attributes of estimators: what they were given, which cannot be assigned, and what ``tune`` chooses, which can."""

# Of estimators, in their own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from laplace import checks
from laplace.network import FeatureExtractor
from laplace.network.outputs import Reading


def reading_of(model: nn.Module, key: Any, function: Any, dim: Any, shift: Any) -> Reading:
    """How the outputs of a model are read, checked; a ``FeatureExtractor`` knows."""
    return model.reading if isinstance(model, FeatureExtractor) else Reading.of(key, function, dim, shift)


backend_kwargs = property(lambda self: dict(self._backend_kwargs), doc="What the back end is constructed with, a copy.")
asdl_fisher_kwargs = property(
    lambda self: dict(self._asdl_fisher_kwargs), doc="What methods of an ASDL back end are given, a copy."
)
curvature_dtype = property(
    lambda self: self._curvature_dtype,
    doc="The precision that was asked for; ``None`` for that of the model, at least float32.",
)
output_key = property(
    lambda self: self._reading.key,
    doc='Where the outputs are in what the model returns; ``None``: the tensor itself, or ``"logits"``.',
)
output_fn = property(
    lambda self: self._reading.function,
    doc="The function from what the model returns to its outputs, if there is one.",
)
output_dim = property(
    lambda self: self._reading.found,
    doc="The axis of the outputs that holds the C outputs, as given or, after a pass, as seen; ``None`` before.",
)
shift_labels = property(
    lambda self: self._reading.shift,
    doc="Whether labels are those of the positions after; ``None``: the labels of each loader tell.",
)


def _assign_weight_uncertainty(self: Any, value: bool) -> None:
    self._adjustments = replace(self._adjustments, weight_uncertainty=checks.flag("weight_uncertainty", value))


def _assign_distance_scale(self: Any, value: float) -> None:
    self._adjustments = self._adjustments.scaled(checks.number("distance_scale", value, from_zero=True))


weight_uncertainty = property(
    lambda self: self._adjustments.weight_uncertainty,
    _assign_weight_uncertainty,
    doc="""Whether predictions use the posterior's variance; ``tune`` chooses, and it may be assigned.

    Samples of weights and functions, covariances and the evidence are those of the posterior in any case.
    """,
)
distance_scale = property(
    lambda self: self._adjustments.scale,
    _assign_distance_scale,
    doc="""s²: how much wider predictions are where inputs are foreign, in units of them; ``tune`` chooses it.

    Logits divided by the output temperature get the variance s² e(x), a regression σ² s² e(x)², with e the excess of
    the distance of features over that of 95 % of the validation rows. May be assigned: 0 turns it off. Another value
    must be positive (``InputError``) and needs a ``tune`` before, which looks at validation rows
    (``UnsupportedError``).
    """,
)

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
