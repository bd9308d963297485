"""``LaplaceModel`` given more observations, fantasies among them, and the functions that are drawn from it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from botorch.acquisition import PosteriorMean
from botorch.models import GenericDeterministicModel
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch_community.acquisition.bll_thompson_sampling import BLLMaxPosteriorSampling
from botorch_community.models.blls import AbstractBLLModel
from torch import Tensor

from laplace.errors import InputError
from laplace.integrations.botorch import LaplaceModel
from tests.integrations.regressions import (
    BATCHES,
    SIGMA,
    UNIT,
    X,
    fitted,
    jacobians,
    network,
    precision,
    scaled,
    targets,
)

# -- observations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_observations_make_the_posterior_of_all_data_and_leave_the_object(n_outputs: int) -> None:
    la = fitted(n_outputs)
    before = la.state_dict()
    x, y = torch.rand(7, 3), torch.randn(7, n_outputs)
    model = LaplaceModel(la).condition_on_observations(x[:4], y[:4]).condition_on_observations(x[4:], y[4:])
    assert model.la.n_data == 27
    # A fit to all data at the same weights has the same covariance.
    together = fitted(n_outputs).fit([(torch.cat([X, x]), torch.cat([targets(X, n_outputs), y]))])
    posterior: Any = model.posterior(BATCHES)
    expected: Any = LaplaceModel(together).posterior(BATCHES)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix, expected.distribution.covariance_matrix, check_dtype=True
    )
    # The weights move to those of linear regression around the ones that the network has.
    plain = network(n_outputs)
    J, A = jacobians(plain, x, last_layer=True), precision(la, last_layer=True)
    A = A + J.T @ J / SIGMA**2
    gap = (y - plain(x)).flatten().detach()
    moved = torch.linalg.solve(A, J.T @ gap) / SIGMA**2
    x_new = BATCHES[0, 0]
    mean = plain(x_new).flatten() + jacobians(plain, x_new, last_layer=True) @ moved
    torch.testing.assert_close(posterior.mean[0, 0].flatten(), mean)
    with torch.no_grad():
        torch.testing.assert_close(model.la(x_new, joint=True)[0], mean.detach())
    after = la.state_dict()
    assert after["digest"] == before["digest"]


@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_batches_of_observations_condition_the_same_gaussian(subset: str, n_outputs: int) -> None:
    """One batch at a time by the dense formula over weights: all batches at once are conditioned in function space."""
    la, of_head = fitted(n_outputs, subset), subset == "last_layer"
    x, y = torch.rand(2, 4, 3), torch.randn(5, 2, 4, n_outputs)
    model = LaplaceModel(la).condition_on_observations(x[:, :3], y[:, :, :3])
    model = model.condition_on_observations(x[:, 3:], y[:, :, 3:])
    assert model.batch_shape == (5, 2)
    x_new = torch.rand(2, 6, 3)
    posterior: Any = model.posterior(x_new)
    assert posterior.mean.shape == (5, 2, 6, n_outputs)
    plain, A = network(n_outputs), precision(la, last_layer=of_head)
    for i, j in ((0, 0), (4, 1)):
        J, J_new = (jacobians(plain, rows, last_layer=of_head) for rows in (x[j], x_new[j]))
        A_new = A + J.T @ J / SIGMA**2
        moved = torch.linalg.solve(A_new, J.T @ (y[i, j] - plain(x[j])).flatten()) / SIGMA**2
        torch.testing.assert_close(posterior.mean[i, j].flatten(), plain(x_new[j]).flatten() + J_new @ moved)
        K = posterior.distribution.covariance_matrix[i, j]
        torch.testing.assert_close(K, J_new @ torch.linalg.solve(A_new, J_new.T))


def test_a_fit_and_function_space_agree_on_the_same_observations() -> None:
    la = fitted(2, temperature=0.5)
    x, y = torch.rand(4, 3), torch.randn(4, 2)
    model = LaplaceModel(la)
    fit: Any = model.condition_on_observations(x, y).posterior(BATCHES)
    batch: Any = model.condition_on_observations(x[None], y[None]).posterior(BATCHES.flatten(0, 1).unsqueeze(1))
    torch.testing.assert_close(fit.mean.flatten(0, 1), batch.mean.squeeze(1))
    torch.testing.assert_close(fit.variance.flatten(0, 1), batch.variance.squeeze(1))


def test_noise_of_each_observation_counts() -> None:
    model = LaplaceModel(fitted())
    x, y = torch.rand(3, 3), torch.randn(3, 1)
    same: Any = model.condition_on_observations(x, y, noise=torch.full((3, 1), SIGMA**2)).posterior(BATCHES)
    plain: Any = model.condition_on_observations(x, y).posterior(BATCHES)
    torch.testing.assert_close(same.mean, plain.mean)
    ignored: Any = model.condition_on_observations(x, y, noise=torch.full((3, 1), 1e9)).posterior(BATCHES)
    torch.testing.assert_close(ignored.mean, model.posterior(BATCHES).mean, rtol=1e-5, atol=1e-5)


def test_approximate_structures_move_the_mean_by_bayes_rule() -> None:
    """Means are those of the Gaussian before the fit; covariances those that the structure adds up to."""
    x, y = torch.rand(4, 3), torch.randn(4, 1)
    for structure in ("kron", "diag", "blockdiag"):
        la = fitted(structure=structure)
        model = LaplaceModel(la)
        found: Any = model.condition_on_observations(x, y).posterior(BATCHES)
        expected: Any = model.condition_on_observations(x[None], y[None]).posterior(BATCHES.flatten(0, 1).unsqueeze(1))
        torch.testing.assert_close(found.mean.flatten(0, 1), expected.mean.squeeze(1))
        la.fit([(x, y)], override=False)
        torch.testing.assert_close(found.variance, LaplaceModel(la).posterior(BATCHES).variance)


def test_fantasies_condition_on_samples_of_the_posterior() -> None:
    model = LaplaceModel(fitted(2), outcome_transform=scaled(targets(X, 2)))
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
    x = torch.rand(4, 2, 3)
    fantasies = model.fantasize(x, sampler)
    assert fantasies.batch_shape == (3, 4)
    Y = sampler(model.posterior(x, observation_noise=True))
    same = model.condition_on_observations(x, Y)
    torch.testing.assert_close(fantasies.posterior(x).mean, same.posterior(x).mean)
    noiseless = model.fantasize(x, sampler, observation_noise=torch.full((1, 2), 1e-8))
    Y = SobolQMCNormalSampler(torch.Size([3]), seed=0)(model.posterior(x))
    torch.testing.assert_close(noiseless.posterior(x).mean, Y, rtol=0.01, atol=0.01)


def test_fantasies_are_differentiable_in_where_they_are() -> None:
    model, sampler = LaplaceModel(fitted()), SobolQMCNormalSampler(torch.Size([3]), seed=0)

    def mean(x: Tensor) -> Tensor:
        return model.fantasize(x, sampler).posterior(BATCHES[0, 0]).mean

    assert torch.autograd.gradcheck(mean, (torch.rand(1, 2, 3, requires_grad=True),))


# -- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_functions_have_the_moments_of_the_posterior(subset: str, conditioned: bool) -> None:
    model = LaplaceModel(fitted(2, subset))
    if conditioned:  # in function space, as each observation has a noise of its own
        model = model.condition_on_observations(torch.rand(4, 3), torch.randn(4, 2), noise=torch.full((4, 2), 0.2))
    functions = model.sample([4000], torch.Generator().manual_seed(0))
    with torch.no_grad():
        values, x = functions(BATCHES[:1, 0]), BATCHES[0, 0]
    assert values.shape == (4000, 1, 6, 2)
    posterior: Any = model.posterior(x)
    values = values.flatten(1)
    K = posterior.distribution.covariance_matrix
    scale = K.diagonal().sqrt()
    assert ((values.mean(0) - posterior.mean.flatten()) / scale).abs().max() < 5 / 4000**0.5
    assert ((torch.cov(values.T) - K) / torch.outer(scale, scale)).abs().max() < 0.1


def test_a_function_of_a_last_layer_is_the_network_at_other_weights() -> None:
    model = LaplaceModel(fitted(), num_inputs=3)
    function = model.sample(generator=torch.Generator().manual_seed(0))
    values = function(X)
    assert values.shape == (20, 1)
    assert (function.num_inputs, function.num_outputs) == (3, 1)
    torch.testing.assert_close(values[3], function(X[3]))
    features = torch.cat([network()[:2](X), torch.ones(20, 1)], 1)
    head = torch.linalg.lstsq(features, values).solution
    torch.testing.assert_close(features @ head, values, check_dtype=True)
    assert torch.autograd.gradcheck(function, (torch.rand(2, 3, requires_grad=True),))
    best, value = optimize_acqf(
        PosteriorMean(GenericDeterministicModel(function)), UNIT, q=1, num_restarts=2, raw_samples=16
    )
    assert value > values.max() - 1e-3
    torch.testing.assert_close(function(best).squeeze(), value)


def test_it_is_a_bayesian_last_layer_of_the_community() -> None:
    model = LaplaceModel(fitted())
    assert isinstance(model, AbstractBLLModel)
    with pytest.raises(InputError, match="num_inputs="):
        BLLMaxPosteriorSampling(model)
    found = model(X)
    noisy = model.posterior(X.unsqueeze(1), observation_noise=True)
    torch.testing.assert_close(found.mean, noisy.mean.squeeze(1))
    torch.testing.assert_close(found.variance, noisy.variance.squeeze(1))
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of arrays with one number, in the sampler
        chosen = BLLMaxPosteriorSampling(model, num_restarts=2)(num_samples=2)
    assert chosen.shape == (2, 3)
    assert ((chosen >= 0) & (chosen <= 1)).all()
    other = model.fit(X[:7], targets(X[:7]))
    assert (other is model, other.la.n_data, fitted().n_data) == (True, 7, 20)
