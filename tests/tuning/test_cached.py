"""Data after their one pass, and scores of them under any posterior."""

import pytest
import torch

from laplace.enums import PredType
from laplace.errors import InputError
from laplace.likelihoods import resolve
from laplace.predictive import Linearization, Options
from laplace.structures import DiagPrecision
from laplace.tuning import CachedData, choose_score
from tests import reference
from tests.contracts import generator, of_head
from tests.structures.samples import uniform
from tests.tools import assert_close

C, D = 3, 4


def validation(likelihood: str, *, masked: bool = False) -> tuple[CachedData, Linearization, torch.Tensor]:
    noise = generator(0)
    inputs = of_head(torch.randn(6, C, generator=noise), torch.randn(6, D, generator=noise))
    y = torch.tensor([0, 1, 2, 0, 1, 2]) if likelihood == "classification" else torch.randn(6, C, generator=noise)
    if masked:
        y[2] = -100
    parts = [slice(0, 4), slice(4, 6)]
    batches = [((inputs.f[part], inputs.head[0].phi[part]), y[part]) for part in parts]
    named = resolve(likelihood)
    return CachedData.collect(batches, lambda x: of_head(*x), named), inputs, y


PRECISION = DiagPrecision(uniform(C * (D + 1)) + 1)


def score_of(data, likelihood, loss=None) -> float:
    score = choose_score(loss, likelihood, PredType.GLM)
    return float(data.scores(score, [PRECISION], [likelihood], Options, torch.float64))


def covariance(inputs: Linearization) -> torch.Tensor:
    return PRECISION.block_covariance(inputs.blocks(torch.float64))


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "one masked"])
def test_the_default_score_of_a_classifier_is_the_mean_log_loss_a_position(masked):
    data, inputs, y = validation("classification", masked=masked)
    probabilities = reference.probit(inputs.f, covariance(inputs))
    kept = y != -100
    expected = -probabilities[kept, y[kept]].log().mean()
    score = score_of(data, resolve("classification"))
    assert score == pytest.approx(float(expected))


def test_the_default_score_of_a_regressor_is_the_mean_log_density_of_the_targets():
    data, inputs, y = validation("regression")
    likelihood = resolve("regression", sigma_noise=0.5)
    noisy = covariance(inputs) + 0.25 * torch.eye(C)
    expected = -torch.distributions.MultivariateNormal(inputs.f, noisy).log_prob(y).mean()
    assert score_of(data, likelihood) == pytest.approx(float(expected))


def test_the_default_score_stays_finite_where_probabilities_underflow():
    inputs = of_head(torch.tensor([[0.0, 1e4, 0.0]]), torch.zeros(1, D))
    named = resolve("classification")
    data = CachedData.collect([(None, torch.tensor([0]))], lambda _: inputs, named)
    score = score_of(data, named)
    assert 1e3 < score < 1e4


def test_a_loss_of_the_users_own_gets_all_predictions_and_targets():
    data, inputs, y = validation("classification", masked=True)
    seen = []

    def loss(probabilities, targets):
        seen.append((probabilities, targets))
        return torch.tensor(4.5)

    assert score_of(data, resolve("classification"), loss) == 4.5
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

    assert score_of(data, resolve("regression"), regression_loss) == 2.5


def test_the_model_runs_once_a_batch_however_many_points_are_scored():
    calls = []
    inputs = of_head(torch.zeros(2, C), torch.zeros(2, D))
    data = CachedData.collect(
        [(None, torch.tensor([0, 1]))] * 3, lambda x: calls.append(x) or inputs, resolve("classification")
    )
    for _ in range(5):
        score_of(data, resolve("classification"))
    assert len(calls) == 3


def test_no_validation_data_is_an_error():
    with pytest.raises(InputError, match="empty"):
        CachedData.collect([], lambda x: x, resolve("classification"))


def test_batches_of_features_become_one_and_keep_only_what_counts():
    data, inputs, y = validation("classification", masked=True)
    ((get, positions),) = data.batches
    kept = y != -100
    assert_close(get().head[0].phi, inputs.head[0].phi[kept])
    assert_close(positions.f, inputs.f[kept])
    assert torch.equal(positions.y, y[kept])
    assert data.n_rows == int(kept.sum())


def test_batches_with_different_numbers_of_positions_are_one_list_of_rows():
    noise = generator(3)
    shapes = [(2, 3), (4, 5)]
    batches = [
        ((torch.randn(*s, C, generator=noise), torch.randn(*s, D, generator=noise)), torch.zeros(s).long())
        for s in shapes
    ]
    data = CachedData.collect(batches, lambda x: of_head(*x), resolve("classification"))
    ((get, positions),) = data.batches
    assert get().head[0].phi.shape == (26, D)
    assert_close(get().head[0].phi, torch.cat([x[1].flatten(0, 1) for x, _ in batches]))
    # A datum of the second batch is another one than those of the first.
    assert positions.datum.tolist() == [n for n in range(2) for _ in range(3)] + [
        2 + n for n in range(4) for _ in range(5)
    ]


def test_many_posteriors_score_as_one_at_a_time():
    data, _, _ = validation("classification")
    named, score = resolve("classification"), choose_score(None, resolve("classification"), PredType.GLM)
    precisions = [DiagPrecision(uniform(C * (D + 1), seed) + 1) for seed in range(5)]
    together = data.scores(score, precisions, [named] * 5, Options, torch.float64)
    alone = [data.scores(score, [precision], [named], Options, torch.float64) for precision in precisions]
    assert_close(together, torch.cat(alone))


def test_a_loss_that_returns_no_number_is_refused_by_name():
    data, _, _ = validation("classification")

    def strange(probabilities, targets):
        return "good"

    with pytest.raises(InputError, match="'strange' must return one number"):
        score_of(data, resolve("classification"), strange)
