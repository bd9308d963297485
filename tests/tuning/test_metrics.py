"""Scores of predictions: running, at once, and of an estimator on a loader."""

import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

from laplace.errors import InputError, ShapeError
from laplace.utils import RunningNLLMetric, get_nll, metrics, utils, validate
from tests.cases import BASIC, named
from tests.contracts import generator, model_untouched
from tests.estimators import fitted
from tests.tools import assert_close

PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
TARGETS = torch.tensor([0, 1, 1])
MEAN = -(torch.tensor([0.5, 0.8, 0.3]).log()).mean()


def test_the_recorded_paths_lead_here():
    assert metrics.RunningNLLMetric is RunningNLLMetric
    assert (utils.get_nll, utils.validate) == (get_nll, validate)


def test_the_mean_is_that_of_all_targets_and_not_of_batches():
    metric = RunningNLLMetric()
    metric.update(PROBS[:1], TARGETS[:1])
    metric.update(PROBS[1:], TARGETS[1:])
    assert_close(metric.compute(), MEAN)
    assert_close(metric(PROBS[:1], TARGETS[:1]), -PROBS[0, 0].log(), "a call scores its own batch")
    assert_close(metric.compute(), (3 * MEAN - PROBS[0, 0].log()) / 4, "and remembers it")
    metric.reset()
    metric.update(PROBS, TARGETS)
    assert_close(metric.compute(), MEAN)
    assert_close(get_nll(PROBS, TARGETS), MEAN)


def test_it_agrees_with_cross_entropy_of_logits():
    logits, y = torch.randn(5, 4, 3), torch.randint(3, (5, 4))
    y[0, 0] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert_close(get_nll(logits.softmax(-1), y), expected)
    metric = RunningNLLMetric()
    metric.update(logits.softmax(-1), y)
    assert_close(metric.compute(), expected)


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_ignored_targets_do_not_count(ignore_index):
    metric = RunningNLLMetric(ignore_index)
    y = torch.tensor([0, ignore_index, 2])
    metric.update(PROBS, y)
    assert_close(metric.compute(), -(PROBS[0, 0].log() + PROBS[2, 2].log()) / 2)


def test_a_target_without_probability_scores_infinity():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for score in (get_nll, RunningNLLMetric()):
        assert float(score(probs, torch.tensor([0, 1]))) == float("inf")
        assert float(score(probs, torch.tensor([0, 0]))) == 0.0


def test_a_score_of_nothing_is_refused():
    metric = RunningNLLMetric()
    with pytest.raises(InputError, match="no targets to average over: call update"):
        metric.compute()
    nothing = torch.full((3,), -100)
    metric.update(PROBS, nothing)
    with pytest.raises(InputError, match="no targets to average over"):
        metric.compute()
    for score in (metric, get_nll):
        with pytest.raises(InputError, match="no targets to average over"):
            score(PROBS, nothing)


@pytest.mark.parametrize("y", [TARGETS[:2], TARGETS.unsqueeze(1), torch.eye(3).long()])
def test_shapes_that_do_not_fit_are_refused(y):
    for score in (get_nll, RunningNLLMetric(), RunningNLLMetric().update):
        with pytest.raises(ShapeError, match=r"Expected targets of shape \[3\]"):
            score(PROBS, y)


# -- validate ---------------------------------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("sizes", [(11,), (4,), (1, 3)], ids=["one batch", "two", "three"])


@SIZES
@pytest.mark.parametrize("options", [{}, {"link_approx": "bridge"}], ids=["probit", "bridge"])
def test_validate_scores_class_probabilities(sizes, options):
    case = BASIC[0]
    la, (x, y) = fitted(case, "kron"), case.data()
    expected = get_nll(la(x, **options), y)
    old = RunningNLLMetric()
    old.update(PROBS, TARGETS)  # forgotten before validating
    with model_untouched(la.model):
        for loss in (RunningNLLMetric(), old, get_nll):
            score = validate(la, case.batches(*sizes), loss, **options)
            assert isinstance(score, float)
            assert_close(torch.tensor(score), expected)


@SIZES
def test_validate_feeds_torchmetrics(sizes):
    case = BASIC[0]
    la, (x, y) = fitted(case, "kron"), case.data()
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=4)
    expected = (la(x).argmax(-1) == y).double().mean()
    assert_close(torch.tensor(validate(la, case.batches(*sizes), accuracy)), expected.float().double())
    regression = BASIC[1]
    la, (x, y) = fitted(regression, "full"), regression.data()
    score = validate(la, regression.batches(*sizes), torchmetrics.MeanSquaredError())
    assert score == pytest.approx(float((la(x)[0] - y).square().mean()), rel=1e-5)


@SIZES
def test_validate_gives_functions_means_covariances_and_targets_of_all_data(sizes):
    case = BASIC[1]
    la, (x, y) = fitted(case, "full"), case.data()

    def loss(mean, cov, target):
        assert torch.equal(target, y)
        return -torch.distributions.MultivariateNormal(mean, cov).log_prob(target).mean()

    assert_close(torch.tensor(validate(la, case.batches(*sizes), loss)), loss(*la(x), y))


def test_validate_reads_mappings_and_loaders_and_passes_options_on():
    case = named("whole_mapping")
    la = fitted(case, "diag")
    x, y = case.data()
    expected = get_nll(la({**x}), y)
    score = validate(la, case.batches(4), RunningNLLMetric(), dict_key_y="target")
    assert_close(torch.tensor(score), expected)
    la, (x, y) = fitted(BASIC[0], "diag"), BASIC[0].data()
    loader = DataLoader(TensorDataset(x, y), batch_size=11, generator=generator(0))
    torch.manual_seed(0)
    sampled = validate(la, loader, get_nll, pred_type="nn", n_samples=3)
    torch.manual_seed(0)
    assert_close(torch.tensor(sampled), get_nll(la(x, pred_type="nn", n_samples=3), y))


def test_validate_needs_data():
    with pytest.raises(InputError, match="validation loader is empty"):
        validate(fitted(BASIC[0], "diag"), [], get_nll)
    with pytest.raises(InputError, match=r"must yield \(x, y\)"):
        validate(fitted(BASIC[0], "diag"), [BASIC[0].data()[0]], get_nll)
