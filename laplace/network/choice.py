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
        """Arguments from which copies and pickles are made."""
        return tuple(self), self.groups


@dataclass(frozen=True)
class Choice:
    """Chosen weights of some parameter tensors."""

    index: Int[Tensor, " params"]
    """Their positions among the weights of these tensors, one tensor after another, ``[P]``."""
    within: tuple[Tensor | None, ...]
    """For each tensor the positions of its chosen weights; ``None`` where it is all of them, in order."""
    places: tuple[Tensor, ...]
    """For each tensor the positions of its chosen weights in the subnetwork."""
    order: Int[Tensor, " params"] | None
    """The subnetwork as positions among the chosen weights listed tensor by tensor; ``None`` if it has that order."""
    sizes: tuple[int, ...]
    """Number of chosen weights per tensor; with ``order``, tensors in the order in which the subnetwork names them."""

    @classmethod
    def of(cls, model: nn.Module, index: Any) -> tuple[tuple[Tensor, ...], Choice]:
        """The parameter tensors that hold the weights at positions in ``parameters_to_vector``, and the choice."""
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
        """The subnetwork's values, from the values of all weights of each tensor, flat along the last axis."""
        parts = [values if w is None else values[..., w] for values, w in zip(flat, self.within, strict=True)]
        return self.join(parts)

    def join(self, parts: Sequence[Tensor]) -> Float[Tensor, "*batch params"]:
        """The subnetwork's values, from the values of the chosen weights of each tensor."""
        joined = torch.cat(list(parts), -1)
        return joined if self.order is None else joined[..., self.order]

    def scatter(self, flat: Sequence[Tensor], theta: Float[Tensor, " params"]) -> list[Tensor]:
        """New tensors: the values of all weights of each tensor, those of the subnetwork replaced by ``theta``."""
        rows = zip(flat, self.within, self.places, strict=True)
        return [
            theta[place] if w is None else old.index_copy(0, w, theta[place].to(old.dtype)) for old, w, place in rows
        ]


def by_appearance(part: Int[Tensor, " params"], device: torch.device) -> Interleaved:
    """Sizes of groups, in the order in which the groups first occur in a list."""
    numbers = part.tolist()
    rank = {number: position for position, number in enumerate(dict.fromkeys(numbers))}
    groups = torch.tensor([rank[number] for number in numbers])
    return Interleaved(groups.bincount().tolist(), groups.to(device))


def checked(index: Any, n_weights: int) -> Int[Tensor, " params"]:
    """Indices of weights as a ``LongTensor``, checked: one-dimensional, not empty, in range and all different."""
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
    """Raise unless parameters require a gradient."""
    frozen = [repr(name) for name, parameter in named if not parameter.requires_grad]
    if frozen:
        msg = (
            f"subnetwork_indices name weights of {', '.join(frozen[:3])}, which do not require a gradient and are "
            "therefore not random. Leave them out, or unfreeze them with requires_grad_(True). Indices count all "
            "weights of the model, frozen ones included."
        )
        raise UnsupportedError(msg)
