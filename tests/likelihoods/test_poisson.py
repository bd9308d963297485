"""The Poisson likelihood of counts."""

import math
import warnings

import pytest
import torch
from scipy import integrate, stats

from laplace import Laplace
from laplace.enums import CurvatureKind, LinkApprox
from laplace.errors import InputError, NumericalWarning, ShapeError
from laplace.likelihoods import PoissonLikelihood
from laplace.likelihoods.poisson import log_normal
from tests.tools import assert_close

LIKELIHOOD = PoissonLikelihood()
LINK = LIKELIHOOD.link(LinkApprox.PROBIT, 1, None)


def rates(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def counts(*shape: int) -> torch.Tensor:
    return torch.poisson(rates(*shape).exp(), generator=torch.Generator().manual_seed(1))


def test_the_nll_is_that_of_scipy():
    f, y = rates(5, 2), counts(5, 2)
    assert_close(-LIKELIHOOD.nll(f, y), torch.tensor(stats.poisson(f.exp().numpy()).logpmf(y.numpy()).sum()))


def test_outputs_are_independent():
    f, y = rates(5, 3), counts(5, 3)
    each = [LIKELIHOOD.nll(f[:, c : c + 1], y[:, c : c + 1]) for c in range(3)]
    assert_close(LIKELIHOOD.nll(f, y), sum(each))


def test_only_the_temperature_scales():
    likelihood = PoissonLikelihood(temperature=4.0)
    for scale in (likelihood.scale, *map(likelihood.curvature_scale, CurvatureKind)):
        assert_close(torch.as_tensor(scale), torch.tensor(0.25))
    assert float(likelihood.log_normalizer(10, 2)) == 0.0


# -- predictions ------------------------------------------------------------------------------------------------------


def test_small_variances_keep_their_digits_in_float32():
    mean, variance = rates(4, 2).float(), torch.full((4, 2), 1e-7)
    rate, spread = log_normal(mean, variance)
    torch.testing.assert_close(spread, rate**2 * 1e-7, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "cov", [torch.full((3, 2), 1e4), 1e4 * torch.eye(2).expand(3, 2, 2)], ids=["variance", "covariance"]
)
def test_a_rate_that_overflows_is_a_warning_that_names_tune(cov):
    with pytest.warns(NumericalWarning, match=r"rate is too large.*tune\(val_loader\)"):
        LIKELIHOOD.predict(rates(3, 2), cov, LINK)


def test_a_rate_that_does_not_overflow_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, cov = LIKELIHOOD.predict(rates(3, 2), 9.0 * torch.eye(2).expand(3, 2, 2), LINK)
    assert bool(mean.isfinite().all())
    assert bool(cov.isfinite().all())


def marginal(mean: float, std: float, y: float, power: float) -> float:
    """-log E[p(y|f)^power], by adaptive quadrature around the largest value of the integrand."""

    def log_integrand(u: float) -> float:
        f = mean + std * u
        return -0.5 * u * u - 0.5 * math.log(2 * math.pi) - power * (math.exp(f) - y * f + math.lgamma(y + 1))

    low, high = -60.0, min(60.0, (600 - mean) / std)
    for _ in range(200):  # concave: the maximum by ternary search
        third = (high - low) / 3
        if log_integrand(low + third) < log_integrand(high - third):
            low = low + third
        else:
            high = high - third
    peak = 0.5 * (low + high)
    top = log_integrand(peak)
    width = (1 + power * std**2 * math.exp(mean + std * peak)) ** -0.5
    value = 0.0
    for first, last in ((-12, -6), (-6, -2), (-2, 0), (0, 2), (2, 6), (6, 12)):
        edges = peak + first * max(width, 1e-9) * 1.5, peak + last * max(width, 1e-9) * 1.5
        value += integrate.quad(lambda u: math.exp(log_integrand(u) - top), *edges, epsabs=0, epsrel=1e-11)[0]
    return -(math.log(value) + top)


@pytest.mark.parametrize("y", [0.0, 1.0, 30.0, 5000.0])
@pytest.mark.parametrize(("std", "error"), [(1e-3, 1e-8), (0.3, 1e-8), (1.0, 1e-8), (3.0, 5e-4)])
def test_predictive_densities_and_energies_hold_for_narrow_and_wide_posteriors(std, error, y):
    """Where the rate may be anything from none to thousands, the number of nodes limits the digits."""
    mean = torch.tensor([[-3.0], [0.0], [2.0], [6.0]])
    variance, targets = torch.full_like(mean, std**2), torch.full_like(mean, y)
    for power in (1.0, 0.3):
        truth = torch.tensor([marginal(float(m), std, y, power) for m in mean])
        found = LIKELIHOOD.energy(mean, variance, targets, power) * power
        torch.testing.assert_close(found, truth, rtol=error, atol=error)
    truth = sum(marginal(float(m), std, y, 1.0) for m in mean)
    assert float(LIKELIHOOD.predictive_nll(mean, variance, targets, LINK)) == pytest.approx(truth, rel=error)


def test_certain_outputs_predict_by_the_density_itself():
    f, y = rates(5, 2), counts(5, 2)
    for cov in (torch.zeros(5, 2), torch.zeros(5, 2, 2)):
        assert_close(LIKELIHOOD.predictive_nll(f, cov, y, LINK), LIKELIHOOD.nll(f, y))
        mean, spread = LIKELIHOOD.predict(f, cov, LINK)
        assert_close(mean, f.exp())
        assert_close(spread, torch.zeros_like(cov))
    for alpha in (0.0, 0.3, 1.0):
        assert_close(LIKELIHOOD.energy(f, torch.zeros(5, 2), y, alpha).sum(), LIKELIHOOD.nll(f, y))


def test_samples_of_functions_are_scored_by_a_negative_binomial_distribution():
    """Counts whose rate has a Gamma distribution with the moments of the samples."""
    y = counts(5, 2)
    functions = rates(5, 2) + 0.4 * torch.randn(300, 5, 2, generator=torch.Generator().manual_seed(2))
    averaged = LIKELIHOOD.average(iter([functions]), 300, rates(5, 2))
    rate, variance = functions.exp().mean(0), functions.exp().var(0)
    shape = rate**2 / variance
    truth = stats.nbinom(shape.numpy(), (shape / (shape + rate)).numpy()).logpmf(y.numpy()).sum()
    mean, spread, link = averaged
    assert_close(LIKELIHOOD.predictive_nll(mean, spread, y, link), torch.tensor(-truth))
    closed = LIKELIHOOD.predictive_nll(rates(5, 2), torch.full((5, 2), 0.16), y, LINK)
    assert abs(float(LIKELIHOOD.predictive_nll(mean, spread, y, link) - closed)) < 0.1, "near the log-normal one"


def test_samples_that_agree_are_scored_by_the_density_itself():
    f, y = rates(5, 2), counts(5, 2)
    mean, variance, link = LIKELIHOOD.average(iter([f.expand(10, 5, 2)]), 10, f)
    found = LIKELIHOOD.predictive_nll(mean, variance, y, link)
    torch.testing.assert_close(found, LIKELIHOOD.nll(f, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2, 1.0])
def test_scores_of_samples_keep_their_digits_in_float32(relative):
    """Logarithms of gamma functions of large numbers are large; their difference is not."""
    y, rate = counts(5, 2), rates(5, 2).exp()
    _, _, link = LIKELIHOOD.average(iter([rates(2, 5, 2)]), 2, rates(5, 2))
    found = LIKELIHOOD.predictive_nll(rate.float(), (relative * rate**2).float(), y.float(), link)
    truth = -stats.nbinom(1 / relative, (1 / (1 + relative * rate)).numpy()).logpmf(y.numpy()).sum()
    assert float(found) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("shape", [0.5, 3.0, 19.9, 20.0, 20.1, 40.0, 1e3])
def test_scores_of_samples_follow_the_recurrence_of_a_negative_binomial(shape):
    """``p(0) = (1 + m/r)^(−r)``, ``p(y + 1) / p(y) = (r + y) / (y + 1) · m / (r + m)``: no gamma function enters."""
    m, y = torch.tensor(2.5), torch.arange(40.0)
    _, _, link = LIKELIHOOD.average(iter([rates(2, 5, 2)]), 2, rates(5, 2))
    cell = torch.ones(1, 1)
    nll = torch.stack([LIKELIHOOD.predictive_nll(m * cell, m**2 / shape * cell, count * cell, link) for count in y])
    steps = ((shape + y[:-1]) / (y[:-1] + 1) * m / (shape + m)).log()
    torch.testing.assert_close(nll[:-1] - nll[1:], steps, rtol=0, atol=1e-12 * max(1, shape))
    torch.testing.assert_close(nll[0], shape * torch.log1p(m / shape), rtol=1e-12, atol=0)


def test_large_counts_keep_their_digits_in_float32():
    """Terms of y log y cancel: what is left is of the size of log y."""
    y = (1_000_000 + 997 * torch.arange(40.0)[:, None]).float()
    f = (y.double().log() + 1e-3 * rates(40, 1)).float()
    cov, wide = torch.full((40, 1), 1e-6).float(), f.double()
    found = LIKELIHOOD.nll(f, y)
    assert found.dtype is torch.float32
    truth = -stats.poisson(wide.exp().numpy()).logpmf(y.double().numpy()).sum()
    assert float(found) == pytest.approx(truth, abs=1e-3)
    u = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    at = wide + cov.double().sqrt() * u
    log_p = y * at - at.exp() - torch.lgamma(y.double() + 1) - 0.5 * u.square() - 0.5 * math.log(2 * math.pi)
    truth = -float((log_p.logsumexp(1) + (u[1] - u[0]).log()).sum())
    found = LIKELIHOOD.predictive_nll(f, cov, y, LINK)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(truth, abs=1e-3)
    for power in (0.0, 1.0):
        found = LIKELIHOOD.energy(f, cov, y, power)
        torch.testing.assert_close(found, LIKELIHOOD.energy(wide, cov.double(), y.double(), power).float())
    sampled = LIKELIHOOD.average(iter([f.expand(10, 40, 1)]), 10, f)
    mean, variance, link = sampled
    found = LIKELIHOOD.predictive_nll(mean, variance, y, link)
    truth = -stats.poisson(mean.double().numpy()).logpmf(y.double().numpy()).sum()
    assert float(found) == pytest.approx(truth, abs=1e-2)


def test_the_evidence_of_large_counts_is_that_of_float64():
    """Of a last layer that is its bias alone, whose float32 weights are those of the float64 one."""
    found = []
    for dtype in (torch.float32, torch.float64):
        net = torch.nn.Sequential(torch.nn.Linear(1, 1)).float()
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.fill_(14.0)
        net.to(dtype)
        x, y = torch.zeros(40, 1, dtype=dtype), torch.full((40, 1), 1.2e6, dtype=dtype)
        la = Laplace(net, LIKELIHOOD, "last_layer", "full", prior_precision=2.0, last_layer_name="0")
        la.fit([(x, y)])
        found.append(float(la.log_marginal_likelihood()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_counts_of_any_type_are_read(dtype):
    y = counts(5, 2)
    assert_close(LIKELIHOOD.flatten(rates(5, 2), y.to(dtype)).y, y)
    assert_close(LIKELIHOOD.flatten(rates(5, 1), y[:, 0].to(dtype)).y, y[:, :1])
    assert LIKELIHOOD.count(y.to(dtype), 2) == 5


def test_positions_are_flattened_and_counted():
    f, y = rates(2, 3, 4), counts(2, 3, 4)
    positions = LIKELIHOOD.flatten(f, y)
    assert_close(positions.f, f.reshape(6, 4))
    assert_close(positions.y, y.reshape(6, 4))
    assert positions.datum.tolist() == [0, 0, 0, 1, 1, 1]
    assert LIKELIHOOD.count(y, 4) == 6


@pytest.mark.parametrize(
    ("f", "y", "error", "says"),
    [
        (rates(5, 2), counts(5, 1), ShapeError, r"Counts.*\[5, 2\]; got \[5, 1\]"),
        (rates(5, 2), counts(5), ShapeError, r"Counts.*got \[5\]"),
        (rates(5, 1), counts(4), ShapeError, r"Counts.*got \[4\]"),
        (rates(5, 2), counts(5, 2) + 0.5, InputError, "takes counts"),
        (rates(5, 2), -1 - counts(5, 2), InputError, "takes counts"),
        (rates(5, 2), -1 - counts(5, 2).long(), InputError, "takes counts"),
        (rates(5, 2), counts(5, 2) * torch.nan, InputError, "Counts must be finite"),
        (rates(5, 2), counts(5, 2) + torch.inf, InputError, "Counts must be finite"),
        (rates(5, 2), counts(5, 2) > 0, InputError, "numbers; got torch.bool"),
        (rates(5, 2), counts(5, 2) + 0j, InputError, "numbers; got torch.complex"),
        (rates(5, 2) / 0, counts(5, 2), InputError, "outputs of the model must be finite"),
    ],
    ids=["one column", "no column", "too few", "fractions", "negative", "negative int", "nan", "infinite", "bool", "complex",
         "infinite outputs"],
)  # fmt: skip
def test_what_is_no_count_is_refused(f, y, error, says):
    with pytest.raises(error, match=says):
        LIKELIHOOD.flatten(f, y)
