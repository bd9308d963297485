"""From linearized inputs to what kernels are made of: tangents of all outputs, and points of chosen ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.gp.last_layer import FeatureTangents
from laplace.gp.tangents import Points, Tangents
from laplace.gp.whole_network import BlockTangents
from laplace.predictive.linearization import Linearization, NetworkLinearization
from laplace.predictive.pairs import Pairs
from laplace.structures.head_block import HeadBlock, head_of
from laplace.structures.jacobian import DenseBlock, JacobianBlock


@runtime_checkable
class Directional(Protocol):
    """Derivatives that can be taken in another direction for each datum."""

    def blocks(self, directions: Sequence[Tensor]) -> list[JacobianBlock]:
        """Of directions in the outputs, ``[batch, *positions, C]`` each: the columns."""
        ...


@dataclass(frozen=True)
class DifferenceTangents(Tangents):
    """Pairs of reward modeling: the logits are (f₀ − f₁, 0)."""

    scores: Tangents
    """Tangents of the scores, those of a pair one after the other."""

    def _difference(self, values: Tensor) -> Tensor:
        """From ``[rows, C, k]`` of scores to ``[pairs, 2, k]`` of logits."""
        first, second = values.reshape(-1, 2, values.shape[-1]).unbind(1)
        return torch.stack([first - second, torch.zeros_like(first)], 1)

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "pairs logits vectors"]:
        """The difference."""
        return self._difference(self.scores.times(vectors))

    def cross(self, points: Points) -> Float[Tensor, "pairs logits points"]:
        """The difference."""
        return self._difference(self.scores.cross(points))

    def variance(self) -> Float[Tensor, "pairs logits"]:
        """Those of the differences, and zero."""
        of_pairs = self.scores.pair_variance()
        return torch.stack([of_pairs, torch.zeros_like(of_pairs)], -1)

    def covariance(self) -> Float[Tensor, "pairs logits logits"]:
        """Diagonal, because the second logit is always 0."""
        return torch.diag_embed(self.variance())

    def joint(self) -> Float[Tensor, "joint joint"]:
        """From the kernel between all scores."""
        kernel = self.scores.joint()
        sign = torch.tensor([1.0, -1.0], dtype=kernel.dtype, device=kernel.device)
        pairs = torch.einsum("i,aibj,j->ab", sign, kernel.reshape(len(kernel) // 2, 2, -1, 2), sign)
        return torch.kron(pairs, torch.diag(sign.clamp(min=0)))


def tangents(inputs: Linearization, dtype: torch.dtype) -> Tangents:
    """The derivatives at some inputs."""
    if isinstance(inputs, Pairs):
        return DifferenceTangents(tangents(inputs.scores, dtype))
    if isinstance(inputs, NetworkLinearization) and inputs.derivatives is not None:
        head = head_of(inputs.blocks(dtype)) if inputs.is_linear else None
        return BlockTangents(inputs, dtype) if head is None else FeatureTangents(head)
    msg = f"{type(inputs).__name__} holds no derivatives that a kernel could be made of."
    raise UnsupportedError(msg)


def feature_points(
    inputs: NetworkLinearization, column: Int[Tensor, " batch"], dtype: torch.dtype
) -> tuple[HeadBlock, Int[Tensor, " batch"]]:
    """Derivatives of a last layer at one position of each datum, and which output is meant of its ``positions · C``."""
    n_positions = inputs.f.numel() // (len(column) * inputs.n_outputs)
    position, output = column // inputs.n_outputs, column % inputs.n_outputs
    head = head_of(inputs.blocks(dtype))
    assert head is not None, "of a last layer"
    return head.select(torch.arange(len(column), device=position.device) * n_positions + position), output


def block_points(
    inputs: NetworkLinearization, column: Int[Tensor, " batch"], dtype: torch.dtype
) -> list[JacobianBlock]:
    """One output of each datum of a whole network, ``[1, batch, p]`` for each parameter group.

    One backward pass; where a back end cannot differentiate another output of each datum at once, one for each output
    that is chosen, and rows are written out.
    """
    assert inputs.derivatives is not None, "tangents checks this"
    one_hot = torch.nn.functional.one_hot(column, inputs.f[0].numel()).to(inputs.f.dtype).reshape(inputs.f.shape)
    if isinstance(inputs.derivatives, Directional):
        return inputs.derivatives.blocks([one_hot])
    result: list[Tensor] = []
    for c in column.unique().tolist():
        rows = (column == c).nonzero().squeeze(1)
        of_c = inputs.blocks(dtype, c, c + 1)
        result = result or [block.sample.new_zeros(1, len(column), block.n_params) for block in of_c]
        for values, block in zip(result, of_c, strict=True):
            for row in rows.tolist():
                values[:, row] = block.dense(slice(row, row + 1))[:, 0]
    return [DenseBlock(values) for values in result]
