"""Which weights are random (``subset_of_weights=``), as one flat vector and back. Never writes to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from laplace import pending
from laplace.network.choice import Choice, Interleaved
from laplace.network.heads import head_of


@dataclass(frozen=True)
class ParameterSubset:
    """The random weights, in the order of ``torch.nn.utils.parameters_to_vector`` or in that of chosen indices.

    Attributes
    ----------
    parameters
        The parameter tensors that hold them; read, never written.
    choice
        Which of their weights are random; all when ``None``.
    """

    parameters: tuple[Tensor, ...]
    choice: Choice | None = None

    @classmethod
    def last_layer(cls, layer: nn.Module) -> ParameterSubset:
        """The weight, as a matrix, and, where there is one, the bias of the last linear layer.

        Read as attributes, so that a parametrized weight (weight norm, say) is the one that multiplies the features.
        """
        return cls(head_of(layer).parameters(layer))

    @classmethod
    def indices(cls, model: nn.Module, index: Any) -> ParameterSubset:
        """Single weights; of the parameter tensors only those that hold one of them are part of the subset.

        Parameters
        ----------
        model
            Any module.
        index
            Positions in ``parameters_to_vector(model.parameters())``, in any order, which is that of the subset.

        Raises
        ------
        InputError
            If these are no such positions: of another type or shape, none, out of range, or one twice.
        UnsupportedError
            If a weight among them does not require a gradient.
        """
        parameters, choice = Choice.of(model, index)
        return cls(parameters, choice)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of random weights in each parameter group."""
        if self.choice is not None:
            return self.choice.sizes
        return tuple(parameter.numel() for parameter in self.parameters)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameter groups; single weights of a tensor have none of their own."""
        if self.choice is not None:
            return [(size,) for size in self.choice.sizes]
        return [tuple(parameter.shape) for parameter in self.parameters]

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
        flat = [parameter.detach().reshape(-1) for parameter in self.parameters]
        return torch.cat(flat) if self.choice is None else self.choice.gather(flat)

    def at(self, theta: Float[Tensor, " params"]) -> list[Tensor]:
        """The parameter tensors with other random weights: new tensors, in the shapes and dtypes of the model's.

        Parameters
        ----------
        theta
            The random weights, ``[P]``.
        """
        if self.choice is None:
            flat = split_sizes(theta, self.sizes)
        else:
            flat = self.choice.scatter([parameter.detach().reshape(-1) for parameter in self.parameters], theta)
        return [part.reshape(old.shape).to(old.dtype) for old, part in zip(self.parameters, flat, strict=True)]

    def equals(self, theta: Float[Tensor, " params"]) -> bool:
        """Whether the weights of the model are those of a vector, in the coarser of their precisions.

        Parameters
        ----------
        theta
            ``[P]``, maybe in another dtype or on another device.
        """
        return not bool(self.differ(theta))

    def differ(self, theta: Float[Tensor, " params"]) -> bool | Tensor:
        """Whether they are others; ``[]`` where reading it would wait for the device of the weights."""
        if self.choice is not None:
            return pending.differ([_alike(self.vector(), theta)])
        parts = zip(self.parameters, split_sizes(theta, self.sizes), strict=True)
        return pending.differ(_alike(parameter.detach().reshape(-1), part) for parameter, part in parts)

    def restrict(self, values: Shaped[Tensor, "*batch all"]) -> Shaped[Tensor, "*batch params"]:
        """Of values for all weights of ``parameters``, one after another along the last axis, those of random ones."""
        return values if self.choice is None else values[..., self.choice.index]

    def embed(self, values: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch all"]:
        """The transpose of ``restrict``: values for the random weights among zeros for the others."""
        if self.choice is None:
            return values
        n_all = sum(parameter.numel() for parameter in self.parameters)
        return values.new_zeros(*values.shape[:-1], n_all).index_copy(-1, self.choice.index, values)


def _alike(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors in the coarser of their precisions, on the device of the first."""
    dtype = max(now.dtype, then.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return now.to(dtype), then.to(now.device, dtype)


def split_sizes(vector: Float[Tensor, "*batch params"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Split the last axis into parameter groups."""
    assert vector.shape[-1] == sum(sizes), "the caller checks sizes"
    return torch.split(vector, list(sizes), dim=-1)


def expand_groups(values: Float[Tensor, " groups"], sizes: Sequence[int]) -> Float[Tensor, " params"]:
    """Repeat one value per parameter group to one value per weight."""
    if isinstance(sizes, Interleaved):
        return values[sizes.groups]
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
