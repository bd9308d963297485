"""Subsets of data of last layers and whole networks, and what they mean as dense matrices, by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace.gp.kernel import SubsetKernel
from laplace.predictive import Linearization
from laplace.structures.head_block import head_of
from tests.cases import Case
from tests.cases import named as case_named
from tests.gp.samples import F64, last_layer, whole_network
from tests.networks import Network
from tests.networks import named as network_named
from tests.reference import rows_of

M, N_INPUTS = 5, 3
WHOLE = ("mlp", "conv2d", "positions", "embedding", "tied_layers", "conv1d_depthwise", "lstm")
LAST = ("classification", "no_bias_regression", "positions_regression")
KINDS = [
    *[("whole", name) for name in WHOLE],
    *[("separate", name) for name in ("mlp", "positions")],
    *[("last", name) for name in LAST],
]
"""(kind, name): all weights, all weights with independent outputs, last layer."""


@dataclass(frozen=True)
class Sample:
    """A kernel of M data, other inputs, and the Jacobians of both, ``[rows, C, P]``."""

    kernel: SubsetKernel
    inputs: Linearization
    J: Tensor
    J_inputs: Tensor

    @property
    def n_outputs(self) -> int:
        return self.J.shape[1]

    def unit(self) -> Tensor:
        """K, ``[rows·C, rows·C]``, without what outputs have in common where these are separate."""
        return self.between(self.J, self.J)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        kernel = first.flatten(0, 1) @ second.flatten(0, 1).T
        if self.kernel.independent:
            same = torch.eye(self.n_outputs)
            kernel = kernel * same.repeat(len(first), len(second))
        return kernel

    def roots(self, *, diagonal: bool, shared: bool = False) -> Tensor:
        """Of some Hessians: a whole one of fewer columns than outputs, or diagonals."""
        noise = torch.Generator().manual_seed(7)
        if diagonal:
            return torch.rand(len(self.J), 1 if shared else self.n_outputs, generator=noise) + 0.1
        return torch.randn(len(self.J), self.n_outputs, max(1, self.n_outputs - 1), generator=noise)

    def dense_root(self, root: Tensor) -> Tensor:
        """R, ``[rows·C, columns]``."""
        if root.dim() == 2:
            return torch.block_diag(*[row.diag() for row in root.expand(-1, self.n_outputs)])
        return torch.block_diag(*root)

    def precision(self, root: Tensor, delta: float) -> Tensor:
        """Over weights, ``[P, P]``."""
        rows = self.dense_root(root).T @ self.J.flatten(0, 1)
        return rows.T @ rows + delta * torch.eye(self.J.shape[2])

    def covariance(self, root: Tensor, delta: float) -> Tensor:
        """Of the outputs of the inputs, ``[rows·C, rows·C]``, in function space."""
        K, R, cross = self.unit() / delta, self.dense_root(root), self.between(self.J_inputs, self.J) / delta
        inner = (torch.eye(R.shape[1]) + R.T @ K @ R).inverse()
        return self.between(self.J_inputs, self.J_inputs) / delta - cross @ R @ inner @ R.T @ cross.T


def sample(kind: str, name: str) -> Sample:
    thing: Case | Network = case_named(name) if kind == "last" else network_named(name)
    problem = thing.problem()
    z, x = thing.data(n_rows=M, shift=3)[0], thing.data(n_rows=N_INPUTS, shift=2)[0]
    J, J_inputs = (problem.jacobian(part).flatten(0, 1) for part in (z, x))
    if isinstance(thing, Case):
        at = last_layer(thing, z)
        head = head_of(at.head)
        assert head is not None
        return Sample(SubsetKernel.of_head(head), last_layer(thing, x), J, J_inputs)

    def linearize(part: Any) -> Linearization:
        return whole_network(thing, part)

    each = len(J) // M
    batches, sizes = (rows_of(z, slice(0, 2)), rows_of(z, slice(2, M))), ((2, each), (M - 2, each))
    kernel = SubsetKernel(batches, sizes, J.shape[1], J.shape[2], kind == "separate", F64, linearize)
    return Sample(kernel, linearize(x), J, J_inputs)
