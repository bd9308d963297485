"""The uses of one group of weights in a forward pass, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import DenseBlock, JacobianBlock, SumBlock
from laplace.structures.product import ProductBlock


@dataclass(frozen=True)
class MixedBlock(DenseBlock):
    """A group used in ways that have no common factors, such as an embedding tied to a linear layer; written out."""


def combined(blocks: Sequence[JacobianBlock], zeros: Float[Tensor, "columns batch 1"], n_params: int) -> JacobianBlock:
    """The derivatives in a group, in factors where all its uses share their kind."""
    if not blocks:
        return DenseBlock(zeros.new_zeros(*zeros.shape[:2], n_params))
    if all(isinstance(b, SumBlock) for b in blocks):
        left = torch.cat([b.left for b in blocks if isinstance(b, SumBlock)], 2)
        return SumBlock(left)
    products = [b for b in blocks if isinstance(b, ProductBlock)]
    if len(products) == len(blocks) and len({(b.transposed, b.left.shape[2]) for b in products}) == 1:
        left, right = (torch.cat([getattr(b, side) for b in products], -2) for side in ("left", "right"))
        return ProductBlock(left, right, products[0].transposed, ProductBlock.counted_together(products))
    tables = [b for b in blocks if isinstance(b, GatherBlock)]
    if len(tables) == len(blocks):
        return GatherBlock.union(tables)
    total = torch.stack([b.dense() for b in blocks]).sum(0)
    return DenseBlock(total) if all(isinstance(b, DenseBlock) for b in blocks) else MixedBlock(total)
