"""Linearized inputs and points of last layers and whole networks, and the Jacobians they stand for, by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace.curvature import AutogradGGN
from laplace.curvature.by_autograd import WrittenOut
from laplace.gp.derivatives import InducingPoints, one_output
from laplace.predictive import Linearization, NetworkLinearization
from laplace.structures.head_block import HeadBlock, OneOutputBlock
from tests.cases import Case
from tests.contracts import of_head
from tests.networks import Network

F64 = torch.float64
WHOLE = (
    "mlp",
    "positions",
    "conv2d",
    "conv1d_depthwise",
    "embedding",
    "encoder",
    "tied_layers",
    "lstm",
    "few_positions",
)
"""Networks whose weights have blocks of every kind."""


def whole_network(network: Network, x: Any, *, written: bool = False) -> NetworkLinearization:
    """Derivatives of all weights, in factors or as a back end that only gives Jacobians has them."""
    backend = AutogradGGN(network.model(), network.likelihood)
    derivatives: Any = backend.derivatives(x)
    if written:
        J = network.problem().jacobian(x).flatten(1, 2)
        derivatives = WrittenOut(derivatives.f, J, tuple(p.numel() for p in backend.params))
    return NetworkLinearization(derivatives.f, derivatives, lambda theta: theta, torch.zeros(()))


def last_layer(case: Case, x: Any) -> NetworkLinearization:
    """Features of a last layer."""
    f, phi = case.extractor().forward_with_features(x)
    return of_head(f.detach(), phi.detach(), case.bias)


def columns_for(f: Tensor, seed: int = 0) -> Tensor:
    """An output of each datum."""
    return torch.randint(f[0].numel(), (len(f),), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Situation:
    """Inputs, points in two batches, and Jacobians: ``J [rows, C, P]`` of the inputs, ``Z [M, P]`` of the points."""

    inputs: Linearization
    points: InducingPoints
    J: Tensor
    Z: Tensor


def situation(thing: Case | Network, *, written: bool = False) -> Situation:
    """Two inputs and five points."""
    problem = thing.problem()
    x, z = thing.data(n_rows=2, shift=2)[0], thing.data(n_rows=5, shift=3)[0]
    Jz = problem.jacobian(z).flatten(1, 2)
    if isinstance(thing, Case):
        inputs, at = last_layer(thing, x), last_layer(thing, z)
        columns = columns_for(at.f)
        blocks = [one_output(at, columns, F64)]
    else:
        inputs = whole_network(thing, x, written=written)
        parts = [whole_network(thing, part, written=written) for part in (z[:2], z[2:])]
        columns = torch.cat([columns_for(part.f, seed) for seed, part in enumerate(parts)])
        split = columns.split([2, 3])
        blocks = [one_output(part, c, F64) for part, c in zip(parts, split, strict=True)]
    points = InducingPoints([lambda some=some: some for some in blocks], [some[0].n_rows for some in blocks])
    chosen = Jz[torch.arange(5), columns]
    return Situation(inputs, points, problem.jacobian(x).flatten(0, 1), chosen)


def head_points(phi: Tensor) -> InducingPoints:
    """The only output of a last layer without a bias at some features."""
    block = OneOutputBlock(HeadBlock((phi,), ((1, phi.shape[1]),)), torch.zeros(len(phi), dtype=torch.long))
    return InducingPoints([lambda: [block]], [len(phi)])
