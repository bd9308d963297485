"""What every estimator does with a fit, whatever it is over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradGGN
from laplace.errors import UnknownAttributeError, UnsupportedError
from laplace.fit import Fit
from tests.contracts import generator
from tests.tools import assert_close

X = torch.randn(12, 4, generator=generator(0)).double()
Y = torch.randn(12, 3, generator=generator(1)).double()
STRUCTURES = ("full", "kron", "diag", "blockdiag", "ekfac")


def fitted(structure: str = "kron", subset: str = "last_layer", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    la = Laplace(model, "regression", subset, structure, **options)
    la.fit([(X, Y)])
    return la


@pytest.mark.parametrize("structure", STRUCTURES)
def test_results_can_be_viewed_flat(structure):
    la = fitted(structure)
    for result in (la.backend.jacobians(X)[0], la(X, diagonal_output=True)[1], la.functional_variance_fast(X)[1]):
        assert result.view(-1).shape == (result.numel(),)


@pytest.mark.parametrize("noise", ["scalar", "per_output", "nonsense", None])
@pytest.mark.parametrize("options", [{}, {"subset": "all"}, {"structure": "gp", "n_subset": 6}])
def test_a_noise_to_choose_goes_with_the_evidence_alone(noise, options):
    la = fitted(**options)
    before = la.sigma_noise
    with pytest.raises(UnsupportedError, match=r"noise=.* goes with method='marglik'"):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], noise=noise)
    assert torch.equal(la.sigma_noise, before)


@pytest.mark.parametrize("name", ["saved", "curvature_entry", "weights_type"])
def test_tables_of_classes_are_no_options(name):
    with pytest.raises(UnknownAttributeError):
        setattr(fitted(), name, ())


@pytest.mark.parametrize("bias", [True, False])
def test_a_fit_that_said_only_whether_a_head_has_a_bias_is_read(bias):
    torch.manual_seed(0)
    la = Laplace(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias)), "regression", "last_layer", "diag"
    )
    la.fit([(X, Y)])
    state = {name: value for name, value in vars(la._fit).items() if name != "head"}
    old = Fit.__new__(Fit)
    old.__setstate__({**state, "head_bias": bias})
    assert list(old.head) == la._fit.head
    scale = torch.tensor([1.0, 2.0, 3.0])
    assert_close(old.scaled(scale).vector, la._fit.scaled(scale).vector)
    assert copy.copy(la._fit).head == la._fit.head


def test_a_back_end_of_a_user_is_not_told_twice_what_it_is_for():
    class Own(AutogradGGN):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{name: value for name, value in kwargs.items() if name != "of_mine"})

    Own.__module__ = "elsewhere"
    fitted(backend=Own, backend_kwargs={"of_mine": 1})
    for name in ("last_layer", "dict_key_x"):
        with pytest.raises(UnsupportedError, match=f"cannot hold '{name}'"):
            fitted(backend=Own, backend_kwargs={name: True})


def test_a_precision_for_each_weight_is_refused_by_tune_before_anything_else():
    la = Laplace(nn.Linear(4, 3), "regression", "all", "diag")
    with pytest.raises(UnsupportedError, match="can never tell apart"):
        la.tune([(X, Y)], prior_structure="diag")
