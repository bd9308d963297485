"""Dispersed counts: any dispersion, the limit of none, digits."""

import math

import pytest
import torch
from scipy import stats

from laplace import Laplace
from laplace.enums import LinkApprox
from laplace.errors import InputError
from laplace.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood
from tests.contracts import generator
from tests.likelihoods.situations import network
from tests.tools import assert_close, assert_mean_is

LINK = PoissonLikelihood().link(LinkApprox.PROBIT, 1, None)
DISPERSIONS = (0.01, 0.4, 3.0)
every_dispersion = pytest.mark.parametrize("alpha", DISPERSIONS)


def outputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def counts(*shape: int) -> torch.Tensor:
    return torch.randint(0, 9, shape, generator=generator(1)).double()


@every_dispersion
def test_it_is_the_negative_binomial_distribution_with_that_mean_and_variance(alpha):
    f, y, likelihood = outputs(5, 2), counts(5, 2), NegativeBinomialLikelihood(dispersion=alpha)
    mean = f.exp().numpy()
    density = stats.nbinom(1 / alpha, 1 / (1 + alpha * mean))
    assert_close(torch.as_tensor(density.mean()), f.exp())
    assert_close(torch.as_tensor(density.var()), f.exp() + alpha * f.exp() ** 2)
    assert_close(likelihood.nll(f, y), torch.tensor(-density.logpmf(y.numpy()).sum()))
    assert_close(likelihood.gradient(f, y), torch.func.grad(likelihood.nll)(f, y))
    assert_close(likelihood.gradient(f, y), (f.exp() - y) / (1 + alpha * f.exp()))
    assert_close(likelihood.hessian(f).diag(), f.exp() / (1 + alpha * f.exp()))
    assert_close(likelihood.noise_variance(f, torch.zeros_like(f)), torch.as_tensor(density.var()))


@every_dispersion
def test_sampled_gradients_have_the_fisher_information(alpha):
    f, likelihood = outputs(3, 2), NegativeBinomialLikelihood(dispersion=alpha)
    g = likelihood.sample_gradient(f, 20_000, generator(0))
    for row in range(3):
        assert_mean_is(g[:, row], torch.zeros(2))
        assert_mean_is(g[:, row] ** 2, likelihood.hessian(f).diag()[row])
    assert torch.equal(g, likelihood.sample_gradient(f, 20_000, generator(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_dispersion_it_is_that_of_poisson_and_keeps_its_digits(dtype):
    f, y, variance = outputs(5, 2).to(dtype), counts(5, 2).to(dtype), outputs(5, 2, seed=2).exp().to(dtype)
    none, poisson = NegativeBinomialLikelihood(dispersion=1e-7), PoissonLikelihood()
    for of in (
        lambda likelihood: likelihood.nll(f, y),
        lambda likelihood: likelihood.gradient(f, y),
        lambda likelihood: likelihood.hessian(f).diag(),
        lambda likelihood: likelihood.predictive_nll(f, variance, y, LINK),
        lambda likelihood: likelihood.energy(f, variance, y, 0.5),
        lambda likelihood: likelihood.energy(f, 0.1 * variance, y, 0.0),
    ):
        torch.testing.assert_close(of(none), of(poisson), rtol=3e-5, atol=3e-5)


@every_dispersion
def test_scores_of_samples_have_the_moments_of_rate_and_count_together(alpha):
    """A count whose rate varies by samples and by dispersion: a negative binomial one with its mean and variance."""
    f, y, likelihood = outputs(3, 2), counts(3, 2), NegativeBinomialLikelihood(dispersion=alpha)
    functions = f + 0.3 * outputs(200, 3, 2, seed=4)
    mean, variance, link = likelihood.average(iter([functions]), 200, f)
    rate, spread = functions.exp().mean(0), functions.exp().var(0)
    total = rate + spread + alpha * (rate**2 + spread)
    size = rate**2 / (total - rate)
    expected = stats.nbinom(size.numpy(), (rate / total).numpy()).logpmf(y.numpy()).sum()
    assert_close(likelihood.predictive_nll(mean, variance, y, link), torch.tensor(-expected))


@pytest.mark.parametrize(("std", "error"), [(0.3, 1e-9), (1.0, 1e-7), (3.0, 1e-3)])
def test_predictive_densities_of_wide_posteriors(std, error):
    """Against the trapezoid rule."""
    likelihood, mean = NegativeBinomialLikelihood(dispersion=0.5), torch.tensor([[-2.0], [0.5], [3.0]])
    y = torch.tensor([[2.0], [0.0], [40.0]])
    u = torch.linspace(-12, 12, 40_001)
    weight = (-0.5 * u**2).exp() / math.sqrt(2 * math.pi)
    log_p = -likelihood._nll(mean + std * u, y)
    truth = -torch.trapezoid(log_p.exp() * weight, u, dim=1).log()
    found = likelihood.energy(mean, torch.full_like(mean, std**2), y, 1.0)
    torch.testing.assert_close(found, truth, rtol=error, atol=error)
    truth = -torch.trapezoid(log_p * weight, u, dim=1)
    found = likelihood.energy(mean, torch.full_like(mean, std**2), y, 0.0)
    torch.testing.assert_close(found, truth, rtol=error, atol=error)


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 1.0])
def test_large_counts_keep_their_digits_in_float32(alpha):
    """Terms of y log y cancel: what is left is of the size of log y."""
    y = (1_000_000 + 997 * torch.arange(40.0)[:, None]).float()
    f = (y.double().log() + 1e-3 * outputs(40, 1)).float()
    likelihood, cov = NegativeBinomialLikelihood(dispersion=alpha), torch.full((40, 1), 1e-6).float()
    wide, counted = f.double(), y.double().numpy()
    density = stats.nbinom(1 / alpha, 1 / (1 + alpha * wide.exp().numpy()))
    truth = -density.logpmf(counted).sum()
    found = likelihood.nll(f, y)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(truth, abs=1e-3)
    found = likelihood.predictive_nll(f, cov, y, LINK)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(
        float(likelihood.predictive_nll(wide, cov.double(), y.double(), LINK)), abs=1e-3
    )
    for power in (0.0, 1.0):
        found = likelihood.energy(f, cov, y, power)
        torch.testing.assert_close(found, likelihood.energy(wide, cov.double(), y.double(), power).float())


@pytest.mark.parametrize("dispersion", [0.0, -1.0, math.inf, math.nan])
def test_a_dispersion_is_positive(dispersion):
    with pytest.raises(InputError, match="dispersion must be one positive finite number"):
        NegativeBinomialLikelihood(dispersion=dispersion)


def test_a_state_knows_the_dispersion(tmp_path):
    la = Laplace(network(2), NegativeBinomialLikelihood(dispersion=0.5))
    la.fit([(outputs(8, 2), counts(8, 2))])
    la.save(tmp_path / "state")
    again = Laplace(network(2), NegativeBinomialLikelihood(dispersion=0.5))
    again.load(tmp_path / "state")
    assert_close(again(outputs(3, 2))[1], la(outputs(3, 2))[1])
    other = Laplace(network(2), "negative_binomial")
    with pytest.raises(InputError, match=r"dispersion=0\.5.*dispersion=1\.0"):
        other.load(tmp_path / "state")
