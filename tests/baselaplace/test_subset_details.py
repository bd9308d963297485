"""Function space with a subset of the data: what is easily counted twice, mixed up or lost."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, NumericalWarning
from tests.baselaplace.test_subset_of_data import DELTA, M, basic, fitted
from tests.cases import named
from tests.contracts import generator
from tests.tools import assert_close


def tanh_net(n_outputs: int = 3, width: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, n_outputs))


def test_the_evidence_of_independent_outputs_counts_each_once():
    model, noise = tanh_net(), generator(0)
    x, y = torch.randn(8, 4, generator=noise), torch.randn(8, 3, generator=noise)
    la = Laplace(model, "regression", "all", "gp", n_subset=8, independent_outputs=True, sigma_noise=0.6)
    la.prior_precision = DELTA
    la.fit([(x[:5], y[:5]), (x[5:], y[5:])])
    truth = 0.0
    for c in range(3):
        J = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(model(row)[c], list(model.parameters()))])
                for row in x
            ]
        )
        truth += torch.logdet(torch.eye(8) + J @ J.T / (DELTA * 0.36))
    assert_close(la.log_det_ratio, truth)
    assert_close(la.log_det_posterior_precision - la.log_det_prior_precision, truth)


@basic
def test_log_prob_is_a_density_also_of_a_subset(case):
    la = fitted(case, "last_layer", n_subset=M)
    theta = la.mean + 0.1 * torch.randn(len(la.mean), generator=generator(0))
    density = torch.distributions.MultivariateNormal(la.mean, precision_matrix=la.posterior_precision.to_dense())
    assert_close(la.log_prob(theta), density.log_prob(theta))


class ItemByItem(nn.Module):
    """Scores of the items of all pairs one after the other, ``[2 · pairs, 1]``."""

    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.score(torch.tanh(self.body(x.reshape(-1, 4))))


def test_pairs_are_counted_as_pairs_however_their_scores_come():
    noise = generator(0)
    x, y = torch.randn(13, 2, 4, generator=noise), torch.randint(2, (13,), generator=noise)
    batches, model = list(zip(x.split(5), y.split(5), strict=True)), ItemByItem()
    full = Laplace(model, "reward_modeling", "last_layer", "full")
    full.fit(batches)
    for loader in (batches, iter(batches)):
        gp = Laplace(model, "reward_modeling", "last_layer", "gp", n_subset=13)
        gp.fit(loader)
        assert gp.n_data == 13
        assert_close(gp(x[:3, 0])[1], full(x[:3, 0])[1])
        assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())


def test_samples_of_preferences_have_the_output_temperature():
    la = fitted(named("preferences"), "last_layer")
    x = named("preferences").data()[0]
    plain = la.predictive_samples(x, fitting=True, n_samples=5, generator=generator(0))
    la.output_temperature = 3.0
    cooled = la.predictive_samples(x, fitting=True, n_samples=5, generator=generator(0))
    assert_close(cooled, (plain.log() / 3).softmax(-1))


def test_a_kernel_that_is_made_of_other_weights_is_refused():
    model, x = tanh_net(), torch.randn(6, 4)
    la = Laplace(model, "regression", "all", "gp", n_subset=6)
    la.fit([(x, torch.randn(6, 3))])
    trained = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(InputError, match=r"weights have changed since fit\. Fit again"):
        la(x)
    model.load_state_dict(trained)
    la(x)


def test_variances_that_are_rounding_say_so():
    noise = generator(0)
    x = torch.randn(40, 4, generator=noise).float()
    y = torch.randn(40, 1, generator=noise).float()
    for weights in ("all", "last_layer"):
        la = Laplace(tanh_net(1, 50).float(), "regression", weights, "gp", n_subset=40, prior_precision=1e-4)
        la.sigma_noise = 0.01
        la.fit([(x, y)])
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            with pytest.warns(NumericalWarning, match=r"variances are less than 1.2e-04 of the prior's.*float64"):
                var = la(x, **options)[1]
            assert float((var.diagonal() if options.get("joint") else var).min()) >= 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            la(50 * x[:1])
            la.sigma_noise, la.prior_precision = 1.0, 10.0
            la(x)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class TakesPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return torch.tanh(self.layer(x.first)) + x.second


def test_moving_gives_the_model_what_the_loader_yielded():
    noise = generator(0)
    x = Pair(torch.randn(6, 4, generator=noise), torch.randn(6, 2, generator=noise))
    la = Laplace(TakesPair(), "regression", "all", "gp", n_subset=4)
    la.fit([(x, torch.randn(6, 2))])
    before = la(x)[1]
    assert_close(la.to("cpu")(x)[1], before)


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron", "gp"])
def test_jacobians_may_have_another_precision_than_the_curvature(structure, weights):
    model, x = tanh_net().float(), torch.randn(6, 4).float()
    options = {"n_subset": 6} if structure == "gp" else {}
    la = Laplace(model, "regression", weights, structure, curvature_dtype=torch.float64, **options)
    la.fit([(x, torch.randn(6, 3).float())])
    J = torch.randn(2, 3, len(la.mean)).float()
    assert_close(la.functional_variance(J), la.functional_variance(J.double()))
    assert_close(la.functional_covariance(J), la.functional_covariance(J.double()))
