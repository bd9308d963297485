"""Quantiles, excess and tails, compared with NumPy and with loops over their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from laplace.density import Excess, Reference, Tail
from laplace.density.reference import MAX_QUANTILES, quantile
from laplace.errors import InputError
from tests.density.brute_force import tail


@pytest.mark.parametrize("n", [1, 2, 5, 18, 19, 20, 21, 100, 1003])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_quantiles_are_those_of_type_6(n, share):
    values = torch.randn(n).sort().values
    assert quantile(values, share) == pytest.approx(np.quantile(values.numpy(), share, method="weibull"), rel=1e-12)


@pytest.mark.parametrize("n", [3, 19, 20, 200])
def test_the_excess(n):
    values = torch.randn(n) * 3 + 7
    ascending = sorted(values.tolist())
    q50, q95 = (float(np.quantile(ascending, share, method="weibull")) for share in (0.5, 0.95))
    assert (q95 == ascending[-1]) == (n < 20)
    excess = Excess.of(values)
    assert excess.reason is None
    new = torch.linspace(-10, 50, 24)
    expected = [max(0.0, (v - q95) / (q95 - q50)) for v in new.tolist()]
    assert_close(excess(new.view(4, 6)), torch.tensor(expected).view(4, 6))
    assert_close(excess(torch.tensor([1e18])), torch.tensor([1e18 / (q95 - q50)]))


@pytest.mark.parametrize("values", [torch.full((30,), 2.5), torch.tensor([4.0]), 5 + 1e-13 * torch.randn(30)])
def test_the_excess_is_off_where_validation_rows_are_equal(values):
    excess = Excess.of(values)
    assert "are equal" in str(excess.reason)
    assert not excess(torch.tensor([1.0, 1e9])).any()


@pytest.mark.parametrize("make", [Excess.of, Tail.of])
@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])])
def test_numbers_that_cannot_be_compared_with_are_refused(make, values):
    with pytest.raises(InputError, match="finite numbers of at least one reference row"):
        make(values)


@pytest.mark.parametrize("n", [2, 4, 7, 50, 300])
def test_the_tail_is_the_share_beyond(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).exp()
    found, new = Tail.of(values), torch.cat([torch.linspace(-30, 60, 301), values])
    assert_close(found(new), torch.tensor([tail(values.tolist(), v) for v in new.tolist()]))


def test_the_tail_at_a_reference_row_is_its_rank():
    values = torch.randn(40)
    shares = [sum(other >= v for other in values.tolist()) / 41 for v in values.tolist()]
    assert_close(Tail.of(values)(values).exp(), torch.tensor(shares))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(100),
        lambda: torch.randn(3000) ** 3,
        lambda: torch.tensor([2.0]),
        lambda: torch.arange(60.0) // 7,
    ],
)
def test_the_tail_is_continuous_and_falls_everywhere(draw):
    values = draw()
    found = Tail.of(values)
    low, high = float(values.min()), float(values.max())
    for point in {low, high, float(values.median())}:
        around = found(torch.tensor([point - 1e-12, point, point + 1e-12]))
        assert_close(around, around[1].expand(3), rtol=0, atol=1e-5)
    grid = torch.cat([torch.linspace(low - 5, high + 5, 5001), high + torch.logspace(1, 25, 100)])
    assert (found(grid).diff() < 0).all()
    assert (found(grid) <= 0).all()


def test_far_rows_keep_their_order_and_are_finite():
    found = Tail.of(torch.randn(100))
    far = found(torch.tensor([1e3, 1e6, 1e18, 1e250]))
    assert torch.isfinite(far).all()
    assert (far.diff() < 0).all()
    slope = (found(torch.tensor(1e4)) - found(torch.tensor(2e4))) / 1e4
    assert float(slope) == pytest.approx(1 / found.scale)


def test_equal_rows_count_together():
    found = Tail.of(torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0, 3.0]))
    assert_close(found(torch.tensor([1.0, 2.0, 3.0])).exp(), torch.tensor([6 / 7, 5 / 7, 2 / 7]))


@pytest.mark.parametrize("n", [MAX_QUANTILES + 1, 20000])
def test_many_rows_are_kept_as_quantiles(n):
    values = torch.randn(n).exp()
    found = Tail.of(values)
    assert MAX_QUANTILES / 2 < len(found.values) <= MAX_QUANTILES
    assert found.values[0] == values.min()
    assert found.values[-1] == values.max()
    new = torch.cat([values, torch.linspace(-1, 1e3, 50)])
    ranks = values.sort().values
    expected = torch.cat([torch.log((n - torch.searchsorted(ranks, values)) / (n + 1)), torch.zeros(0)])
    assert_close(found(new)[:n], expected, rtol=0, atol=0.25)
    assert_close(
        found(values[values <= values.median()]).exp(), expected[values <= values.median()].exp(), rtol=0, atol=3e-3
    )
    assert found.scale == pytest.approx(float((ranks[-math.ceil(n / 10) :] - ranks[-math.ceil(n / 10) - 1]).mean()))


def test_fisher_is_the_sum_of_both_tails():
    rest, g = -torch.rand(50).exp(), torch.randn(50)
    reference = Reference.of(rest, g)
    new = torch.linspace(-4, -0.1, 20), torch.linspace(-2, 1e6, 20)
    expected = [-tail(rest.tolist(), a) - tail(g.tolist(), b) for a, b in zip(*(v.tolist() for v in new), strict=True)]
    found = reference.fisher(*new)
    assert_close(found, torch.tensor(expected))
    assert_close(reference.fisher(*(v.view(4, 5) for v in new)), found.view(4, 5))
    assert (found >= 0).all()
    assert reference.n_rows == 50
    assert reference.notes == ()


def test_a_reference_of_training_rows_says_so():
    assert "50 training rows" in Reference.of(-torch.rand(50), torch.randn(50), "training").notes[0]


def test_wrong_references_are_refused():
    with pytest.raises(InputError, match=r"Expected one g for each"):
        Reference.of(-torch.rand(5), torch.rand(6))
    with pytest.raises(InputError, match=r"source must be 'validation' or 'training'; got 'test'"):
        Reference.of(-torch.rand(5), torch.rand(5), "test")
    with pytest.raises(InputError, match=r"The values of g must be finite"):
        Reference.of(-torch.rand(5), torch.full((5,), torch.nan))


def test_float32_is_read_in_float64():
    values = torch.randn(30)
    found = Tail.of(values.float())
    assert found.values.dtype == found(values.float()).dtype == torch.float64
    assert_close(found(values.float()), Tail.of(values.float().double())(values.float().double()))
