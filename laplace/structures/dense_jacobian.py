"""Jacobians written out, ``[batch, outputs, P]``: for the generic paths, which are slow and correct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import ShapeError
from laplace.linalg import CHUNK_ELEMENTS
from laplace.structures.jacobian import JacobianBlock


def dense_rows(blocks: Sequence[JacobianBlock]) -> Iterator[Float[Tensor, "batch columns params"]]:
    """Derivatives in all parameter groups, written out, for a bounded number of data at a time."""
    n_rows, n_columns = blocks[0].n_rows, blocks[0].n_columns
    step = max(1, CHUNK_ELEMENTS // max(1, n_columns * sum(block.n_params for block in blocks)))
    for start in range(0, n_rows, step):
        yield torch.cat([block.dense(slice(start, start + step)) for block in blocks], -1).transpose(0, 1)


def check_jacobians(J: Tensor, n_params: int) -> None:
    """Raise unless Jacobians are ``[batch, outputs, P]``."""
    if J.dim() != 3 or J.shape[-1] != n_params:
        msg = f"Jacobians must have the shape [batch, outputs, {n_params}]; got {list(J.shape)}."
        raise ShapeError(msg)
