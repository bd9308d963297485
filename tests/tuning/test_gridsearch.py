"""Search over a grid of prior precisions."""

import pytest
import torch

from laplace.errors import InputError
from laplace.likelihoods import resolve
from laplace.predictive import FeatureLinearization, Linearization, Options
from laplace.structures import DiagPrecision
from laplace.tuning import gridsearch
from tests import reference
from tests.contracts import generator
from tests.structures.samples import uniform
from tests.tools import assert_close

GRID = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)


def search(scores, grid=GRID):
    table = dict(zip(grid.tolist(), scores, strict=True))
    return gridsearch.search(lambda point: table[float(point)], grid)


@pytest.mark.parametrize("base", [2.0, 10.0])
def test_the_grid_is_evenly_spaced_between_its_ends(base):
    grid = gridsearch.log_grid(-2, 3, 6, base)
    assert_close(grid, base ** torch.arange(-2.0, 4.0))


def test_a_grid_of_one_point_is_its_lower_end():
    assert_close(gridsearch.log_grid(-1, 4, 1, 10.0), torch.tensor([0.1]))
    assert_close(gridsearch.log_grid(1, 1, 3, 10.0), torch.tensor([10.0] * 3))


@pytest.mark.parametrize(
    "bounds",
    [(1, -1, 5, 10.0), (-1, 1, 0, 10.0), (-1, 1, 5, 1.0), (-1, float("inf"), 5, 10.0), (float("nan"), 1, 5, 10.0)],
)
def test_impossible_grids_are_refused(bounds):
    with pytest.raises(InputError, match="grid_size"):
        gridsearch.log_grid(*bounds)


def test_the_lowest_score_wins_and_every_point_is_asked_once():
    asked = []

    def score(point):
        asked.append(float(point))
        return (float(point) - 9) ** 2

    best, scores = gridsearch.search(score, GRID)
    assert float(best) == 10.0
    assert asked == GRID.tolist()
    assert_close(scores, (GRID - 9) ** 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_points_without_a_finite_score_are_skipped(bad, place):
    scores = [3.0, 2.0, 1.0, 4.0]
    scores[place] = bad
    assert float(search(scores)[0]) == 10.0


def test_no_finite_score_at_all_is_an_error():
    with pytest.raises(InputError, match="not finite at any of the 4"):
        search([float("inf"), float("nan"), float("inf"), float("nan")])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([1.0, 2.0, 3.0, 4.0], "lower end.*log_prior_prec_min"),
        ([4.0, 3.0, 2.0, 1.0], "upper end.*log_prior_prec_max"),
        ([1.0, 1.0, 1.0, 1.0], "does not depend on the prior"),
    ],
    ids=["lower", "upper", "flat"],
)
def test_a_best_point_at_an_end_is_reported(scores, says):
    with pytest.warns(UserWarning, match=says):
        best, _ = search(scores)
    assert float(best) == GRID[scores.index(1.0)]


def test_an_inner_optimum_and_a_single_point_are_silent():
    search([2.0, 1.0, 1.0, 2.0])
    search([1.0], GRID[:1])


# -- scoring validation data ------------------------------------------------------------------------------------------

C, D = 3, 4


def validation(likelihood: str, *, masked: bool = False) -> tuple[gridsearch.Validation, Linearization, torch.Tensor]:
    noise = generator(0)
    inputs = FeatureLinearization(torch.randn(6, C, generator=noise), torch.randn(6, D, generator=noise), True)
    y = torch.tensor([0, 1, 2, 0, 1, 2]) if likelihood == "classification" else torch.randn(6, C, generator=noise)
    if masked:
        y[2] = -100
    parts = [slice(0, 4), slice(4, 6)]
    batches = [((inputs.f[part], inputs.phi[part]), y[part]) for part in parts]
    named = resolve(likelihood)
    return gridsearch.Validation.collect(batches, lambda x: FeatureLinearization(*x, True), named), inputs, y


PRECISION = DiagPrecision(uniform(C * (D + 1)) + 1)


def covariance(inputs: Linearization) -> torch.Tensor:
    return PRECISION.feature_variance(inputs.phi, C, True)


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "one masked"])
def test_the_default_score_of_a_classifier_is_the_mean_log_loss_a_position(masked):
    data, inputs, y = validation("classification", masked=masked)
    probabilities = reference.probit(inputs.f, covariance(inputs))
    kept = y != -100
    expected = -probabilities[kept, y[kept]].log().mean()
    score = data.score(PRECISION, resolve("classification"), Options(), None, torch.float64)
    assert score == pytest.approx(float(expected))


def test_the_default_score_of_a_regressor_is_the_mean_log_density_of_the_targets():
    data, inputs, y = validation("regression")
    likelihood = resolve("regression", sigma_noise=0.5)
    noisy = covariance(inputs) + 0.25 * torch.eye(C)
    expected = -torch.distributions.MultivariateNormal(inputs.f, noisy).log_prob(y).mean()
    assert data.score(PRECISION, likelihood, Options(), None, torch.float64) == pytest.approx(float(expected))


def test_the_default_score_stays_finite_where_probabilities_underflow():
    inputs = FeatureLinearization(torch.tensor([[0.0, 1e4, 0.0]]), torch.zeros(1, D), True)
    named = resolve("classification")
    data = gridsearch.Validation.collect([(None, torch.tensor([0]))], lambda _: inputs, named)
    score = data.score(PRECISION, named, Options(), None, torch.float64)
    assert 1e3 < score < 1e4


def test_a_loss_of_the_users_own_gets_all_predictions_and_targets():
    data, inputs, y = validation("classification", masked=True)
    seen = []

    def loss(probabilities, targets):
        seen.append((probabilities, targets))
        return torch.tensor(4.5)

    assert data.score(PRECISION, resolve("classification"), Options(), loss, torch.float64) == 4.5
    ((probabilities, targets),) = seen
    kept = y != -100
    assert_close(probabilities, reference.probit(inputs.f, covariance(inputs))[kept])
    assert torch.equal(targets, y[kept])

    data, inputs, y = validation("regression")

    def regression_loss(mean, cov, targets):
        assert_close(mean, inputs.f)
        assert_close(cov, covariance(inputs))
        assert torch.equal(targets, y)
        return 2.5

    assert data.score(PRECISION, resolve("regression"), Options(), regression_loss, torch.float64) == 2.5


def test_the_model_runs_once_a_batch_however_many_points_are_scored():
    calls = []
    inputs = FeatureLinearization(torch.zeros(2, C), torch.zeros(2, D), True)
    data = gridsearch.Validation.collect(
        [(None, torch.tensor([0, 1]))] * 3, lambda x: calls.append(x) or inputs, resolve("classification")
    )
    for _ in range(5):
        data.score(PRECISION, resolve("classification"), Options(), None, torch.float64)
    assert len(calls) == 3


def test_no_validation_data_is_an_error():
    with pytest.raises(InputError, match="empty"):
        gridsearch.Validation.collect([], lambda x: x, resolve("classification"))
