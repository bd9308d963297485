"""Rows back to the data they belong to."""

import pytest
import torch

from laplace.likelihoods import Positions
from laplace.tuning.grouped import Grouping, numbered
from tests.contracts import generator


@pytest.mark.parametrize("datum", [[0, 1, 2], [3, 3, 3], [9, 2, 2, 5, 9, 2], [4], []])
def test_each_row_is_in_the_place_of_its_datum_and_other_places_are_empty(datum, device):
    datum = torch.tensor(datum, dtype=torch.long, device=device)
    values = torch.rand(len(datum), 2, generator=generator(0)).to(device) + 1
    groups = Grouping.of(datum)
    grid = groups.grid(values)
    for row, known in zip(grid, datum.unique(), strict=True):
        mine = values[datum == known]
        assert torch.equal(row[: len(mine)], mine)
        assert not row[len(mine) :].any()
    found = groups.positions(Positions(values, -values))
    assert torch.equal(grid.flatten(0, 1)[found.kept], found.f)
    assert torch.equal(found.y, -found.f)
    assert torch.equal(datum.unique()[found.datum], datum[groups.order])


def test_data_are_counted_from_zero_in_ascending_order():
    number, n_data = numbered(torch.tensor([7, 3, 7, 20]))
    assert number.tolist() == [1, 0, 1, 2]
    assert n_data == 3
