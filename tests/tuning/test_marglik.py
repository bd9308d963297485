"""The log marginal likelihood as a pure function, and ascent on it."""

import math

import pytest
import torch

from laplace.enums import CurvatureKind
from laplace.errors import InputError, NumericalWarning
from laplace.fit import Fit
from laplace.likelihoods import resolve
from laplace.prior import GaussianPrior
from laplace.structures import DiagCurvature, FullCurvature, Kron, KronCurvature
from laplace.tuning import marglik
from tests import reference
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, SIZES, C, D, P, psd, uniform
from tests.tools import assert_close

F64 = torch.float64
THETA = uniform(P, 11) - 1
CURVATURES = {
    "full": FullCurvature(psd(P, 1)),
    "diag": DiagCurvature(uniform(P, 2)),
    "kron": KronCurvature(Kron([[psd(C, 1), psd(D, 2)], [psd(C, 1)]]), (5, 5)),
}
PRIORS = {"scalar": SCALAR, "per layer": PER_LAYER, "per weight": PER_WEIGHT}
ROWS = [
    pytest.param(curvature, precision, id=f"{structure}-{name}")
    for structure, curvature in CURVATURES.items()
    for name, precision in PRIORS.items()
    if (structure, name) != ("kron", "per weight")
]
KINDS = pytest.mark.parametrize("kind", list(CurvatureKind), ids=lambda kind: kind.value)


def fit(curvature) -> Fit:
    return Fit(THETA, curvature, torch.tensor(7.5, dtype=F64), n_data=5, n_positions=6, n_outputs=C)


def prior(precision: torch.Tensor, mean: float = 0.2) -> GaussianPrior:
    return GaussianPrior(torch.tensor(mean, dtype=F64), precision, SIZES)


def evidence(curvature, precision, sigma, kind, temperature=1.3, likelihood="regression"):
    noise = {"sigma_noise": sigma} if likelihood == "regression" else {}
    named = resolve(likelihood, temperature=temperature, **noise)
    return marglik.log_marginal_likelihood(fit(curvature), prior(precision), named, kind)


@KINDS
@pytest.mark.parametrize(("curvature", "precision"), ROWS)
def test_evidence_equals_its_definition(curvature, precision, kind):
    sigma, T = 0.7, 1.3
    s = {CurvatureKind.GGN: 1 / (sigma**2 * T), CurvatureKind.EF: 1 / (sigma**4 * T)}[kind]
    P0 = prior(precision).diagonal().diag()
    posterior, shift = s * curvature.to_dense() + P0, THETA - 0.2
    expected = reference.log_evidence(torch.tensor(7.5), 1 / (sigma**2 * T), sigma, 6 * C, posterior, P0, shift)
    assert_close(evidence(curvature, precision, torch.tensor(sigma), kind, T), expected)


@pytest.mark.parametrize(("curvature", "precision"), ROWS)
def test_classification_has_no_noise_in_its_evidence(curvature, precision):
    P0 = prior(precision).diagonal().diag()
    posterior, shift = curvature.to_dense() / 1.3 + P0, THETA - 0.2
    expected = reference.log_evidence(torch.tensor(7.5), 1 / 1.3, None, 6 * C, posterior, P0, shift)
    actual = evidence(curvature, precision, None, CurvatureKind.GGN, 1.3, "classification")
    assert_close(actual, expected)


@KINDS
@pytest.mark.parametrize(("curvature", "precision"), ROWS)
def test_evidence_is_differentiable_in_prior_and_noise(curvature, precision, kind):
    inputs = precision.clone().requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, s: evidence(curvature, p, s, kind), inputs)


def test_log_likelihood_is_tempered_and_its_normalizer_is_not():
    likelihood = resolve("regression", torch.tensor(0.5, dtype=F64), 2.0)
    expected = -7.5 / (0.25 * 2) - 6 * C * math.log(0.5 * math.sqrt(2 * math.pi))
    assert_close(marglik.log_likelihood(fit(CURVATURES["diag"]), likelihood), torch.tensor(expected))


# -- ascent -----------------------------------------------------------------------------------------------------------


def optimize(objective, start=1.0, **options):
    return marglik.optimize(objective, torch.tensor([start]), **{"n_steps": 200, "lr": 0.1, **options})


def test_ascent_finds_the_maximum_of_a_smooth_objective():
    best, value = optimize(lambda p: -((p.log() - 1.5) ** 2).sum(), n_steps=500)
    assert abs(float(best.log()) - 1.5) < 1e-2
    assert value > -1e-4


def test_ascent_never_ends_below_its_start_or_below_anything_it_saw():
    seen = []

    def jagged(p):
        seen.append(float((-p.log().square() + (20 * p).sin()).sum().detach()))
        return (-p.log().square() + (20 * p).sin()).sum()

    best, value = optimize(jagged, lr=1.0)
    assert value == max(seen)
    assert float(jagged(best)) == pytest.approx(value)


def test_no_steps_return_the_start():
    start = torch.tensor([2.0, 3.0])
    best, _ = marglik.optimize(lambda p: -p.sum(), start, n_steps=0, lr=0.1)
    assert_close(best, torch.tensor([2.0, 3.0]))
    assert_close(start, torch.tensor([2.0, 3.0]))
    assert not best.requires_grad


def test_ascent_works_under_no_grad():
    with torch.no_grad():
        best, _ = optimize(lambda p: -((p.log() - 1) ** 2).sum())
    assert abs(float(best.log()) - 1) < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_objective_that_starts_without_a_number_is_refused(value):
    with pytest.raises(InputError, match="init_prior_prec"):
        optimize(lambda p: p.sum() * value)


def test_an_objective_that_stops_being_finite_keeps_the_best_and_says_so():
    def bounded(p):
        return p.sum() + (torch.nan if float(p.detach().sum()) > 2 else 0.0)

    with pytest.warns(NumericalWarning, match="became nan"):
        best, value = optimize(bounded)
    assert 1.5 < float(best) <= 2
    assert value == pytest.approx(float(best))
