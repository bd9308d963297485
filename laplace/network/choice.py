"""Single weights of a model (``subnetwork_indices=``): which parameter tensors hold them, and where.

A chosen weight has three positions: in the vector of all weights of the model, which is what users pass; among the
weights of the tensors that hold a chosen one; and in the subnetwork, whose order is that of the user's indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace.errors import InputError, UnsupportedError


class Interleaved(tuple[int, ...]):
    """Sizes of parameter groups, ``(sizes, groups)``, whose weights are not listed group by group."""

    groups: Int[Tensor, " params"]
    """The group of each weight, ``[P]``."""

    def __new__(cls, sizes: Sequence[int], groups: Int[Tensor, " params"]) -> Interleaved:
        """Make the tuple and remember where the weights of each group are."""
        made = super().__new__(cls, sizes)
        made.groups = groups
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What copies and pickles are made of."""
        return tuple(self), self.groups


@dataclass(frozen=True)
class Choice:
    """Chosen weights of some parameter tensors.

    Attributes
    ----------
    index
        Where they are among the weights of these tensors, one tensor after another, ``[P]``.
    within
        For each tensor which of its weights they are; ``None`` where it is all of them, in order.
    places
        For each tensor where its chosen weights are in the subnetwork.
    order
        The subnetwork as positions among the chosen weights tensor by tensor; ``None`` when that is its order.
    sizes
        Number of chosen weights a tensor; with ``order``, tensors in the order in which the subnetwork names them.
    """

    index: Int[Tensor, " params"]
    within: tuple[Tensor | None, ...]
    places: tuple[Tensor, ...]
    order: Int[Tensor, " params"] | None
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, index: Any) -> tuple[tuple[Tensor, ...], Choice]:
        """The parameter tensors that hold chosen weights of a model, and which of theirs these are.

        Parameters
        ----------
        model
            Any module.
        index
            Positions in ``parameters_to_vector(model.parameters())``.

        Raises
        ------
        InputError
            If these are no such positions.
        UnsupportedError
            If a weight among them does not require a gradient.
        """
        named = list(model.named_parameters())
        sizes = torch.tensor([parameter.numel() for _, parameter in named])
        index = checked(index, int(sizes.sum())).cpu()
        ends = sizes.cumsum(0)
        tensor = torch.bucketize(index, ends, right=True)
        touched, part, counts = torch.unique(tensor, return_inverse=True, return_counts=True)
        check_random([named[t] for t in touched.tolist()])
        inside, widths = index - (ends - sizes)[tensor], sizes[touched]
        among = inside + (widths.cumsum(0) - widths)[part]
        together = part.argsort(stable=True)
        places = together.split(counts.tolist())
        ascending = torch.equal(together, torch.arange(len(index)))
        withins = [inside[place] for place in places]
        device = named[int(touched[0])][1].device
        return tuple(named[t][1] for t in touched.tolist()), cls(
            among.to(device),
            tuple(
                None if torch.equal(w, torch.arange(n)) else w.to(device)
                for w, n in zip(withins, widths.tolist(), strict=True)
            ),
            tuple(place.to(device) for place in places),
            None if ascending else together.argsort().to(device),
            tuple(map(len, places)) if ascending else by_appearance(part, device),
        )

    def gather(self, flat: Sequence[Tensor]) -> Float[Tensor, "*batch params"]:
        """The subnetwork's values.

        Parameters
        ----------
        flat
            For each tensor the values of all of its weights, along the last axis.
        """
        parts = [values if w is None else values[..., w] for values, w in zip(flat, self.within, strict=True)]
        return self.join(parts)

    def join(self, parts: Sequence[Tensor]) -> Float[Tensor, "*batch params"]:
        """The same from the values of the chosen weights, tensor by tensor."""
        joined = torch.cat(list(parts), -1)
        return joined if self.order is None else joined[..., self.order]

    def scatter(self, flat: Sequence[Tensor], theta: Float[Tensor, " params"]) -> list[Tensor]:
        """Values of all weights with those of the subnetwork put into place; new tensors.

        Parameters
        ----------
        flat
            For each tensor the values of all of its weights.
        theta
            Of the subnetwork.
        """
        rows = zip(flat, self.within, self.places, strict=True)
        return [
            theta[place] if w is None else old.index_copy(0, w, theta[place].to(old.dtype)) for old, w, place in rows
        ]


def by_appearance(part: Int[Tensor, " params"], device: torch.device) -> Interleaved:
    """Sizes of groups in the order in which they first occur in a list."""
    numbers = part.tolist()
    rank = {number: position for position, number in enumerate(dict.fromkeys(numbers))}
    groups = torch.tensor([rank[number] for number in numbers])
    return Interleaved(groups.bincount().tolist(), groups.to(device))


def checked(index: Any, n_weights: int) -> Int[Tensor, " params"]:
    """Indices of weights that can be used.

    Parameters
    ----------
    index
        What the user gave.
    n_weights
        Number of weights of the model.

    Raises
    ------
    InputError
        If they are no one-dimensional ``LongTensor``, none, out of range, or not all different.
    """
    where = "positions in torch.nn.utils.parameters_to_vector(model.parameters())"
    if not isinstance(index, Tensor):
        msg = (
            f"subnetwork_indices must be a one-dimensional torch.LongTensor, {where}; got {type(index).__name__}. "
            "Pass torch.tensor([...]), or what mask.select() returns."
        )
        raise InputError(msg)
    if index.dtype == torch.bool:
        msg = "subnetwork_indices must be a torch.LongTensor; got a boolean mask. Pass mask.nonzero().flatten()."
        raise InputError(msg)
    if index.dtype != torch.int64:
        msg = f"subnetwork_indices must be a torch.LongTensor; got {index.dtype}. Convert them with .long()."
        raise InputError(msg)
    if index.dim() != 1:
        msg = f"subnetwork_indices must be one-dimensional, {where}; got the shape {list(index.shape)}."
        raise InputError(msg)
    if not len(index):
        msg = "subnetwork_indices are empty: a subnetwork has at least one weight."
        raise InputError(msg)
    wrong = index[(index < 0) | (index >= n_weights)]
    if len(wrong):
        msg = (
            f"subnetwork_indices must lie between 0 and {n_weights - 1}, since the model has {n_weights} weights; got "
            f"{wrong[:3].tolist()}. Were they selected for another model?"
        )
        raise InputError(msg)
    values, counts = index.unique(return_counts=True)
    if len(values) < len(index):
        msg = f"subnetwork_indices must differ; {values[counts > 1][:3].tolist()} occur more than once."
        raise InputError(msg)
    return index.detach().clone()


def check_random(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise unless parameters require a gradient.

    Raises
    ------
    UnsupportedError
        If one does not; it is named.
    """
    frozen = [repr(name) for name, parameter in named if not parameter.requires_grad]
    if frozen:
        msg = (
            f"subnetwork_indices name weights of {', '.join(frozen[:3])}, which do not require a gradient and are "
            "therefore not random. Leave them out, or unfreeze them with requires_grad_(True). Indices count all "
            "weights of the model, frozen ones included."
        )
        raise UnsupportedError(msg)
