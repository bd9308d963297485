"""Kronecker sums of many batches: in place, half of each matrix, in float64 once in a while."""

import copy

import pytest
import torch

from laplace.errors import ShapeError
from laplace.structures import Kron
from laplace.structures.open_kron import OPEN, OpenKron, add_upper


def upper(rows: torch.Tensor) -> torch.Tensor:
    """The upper half of a sum of outer products, beside numbers that mean nothing."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    add_upper(total, rows)
    return total


@pytest.mark.parametrize("n", [1, 5, 127, 128, 131, 300])
def test_half_of_a_symmetric_product_says_all_of_it(n):
    rows = torch.randn(7, n, dtype=torch.float64)
    (found,), ((pair, token),) = OpenKron([[upper(rows)]]).kfacs, OpenKron([[upper(rows), torch.ones(3)]]).kfacs
    torch.testing.assert_close(found[0], rows.T @ rows)
    torch.testing.assert_close(pair, rows.T @ rows)
    assert torch.equal(token, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("n_batches", [1, 2, OPEN, OPEN + 1, 5 * OPEN + 3])
def test_many_batches_keep_the_digits_of_one(n_batches):
    batches = [torch.rand(20, 150) for _ in range(n_batches)]
    total = OpenKron([[upper(batches[0])]], [20], 1e-7)
    for rows in batches[1:]:
        assert total.absorbing(OpenKron([[upper(rows)]], [20], 1e-7)) is total
    exact = sum(rows.double().T @ rows.double() for rows in batches)
    ((found,),) = total.kfacs
    assert found.dtype == torch.float64
    assert float(((found - exact) / exact).abs().max()) < 4 * torch.finfo(torch.float32).eps
    assert total.counts == [20 * n_batches]


def test_it_may_be_read_in_between_and_summands_stay_as_they_are():
    batches = [torch.rand(20, 130, dtype=torch.float64) for _ in range(4)]
    parts = [OpenKron([[upper(rows)]]) for rows in batches]
    before = copy.deepcopy(parts[1:])
    total = parts[0]
    for part in parts[1:]:
        total.absorbing(part)
        torch.testing.assert_close(total.kfacs[0][0], total.kfacs[0][0].T)
    torch.testing.assert_close(total.kfacs[0][0], sum(rows.T @ rows for rows in batches))
    for part, kept in zip(parts[1:], before, strict=True):
        assert torch.equal(part.kfacs[0][0], kept.kfacs[0][0])
    assert isinstance(total + parts[1], Kron)


def test_factors_that_blocks_share_stay_shared_where_all_batches_share_them():
    def of_batch(*, shared: bool) -> OpenKron:
        first = torch.eye(3)
        return OpenKron([[first, torch.eye(2)], [first if shared else 2 * torch.eye(3)]])

    total = of_batch(shared=True).absorbing(of_batch(shared=True))
    assert total.kfacs[0][0] is total.kfacs[1][0]
    total = total.absorbing(of_batch(shared=False))
    assert torch.equal(total.kfacs[0][0], 3 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(total.kfacs[1][0], 4 * torch.eye(3, dtype=torch.float64))


def test_factors_of_other_shapes_do_not_add_up():
    with pytest.raises(ShapeError, match="parameter 0"):
        OpenKron([[torch.eye(3)]]).absorbing(OpenKron([[torch.eye(4)]]))


def test_a_plain_matrix_is_added_as_before():
    total = OpenKron([[torch.eye(3)]]).absorbing(Kron([[torch.eye(3, dtype=torch.float64)]]))
    assert torch.equal(total.kfacs[0][0], 2 * torch.eye(3, dtype=torch.float64))
