"""Checks of targets that need no outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.errors import InputError
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


def may_be_copied(x: Inputs, y: Tensor, dict_key_x: str = "input_ids") -> bool:
    """Whether targets of later batches may be the tokens of their inputs; raise if these are, position by position.

    Those of a causal language model are, but they belong to the outputs one position before. Everything that counts has
    to agree, and enough of it (all positions, or ``COPIED`` of them, that hold ``BITS``) that it does not by chance.
    Where something differs, labels are no copies, and later batches need not be checked.

    Raises
    ------
    InputError
        If they are; labels of another integer type than the inputs are taken as they come.
    """
    x = x[dict_key_x] if isinstance(x, Mapping) and dict_key_x in x else x
    x = x[0] if type(x) is tuple else x
    if not isinstance(x, Tensor) or y.dtype not in TOKENS or x.dtype != y.dtype or x.shape != y.shape:
        return True
    if y.dim() < 2 or y.shape[1] < 2:
        return True
    counts = y != IGNORED
    labels = y[counts]
    if not torch.equal(x[counts], labels):
        return False
    n_counts, n_tokens = len(labels), len(labels.unique())
    if n_counts < min(COPIED, y.numel()) or n_counts * math.log2(max(n_tokens, 1)) < BITS:
        return True
    msg = (
        f"The labels are the tokens of the inputs, position by position (at all {n_counts} that count). The outputs of "
        "a causal language model at a position belong to the token after it: its own loss shifts the labels, this "
        "library does not. Shift them in the loader: labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], "
        f"{IGNORED})], 1). For a model that is to copy its inputs yield labels of another integer type: labels.int()."
    )
    raise InputError(msg)
