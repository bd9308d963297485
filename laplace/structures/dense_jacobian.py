"""Jacobians written out, ``[batch, outputs, P]``: for the generic paths, which are slow and correct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import ShapeError, UnsupportedError
from laplace.linalg import CHUNK_ELEMENTS
from laplace.structures.jacobian import JacobianBlock

MOST_COVARIANCES = 2**29
"""Largest number of covariances that are written out: 2 GB in float32."""


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


def check_covariances(n_numbers: int, n_outputs: int) -> None:
    """Raise if covariances are too many to be written out."""
    if n_numbers > MOST_COVARIANCES:
        msg = (
            f"The covariances of {n_outputs} outputs at these inputs are {n_numbers:.1e} numbers "
            f"({4 * n_numbers / 1e9:.0f} GB). Ask for variances (link_approx='probit', diagonal_output=True), for "
            "samples of functions (link_approx='mc', functional_samples), or predict fewer inputs at a time."
        )
        raise UnsupportedError(msg)
