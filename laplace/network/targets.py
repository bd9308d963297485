"""Checks of targets that need no outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.errors import InputError, warn
from laplace.network.failures import described
from laplace.types import Inputs

IGNORED = -100
"""The target that masks a position, as in PyTorch's cross-entropy."""
COPIED = 8
"""Number of positions at which labels and inputs must agree before labels count as copied, if some are masked."""
BITS = 8
"""Information (bits) in labels that agree before they count as copied: a few tokens may agree by chance."""
TOKENS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_targets(y: Any, batch: Any) -> None:
    """Raise unless targets are a tensor of numbers with an axis for the batch."""
    if not isinstance(y, Tensor):
        msg = (
            f"Targets must be a tensor; the loader yields {type(y).__name__} for them, in a batch that is "
            f"{described(batch)}. Convert arrays and numbers with torch.as_tensor(y)."
        )
        raise InputError(msg)
    if y.is_meta:
        msg = "The targets are on the meta device, where tensors have no values: let the loader yield data."
        raise InputError(msg)
    if y.layout is not torch.strided:
        msg = f"Targets must be a dense tensor; the loader yields one of {y.layout}. Pass y.to_dense()."
        raise InputError(msg)
    if y.dim() == 0:
        msg = (
            "The loader yields single data, whose targets have no axis for a batch, in place of batches. Wrap the data "
            "set in a DataLoader(dataset, batch_size=...), or stack the data."
        )
        raise InputError(msg)


def agreeing(x: Inputs, y: Tensor, dict_key_x: str = "input_ids") -> Tensor | None:
    """Labels that are the tokens of the inputs, position by position, as those of a causal language model are.

    ``None`` where one of those that count is another. Of a mapping without the entry ``dict_key_x`` any entry
    may be the tokens; it holds no targets.
    """
    if isinstance(x, Mapping) and dict_key_x not in x:
        found = (agreeing(value, y) for value in x.values() if isinstance(value, Tensor))
        return next((labels for labels in found if labels is not None), None)
    x = x[dict_key_x] if isinstance(x, Mapping) else x
    x = x[0] if type(x) is tuple else x
    if not isinstance(x, Tensor) or y.dtype not in TOKENS or x.dtype not in TOKENS or x.shape != y.shape:
        return None
    if y.dim() < 2 or y.shape[1] < 2:
        return None
    x, counts = x.to(y.device), y != IGNORED
    labels = y[counts].long()
    return labels if torch.equal(x[counts].long(), labels) else None


def are_enough(labels: Tensor, n_positions: int) -> bool:
    """Whether so many labels do not agree by chance: all positions, or ``COPIED`` of them, that hold ``BITS``."""
    n_counts, n_tokens = len(labels), len(labels.unique())
    return n_counts >= min(COPIED, n_positions) and n_counts * math.log2(max(n_tokens, 1)) >= BITS


class Shift:
    """Whether the labels of a loader are those of the positions after: given, or found by the first batch that tells.

    The outputs of a causal language model at a position belong to the token after it, and its own loss shifts labels.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self._found: bool | None = None
        self._open: list[Tensor] = []
        """Labels of batches that did not tell, and were taken as they came."""

    def __call__(self, x: Inputs, y: Tensor, dict_key_x: str) -> Tensor:
        """The targets of one batch.

        Raises
        ------
        InputError
            If labels cannot be shifted, or batches do not agree on whether they are to be.
        """
        if self.wanted is not None:
            return shifted(y) if self.wanted else y
        if self._found is False:
            return y
        labels = agreeing(x, y, dict_key_x)
        if self._found is None:
            if labels is not None and not len(labels):
                return y  # nothing counts
            verdict = labels is not None and are_enough(torch.cat([*self._open, labels]), y.numel())
            if labels is not None and not verdict:
                self._open.append(labels)
                return y
            if verdict and self._open:
                msg = (
                    "The labels of this batch are the tokens of its inputs, as those of a causal language model are; "
                    "those before were too few to tell, and were taken as they came. Say it: shift_labels=True, "
                    "or shift_labels=False for a model that is to copy its inputs."
                )
                raise InputError(msg)
            self._found = verdict
            if verdict:
                msg = (
                    "The labels are the tokens of the inputs, as those of a causal language model are, whose outputs "
                    "belong to the token after a position: they are shifted by one, as in the loss of the model. "
                    "shift_labels=True says so without this warning; shift_labels=False takes labels as they come."
                )
                warn(msg, UserWarning)
            return shifted(y) if verdict else y
        if labels is None:
            msg = (
                "The labels of earlier batches are the tokens of their inputs, and were shifted by one; those of this "
                "batch are not. Say what they are: shift_labels=True or shift_labels=False."
            )
            raise InputError(msg)
        return shifted(y)


def shifted(y: Tensor) -> Tensor:
    """Labels ``[batch, positions, ...]`` of the positions after; the last position has none and is masked.

    Raises
    ------
    InputError
        If they are no class indices with an axis for positions.
    """
    if y.dim() < 2 or y.dtype not in TOKENS:
        msg = (
            "shift_labels=True moves labels [batch, positions] of a causal language model by one position; got "
            f"{list(y.shape)} of {y.dtype}. Leave it out for other targets."
        )
        raise InputError(msg)
    y = y.long()
    return torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], 1)
