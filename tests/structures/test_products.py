"""Pieces of products that are made in one buffer: squares and variances are those of J written out."""

import pytest
import torch

from laplace.structures import jacobian
from laplace.structures.product import ProductBlock, Shared


@pytest.mark.parametrize("limit", [1, 40, 10**6], ids=["a unit at a time", "some", "all"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [None, Shared(3)], ids=["alone", "shared"])
def test_squares_and_variances_are_those_of_the_dense_derivatives(monkeypatch, limit, groups, transposed, shared):
    monkeypatch.setattr(jacobian, "piece_elements", lambda _: limit)
    left, right = torch.randn(3, 5, groups, 4, 2).double(), torch.randn(5, groups, 4, 6).double()
    block = ProductBlock(left, right, transposed, shared=shared)
    sides = "qbgti,qbgto->qbgio" if transposed else "qbgto,qbgti->qbgoi"
    wide = right.expand(3, *right.shape)
    J = torch.einsum(sides, *((wide, left) if transposed else (left, wide))).flatten(2)
    w = torch.rand(J.shape[2]).double()
    torch.testing.assert_close(block.squares(), J.square().sum((0, 1)))
    torch.testing.assert_close(block.variance(w), (J.square() * w).sum(-1))
    total = torch.ones_like(w)
    block.add_squares(total)
    torch.testing.assert_close(total, 1 + J.square().sum((0, 1)))


def test_derivatives_with_a_graph_are_not_overwritten():
    left = torch.randn(1, 3, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 1, 2, 5, dtype=torch.float64)

    def variance(g: torch.Tensor) -> torch.Tensor:
        return ProductBlock(g, right, shared=Shared()).variance(torch.ones(20, dtype=torch.float64))

    assert torch.autograd.gradcheck(variance, left)


def test_variances_are_differentiable_in_the_weights_of_the_squares(monkeypatch):
    """As tuning does: the graph keeps each piece, so that none may be made where another one is."""
    monkeypatch.setattr(jacobian, "piece_elements", lambda _: 8)
    left, right = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 1, 2, 4), (3, 1, 2, 5)))
    w = torch.rand(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: ProductBlock(left, right, shared=Shared()).variance(w), w)


def test_inputs_that_all_columns_share_are_turned_once():
    shared, right = Shared(10), torch.randn(3, 1, 4, 6)
    turn = torch.linalg.qr(torch.randn(6, 6))[0]
    blocks = [ProductBlock(torch.randn(1, 3, 1, 4, 5), right, shared=shared, is_kept=True) for _ in range(2)]
    first, second = (block.rotate([None, turn], (5, 6)) for block in blocks)
    assert first.right is second.right
    torch.testing.assert_close(first.dense(), (blocks[0].dense().view(1, 3, 5, 6) @ turn).flatten(2))
