"""Modes under several priors, against Newton's method, closed forms and the definition of an optimum."""

import numpy as np
import pytest
import torch

from laplace.errors import InputError, NumericalWarning
from laplace.likelihoods import resolve
from laplace.prior import GaussianPrior
from laplace.tuning import path
from laplace.tuning.head import HeadData
from laplace.tuning.newton import Head, mode
from laplace.tuning.path import cost, heads_along
from tests.contracts import generator, shapes_of
from tests.tools import LargestTensor, assert_close

N, D = 40, 6
DELTAS = (30.0, 2.0, 0.1, 0.004)
NOISES = torch.tensor([0.3, 1.0, 2.5])
KINDS = {
    "classification": (3, {"temperature": 1.4}),
    "soft labels": (3, {}),
    "binary": (1, {"temperature": 0.7}),
    "poisson": (2, {}),
    "multilabel": (3, {"temperature": 1.3}),
    "negative_binomial": (2, {}),
    "regression": (3, {"sigma_noise": 0.6, "temperature": 0.8}),
    "noise per output": (3, {"sigma_noise": NOISES}),
}
NAMES = {"soft labels": "classification", "noise per output": "regression"}
kinds = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Problems of a test are small: let them take the way of large ones."""
    monkeypatch.setattr(path, "DENSE_PARAMS", 0)


def problem(kind, *, bias=True, n=N, n_features=D, seed=0):
    """Data of a head, and its likelihood; features have a mean and very different scales."""
    C, options = KINDS[kind]
    noise = generator(seed)
    phi = torch.randn(n, n_features, generator=noise) * torch.logspace(1, -2, n_features) + 1
    f = phi @ torch.randn(n_features, C, generator=noise) / n_features
    y = {
        "classification": lambda: (f + torch.randn(n, C, generator=noise)).argmax(-1),
        "soft labels": lambda: (f + torch.randn(n, C, generator=noise)).softmax(-1),
        "binary": lambda: (f > 0).to(f),
        "poisson": lambda: torch.poisson(f.exp().clamp(max=50), generator=noise),
        "negative_binomial": lambda: torch.poisson(f.exp().clamp(max=50), generator=noise),
        "multilabel": lambda: (f > 0).to(f).masked_fill(torch.rand(f.shape, generator=noise) < 0.2, torch.nan),
    }.get(kind, lambda: f + torch.randn(n, C, generator=noise))()
    return HeadData(phi, y, shapes_of(C, n_features, bias)), resolve(NAMES.get(kind, kind), **options)


def priors_of(data, *, mean=0.0, ratios=(1.0,), deltas=DELTAS):
    """One prior for each precision, with several groups in given ratios."""
    sizes = tuple(int(np.prod(shape)) for shape in data.shapes)
    mean = torch.as_tensor(mean).to(data.phi)
    return [GaussianPrior(mean, delta * torch.tensor(ratios).to(data.phi), sizes) for delta in deltas]


def heads(data, likelihood, priors):
    return [Head(data.phi, data.y, data.shapes, likelihood, prior) for prior in priors]


def check(data, likelihood, priors):
    """The losses are those at the mode, and so are outputs at rows that were not seen."""
    new = torch.randn(7, data.phi.shape[1], generator=generator(9))
    found = heads_along(data, likelihood, priors, share=1e-15)
    assert len(found) == len(priors)
    for head, theta in zip(heads(data, likelihood, priors), found, strict=True):
        expected = mode(head)
        torch.testing.assert_close(head.objective(theta), head.objective(expected), rtol=1e-11, atol=1e-11)
        # Weights are known to about the root of (rounding of the loss / prior precision).
        torch.testing.assert_close(head.outputs(theta, new), head.outputs(expected, new), rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_modes_are_those_of_newtons_method(kind, bias):
    data, likelihood = problem(kind, bias=bias)
    check(data, likelihood, priors_of(data))


@kinds
def test_a_prior_mean_draws_weights_to_it(kind):
    data, likelihood = problem(kind)
    mean = 0.2 * torch.randn(sum(int(np.prod(shape)) for shape in data.shapes), generator=generator(5))
    check(data, likelihood, priors_of(data, mean=mean))
    check(data, likelihood, priors_of(data, mean=0.3))


@kinds
@pytest.mark.parametrize("ratios", [(1.0, 1e-3), (0.5, 20.0)])
def test_weight_and_bias_may_have_precisions_of_their_own(kind, ratios):
    data, likelihood = problem(kind)
    check(data, likelihood, priors_of(data, mean=0.1, ratios=ratios))


def test_the_ratio_of_precisions_may_change_along_the_path():
    data, likelihood = problem("classification")
    check(data, likelihood, [*priors_of(data), *priors_of(data, ratios=(1.0, 0.1))])


def test_every_weight_may_have_a_precision_of_its_own():
    data, likelihood = problem("classification")
    ratios = torch.rand(sum(int(np.prod(shape)) for shape in data.shapes), generator=generator(3)) + 0.1
    check(data, likelihood, priors_of(data, ratios=tuple(ratios.tolist())))


@kinds
def test_slopes_are_zero_at_the_modes(kind):
    data, likelihood = problem(kind)
    priors = priors_of(data, mean=0.1)
    for head, theta in zip(
        heads(data, likelihood, priors), heads_along(data, likelihood, priors, share=1e-15), strict=True
    ):
        slopes = torch.func.grad(head.objective)(theta)
        assert float(slopes.abs().max()) < 1e-5 * float(head.objective(theta))


@pytest.mark.parametrize("kind", ["regression", "noise per output"])
@pytest.mark.parametrize("ratio", [1.0, 1e-2])
def test_modes_of_a_regression_are_ridge_estimates(kind, ratio):
    data, likelihood = problem(kind)
    X = np.concatenate([data.phi.numpy(), np.ones((N, 1))], 1)
    for prior, theta in zip(
        priors_of(data, ratios=(1.0, ratio)),
        heads_along(data, likelihood, priors_of(data, ratios=(1.0, ratio))),
        strict=True,
    ):
        delta = np.append(np.full(D, float(prior.precision[0])), float(prior.precision[1]))
        columns = []
        for c, s in enumerate(np.broadcast_to(likelihood.scale.numpy(), 3)):
            columns.append(np.linalg.solve(s * X.T @ X + np.diag(delta), s * X.T @ data.y[:, c].numpy()))
        W = torch.tensor(np.stack(columns))
        torch.testing.assert_close(theta, torch.cat([W[:, :-1].flatten(), W[:, -1]]), rtol=1e-7, atol=1e-9)


def test_a_regression_takes_one_step_and_another_for_rounding(monkeypatch):
    data, likelihood = problem("noise per output")
    searches, search = [], path._search
    monkeypatch.setattr(path, "_search", lambda *args: searches.append(args) or search(*args))
    heads_along(data, likelihood, priors_of(data, deltas=DELTAS[:1]))
    assert len(searches) <= 2


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_separable_data_have_modes_under_weak_priors(kind):
    data, likelihood = problem(kind, n=12, n_features=20)
    check(data, likelihood, priors_of(data, deltas=tuple(torch.logspace(1, -6, 9).tolist())))


@kinds
def test_losses_by_default_are_within_parts_in_ten_thousand(kind):
    data, likelihood = problem(kind, n=120, n_features=30)
    priors = priors_of(data, deltas=tuple(torch.logspace(2, -4, 9).tolist()))
    for head, theta in zip(heads(data, likelihood, priors), heads_along(data, likelihood, priors), strict=True):
        least = float(head.objective(mode(head)))
        assert float(head.objective(theta)) <= least + 1e-3 * abs(least)


@kinds
def test_single_precision_is_enough(kind):
    data, likelihood = problem(kind, n=120, n_features=30)
    priors = priors_of(data, deltas=tuple(torch.logspace(2, -3, 6).tolist()))
    narrow = data.to(torch.zeros((), dtype=torch.float32))
    found = heads_along(narrow, likelihood, priors_of(narrow, deltas=tuple(torch.logspace(2, -3, 6).tolist())))
    for head, theta in zip(heads(data, likelihood, priors), found, strict=True):
        assert theta.dtype == torch.float32
        least = float(head.objective(mode(head)))
        assert float(head.objective(theta.double())) <= least + 2e-3 * abs(least)


@kinds
def test_a_start_is_used_and_not_written_to(kind):
    data, likelihood = problem(kind)
    (prior, *_) = priors = priors_of(data)
    start = 0.1 * torch.randn(prior.n_params, generator=generator(2))
    kept = start.clone()
    expected = heads_along(data, likelihood, priors, share=1e-15)
    for theta, other in zip(heads_along(data, likelihood, priors, start, share=1e-15), expected, strict=True):
        torch.testing.assert_close(theta, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(start, kept)


def test_few_weights_are_those_of_newtons_method_bit_for_bit(monkeypatch):
    monkeypatch.setattr(path, "DENSE_PARAMS", 512)
    data, likelihood = problem("classification")
    theta = None
    for head, found in zip(
        heads(data, likelihood, priors_of(data)), heads_along(data, likelihood, priors_of(data)), strict=True
    ):
        theta = mode(head, theta)
        assert torch.equal(found, theta)


def test_no_priors_have_no_heads():
    assert heads_along(*problem("classification"), []) == []


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_coordinates_are_turned_back(bias):
    data, _ = problem("classification", bias=bias)
    basis = path.Coordinates.of(data, 0.3)
    theta = torch.randn(sum(int(np.prod(shape)) for shape in data.shapes), generator=generator(1))
    assert_close(basis.rotate_back(basis.rotate(theta)), theta)
    (prior,) = priors_of(data, deltas=(1.0,))
    head = Head(data.phi, data.y, data.shapes, resolve("classification"), prior)
    turned = basis.head(data.y, resolve("classification"), prior)
    assert_close(turned.outputs(basis.rotate(theta)), head.outputs(theta))
    moments = basis.phi.T @ basis.phi
    assert_close(moments, torch.diag(moments.diagonal()))


@pytest.mark.parametrize(("n", "C", "D"), [(300, 4, 60), (60, 200, 50), (300, 50, 8)])
def test_no_tensor_is_much_larger_than_data_and_weights(n, C, D):
    noise = generator(0)
    phi, y = torch.randn(n, D, generator=noise), torch.randint(C, (n,), generator=noise)
    data = HeadData(phi, y, shapes_of(C, D))
    with LargestTensor() as largest:
        heads_along(data, resolve("classification"), priors_of(data))
    assert largest.numel <= 2 * max(n * C, C * (D + 1), n * (D + 1), C * C), largest.operation


def test_a_loss_that_is_not_finite_is_an_error():
    data, likelihood = problem("regression")
    (prior,) = priors = priors_of(data, deltas=(1.0,))
    with pytest.raises(InputError, match="features and targets"):
        heads_along(data, likelihood, priors, torch.full((prior.n_params,), float("inf")))


def test_steps_that_end_early_say_how_much_is_left(monkeypatch):
    monkeypatch.setattr(path, "MAX_STEPS", 1)
    data, likelihood = problem("classification")
    with pytest.warns(NumericalWarning, match="nats above the optimum"):
        heads_along(data, likelihood, priors_of(data, deltas=(1e-6,)))


def test_costs_grow_with_rows_and_outputs():
    assert cost(5000, 1280, 1000, 9) > 5 * cost(5000, 512, 100, 9)
    assert cost(50_000, 512, 10, 9) == pytest.approx(10 * cost(5000, 512, 10, 9), rel=0.3)
