"""Data that are read several times."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.structures.accumulate import check_same_data
from tests.contracts import generator


def shuffled(**options) -> DataLoader:
    noise = generator(0)
    x, y = torch.randn(30, 3, generator=noise), torch.randn(30, 2, generator=noise)
    y[:3] += 20  # outliers
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=noise, **options)


@pytest.mark.parametrize(("structure", "options"), [("ekfac", {}), ("lowrank", {"rank": 1})])
def test_a_loader_with_other_rows_in_each_pass_is_noticed(structure, options, monkeypatch):
    monkeypatch.setattr("laplace.structures.lowrank.OVERSAMPLING", 1)
    la = Laplace(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), "regression", "all", structure, **options)
    with pytest.warns(UserWarning, match=r"not the same each time.*drop_last=True"):
        la.fit(shuffled(drop_last=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.fit(shuffled())


def test_rounding_is_no_difference():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_data(torch.tensor(1000.0), torch.tensor(1000.5))
        check_same_data(torch.tensor([3.0, -5.0]), torch.tensor([3.001, -5.001]))
        check_same_data(torch.tensor(0.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="was 1000 and is 1002"):
        check_same_data(torch.tensor(1000.0), torch.tensor(1002.0))
