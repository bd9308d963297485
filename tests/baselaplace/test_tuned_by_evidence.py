"""Prior precisions and noise that maximize the evidence."""

import math
import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, UnsupportedError
from laplace.tuning.marglik import effective_parameters
from tests import reference
from tests.cases import BASIC, STRUCTURES
from tests.contracts import generator
from tests.estimators import every_structure, fitted
from tests.tools import assert_close, slow_but

F64 = torch.float64


def adam(la, start, n_steps=1000):
    """The evidence that a thousand steps of Adam reach."""
    log_values = start.log().clone().requires_grad_(True)
    optimizer, best = torch.optim.Adam([log_values], lr=0.1), -math.inf
    for _ in range(n_steps):
        optimizer.zero_grad()
        value = la.log_marginal_likelihood(log_values.exp())
        (-value).backward()
        optimizer.step()
        best = max(best, float(value.detach()))
    return best


# Every structure, every structure of the prior and both likelihoods; the other combinations are slow.
@pytest.mark.every(5, each_value=False)
@pytest.mark.parametrize(
    ("case", "prior_structure", "structure"),
    slow_but(
        [
            "regression-scalar-full",
            "classification-scalar-lowrank",
            "classification-layerwise-kron",
            "regression-layerwise-ekfac",
            "classification-layerwise-blockdiag",
            "regression-diag-diag",
            "classification-diag-kron",
            "regression-diag-ekfac",
        ],
        BASIC,
        ["scalar", "layerwise", "diag"],
        STRUCTURES,
    ),
)
def test_the_evidence_reached_is_at_least_that_of_a_thousand_steps_of_adam(case, structure, prior_structure):
    if structure in ("kron", "ekfac") and prior_structure == "diag":
        with pytest.raises(UnsupportedError, match="parameter group"):
            fitted(case, structure).optimize_prior_precision(prior_structure=prior_structure)
        return
    la = fitted(case, structure)
    la.optimize_prior_precision(prior_structure=prior_structure)
    reached = float(la.log_marginal_likelihood())
    assert reached == pytest.approx(la.tuning_.value)
    assert reached >= adam(la, torch.ones_like(la.prior_precision)) - 1e-3


def test_evidence_is_maximized_in_few_evaluations():
    la, calls = fitted(BASIC[0], "full"), []
    problem = la._problem()
    object.__setattr__(problem, "evidence", lambda *a, _e=problem.evidence: calls.append(1) or _e(*a))
    la._problem = lambda: problem
    la.optimize_prior_precision(n_steps=1000)
    assert len(calls) < 60


@every_structure
def test_noise_and_prior_reach_the_joint_optimum(structure):
    case = BASIC[1]
    la = fitted(case, structure, sigma_noise=3.0)
    la.optimize_prior_precision(noise="scalar")
    best = float(la.log_marginal_likelihood())
    for factor in (0.97, 1.03):
        for precision, sigma in ((factor, 1.0), (1.0, factor), (factor, factor), (factor, 1 / factor)):
            value = la._problem().evidence(la.prior_precision * precision, la.sigma_noise * sigma)
            assert float(value) <= best + 1e-9


def test_exact_bayesian_linear_regression_has_the_evidence_and_optimum_of_its_closed_form():
    X = torch.randn(40, 3, dtype=F64, generator=generator(0))
    Y = (X @ torch.tensor([1.0, -0.5, 0.2], dtype=F64) + 0.3 * torch.randn(40, dtype=F64, generator=generator(1)))[
        :, None
    ]
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).double()
    la = Laplace(model, "regression", hessian_structure="full", last_layer_name="1")
    ones = torch.cat([X, torch.ones(40, 1, dtype=F64)], 1)
    for _ in range(25):  # evidence at the mode of the hyperparameters, which moves the mode
        mean, _, _ = reference.linear_regression(X, Y, float(la.sigma_noise), float(la.prior_precision))
        with torch.no_grad():
            model[1].weight.copy_(mean.reshape(-1)[:3])
            model[1].bias.copy_(mean.reshape(-1)[3:])
        la.fit([(X, Y)])
        la.optimize_prior_precision(noise="scalar", init_prior_prec=la.prior_precision)

    def density(delta, sigma):
        cov = ones @ ones.T / delta + sigma**2 * torch.eye(40, dtype=F64)
        return float(torch.distributions.MultivariateNormal(torch.zeros(40, dtype=F64), cov).log_prob(Y[:, 0]))

    delta, sigma = float(la.prior_precision), float(la.sigma_noise)
    assert float(la.log_marginal_likelihood()) == pytest.approx(density(delta, sigma))
    for d, s in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98)):
        assert density(delta * d, sigma * s) < density(delta, sigma) + 1e-6


