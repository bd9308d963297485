"""Regression with a noise for each output."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF, BackPackGGN
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import networks
from tests.cases import BASIC
from tests.contracts import generator
from tests.estimators import every_structure, fitted
from tests.tools import assert_close

F64 = torch.float64


SIGMAS = torch.tensor([0.4, 1.7], dtype=F64)


def heteroscedastic(case, structure, fisher):
    """The posterior precision with a noise of each output, by brute force: every output's Jacobian over its noise."""
    problem = case.problem()
    H = torch.zeros(len(problem.theta()), len(problem.theta()), dtype=F64)
    x, y = case.data()
    J = problem.jacobian(x).flatten(0, 1)
    residual = case.forward(case.model(), x).detach() - y
    for Jn, rn in zip(J, residual, strict=True):
        root = (Jn.T @ (rn / SIGMAS**2))[:, None] if fisher else Jn.T / SIGMAS
        H += root @ root.T
    return H.diagonal().diag() if structure == "diag" else H


@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_noise_for_each_output_is_exact_without_fitting_again(structure, fisher):
    case = BASIC[1]
    la = fitted(case, structure, **({"backend": AutogradEF} if fisher else {}))
    la.sigma_noise = SIGMAS
    H = heteroscedastic(case, structure, fisher)
    precision = H + torch.eye(len(H), dtype=F64)
    shown = la.posterior_precision
    assert_close(shown if shown.dim() == 2 else shown.diag(), precision)
    x, y = case.data()
    residual = case.forward(case.model(), x).detach() - y
    log_likelihood = torch.distributions.Normal(torch.zeros_like(residual), SIGMAS).log_prob(residual).sum()
    assert_close(la.log_likelihood, log_likelihood)
    theta = case.problem().theta()
    evidence = log_likelihood - 0.5 * (precision.logdet() + theta.square().sum())
    assert_close(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
def test_kronecker_factors_scale_with_the_noise_of_each_output(fisher):
    case = BASIC[1]
    la = fitted(case, "kron", **({"backend": AutogradEF} if fisher else {}))
    G, A = la.H_facs.kfacs[0]
    power = 2 if fisher else 1
    root = SIGMAS ** -float(power)
    la.sigma_noise = SIGMAS
    scaled = root[:, None] * G * root
    expected = torch.block_diag(torch.kron(scaled, A), scaled) + torch.eye(la.n_params, dtype=F64)
    assert_close(la.posterior_precision.to_matrix(), expected)


@every_structure
def test_equal_noise_of_all_outputs_is_one_noise(structure):
    case = BASIC[1]
    one, each = fitted(case, structure, sigma_noise=0.7), fitted(case, structure, sigma_noise=torch.full((2,), 0.7))
    assert_close(each.log_marginal_likelihood(), one.log_marginal_likelihood())
    for ours, theirs in zip(each(case.test_inputs()), one(case.test_inputs()), strict=True):
        assert_close(ours, theirs)


@every_structure
def test_evidence_is_differentiable_in_the_noise_of_each_output(structure):
    la = fitted(BASIC[1], structure)
    problem = la._problem()
    inputs = torch.tensor([0.7], dtype=F64, requires_grad=True), SIGMAS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(problem.evidence, inputs)


@pytest.mark.every(3, each_value=False)
@every_structure
@pytest.mark.parametrize("by", ["evidence", "validation"])
def test_outputs_of_different_noise_get_their_own(by, structure):
    X = torch.randn(400, 3, dtype=F64, generator=generator(0))
    W = torch.randn(2, 3, dtype=F64, generator=generator(1))
    Y = X @ W.T + torch.tensor([0.1, 1.0]) * torch.randn(400, 2, dtype=F64, generator=generator(2))
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.linalg.lstsq(X[:200], Y[:200]).solution.T)
        model[1].bias.zero_()
    la = Laplace(model, "regression", hessian_structure=structure, last_layer_name="1")
    la.fit([(X[:200], Y[:200])])
    if by == "evidence":
        la.optimize_prior_precision(noise="per_output")
    else:
        la.tune([(X[200:], Y[200:])], noise="per_output")
    assert bool(((la.sigma_noise / torch.tensor([0.1, 1.0]) - 1).abs() < 0.15).all())
    la2 = Laplace(model, "regression", hessian_structure=structure, last_layer_name="1")
    la2.load_state_dict(la.state_dict())
    assert_close(la2.sigma_noise, la.sigma_noise)


