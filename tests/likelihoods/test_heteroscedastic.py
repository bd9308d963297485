"""Regression whose noise is predicted: several targets, limits, and how far its quadrature reaches."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from laplace import Laplace
from laplace.enums import LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import GaussianLikelihood, HeteroscedasticLikelihood
from tests.contracts import generator
from tests.likelihoods.situations import network
from tests.networks import Applied
from tests.structures.samples import psd
from tests.tools import assert_close, assert_within

LIKELIHOOD, K = HeteroscedasticLikelihood(), 2
LINK = LIKELIHOOD.link(LinkApprox.PROBIT, 1, None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def covariances(n: int = 4, size: float = 0.3) -> torch.Tensor:
    return size * torch.stack([psd(2 * K, seed) for seed in range(n)])


def test_a_target_has_the_mean_and_the_variance_of_its_own_two_outputs():
    f, y = random(4, 2 * K), random(4, K, seed=1)
    expected = Normal(f[:, :K], (f[:, K:] / 2).exp()).log_prob(y)
    assert_close(LIKELIHOOD.nll(f, y) + LIKELIHOOD.log_normalizer(4, 2 * K), -expected.sum())
    for k in range(K):
        alone = LIKELIHOOD.nll(f[:, [k, K + k]], y[:, [k]]) + LIKELIHOOD.log_normalizer(4, 2)
        assert_close(alone, -expected[:, k].sum())


def test_predictions_are_those_of_the_means():
    f, cov = random(4, 2 * K), covariances()
    mean, spread = LIKELIHOOD.predict(f, cov, LINK)
    assert_close(mean, f[:, :K])
    assert_close(spread, cov[:, :K, :K])
    assert_close(LIKELIHOOD.predict(f, cov.diagonal(dim1=1, dim2=2), LINK)[1], cov.diagonal(dim1=1, dim2=2)[:, :K])
    joint = psd(3 * 2 * K, 5)
    mean, spread = LIKELIHOOD.predict_joint(f[:3], joint)
    for row in range(3):
        for other in range(3):
            at, to = (slice(2 * K * i, 2 * K * i + K) for i in (row, other))
            assert_close(spread[K * row : K * row + K, K * other : K * other + K], joint[at, to])
    assert_close(mean, f[:3, :K].flatten())


def test_the_two_variances_are_that_of_targets():
    """Of targets that are drawn: outputs from the posterior, then noise."""
    f, cov, n = random(3, 2 * K), covariances(3), 100_000
    drawn = MultivariateNormal(f, cov + 1e-12 * torch.eye(2 * K)).sample((n,))
    y = drawn[..., :K] + (drawn[..., K:] / 2).exp() * random(n, 3, K, seed=7)
    found = LIKELIHOOD.predict(f, cov, LINK)[1].diagonal(dim1=1, dim2=2) + LIKELIHOOD.noise_variance(
        f, cov.diagonal(dim1=1, dim2=2)
    )
    square = (y - f[:, :K]).square()
    assert_within(square.mean(0), found, square.std(0) / n**0.5)


def test_densities_of_several_targets_are_sums_over_each():
    f, cov, y = random(4, 2 * K), covariances(), random(4, K, seed=1)
    for alpha in (0.0, 0.5, 1.0):
        each = []
        for k in range(K):
            pair = [k, K + k]
            each.append(LIKELIHOOD.energy(f[:, pair], cov[:, pair][:, :, pair], y[:, [k]], alpha))
        assert_close(LIKELIHOOD.energy(f, cov, y, alpha), sum(each))
    total = LIKELIHOOD.energy(f, cov, y, 1.0).sum() + LIKELIHOOD.log_normalizer(4, 2 * K)
    assert_close(LIKELIHOOD.predictive_nll(f, cov, y, LINK), total)


def test_where_the_noise_is_known_it_is_regression():
    sigma, y = torch.tensor(0.6), random(4, K, seed=1)
    f = torch.cat([random(4, K), torch.full((4, K), 2 * math.log(0.6))], -1)
    known, cov = GaussianLikelihood(sigma), covariances()
    cov[:, K:], cov[:, :, K:] = 0.0, 0.0
    variance = cov.diagonal(dim1=1, dim2=2)
    expected = known.predictive_nll(f[:, :K], variance[:, :K], y, lambda m, v: (m, v))
    assert_close(LIKELIHOOD.predictive_nll(f, variance, y, LINK), expected)
    assert_close(LIKELIHOOD.predictive_nll(f, cov, y, LINK), expected)
    assert_close(LIKELIHOOD.noise_variance(f, variance), sigma.square().expand(4, K))
    assert_close(LIKELIHOOD.gradient(f, y)[:, :K], known.gradient(f[:, :K], y) / 0.36)


@pytest.mark.parametrize("y", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(("std", "error"), [(0.1, 1e-10), (0.5, 1e-10), (1.0, 1e-10)])
def test_the_error_of_the_predictive_density_is_as_stated(std, error, y):
    """Against the trapezoid rule over s, also where mean and noise are uncertain together."""
    for both in (0.0, 0.5):
        var_m = 0.5
        cov = torch.tensor([[var_m, both * std * var_m**0.5], [both * std * var_m**0.5, std**2]])[None]
        f, target = torch.tensor([[0.2, -0.7]]), torch.tensor([[y]])
        u = torch.linspace(-40, 60, 800_001)
        s = f[0, 1] + std * u
        m, rest = f[0, 0] + both * var_m**0.5 * u, var_m * (1 - both**2)
        log_p = Normal(m, (rest + s.exp()).sqrt()).log_prob(target[0, 0]) + Normal(0.0, 1.0).log_prob(u)
        top = log_p.max()
        truth = -(torch.trapezoid((log_p - top).exp(), u).log() + top)
        found = LIKELIHOOD.predictive_nll(f, cov, target, LINK)
        torch.testing.assert_close(found, truth, rtol=error, atol=error)


def on_a_grid(f, cov, y, power):
    """−log E[exp(−power (½ s + ½ (y − m)² e^(−s)))]: Gaussian in m, a dense grid over s, ``[rows]``."""
    found = []
    for (m, s), ((var_m, both), (_, var_s)), target in zip(f, cov, y, strict=True):
        u = torch.linspace(-45, 45, 90_001)
        at = s + var_s.sqrt() * u
        center, rest = m + both / var_s.sqrt() * u, (var_m - both**2 / var_s).clamp(min=0)
        # exp(−a (y − m)² e^(−s) / 2) is a Gaussian density of variance e^s / a, but for its constant.
        log_p = Normal(center, (rest + at.exp() / power).sqrt()).log_prob(target) - 0.5 * power * at
        log_p = log_p + 0.5 * (2 * math.pi * at.exp() / power).log() + Normal(0.0, 1.0).log_prob(u)
        found.append(-(log_p.logsumexp(0) + (u[1] - u[0]).log()))
    return torch.stack(found)


def pairs(rows):
    """Outputs, their covariances and targets of rows (m, s, var m, var s, correlation, y)."""
    m, s, var_m, var_s, rho, y = torch.as_tensor(rows, dtype=torch.float64).T
    both = rho * (var_m * var_s).sqrt()
    cov = torch.stack([torch.stack([var_m, both], -1), torch.stack([both, var_s], -1)], -1)
    return torch.stack([m, s], -1), cov, y


TWO_MAXIMA = [
    (0.3, -0.5, 1, 0.25, -0.8, 6),
    (0, 0, 3.4, 0.81, -0.81, 8.2),
    (0.3, -4, 0.1, 1, -0.95, 1.5),
    (0.3, -4, 0.1, 0.05, -0.4, 6),
    (0.3, -4, 1, 1, -0.4, 20),
]


def with_outliers(n):
    """Any correlation, deviations of s from 0.01 to 3, targets up to 6 of their standard deviations from the mean."""
    draw = torch.rand(n, 5, generator=generator(3), dtype=torch.float64)
    s, var_m, var_s = 7 * draw[:, 0] - 5, 10 ** (4 * draw[:, 1] - 3), 9 * 10 ** (-5 * draw[:, 2])
    return torch.stack(
        [0 * s, s, var_m, var_s, 1.998 * draw[:, 3] - 0.999, 6 * draw[:, 4] * (var_m + s.exp()).sqrt()], -1
    )


@pytest.mark.every(3, each_value=False)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rows", [torch.tensor(TWO_MAXIMA), with_outliers(200)], ids=["two maxima", "outliers"])
def test_uncertain_noise_and_mean_that_vary_together(rows, power):
    """The target may be explained by a loud noise, or by a mean that moved with a quiet one."""
    f, cov, y = pairs(rows)
    truth = on_a_grid(f, cov, y, power)
    found = LIKELIHOOD.energy(f, cov, y[:, None], power) * power
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-10)
    found = LIKELIHOOD.energy(f.float(), cov.float(), y[:, None].float(), power) * power
    torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=2e-5)
    if power == 1.0:
        density = LIKELIHOOD.predictive_nll(f, cov, y[:, None], LINK)
        torch.testing.assert_close(density, truth.sum() + len(y) * 0.5 * math.log(2 * math.pi), rtol=0, atol=1e-8)


def test_gradients_of_two_maxima_are_those_of_the_integral():
    f, cov, y = pairs(TWO_MAXIMA)
    gradients = []
    for of in (lambda f, cov: LIKELIHOOD.energy(f, cov, y[:, None], 1.0), lambda f, cov: on_a_grid(f, cov, y, 1.0)):
        at = f.clone().requires_grad_(), cov.clone().requires_grad_()
        by_f, by_cov = torch.autograd.grad(of(*at).sum(), at)
        gradients.append((by_f, by_cov + by_cov.mT))  # of a symmetric matrix
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("s", [-90.0, -60.0, 60.0, 90.0])
@pytest.mark.parametrize("variance", [0.0, 1e-3, 1.0])
def test_extreme_noise_stays_finite_in_float32(s, variance):
    f, y = torch.tensor([[0.1, s]]).float().requires_grad_(), torch.tensor([[0.1]]).float()
    cov = torch.full((1, 2), variance).float()
    found = LIKELIHOOD.predictive_nll(f, cov, y, LINK)
    (gradient,) = torch.autograd.grad(found, f)
    assert bool(gradient.isfinite().all())
    truth = LIKELIHOOD.predictive_nll(f.detach().double(), cov.double(), y.double(), LINK)
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_constant_noise_leaves_the_posterior_of_regression(subset):
    """The log-variance is fixed, not a weight: what is left is a regression with that noise."""
    x, y, sigma = random(9, 2), random(9, 1, seed=1), 0.7
    net = network(1)
    options = {"last_layer_name": "2"} if subset == "last_layer" else {}
    plain = Laplace(net, "regression", subset, "full", sigma_noise=sigma, **options)
    plain.fit([(x, y)])
    evidence, predicted = plain.log_marginal_likelihood(), plain(x)
    fixed = Applied(lambda m, x: nn.functional.pad(m.net(x), (0, 1), value=2 * math.log(sigma)), net=net)
    if subset == "last_layer":
        fixed.net[0].requires_grad_(False)
    la = Laplace(fixed, "heteroscedastic_regression", "all", "full")
    la.fit([(x, y)])
    assert_close(la.log_marginal_likelihood(), evidence)
    for found, expected in zip(la(x), predicted, strict=True):
        assert_close(found, expected)


def test_the_noise_is_that_of_sampled_functions():
    x, y, n = random(30, 2), random(30, K, seed=1), 20_000
    la = Laplace(network(2 * K), "heteroscedastic_regression", "last_layer", "full", last_layer_name="2")
    la.fit([(x, y)])
    told = la.predict(x[:3])
    noise = la.functional_samples(x[:3], n_samples=n, generator=generator(0))[..., K:].exp()
    assert_within(noise.mean(0), told.aleatoric_variance, noise.std(0) / n**0.5)
    assert_close(told.mean, la(x[:3])[0])
    assert_close(told.epistemic_variance, la(x[:3], diagonal_output=True)[1])
    assert la(x)[0].shape == (30, K)
    assert la(x)[1].shape == (30, K, K)
    assert la.predictive_samples(x, n_samples=5).shape == (5, 30, K)


def test_tune_keeps_the_head_and_says_why():
    x, y = random(30, 2), random(30, K, seed=1)
    la = Laplace(network(2 * K), "heteroscedastic_regression", "last_layer", "full", last_layer_name="2")
    la.fit([(x[:15], y[:15])])
    before = la.mean.clone()
    la.tune([(x[15:], y[15:])])
    assert torch.equal(la.mean, before)
    assert any("convex" in note for note in la.tuning_.notes)
    with pytest.raises(UnsupportedError, match=r"refit=True.*convex"):
        la.tune([(x[15:], y[15:])], refit=True)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_an_odd_number_of_outputs_is_refused(subset):
    la = Laplace(network(3), "heteroscedastic_regression", subset)
    with pytest.raises(UnsupportedError, match=r"two outputs for each target.*model has 3.*2 \* n_targets"):
        la.fit([(random(5, 2), random(5, 1))])


def test_targets_are_read():
    positions = LIKELIHOOD.flatten(random(2, 3, 4), random(2, 3, 2))
    assert positions.f.shape == (6, 4)
    assert positions.y.shape == (6, 2)
    assert positions.datum.tolist() == [0, 0, 0, 1, 1, 1]
    assert LIKELIHOOD.count(random(2, 3, 2), 4) == 6
    assert LIKELIHOOD.flatten(random(5, 2), random(5)).y.shape == (5, 1)
    with pytest.raises(ShapeError, match=r"shape \[5, 2\], one for two outputs of \[5, 4\].*got \[5, 4\]"):
        LIKELIHOOD.flatten(random(5, 4), random(5, 4))
    with pytest.raises(InputError, match="floating-point"):
        LIKELIHOOD.flatten(random(5, 2), torch.ones(5, 1).long())
    with pytest.raises(InputError, match="Regression targets must be finite"):
        LIKELIHOOD.flatten(random(5, 2), random(5, 1) / 0)
