"""Outputs and targets of models that have several heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace.checks import shown
from laplace.errors import InputError, MissingKeyError, UnsupportedError
from laplace.network.outputs import entry

Key = str | int
"""Of a head: in what the model returns, and among targets."""


@dataclass(frozen=True)
class SideBySide:
    """The outputs of all heads in one tensor ``[batch, C]``."""

    keys: tuple[Key, ...]

    def __call__(self, returned: Any) -> Tensor:
        """From what the model returns."""
        return torch.cat([rows_of(key, entry(returned, key)) for key in self.keys], -1)


def rows_of(key: Key, f: Any) -> Tensor:
    """The outputs of a head, ``[batch, C]``."""
    f = f.unsqueeze(-1) if isinstance(f, Tensor) and f.dim() == 1 else f
    if not isinstance(f, Tensor) or f.dim() != 2:
        shown = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        msg = (
            f"With all weights the outputs of several heads are [batch, C]; those of {key!r} are {shown}. Fit last "
            'layers (subset_of_weights="last_layer"), which may have positions.'
        )
        raise UnsupportedError(msg)
    return f


@dataclass(frozen=True)
class Targets:
    """A loader that yields other targets: those of one head, or of all heads side by side."""

    loader: Iterable[Any]
    dict_key_y: str
    choose: Callable[[Any], Tensor]

    def __iter__(self) -> Iterator[Any]:
        """Batches."""
        for batch in self.loader:
            if isinstance(batch, Mapping) and self.dict_key_y in batch:
                yield {**batch, self.dict_key_y: self.choose(batch[self.dict_key_y])}
            elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
                yield (*batch[:-1], self.choose(batch[-1]))
            else:
                yield batch  # which is refused where batches are read

    def __len__(self) -> int:
        """Number of batches."""
        if not isinstance(self.loader, Sized):
            raise TypeError
        return len(self.loader)


def target(y: Any, key: Key) -> Tensor:
    """The targets of one head."""
    held = y[key] if isinstance(y, Mapping) and key in y else None
    if isinstance(y, (tuple, list)) and isinstance(key, int) and -len(y) <= key < len(y):
        held = y[key]
    if held is None:
        found = f"a mapping with {', '.join(map(repr, y))}" if isinstance(y, Mapping) else f"a {type(y).__name__}"
        msg = f"Targets of several heads are a mapping, or a sequence, with {key!r} among its keys; got {found}."
        raise MissingKeyError(msg)
    if not isinstance(held, Tensor) or not held.dim():
        msg = f"The targets of head {key!r} must be a tensor with an axis for the batch; got {shown(held)}."
        raise InputError(msg)
    return held


__all__ = ["Key", "SideBySide", "Targets", "rows_of", "target"]
