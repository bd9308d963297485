"""Derivatives of a linear head, never written out, against the same written out."""

import pytest
import torch

from laplace.structures.head_block import HeadBlock, OneOutputBlock, follow, head_blocks, head_of
from laplace.structures.jacobian import DenseBlock
from tests.contracts import generator, linear_jacobian, of_head, shapes_of
from tests.structures.samples import C, D, uniform
from tests.tools import assert_close

N = 5
noise = generator(0)
PHI = torch.randn(N, D, generator=noise).double()
MIX = torch.randn(2, C, generator=noise).double()
BLOCKS = {
    "weight": HeadBlock((PHI,), ((C, D),)),
    "bias": HeadBlock((torch.ones(N, 1).double(),), ((C,),)),
    "bias of one row": HeadBlock((torch.ones(1, 1).double().expand(N, 1),), ((C,),)),
    "bias of differences": HeadBlock((torch.zeros(N, 1).double(),), ((C,),)),
    "mixtures": HeadBlock((PHI,), ((C, D),), MIX),
    "mixtures of the bias": HeadBlock((torch.ones(N, 1).double(),), ((C,),), MIX),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


@every_block
def test_all_that_structures_ask_for_is_that_of_the_written_out_block(block):
    dense, w = DenseBlock(block.dense()), uniform(block.n_params, 1)
    assert dense.values.shape == (block.n_columns, block.n_rows, block.n_params)
    for ask in ("variance", "covariance", "kernel"):
        assert_close(getattr(block, ask)(w), getattr(dense, ask)(w), ask)
    assert_close(block.squares(), dense.squares(), "squares")
    v = torch.randn(3, block.n_params, generator=generator(2)).double()
    assert_close(block.apply(v), dense.apply(v), "apply")
    weights = torch.randn(3, block.n_columns, N, generator=generator(3)).double()
    assert_close(block.apply_transposed(weights), dense.apply_transposed(weights), "apply transposed")
    assert_close(block.cross(block), dense.cross(dense), "cross")
    assert_close(block.cross(dense), dense.cross(dense), "cross with a written-out block")
    index = torch.tensor([1, 0, C - 1])
    assert_close(block.entries(slice(1, 3), index), dense.entries(slice(1, 3), index), "entries")
    assert_close(block.select(torch.arange(1, 3)).dense(), dense.values[:, 1:3], "rows")
    mix = torch.randn(4, block.n_columns, generator=generator(4)).double()
    assert_close(block.mix(mix).dense(), dense.mix(mix).values, "mixtures")
    for _, weights, J in block.pieces():
        assert_close(J, dense.values[:, :, weights], "pieces")


def test_where_weights_are_alike_one_output_stands_for_all():
    for block in (*BLOCKS.values(), head_of(head_blocks(PHI, shapes_of(C, D)))):
        alike = torch.tensor([0.3]).double().expand(block.n_params)
        for ask in ("variance", "covariance", "kernel"):
            assert_close(getattr(block, ask)(alike), getattr(DenseBlock(block.dense()), ask)(alike), ask)


def test_one_output_of_each_row_is_that_row_of_the_written_out_block():
    head = head_of(head_blocks(PHI, shapes_of(C, D)))
    output = torch.tensor([2, 0, 0, C - 1, 1])
    block, J = OneOutputBlock(head, output), head.dense()[output, torch.arange(N)].unsqueeze(0)
    dense = DenseBlock(J)
    assert_close(block.dense(), J)
    assert_close(block.dense(slice(1, 4)), J[:, 1:4])
    assert (block.n_columns, block.n_rows, block.n_params) == J.shape
    v, weights = torch.randn(3, block.n_params).double(), torch.randn(3, 1, N).double()
    assert_close(block.apply(v), dense.apply(v), "apply")
    assert_close(block.apply_transposed(weights), dense.apply_transposed(weights), "apply transposed")
    others = OneOutputBlock(head.select(torch.arange(3)), output[1:4])
    assert_close(block.cross(others), dense.cross(DenseBlock(others.dense())), "cross")
    for other in (head, head.mix(MIX), dense):
        written = DenseBlock(other.dense())
        assert_close(block.cross(other), dense.cross(written), "cross with other blocks")
        assert_close(other.cross(block), written.cross(dense), "and the other way round")
    w = uniform(block.n_params, 1)
    for ask in ("variance", "covariance", "kernel"):
        assert_close(getattr(block, ask)(w), getattr(dense, ask)(w), ask)
    assert_close(block.mix(torch.ones(2, 1).double()).dense(), J.expand(2, -1, -1))
    basis = torch.linalg.qr(torch.randn(block.n_params, block.n_params).double())[0]
    assert_close(block.rotate([basis], (block.n_params,)).dense(), J @ basis)
    assert block.size < J.numel()


@every_block
def test_in_other_coordinates_it_is_the_written_out_block_there(block):
    dense, shape = DenseBlock(block.dense()), block.shape
    sides = [torch.linalg.qr(torch.randn(n, n, generator=generator(5)).double())[0] for n in shape]
    kinds = [sides, [None] * len(sides), [*sides[:-1], None], [None, *sides[1:]]][: 2 * len(sides)]
    for kind in kinds:
        assert_close(block.rotate(kind, shape).dense(), dense.rotate(kind, shape).values)
    (whole,) = [torch.linalg.qr(torch.randn(block.n_params, block.n_params, generator=generator(6)).double())[0]]
    flat = (block.n_params,)
    assert_close(block.rotate([whole], flat).dense(), dense.rotate([whole], flat).values)


def test_columns_are_outputs_and_mixtures_of_them():
    inputs = of_head(torch.zeros(N, C).double(), PHI)
    J = torch.stack([linear_jacobian(row, C, True) for row in PHI])
    found = [(inputs.blocks(torch.float64), J), (inputs.blocks(torch.float64, 1, 3), J[:, 1:3])]
    found.append((inputs.derivatives.columns(MIX), MIX @ J))
    for blocks, expected in found:
        assert_close(torch.cat([block.dense() for block in blocks], -1).transpose(0, 1), expected)


def test_a_bias_cancels_in_differences():
    J = torch.stack([linear_jacobian(row, C, True) for row in PHI[:4]])
    pairs = [block.differences() for block in head_blocks(PHI[:4], shapes_of(C, D))]
    found = torch.cat([block.dense() for block in pairs], -1)
    assert_close(found.transpose(0, 1), J[::2] - J[1::2])


def test_weight_and_bias_are_one_block_where_groups_are_coupled():
    blocks = head_blocks(PHI, shapes_of(C, D))
    head = head_of(blocks)
    theta = uniform(C * (D + 1), 2)
    W, b = theta[: C * D].view(C, D), theta[C * D :]
    assert_close(head.augmented @ theta[head.order].T, PHI @ W.T + b)
    dense, w = DenseBlock(head.dense()), uniform(head.n_params, 1)
    assert_close(head.dense(), torch.cat([block.dense() for block in blocks], -1))
    for ask in ("variance", "covariance", "kernel"):
        assert_close(getattr(head, ask)(w), getattr(dense, ask)(w), ask)
    assert_close(head.squares(), dense.squares(), "squares")
    assert head_of([BLOCKS["mixtures"], BLOCKS["bias"]]) is None
    assert head_of([BLOCKS["weight"], DenseBlock(BLOCKS["bias"].dense())]) is None


def test_batches_follow_one_another():
    parts = [head_blocks(rows, shapes_of(C, D)) for rows in PHI.split([2, 3])]
    for block, whole in zip(follow(parts), head_blocks(PHI, shapes_of(C, D)), strict=True):
        assert_close(block.dense(), whole.dense())
