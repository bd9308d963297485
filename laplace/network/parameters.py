"""Which weights are random (``subset_of_weights=``), as one flat vector and back. Never writes to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSubset:
    """The random weights: whole parameter tensors, in the order of ``torch.nn.utils.parameters_to_vector``.

    Attributes
    ----------
    parameters
        The parameter tensors themselves; read, never written.
    """

    parameters: tuple[Tensor, ...]

    @classmethod
    def last_layer(cls, layer: nn.Linear) -> ParameterSubset:
        """The weight and, where there is one, the bias of the last linear layer.

        Read as attributes, so that a parametrized weight (weight norm, say) is the one that multiplies the features.
        """
        return cls((layer.weight,) if layer.bias is None else (layer.weight, layer.bias))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights in each parameter group."""
        return tuple(parameter.numel() for parameter in self.parameters)

    @property
    def n_params(self) -> int:
        """P, the number of random weights."""
        return sum(self.sizes)

    @property
    def n_layers(self) -> int:
        """Number of parameter groups (a weight and its bias are two)."""
        return len(self.parameters)

    def vector(self) -> Float[Tensor, " params"]:
        """A detached copy of the weights as they are now."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])


def head_views(
    vector: Float[Tensor, "*batch params"], n_outputs: int, n_features: int, bias: bool
) -> tuple[Float[Tensor, "*batch outputs features"], Float[Tensor, "*batch outputs"] | None]:
    """View vectors over the weights of a linear layer as its weight and its bias.

    Parameters
    ----------
    vector
        ``[..., P]`` in public order: the weight row by row, then the bias.
    n_outputs, n_features
        C and D of the layer.
    bias
        Whether it has a bias.
    """
    size = n_outputs * n_features
    weight = vector[..., :size].unflatten(-1, (n_outputs, n_features))
    return weight, vector[..., size:] if bias else None


def augment(phi: Float[Tensor, "rows features"], bias: bool) -> Float[Tensor, "rows augmented"]:
    """Append the constant feature 1 that a bias multiplies."""
    return torch.cat([phi, torch.ones_like(phi[:, :1])], 1) if bias else phi


def output_index(n_outputs: int, n_params: int, bias: bool) -> Int[Tensor, "outputs augmented"]:
    """Where the weights of each output (its row of W, then its bias) lie in public order, ``[C, D + bias]``."""
    n_features = n_params // n_outputs - int(bias)
    weight = torch.arange(n_outputs * n_features).view(n_outputs, n_features)
    if not bias:
        return weight
    return torch.cat([weight, (n_outputs * n_features + torch.arange(n_outputs)).unsqueeze(1)], 1)


def split_sizes(vector: Float[Tensor, "*batch params"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Split the last axis into parameter groups."""
    assert vector.shape[-1] == sum(sizes), "the caller checks sizes"
    return torch.split(vector, list(sizes), dim=-1)


def expand_groups(values: Float[Tensor, " groups"], sizes: Sequence[int]) -> Float[Tensor, " params"]:
    """Repeat one value a parameter group to one value a weight."""
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
