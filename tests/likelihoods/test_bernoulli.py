"""The Bernoulli likelihood of one logit."""

import math

import pytest
import torch
from scipy import integrate

from laplace.enums import CurvatureKind, LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from tests.contracts import generator
from tests.tools import assert_close

LIKELIHOOD = BernoulliLikelihood()
Y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])[:, None]


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def two(f: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(f), f], -1)


def test_it_is_the_softmax_over_zero_and_the_logit():
    f, softmax = logits(5, 1), CategoricalLikelihood()
    labels = Y[:, 0].long()
    assert_close(LIKELIHOOD.nll(f, Y), softmax.nll(two(f), labels))
    assert_close(LIKELIHOOD.gradient(f, Y), softmax.gradient(two(f), labels)[:, 1:])
    assert_close(LIKELIHOOD.hessian(f).dense(), softmax.hessian(two(f)).dense()[:, 1:, 1:])
    assert_close(LIKELIHOOD.expectation(f), softmax.expectation(two(f))[:, 1:])


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("link", [LinkApprox.PROBIT, LinkApprox.MC])
def test_its_predictions_are_those_of_the_two_classes(link, T):
    f, variance = logits(5, 1), logits(5, 1).exp()
    single, double = BernoulliLikelihood(output_temperature=T), CategoricalLikelihood(output_temperature=T)
    found = single.predict(f, variance, single.link(link, 100_000, generator(0)))
    expected = double.predict(two(f), two(variance), double.link(link, 100_000, generator(0)))
    assert found.shape == (5, 1)
    tolerance = 1e-12 if link is LinkApprox.PROBIT else 0.01
    assert float((found[:, 0] - expected[:, 1]).abs().max()) < tolerance
    if link is LinkApprox.PROBIT:
        assert_close(found, torch.sigmoid(f / T / (1 + math.pi / 8 * variance / T**2).sqrt()))


def test_the_opposite_logit_is_the_other_label():
    f = logits(5, 1)
    assert_close(LIKELIHOOD.nll(-f, 1 - Y), LIKELIHOOD.nll(f, Y))
    assert_close(LIKELIHOOD.gradient(-f, 1 - Y), -LIKELIHOOD.gradient(f, Y))


@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 25.0, 80.0, -25.0, -80.0])
def test_confident_float32_logits_keep_their_digits(size):
    """1 - p has no digits left from a logit of 17 on; each quantity is right in proportion to its own size."""
    f, y = torch.full((2, 1), size), torch.tensor([[0.0], [1.0]])
    for of in (LIKELIHOOD.gradient, lambda f, y: LIKELIHOOD.hessian(f).diag(), lambda f, y: LIKELIHOOD.hessian_root(f)):
        torch.testing.assert_close(of(f.float(), y.float()).double(), of(f, y), rtol=1e-5, atol=0.0)
    exact = [math.log1p(math.exp(-abs(size))) + max(sign * size, 0.0) for sign in (1, -1)]
    for row in range(2):
        found = LIKELIHOOD.nll(f[row, None].float(), y[row, None].float())
        torch.testing.assert_close(found.double(), torch.tensor(exact[row]), rtol=1e-5, atol=0.0)
    p, q = 1 / (1 + math.exp(-size)), 1 / (1 + math.exp(size))
    torch.testing.assert_close(LIKELIHOOD.gradient(f, y).flatten(), torch.tensor([p, -q]), rtol=1e-12, atol=0.0)


def test_extreme_logits_stay_finite():
    f = 1e4 * logits(5, 1).float()
    y, variance = Y.float(), torch.full((5, 1), 1e6)
    link = LIKELIHOOD.link(LinkApprox.PROBIT, 1, None)
    for quantity in (
        LIKELIHOOD.nll(f, y),
        LIKELIHOOD.gradient(f, y),
        LIKELIHOOD.hessian(f).dense(),
        LIKELIHOOD.sample_gradient(f, 3),
        LIKELIHOOD.predictive_nll(f, variance, y, link),
        *(LIKELIHOOD.energy(f, size * variance, y, alpha) for alpha in (0.0, 0.3, 1.0) for size in (0.0, 1e-9, 1.0)),
    ):
        assert bool(torch.isfinite(quantity).all())


