"""Blocks of chosen weights: all that a block gives equals what its derivatives, written out and cut, give."""

import pytest
import torch
from torch import nn

from laplace.network.parameters import ParameterSubset
from laplace.structures.entries import FEW, EntriesBlock, ReorderedBlock, chosen
from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import DenseBlock, SumBlock
from laplace.structures.product import ProductBlock
from tests.contracts import generator
from tests.tools import LargestTensor, assert_close

Q, B = 2, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def product(groups: int, positions: int, o: int, i: int, *, transposed: bool = False) -> ProductBlock:
    left, right = normal(Q, B, groups, positions, o), normal(B, groups, positions, i, seed=1)
    return ProductBlock(left, right, transposed)


def embedding() -> GatherBlock:
    datum, token = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 6, 0, 1, 3])
    values = normal(Q, 5, 4)
    return GatherBlock(values, datum, token, B, 8, values, token)


def bias() -> SumBlock:
    left = normal(Q, B, 4, 20)
    return SumBlock(left)


BLOCKS = {
    "one position": lambda: product(1, 1, 5, 6),
    "positions": lambda: product(1, 3, 5, 6),
    "transposed": lambda: product(1, 2, 5, 6, transposed=True),
    "groups": lambda: product(2, 2, 3, 5),
    "transposed groups": lambda: product(2, 1, 3, 5, transposed=True),
    "rotated": lambda: product(1, 3, 5, 6).rotate((torch.linalg.qr(normal(5, 5)).Q, None), (5, 6)),
    "embedding": embedding,
    "dense": lambda: DenseBlock(normal(Q, B, 20)),
    "bias": bias,
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def check_block(block, expected: DenseBlock) -> None:
    """Every operation gives what it gives of the derivatives written out."""
    p = expected.n_params
    w, v, mix = normal(p).square(), normal(4, p), normal(3, Q)
    assert (block.n_params, block.n_columns, block.n_rows) == (p, Q, B)
    assert block.sample.dtype == torch.float64
    assert block.size > 0
    assert_close(block.dense(), expected.values, "dense")
    assert_close(block.dense(slice(1, 3)), expected.values[:, 1:3], "some rows")
    assert_close(block.squares(), expected.squares(), "squares")
    assert_close(block.variance(w), expected.variance(w), "variance")
    assert_close(block.covariance(w), expected.covariance(w), "covariance")
    assert_close(block.kernel(w), expected.kernel(w), "kernel")
    assert_close(block.apply(v), expected.apply(v), "apply")
    assert_close(block.mix(mix).dense(), expected.mix(mix).dense(), "mix")
    rotation = torch.linalg.qr(normal(p, p)).Q
    assert_close(block.rotate((rotation,), (p,)).dense(), expected.rotate((rotation,), (p,)).dense(), "rotation")


@every_block
@pytest.mark.parametrize("few", [False, True], ids=["most", "few"])
def test_chosen_weights_have_the_derivatives_of_the_whole_group(kind, few):
    block = BLOCKS[kind]()
    order = torch.randperm(block.n_params, generator=generator(5))
    index = order[: max(2, block.n_params // FEW)] if few else order[: block.n_params - 3]
    assert (len(index) * FEW <= block.n_params) == (few and block.n_params >= 2 * FEW)
    check_block(EntriesBlock(block, index), DenseBlock(block.dense()[..., index]))


def subset_of(*sizes: int, index: list[int]) -> ParameterSubset:
    model = nn.ParameterList([nn.Parameter(normal(size)) for size in sizes])
    return ParameterSubset.indices(model, torch.tensor(index))


def test_weights_in_any_order_have_their_derivatives_in_that_order():
    subset = subset_of(30, 20, 7, index=[33, 2, 49, 29, 30, 0])  # none of the last tensor
    blocks = [product(1, 3, 5, 6), bias()]
    (block,) = chosen(blocks, subset)
    assert isinstance(block, ReorderedBlock)
    check_block(block, DenseBlock(torch.cat([b.dense() for b in blocks], -1)[..., [33, 2, 49, 29, 30, 0]]))


def test_whole_groups_keep_their_own_blocks():
    blocks = [product(1, 3, 5, 6), bias()]
    first, second = chosen(blocks, subset_of(30, 20, index=[*range(30), 31]))
    assert first is blocks[0]
    assert isinstance(second, EntriesBlock)
    assert chosen(blocks, ParameterSubset((normal(30), normal(20)))) == blocks


@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (1, True), (2, False)])
def test_a_few_weights_of_a_large_group_never_form_its_derivatives(groups, transposed, positions):
    block = product(groups, positions, 50, 60, transposed=transposed)
    index = torch.arange(0, block.n_params, 500)
    entries = EntriesBlock(block, index)
    with LargestTensor() as largest:
        entries.squares()
        entries.variance(torch.ones(len(index)))
        entries.dense()
    allowed = max(block.left.numel(), block.right.numel(), Q * B * positions * len(index))
    assert largest.numel <= allowed, largest.operation
    assert allowed < Q * B * block.n_params


def test_padding_alone_has_no_derivatives():
    nothing = torch.zeros(0, dtype=torch.long)
    block = GatherBlock(normal(Q, 0, 4), nothing, nothing, B, 8, normal(Q, 0, 4), nothing)
    assert_close(block.entries(slice(None), torch.tensor([0, 9])), torch.zeros(Q, B, 2))
