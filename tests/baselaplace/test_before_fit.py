"""Before a fit an object is the prior over its weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from laplace.errors import NotFittedError
from laplace.utils import Kron
from tests.contracts import generator
from tests.estimators import dense
from tests.kinds import CHOSEN, DOUBLE, data, every_kind, fitted, make
from tests.tools import assert_close, assert_covariance_of


@every_kind
def test_before_fit_the_object_is_the_prior(subset, structure):
    la = make(subset, structure, prior_mean=0.3)
    n_random = len(la.prior_precision_diag)
    prior = torch.distributions.Normal(torch.tensor(0.3, **DOUBLE), torch.tensor(0.7, **DOUBLE) ** -0.5)
    theta = torch.randn(n_random, **DOUBLE, generator=generator(5)).requires_grad_()
    mean = la.mean_subnet if subset == "subnetwork" else la.mean
    assert_close(mean, torch.full((n_random,), 0.3, **DOUBLE))
    assert_close(la.log_prob(theta), prior.log_prob(theta).sum())
    (gradient,) = torch.autograd.grad(la.log_prob(theta), theta)
    assert_close(gradient, -0.7 * (theta.detach() - 0.3))
    assert_close(dense(la.H), torch.zeros(n_random, n_random, **DOUBLE))
    assert type(la.H) is (Kron if structure == "kron" else type(fitted(subset, structure).H))
    assert_close(dense(la.posterior_precision), 0.7 * torch.eye(n_random, **DOUBLE))
    assert_close(la.log_det_posterior_precision, n_random * torch.tensor(0.7, **DOUBLE).log())
    assert float(la.log_det_ratio) == float(la.scatter) == float(la.loss) == la.n_data == 0
    jacobians = torch.randn(2, 2, n_random, **DOUBLE, generator=generator(6))
    assert_close(la.functional_variance(jacobians), jacobians @ jacobians.mT / 0.7)
    draws = la.sample(4000, generator=generator(7))
    draws = draws[:, CHOSEN] if subset == "subnetwork" else draws
    assert_covariance_of(draws, mean, torch.eye(n_random, **DOUBLE) / 0.7)


@every_kind
def test_before_fit_there_are_no_predictions_no_evidence_and_nothing_to_save(subset, structure, tmp_path):
    la, x = make(subset, structure), data()[0]
    requests = [
        lambda: la(x),
        lambda: la(x, pred_type="nn"),
        lambda: la.functional_samples(x),
        lambda: la.predictive_samples(x),
        lambda: la.save(tmp_path / "la.pt"),
        la.state_dict,
        la.log_marginal_likelihood,
        lambda: la.log_likelihood,
        lambda: la.n_outputs,
        la.optimize_prior_precision,
    ]
    for request in requests:
        with pytest.raises(NotFittedError, match=r"fit\("):
            request()
    la.mean = torch.zeros(len(la.prior_precision_diag), **DOUBLE)  # weights alone make no posterior
    with pytest.raises(NotFittedError, match=r"fit\("):
        la(x)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "lowrank"])
@pytest.mark.parametrize(
    "request_", ["mean", "H", "posterior_precision", "sample", "log_prob", "n_params", "functional_variance"]
)
def test_a_last_layer_that_is_not_known_has_to_be_named(structure, request_):
    la = make("last_layer", structure, last_layer_name=None)
    arguments = {"log_prob": (torch.zeros(10),), "sample": (3,), "functional_variance": (torch.zeros(1, 2, 10),)}
    with pytest.raises(NotFittedError, match=r"last_layer_name=.*fit\(train_loader\)"):  # noqa: PT012
        found = getattr(la, request_)
        found(*arguments[request_])


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_the_first_task_of_continual_learning_is_regularized_by_the_prior_and_the_second_by_the_posterior(structure):
    la = make("all", structure, likelihood="classification", prior_precision=0.4)
    theta = parameters_to_vector(la.model.parameters())
    prior = torch.distributions.Normal(torch.zeros_like(theta), 0.4**-0.5)
    assert_close(la.log_prob(theta), prior.log_prob(theta).sum())
    copied = copy.deepcopy(la)
    copied.prior_mean = la.mean
    copied.fit([data("classification")], override=False)
    la.fit([data("classification")], override=False)
    assert_close(dense(copied.posterior_precision), dense(la.posterior_precision))
    exact = torch.distributions.MultivariateNormal(la.mean, precision_matrix=dense(la.posterior_precision))
    assert_close(la.log_prob(theta + 0.01), exact.log_prob(theta + 0.01))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_prior_that_was_pickled_is_the_same_prior(structure):
    la = make("all", structure, prior_mean=0.1)
    la.mean = torch.ones(la.n_params, **DOUBLE)
    other = pickle.loads(pickle.dumps(la))
    assert torch.equal(other.mean, la.mean)
    assert torch.equal(other.sample(2, generator=generator(1)), la.sample(2, generator=generator(1)))