def integrated(mean: float, std: float, y: float, alpha: float) -> float:
    """-(1/alpha) log E[p(y|f)^alpha], by adaptive quadrature relative to the largest value of the integrand."""
    sign = 2 * y - 1

    def nll(f: float) -> float:
        return max(-sign * f, 0.0) + math.log1p(math.exp(-abs(f)))

    def log_density(u: float) -> float:
        return -0.5 * u * u - 0.5 * math.log(2 * math.pi)

    grid = [-40 + 0.01 * i for i in range(8001)]
    if alpha == 0:
        kink = min(max(-mean / std, -39.0), 39.0)
        return integrate.quad(
            lambda u: nll(mean + std * u) * math.exp(log_density(u)), -40, 40, points=[0, kink], limit=500, epsabs=1e-13
        )[0]
    peak = max(grid, key=lambda u: log_density(u) - alpha * nll(mean + std * u))
    top = log_density(peak) - alpha * nll(mean + std * peak)
    value = integrate.quad(
        lambda u: math.exp(log_density(u) - alpha * nll(mean + std * u) - top),
        peak - 12,
        peak + 12,
        points=[peak],
        limit=500,
        epsabs=1e-13,
    )[0]
    return -(math.log(value) + top) / alpha


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("std", "error"), [(1e-3, 1e-9), (0.3, 1e-9), (2.0, 1e-4), (10.0, 0.03)])
def test_energies_hold_for_narrow_and_for_wide_posteriors(std, error, alpha):
    """The kink of softplus is as sharp as the posterior is wide, which is where quadrature loses digits."""
    mean = torch.tensor([[-8.0], [-1.0], [0.0], [2.0], [30.0]])
    for y in (0.0, 1.0):
        found = LIKELIHOOD.energy(mean, torch.full_like(mean, std**2), torch.full_like(mean, y), alpha)
        truth = torch.tensor([integrated(float(m), std, y, alpha) for m in mean])
        torch.testing.assert_close(found, truth, rtol=error, atol=error)


def test_energies_of_certain_outputs_are_the_nll():
    f = logits(5, 1)
    for alpha in (0.0, 0.3, 1.0):
        assert_close(LIKELIHOOD.energy(f, torch.zeros(5, 1), Y, alpha).sum(), LIKELIHOOD.nll(f, Y))


def test_only_the_temperature_scales():
    likelihood = BernoulliLikelihood(temperature=4.0)
    for scale in (likelihood.scale, *map(likelihood.curvature_scale, CurvatureKind)):
        assert_close(torch.as_tensor(scale), torch.tensor(0.25))
    assert float(likelihood.log_normalizer(10, 1)) == 0.0


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_targets_of_any_type_are_read(shape, dtype):
    positions = LIKELIHOOD.flatten(logits(5, 1), Y.reshape(shape).to(dtype))
    assert_close(positions.y, Y)
    assert_close(positions.f, logits(5, 1))
    assert positions.kept is None
    assert positions.datum is None
    assert LIKELIHOOD.count(Y.reshape(shape).to(dtype), 1) == 5


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
def test_positions_are_flattened_and_counted(shape):
    f, y = logits(2, 3, 1), (logits(2, 3, 1) > 0).reshape(shape)
    positions = LIKELIHOOD.flatten(f, y)
    assert_close(positions.f, f.reshape(6, 1))
    assert_close(positions.y, y.reshape(6, 1).double())
    assert positions.datum.tolist() == [0, 0, 0, 1, 1, 1]
    assert LIKELIHOOD.count(y, 1) == 6


@pytest.mark.parametrize(
    ("f", "y", "error", "says"),
    [
        (logits(5, 2), Y, UnsupportedError, "one logit.*2 outputs.*classification"),
        (logits(5, 1), Y[:4], ShapeError, r"\[5\] or \[5, 1\]; got \[4, 1\]"),
        (logits(5, 1), two(Y), ShapeError, r"got \[5, 2\]"),
        (logits(5, 1), Y[None], ShapeError, r"got \[1, 5, 1\]"),
        (logits(5, 1), 0.5 * Y, InputError, "0 or 1"),
        (logits(5, 1), 2 * Y, InputError, "0 or 1"),
        (logits(5, 1), 2 * Y.long(), InputError, "0 or 1"),
        (logits(5, 1), -Y, InputError, "0 or 1"),
        (logits(5, 1), -Y.long(), InputError, "0 or 1"),
        (logits(5, 1), Y / 0, InputError, "0 or 1"),
        (logits(5, 1), Y * torch.nan, InputError, "0 or 1"),
        (logits(5, 1), Y + 0j, InputError, "0 or 1"),
        (logits(5, 1) / 0, Y, InputError, "outputs of the model must be finite"),
    ],
    ids=["two outputs", "too few", "one-hot", "extra axis", "half", "two", "int two", "minus one", "int minus one", "infinite",
         "nan", "complex", "infinite outputs"],
)  # fmt: skip
def test_what_is_no_label_is_refused(f, y, error, says):
    with pytest.raises(error, match=says):
        LIKELIHOOD.flatten(f, y)


def test_a_head_has_one_output():
    LIKELIHOOD.check_head(1)
    with pytest.raises(UnsupportedError, match=r"one logit.*3 outputs"):
        LIKELIHOOD.check_head(3)
