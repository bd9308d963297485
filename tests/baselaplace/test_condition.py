"""Variances where the prior is weak and the precision float32: right, or with a warning."""

import copy
import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import NumericalWarning

PRIORS = [1.0, 1e-4, 1e-5, 1e-12]


def variances(model, x, y, inputs, subset, structure, prior):
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la = Laplace(model, "regression", subset, structure, prior_precision=prior)
        la.fit([(x.to(dtype), y.to(dtype))])
        variance = la(inputs.to(dtype))[1].diagonal(dim1=1, dim2=2).double()
    return variance, any(entry.category is NumericalWarning for entry in caught)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "blockdiag", "ekfac", "kron", "lowrank"])
def test_variances_in_float32_are_those_in_float64_or_come_with_a_warning(structure, subset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)).float()
    x, y, inputs = torch.randn(5, 4), torch.randn(5, 2), 2 * torch.randn(9, 4)
    warned = []
    for prior in PRIORS:
        found, says = variances(model, x, y, inputs, subset, structure, prior)
        exact, _ = variances(copy.deepcopy(model).double(), x, y, inputs, subset, structure, prior)
        error = float((found / exact - 1).abs().max())
        assert says or error < 2e-2, f"{prior}: off by {error:.1%} without a word"
        warned.append(says)
    assert not warned[0], "no warning where there is no need for one"
    if structure in ("full", "blockdiag"):
        assert warned[2], "the warning is there where variances are off"


def test_the_candidates_of_a_search_do_not_warn_of_their_condition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)).float()
    la = Laplace(model, "regression", "all", "blockdiag")
    la.fit([(torch.randn(5, 4).float(), torch.randn(5, 2).float())])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(
            method="gridsearch", val_loader=[(torch.randn(5, 4).float(), torch.randn(5, 2).float())]
        )
        told = [str(entry.message) for entry in caught]
        la.prior_precision = 1e-5
        la(torch.randn(3, 4).float())
    assert not any("condition number" in message for message in told)
    assert "condition number" in str(caught[-1].message), "that of a prediction does"
