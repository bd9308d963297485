"""Names and options that code written for laplace-torch uses: moments and samples of outputs, starts of the prior."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.func import functional_call, jacrev

from laplace import FullSubnetLaplace
from laplace.curvature import AsdlEF, AsdlGGN, AsdlHessian
from laplace.errors import InputError, NotFittedError, UnsupportedError
from tests.contracts import generator
from tests.estimators import dense
from tests.kinds import CHOSEN, data, every_kind, fitted, make, network
from tests.tools import assert_close, assert_covariance_of


def jacobian(subset, x):
    """∂f/∂θ of the small network in its random weights, [batch, C, P]."""
    model = network()
    parts = jacrev(lambda weights: functional_call(model, weights, (x,)))(dict(model.named_parameters()))
    J = torch.cat([part.flatten(2) for part in parts.values()], -1)
    return J[..., -10:] if subset == "last_layer" else J[..., CHOSEN] if subset == "subnetwork" else J


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@every_kind
def test_moments_of_the_outputs_are_those_of_the_linearized_network(subset, structure, likelihood):
    la, x = fitted(subset, structure, likelihood=likelihood), data()[0][:4]
    J, covariance = jacobian(subset, x).detach(), torch.linalg.inv(dense(la.posterior_precision))
    expected = J @ covariance @ J.mT
    f, var = la.functional_variance_fast(x)
    assert_close(f, network()(x))
    assert_close(var, expected.diagonal(dim1=1, dim2=2))
    f, cov = la._glm_predictive_distribution(x)
    assert_close(f, network()(x))
    assert_close(cov, expected)
    assert_close(la._glm_predictive_distribution(x, diagonal_output=True)[1], var)
    f, cov = la._glm_predictive_distribution(x, joint=True)
    assert_close(f, network()(x).flatten())
    assert_close(cov, J.flatten(0, 1) @ covariance @ J.flatten(0, 1).T)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_sampled_networks_are_those_of_the_public_calls(subset, likelihood):
    la, x = fitted(subset, "kron", likelihood=likelihood), data()[0][:4]
    draws = la._nn_functional_samples(X=x, n_samples=6, generator=generator(1))
    assert torch.equal(draws, la.functional_samples(x, "nn", 6, generator=generator(1)))
    predictions = la._nn_predictive_samples(X=x, n_samples=6, generator=generator(1))
    assert torch.equal(predictions, la.predictive_samples(x, "nn", 6, generator=generator(1)))
    assert_close(predictions, draws.softmax(-1) if likelihood == "classification" else draws)


def test_samples_of_moments_have_these_moments():
    la, x = fitted("all", "full", likelihood="classification"), data()[0][:1]
    f, cov = la._glm_predictive_distribution(x)
    draws = la._glm_functional_samples(f, cov, n_samples=4000, generator=generator(1))
    assert_covariance_of(draws[:, 0], f[0], cov[0])
    alone = la._glm_functional_samples(f, cov, 4000, diagonal_output=True, generator=generator(1))
    assert_covariance_of(alone[:, 0], f[0], cov[0].diagonal().diag())
    assert torch.equal(la._glm_predictive_samples(f, cov, 4000, generator=generator(1)), draws.softmax(-1))
    joint = la._glm_predictive_distribution(data()[0][:2], joint=True)
    draws = la._glm_functional_samples(*joint, n_samples=4000, generator=generator(1))
    assert_covariance_of(draws, *joint)


@every_kind
def test_moments_need_a_fit(subset, structure):
    la, x = make(subset, structure), data()[0]
    for call in (la.functional_variance_fast, la._glm_predictive_distribution, la._nn_predictive_samples):
        with pytest.raises(NotFittedError, match=r"fit\("):
            call(x)


def test_the_older_package_has_the_names_of_its_successor():
    module = importlib.import_module("laplace.curvature.asdfghjkl")
    assert (module.AsdfghjklGGN, module.AsdfghjklEF, module.AsdfghjklHessian) == (AsdlGGN, AsdlEF, AsdlHessian)


# -- starts of the prior precision ------------------------------------------------------------------------------------


@every_kind
def test_a_start_for_each_parameter_group_keeps_a_precision_for_each(subset, structure):
    la, other = fitted(subset, structure), fitted(subset, structure)
    start = torch.linspace(0.5, 2.0, la.n_layers)
    la.optimize_prior_precision(init_prior_prec=start, n_steps=0)
    assert_close(la.prior_precision, start.double())
    la.optimize_prior_precision(init_prior_prec=start, n_steps=4)
    other.optimize_prior_precision(init_prior_prec=start, n_steps=4, prior_structure="layerwise")
    assert_close(la.prior_precision, other.prior_precision)


def test_a_start_for_each_weight_keeps_a_precision_for_each_and_one_that_fits_neither_is_refused():
    la = fitted("all", "diag")
    la.optimize_prior_precision(init_prior_prec=torch.ones(la.n_params), n_steps=0)
    assert la.prior_precision.shape == (la.n_params,)
    with pytest.raises(InputError, match="init_prior_prec"):
        la.optimize_prior_precision(init_prior_prec=torch.ones(3))
    with pytest.raises(UnsupportedError, match="one value for each parameter group"):
        fitted("all", "kron").optimize_prior_precision(init_prior_prec=torch.ones(26))


@pytest.mark.parametrize("options", [{"structure": "diag"}, {"structure": "gp", "n_subset": 8}])
def test_the_old_name_of_grid_search_is_answered_with_the_new_one(options):
    la = make("all", **options)
    la.fit([data()])
    before = la.prior_precision
    with pytest.raises(UnsupportedError, match="method='gridsearch', val_loader=loader"):
        la.optimize_prior_precision(method="CV", val_loader=[data()])
    assert torch.equal(la.prior_precision, before)


def test_a_subnetwork_without_indices_says_where_to_get_them():
    with pytest.raises(InputError, match=r"LongTensor.*mask\.select"):
        FullSubnetLaplace(network(), "regression", subnetwork_indices=None)