def test_the_noise_starts_at_the_residuals():
    case = BASIC[1]
    la = fitted(case, "diag")
    x, y = case.data()
    residuals = (case.forward(la.model.model, x) - y).detach()
    assert_close(la._problem().residual_noise(), residuals.square().mean().sqrt())
    assert_close(la._problem().residual_noise(per_output=True), residuals.square().mean(0).sqrt())
    la.optimize_prior_precision(noise="per_output", n_steps=0)
    assert_close(la.sigma_noise, residuals.square().mean(0).sqrt())


def test_diagonal_precisions_are_clipped_to_the_stated_bounds_and_counted():
    case = BASIC[1]
    la = fitted(case, "diag")
    la.optimize_prior_precision(prior_structure="diag", bounds=(0.5, 5.0))
    h, theta = case.scale * case.problem().ggn().diagonal(), case.problem().theta()
    optimum = (-h + (h**2 + 4 * h / theta**2).sqrt()) / 2
    assert_close(la.prior_precision, optimum.clamp(0.5, 5.0))
    assert la.tuning_.n_clipped == int(((optimum < 0.5) | (optimum > 5.0)).sum()) > 0
    assert "clipped" in str(la.tuning_)


@pytest.mark.parametrize("bounds", [(1.0, 0.5), (0.0, 1.0), 3.0])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(InputError, match="bounds must be"):
        fitted(BASIC[0], "diag").optimize_prior_precision(bounds=bounds)


def test_temperatures_are_never_tuned_by_evidence():
    la = fitted(BASIC[0], "diag")
    with pytest.raises(UnsupportedError, match="grows without end"):
        la.optimize_prior_precision(temperature=True)


def test_warnings_are_silent_where_the_optimum_is_inside():
    la = fitted(BASIC[1], "diag")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(noise="scalar")


def regression(width, n_rows, n_inputs, steps):
    """A network trained on targets of which a share is noise."""
    X = torch.randn(n_rows, n_inputs, dtype=F64, generator=generator(0))
    Y = X[:, :1].sin() + torch.randn(n_rows, 1, dtype=F64, generator=generator(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_inputs, width), nn.Tanh(), nn.Linear(width, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    return model, X, Y


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_noise_chosen_by_a_network_that_interpolates_is_warned_of(subset):
    model, X, Y = regression(30, 20, 5, 600)
    la = Laplace(model, "regression", subset, "full")
    la.fit([(X, Y)])
    with pytest.warns(UserWarning, match=r"interpolates its training data.*tune\(val_loader\)"):
        la.optimize_prior_precision(noise="scalar")


def test_noise_far_below_the_targets_is_warned_of_where_the_last_layer_has_few_weights():
    model, X, _ = regression(6, 60, 1, 20)
    la = Laplace(model, "regression", hessian_structure="full")
    noise = torch.randn(60, 1, dtype=F64, generator=generator(2))
    for size in (0.02, 0.2):
        la.fit([(X, model(X).detach() * (1 + size * noise))])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            la.optimize_prior_precision(noise="scalar")
        assert ["standard deviation of the targets" in str(each.message) for each in seen] == [True] * (size < 0.05)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_noise_of_a_network_that_leaves_residuals_is_no_reason_to_warn(subset):
    model, X, Y = regression(4, 60, 1, 100)
    la = Laplace(model, "regression", subset, "full")
    la.fit([(X, Y)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(noise="scalar")


@every_structure
def test_effective_parameters_are_those_of_the_dense_covariance(structure):
    la = fitted(BASIC[1], structure)
    found = effective_parameters(la._problem(), torch.tensor([0.7], dtype=F64), torch.tensor(0.5, dtype=F64))
    la.prior_precision, la.sigma_noise = 0.7, 0.5
    assert found == pytest.approx(la.n_params - 0.7 * float(la._posterior.to_dense().inverse().trace()), rel=1e-6)
