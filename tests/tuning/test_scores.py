"""What a validation score is."""

import pytest
import torch
import torchmetrics

from laplace.enums import PredType
from laplace.errors import InputError, UnsupportedError
from laplace.evaluation.metrics import brier_score, calibration_error
from laplace.likelihoods import resolve
from laplace.likelihoods.softmax import probit
from laplace.tuning.scores import choose_score
from tests.contracts import generator
from tests.tools import assert_close

GLM = PredType.GLM
CLASSIFICATION = resolve("classification")
REGRESSION = resolve("regression", torch.tensor(0.7, dtype=torch.float64))
MEAN = torch.randn(8, 3, dtype=torch.float64, generator=generator(0))
VAR = torch.rand(8, 3, dtype=torch.float64, generator=generator(1))
LABELS = torch.arange(8) % 3
TARGETS = torch.randn(8, 3, dtype=torch.float64, generator=generator(2))


def test_brier_is_the_squared_distance_to_the_label_hard_or_soft():
    score = choose_score("brier", CLASSIFICATION, GLM)
    total = score.additive(CLASSIFICATION, MEAN, VAR, LABELS, probit)
    assert float(total) / 8 == pytest.approx(brier_score(probit(MEAN, VAR).exp(), LABELS))
    one_hot = torch.nn.functional.one_hot(LABELS, 3).double()
    assert_close(score.additive(CLASSIFICATION, MEAN, VAR, one_hot, probit), total)


def test_crps_is_the_expected_distance_less_half_the_spread():
    """Its definition, E|Y − y| − ½ E|Y − Y'|, by quadrature over the predictive distribution with noise."""
    score = choose_score("crps", REGRESSION, GLM)
    total = 0.0
    for mean, var, y in zip(MEAN.flatten(), VAR.flatten(), TARGETS.flatten(), strict=True):
        sd = float((var + 0.49) ** 0.5)
        grid = torch.linspace(float(mean) - 12 * sd, float(mean) + 12 * sd, 20001, dtype=torch.float64)
        cdf = torch.distributions.Normal(mean, sd).cdf(grid)
        total += float(torch.trapezoid((cdf - (grid >= y).double()).square(), grid))
    assert float(score.additive(REGRESSION, MEAN, VAR, TARGETS, probit)) == pytest.approx(total, rel=1e-3)
    covariance = torch.diag_embed(VAR)
    assert_close(
        score.additive(REGRESSION, MEAN, covariance, TARGETS, probit),
        score.additive(REGRESSION, MEAN, VAR, TARGETS, probit),
    )


def test_the_calibration_error_takes_hard_and_soft_labels():
    score = choose_score("ece", CLASSIFICATION, GLM)
    probabilities = probit(MEAN, VAR).exp()
    expected = calibration_error(probabilities, LABELS)
    assert score.whole(probabilities, LABELS) == expected
    assert score.whole(probabilities, torch.nn.functional.one_hot(LABELS, 3).double()) == expected


def test_a_metric_of_torchmetrics_starts_again_at_every_point_and_more_may_be_better():
    metric = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
    score = choose_score(metric, CLASSIFICATION, GLM)
    probabilities = torch.eye(3)[LABELS]
    assert (score.whole(probabilities, LABELS), score.sign) == (1.0, -1)
    assert score.whole(probabilities, (LABELS + 1) % 3) == 0.0


def test_scores_of_means_are_refused_where_the_prior_leaves_means_alone():
    with pytest.raises(InputError, match="do not depend on the prior"):
        choose_score(torchmetrics.MeanSquaredError(), REGRESSION, GLM)
    with pytest.raises(UnsupportedError, match="does not depend on prior precision"):
        choose_score("mse", REGRESSION, GLM)
    sampled = choose_score(torchmetrics.MeanSquaredError(), REGRESSION, PredType.NN)
    assert sampled.whole(MEAN, VAR, MEAN) == 0.0


@pytest.mark.parametrize(
    ("loss", "likelihood", "says"),
    [
        ("crps", CLASSIFICATION, "'nll', 'brier', 'ece'"),
        ("brier", REGRESSION, "'nll', 'crps'"),
        ("logloss", CLASSIFICATION, "'nll'"),
    ],
)
def test_names_without_a_meaning_list_those_that_have_one(loss, likelihood, says):
    with pytest.raises(UnsupportedError, match=says):
        choose_score(loss, likelihood, GLM)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(InputError, match="a name, a function or a metric"):
        choose_score(3.0, CLASSIFICATION, GLM)
