"""What a last layer can be, as a table: its weights as a matrix ``[C, D]`` and a bias, its outputs from features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Head(NamedTuple):
    """How one kind of layer is read; all functions take the layer first."""

    called: str
    """In messages."""
    groups: Callable[[Any], list[tuple[int, ...]]]
    """Shapes of its parameter groups: ``(C, D)`` and, with a bias, ``(C,)``."""
    parameters: Callable[[Any], tuple[Tensor, ...]]
    """Its weights in that order, read as attributes: of a parametrized layer those that multiply the features."""
    outputs: Callable[[Any, Tensor], Tensor]
    """``W φ + b`` of features in the precision of the weights, ``[..., D]`` to ``[..., C]``."""


def _linear_groups(layer: nn.Linear) -> list[tuple[int, ...]]:
    weight = (layer.out_features, layer.in_features)
    return [weight] if layer.bias is None else [weight, (layer.out_features,)]


def _linear_parameters(layer: nn.Linear) -> tuple[Tensor, ...]:
    return (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)


def _linear_outputs(layer: nn.Linear, phi: Tensor) -> Tensor:
    return F.linear(phi, layer.weight, layer.bias)


HEADS: Mapping[type[nn.Module], Head] = {
    nn.Linear: Head("torch.nn.Linear", _linear_groups, _linear_parameters, _linear_outputs),
}
"""Kinds of layers whose outputs are linear in features and weights; another one is another row."""
KINDS = tuple(HEADS)


def head_of(layer: nn.Module) -> Head:
    """The row of a layer, which is one of ``KINDS``."""
    return next(head for kind, head in HEADS.items() if isinstance(layer, kind))


def n_outputs(layer: nn.Module) -> int:
    """C."""
    return head_of(layer).groups(layer)[0][0]


__all__ = ["HEADS", "KINDS", "Head", "head_of", "n_outputs"]