def test_noise_of_each_output_is_refused_where_it_has_no_meaning():
    la = fitted(BASIC[1], "diag")
    with pytest.raises(InputError, match="each of the 2 outputs"):
        la.sigma_noise = torch.ones(3)
    with pytest.raises(ShapeError, match="the model has 2"):
        fitted(BASIC[1], "diag", sigma_noise=torch.ones(3))
    with pytest.raises(UnsupportedError, match="leave it at 1"):
        fitted(BASIC[0], "diag").sigma_noise = torch.full((4,), 2.0)


def whole(structure, **options):
    network = networks.named("mlp_regression")
    la = Laplace(network.model(), "regression", "all", structure, **options)
    la.fit([network.data()])
    return la, network


@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_whole_network_is_fitted_with_the_noise_of_each_output(structure, fisher):
    la, network = whole(structure, sigma_noise=SIGMAS, **({"backend": AutogradEF} if fisher else {}))
    x, y = network.data()
    residual = (network.model()(x) - y).detach()
    J = network.problem().jacobian(x).flatten(0, 1)
    J = J.reshape(len(x), 2, -1)
    H = torch.zeros(J.shape[-1], J.shape[-1], dtype=F64)
    for Jn, rn in zip(J, residual, strict=True):
        root = (Jn.T @ (rn / SIGMAS**2))[:, None] if fisher else Jn.T / SIGMAS
        H += root @ root.T
    H = H.diagonal().diag() if structure == "diag" else H
    precision = H + torch.eye(len(H), dtype=F64)
    shown = la.posterior_precision
    assert_close(shown if shown.dim() == 2 else shown.diag(), precision)
    density = torch.distributions.Normal(torch.zeros_like(residual), SIGMAS).log_prob(residual).sum()
    assert_close(la.log_likelihood, density)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_common_size_of_its_noise_may_change_and_the_relative_one_needs_a_new_fit(structure):
    la, network = whole(structure, sigma_noise=SIGMAS)
    la.sigma_noise = 3 * SIGMAS
    other, _ = whole(structure, sigma_noise=3 * SIGMAS)
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())
    x = network.data(2)[0]
    for ours, theirs in zip(la(x), other(x), strict=True):
        assert_close(ours, theirs)
    for sigma in (SIGMAS.flip(0), torch.tensor(1.0)):
        la.sigma_noise = sigma
        with pytest.raises(UnsupportedError, match="call fit again"):
            la.log_marginal_likelihood()
        with pytest.raises(UnsupportedError, match="call fit again"):
            la(x)
    la.fit([network.data()])
    assert_close(la.log_marginal_likelihood(), whole(structure)[0].log_marginal_likelihood())
    other.sigma_noise = torch.tensor(1.0)
    with pytest.raises(InputError, match="fit again"):
        other.fit([network.data()], override=False)


def test_it_is_saved_with_the_fit():
    for build in (lambda: whole("kron", sigma_noise=SIGMAS)[0], lambda: fitted(BASIC[1], "kron", sigma_noise=SIGMAS)):
        la, other = build(), build()
        other.prior_precision = 7.0
        other.load_state_dict(la.state_dict())
        assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
        assert_close(other.to("cpu").log_marginal_likelihood(), la.log_marginal_likelihood())


def test_packages_that_know_one_noise_are_refused():
    network = networks.named("mlp_regression")
    la = Laplace(network.model(), "regression", "all", "diag", sigma_noise=SIGMAS, backend=BackPackGGN)
    with pytest.raises(UnsupportedError, match="one noise for all outputs"):
        la.fit([network.data()])
    with pytest.raises(UnsupportedError, match="call fit again"):
        whole("diag")[0].optimize_prior_precision(noise="per_output")
