"""Data that are read more than once: again from the loader, or as features that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from laplace.enums import HessianStructure
from laplace.errors import InputError
from laplace.types import Inputs

KEPT_ELEMENTS = 2**29
"""How many numbers of features and outputs are kept between passes: 2 GB in float32."""


class Features(NamedTuple):
    """Outputs and features of a last layer, in place of the inputs."""

    f: Tensor
    phi: Tensor


class Replay:
    """Batches of features, made in the first pass and kept, or made again in every pass if they do not fit."""

    def __init__(self, batches: Iterable[tuple[Inputs, Tensor]], features: Callable[[Inputs], Features]) -> None:
        self._batches, self._features = batches, features
        self._kept: list[tuple[Features, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Features, Tensor]]:
        """Iterate over the batches."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Features, Tensor]] = []
        left = KEPT_ELEMENTS
        for x, y in self._batches:
            found = self._features(x)
            left -= found.f.numel() + found.phi.numel()
            if left >= 0:
                kept.append((found, y))
            else:
                kept.clear()
            yield found, y
        if left >= 0:
            self._kept = kept


def check_repeatable(batches: Iterable[tuple[Inputs, Tensor]], structure: HessianStructure) -> None:
    """Raise unless batches can be read more than once."""
    if getattr(batches, "one_shot", isinstance(batches, Iterator)):
        msg = (
            f"hessian_structure={structure.value!r} reads the training data several times, and this loader can be read "
            "once: it is an iterator, such as a generator. Pass a DataLoader or a list of batches."
        )
        raise InputError(msg)
