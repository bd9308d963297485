"""`tune` beyond hyperparameters: what it chooses, with which data, and what it leaves as it is."""

import math

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.baselaplace import observed, recipe
from laplace.errors import InputError, UnsupportedError
from tests.baselaplace import recipes
from tests.baselaplace.recipes import C, classification, features, head_vector, joined, logits, regression, tuned
from tests.contracts import generator, model_untouched
from tests.tools import assert_close

near = torch.testing.assert_close

NARROW = {"distance_aware": False}


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["parameters", False])
@pytest.mark.parametrize("bias", [True, False])
def test_heads_and_temperature_are_those_of_the_definition(average, bias):
    data = classification(bias=bias)
    with model_untouched(data.model):
        la = tuned(data, average=average, **NARROW)
    expected = recipes.choice(data, parameters=average == "parameters")
    assert math.log(la.output_temperature) == pytest.approx(expected.log_t, abs=2e-3)
    near(la.mean, expected.theta, rtol=5e-3, atol=5e-3)
    assert float(la.prior_precision.log()) == pytest.approx(math.log(expected.delta), abs=5e-3)
    p = (logits(la.mean, data.model.body(data.test).detach()) / la.output_temperature).softmax(-1)
    assert_close(la(data.test), p)


def test_a_head_far_from_the_targets_is_tuned_alike_in_both_precisions():
    noise = generator(0)
    x, w = torch.randn(600, 5, generator=noise), torch.randn(5, 1, generator=noise)
    y, found = 100 + x @ w + 0.05 * torch.randn(600, 1, generator=noise), []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model, inputs, targets = nn.Linear(5, 1, dtype=torch.float64).to(dtype), x.to(dtype), y.to(dtype)
        la = Laplace(model, "regression", hessian_structure="full").fit([(inputs[:300], targets[:300])])
        la.tune([(inputs[300:], targets[300:])])
        found.append(la.prior_precision.double())
    near(found[1], found[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("average", ["parameters", "mixture", False])
def test_validation_data_are_predicted_better_than_by_the_network_at_its_best_temperature(average):
    for seed in range(3):
        la = tuned(classification(seed), average=average)
        found = la.tuning_
        assert found.value < found.candidates["MAP with its output temperature"] <= found.candidates["MAP"]


def test_a_mixture_averages_predictions_of_heads_at_their_temperatures():
    data = classification()
    la = tuned(data, average="mixture", **NARROW)
    expected = recipes.choice(data)
    phi, y = features(data, data.train)
    own = head_vector(data.model)
    heads = [own] + [recipes.best_head(phi, y, delta, own) for delta in recipes.precisions(phi, C)]
    test = data.model.body(data.test).detach()
    p = sum(w * (logits(heads[k], test) / math.exp(t)).softmax(-1) for w, k, t in expected.points)
    near(la(data.test), p, rtol=2e-3, atol=2e-3)
    near(la.mean, expected.theta, rtol=5e-3, atol=5e-3)
    la.output_temperature = 2 * la.output_temperature  # of all points
    p = sum(w * (logits(heads[k], test) / (2 * math.exp(t))).softmax(-1) for w, k, t in expected.points)
    near(la(data.test), p, rtol=2e-3, atol=2e-3)


def test_regression_heads_are_ridge_regressions_and_the_noise_goes_with_them():
    data = regression()
    la = tuned(data, "full", "regression", noise="per_output", average=False, **NARROW)
    (phi, y), (_, y_val) = features(data, data.train), features(data, data.val)
    assert la.sigma_noise.shape == (2,)
    ones = torch.cat([phi, torch.ones(len(phi), 1)], 1)
    for k, (theta_w, theta_b) in enumerate(zip(la.head_.weight.detach(), la.head_.bias.detach(), strict=True)):
        ridge = float(la.prior_precision) * float(la.sigma_noise[k]) ** 2
        expected = torch.linalg.solve(ones.T @ ones + ridge * torch.eye(len(ones.T)), ones.T @ y[:, k])
        near(torch.cat([theta_w, theta_b[None]]), expected, rtol=1e-5, atol=1e-6)
    mean, cov = la(joined(data.val)[0])
    total = torch.distributions.MultivariateNormal(
        mean, cov + torch.diag_embed(la.sigma_noise.square().expand(len(mean), 2))
    )
    assert -float(total.log_prob(y_val).mean()) == pytest.approx(la.tuning_.value, abs=1e-6)
    assert la.weight_uncertainty


def test_the_prior_mean_and_grouped_precisions_enter_the_heads():
    data = classification()
    la = Laplace(data.model, "classification", prior_mean=0.7, prior_precision=torch.tensor([1.0, 100.0]))
    la.fit(data.train)
    la.tune(data.val, average=False, **NARROW)
    assert float(la.prior_precision[1] / la.prior_precision[0]) == pytest.approx(100.0)
    phi, y = features(data, data.train)
    theta = la.mean.clone().requires_grad_()
    delta = torch.cat([la.prior_precision[:1].expand(C * recipes.D), la.prior_precision[1:].expand(C)])
    loss = nn.functional.cross_entropy(logits(theta, phi), y, reduction="sum")
    loss = loss + 0.5 * (delta * (theta - 0.7).square()).sum()
    assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-4


# -- the training data --------------------------------------------------------------------------------------------------


def test_a_train_loader_stands_for_features_that_were_not_kept(monkeypatch):
    data = classification()
    expected = tuned(data)
    monkeypatch.setattr(observed, "KEPT_FEATURES", 10)
    la = Laplace(data.model, "classification")
    la.fit(data.train)
    with pytest.warns(UserWarning, match="Pass train_loader="):
        la.tune(data.val)
    assert_close(la.mean, head_vector(data.model))
    with pytest.raises(UnsupportedError, match=r"refit=True is not possible.*train_loader="):
        la.tune(data.val, refit=True)
    la.tune(data.val, data.train)
    near(la.mean, expected.mean, rtol=1e-6, atol=1e-6)
    la.tune(data.val, data.train)  # from the head of the model, again
    near(la.mean, expected.mean, rtol=1e-6, atol=1e-6)


def test_fewer_rows_stand_for_all(monkeypatch, capsys):
    data = classification()
    twice = data._replace(train=data.train + data.train)
    la = Laplace(data.model, "classification")
    la.fit(twice.train)
    la.tune(data.val, max_rows=100, average=False, **NARROW)
    assert any("100 rows" in note for note in la.tuning_.notes)
    phi, y = features(twice, twice.train)
    rows = torch.randperm(len(phi), generator=generator(0))[:100].sort().values
    theta = la.mean.clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits(theta, phi[rows]), y[rows], reduction="sum") * len(phi) / 100
    loss = loss + 0.5 * float(la.prior_precision) * theta.square().sum()
    assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-4
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(recipe, "LONG", 0.0)
    la.tune(data.val)
    assert "max_rows=" in capsys.readouterr().err


def test_limits_of_the_precision_are_those_of_the_heads():
    data = classification()
    la = tuned(data, limits={"prior_precision": (2.0, 3.0)})
    assert 2.0 <= float(la.prior_precision) <= 3.0


def test_targets_of_two_kinds_are_fitted_and_not_kept():
    data = classification()
    x, y = joined(data.train)
    la = Laplace(data.model, "classification")
    la.fit([(x[:40], y[:40]), (x[40:], nn.functional.one_hot(y[40:], C).double())])
    with pytest.warns(UserWarning, match="two kinds"):
        la.tune(data.val)


def test_the_value_is_that_of_predictions():
    data = classification()
    x, y = joined(data.val)
    for average in ("parameters", "mixture", False):
        la = tuned(data, average=average)
        nll = -la(x).gather(1, y[:, None]).log().mean()
        assert la.tuning_.value == pytest.approx(float(nll), abs=1e-9)
    la = tuned(data := regression(), likelihood="regression")
    mean, cov = la(joined(data.val)[0])
    total = cov + la.sigma_noise.square() * torch.eye(2)
    nll = -torch.distributions.MultivariateNormal(mean, total).log_prob(joined(data.val)[1]).mean()
    assert la.tuning_.value == pytest.approx(float(nll), abs=1e-9)


def test_data_can_be_forgotten():
    data = classification()
    la = tuned(data)
    la.forget_data()
    with pytest.raises(UnsupportedError, match=r"starts from the head of the model.*train_loader="):
        la.tune(data.val)


def test_another_train_loader_is_refused_and_nothing_changes():
    data = classification()
    la = tuned(data)
    before = la.mean, la.prior_precision
    for wrong in (data.train[:1], [(x + 0.1, y) for x, y in data.train]):
        with pytest.raises(InputError, match="other data than fit had"):
            la.tune(data.val, wrong)
    assert torch.equal(la.mean, before[0])
    assert torch.equal(la.prior_precision, before[1])


def test_odd_classes_are_said():
    data = classification()
    x, y = joined(data.val)
    rows = y < 2
    la = Laplace(data.model, "classification")
    la.fit([(a, b.clamp(max=1)) for a, b in data.train])
    with pytest.warns(UserWarning, match=r"without a row in the training data: \[2\]"):
        la.tune([(x, y)])
    la = Laplace(data.model, "classification")
    la.fit(data.train)
    with pytest.warns(UserWarning, match="Validation rows: 2, for 3 classes"):
        la.tune([(x[rows][:2], y[rows][:2])])


@pytest.mark.parametrize("bias", [0.0, 6.0])
def test_the_value_for_counts_is_that_of_the_posterior_around_the_chosen_head(bias):
    """The curvature of counts depends on the head: what tune reports is what the object then predicts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, dtype=torch.float64, generator=generator)
    y = torch.poisson((4 + x @ torch.tensor([0.5, -0.2, 0.3], dtype=torch.float64)).exp(), generator=generator)[:, None]
    model = torch.nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(bias)
    la = Laplace(model, "poisson", "last_layer", "full")
    la.fit([(x[:60], y[:60])])
    found = la.tune([(x[60:], y[60:])])
    f, variance = la.functional_variance_fast(x[60:])
    nodes = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    at = f + variance.sqrt() * nodes
    logs = y[60:] * at - at.exp() - torch.lgamma(y[60:] + 1) - 0.5 * nodes**2
    step = torch.log(nodes[1] - nodes[0]) - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    assert found.value == pytest.approx(-float((logs.logsumexp(1) + step).mean()), abs=1e-4)
    assert found.value < 3.6
