"""Leave-one-out scores."""

import math

import pytest
import torch

from laplace.enums import LinkApprox, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods import resolve
from laplace.predictive import Options
from laplace.prior import GaussianPrior
from laplace.structures import STRUCTURES, DiagPrecision, FullPrecision
from laplace.tuning import (
    CachedData,
    HeadData,
    cross_validation_scores,
    leave_one_out_score,
    refitted_leave_one_out_scores,
)
from laplace.tuning.head import HeadBackend, posteriors
from laplace.tuning.loo import LeftOut, leave_one_out
from tests import reference
from tests.cases import named
from tests.contracts import generator, of_head, shapes_of
from tests.estimators import fitted, posterior
from tests.tools import assert_close
from tests.tuning.collected import against_zero, collected, nll, own_blocks, without_each

N, C, D = 12, 3, 4
SIGMA, DELTA = 0.6, 0.3


def score(la, data, options=None, loss=None):
    return left_out_score(data, la._frozen_posterior, la._frozen_likelihood, options or Options(), loss)


def left_out_score(data, precision, likelihood, options=None, loss=None, dtype=torch.float64):
    found = leave_one_out_score(data, nll(likelihood, loss), precision, likelihood, lambda: options or Options(), dtype)
    return float(found)


def fresh(**arguments):
    """The same random numbers whenever options are asked for."""
    return lambda: Options(**arguments, generator=generator(0))


def regression():
    """Linear regression at its ridge optimum: data, the same collected, and the exact posterior precision."""
    noise = generator(0)
    X, Y = torch.randn(N, D, generator=noise), torch.randn(N, C, generator=noise)
    W, cov, _ = reference.linear_regression(X, Y, SIGMA, DELTA)
    design = torch.cat([X, torch.ones(N, 1)], 1)
    likelihood = resolve("regression", sigma_noise=SIGMA)
    data = CachedData.collect([(design, Y)], lambda phi: of_head(phi @ W.T, phi, False), likelihood)
    return X, Y, design, data, FullPrecision(torch.kron(torch.eye(C), cov.inverse().contiguous())), likelihood


def test_without_each_datum_means_and_covariances_are_those_of_explicit_refits():
    X, Y, design, data, precision, likelihood = regression()
    ((get, _),) = leave_one_out(data, precision, likelihood, torch.float64).batches
    for n in range(N):
        others = torch.arange(N) != n
        W, cov, _ = reference.linear_regression(X[others], Y[others], SIGMA, DELTA)
        assert_close(get().f[n], W @ design[n], "mean")
        variance = design[n] @ cov @ design[n]
        assert_close(get().covariance(precision, torch.float64)[n], variance * torch.eye(C), "covariance")


def test_the_score_of_a_linear_regression_is_its_exact_predictive_density_of_each_target_given_the_others():
    X, Y, design, data, precision, likelihood = regression()
    marginal = design @ design.T / DELTA + SIGMA**2 * torch.eye(N)  # p(Y), one Gaussian an output
    expected = 0.0
    for n in range(N):
        others = torch.arange(N) != n
        gain = torch.linalg.solve(marginal[others][:, others], marginal[others, n])
        variance = marginal[n, n] - gain @ marginal[others, n]
        density = torch.distributions.Normal(gain @ Y[others], variance.sqrt())
        expected -= float(density.log_prob(Y[n]).sum()) / N
    found = left_out_score(data, precision, likelihood)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", ["classification", "masked_positions", "soft_positions"])
def test_the_score_of_a_classifier_is_the_mean_log_loss_of_positions_without_their_datum(name, structure):
    case = named(name)
    la, problem = fitted(case, structure), case.problem()
    total, count = 0.0, 0
    means, covariances = without_each(problem, posterior(case, structure), 1.0, structure)
    for datum, mean, cov in zip(problem.data, means, covariances, strict=True):
        probabilities = reference.probit(mean.view(-1, case.n_outputs), own_blocks(cov, case.n_outputs))
        for t in datum.kept:
            if datum.y.is_floating_point():
                total -= float(datum.y[t] @ probabilities[t].log())
            else:
                total -= float(probabilities[t, datum.y.reshape(-1)[t]].log())
            count += 1
    assert score(la, collected(la, case.batches(4))) == pytest.approx(total / count, rel=1e-9)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_score_of_preferences_is_the_mean_log_loss_of_pairs_without_themselves(structure):
    case = named("preferences")
    la, problem = fitted(case, structure), case.problem()
    total = 0.0
    for datum, mean, cov in zip(
        problem.data, *without_each(problem, posterior(case, structure), 1.0, structure), strict=True
    ):
        gap, spread = against_zero(mean, cov)
        logit = gap[0] / (1 + math.pi / 8 * spread[0, 0]).sqrt()
        total += float(torch.nn.functional.softplus(logit if datum.y == 1 else -logit))
    found = score(la, collected(la, case.batches(4)), Options(fitting=True))
    assert found == pytest.approx(total / len(problem.data), rel=1e-9)


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_with_a_strong_prior_a_datum_hardly_matters_and_the_score_is_the_training_loss(name):
    case = named(name)
    la = fitted(case, "full", prior_precision=1e12)
    normalizer = math.log(case.sigma * math.sqrt(2 * math.pi)) * case.n_outputs if name == "regression" else 0.0
    expected = float(case.problem().nll()) * case.scale / case.n_rows + normalizer
    assert score(la, collected(la, case.batches(4))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("link", list(LinkApprox))
def test_every_link_sees_the_outputs_without_the_datum(link):
    case = named("classification")
    la = fitted(case, "full")
    data = collected(la, case.batches(4))
    options = Options(link=link, generator=generator(0))
    found = score(la, data, options)
    (with_datum,) = data.scores(
        nll(la._frozen_likelihood), [la._frozen_posterior], [la._frozen_likelihood], lambda: options, torch.float64
    )
    assert math.isfinite(found)
    assert found > float(with_datum)  # a datum is predicted worse without itself


@pytest.mark.parametrize("name", ["masked_positions", "positions_regression"])
def test_the_score_does_not_depend_on_the_batches(name):
    case = named(name)
    la = fitted(case, "full")
    assert score(la, collected(la, case.batches(1, 3))) == pytest.approx(score(la, collected(la, case.batches(5))))


def test_a_loss_of_the_users_own_gets_predictions_without_the_datum():
    *_, data, precision, likelihood = regression()
    ((get, positions),) = leave_one_out(data, precision, likelihood, torch.float64).batches
    seen = []
    result = left_out_score(data, precision, likelihood, loss=lambda *row: seen.append(row) or 1.5)
    assert result == 1.5
    ((mean, cov, targets),) = seen
    assert_close(mean, get().f)
    assert_close(cov, get().covariance(precision, torch.float64))
    assert torch.equal(targets, positions.y)


def test_a_single_precision_score_is_that_in_double_precision():
    case = named("classification")
    la = fitted(case, "full")
    data, likelihood = collected(la, case.batches(4)), la._frozen_likelihood
    narrow = FullPrecision(la._frozen_posterior.matrix.float())
    found = left_out_score(data, narrow, likelihood, dtype=torch.float32)
    assert found == pytest.approx(score(la, data), rel=1e-5)


def test_the_training_data_stay_as_they_were_collected():
    *_, data, precision, likelihood = regression()
    ((get, _),) = data.batches
    before = get().f.clone()
    left_out_score(data, precision, likelihood)
    assert torch.equal(get().f, before)


def test_a_kronecker_structure_is_refused_with_what_to_use_instead():
    case = named("classification")
    la = fitted(case, "kron")
    with pytest.raises(UnsupportedError, match=r'"full" or "diag"; got KronDecomposed.*no sum.*marglik'):
        score(la, collected(la, case.batches(4)))


def test_predictions_through_sampled_weights_are_refused():
    *_, data, precision, likelihood = regression()
    with pytest.raises(UnsupportedError, match='pred_type="glm"'):
        left_out_score(data, precision, likelihood, Options(pred_type=PredType.NN))


def test_there_are_no_functions_that_leave_out_each_datum_at_its_own_input():
    left_out, precision = LeftOut(torch.zeros(2, C), torch.ones(2, C)), DiagPrecision(torch.ones(C))
    with pytest.raises(UnsupportedError, match="coherent"):
        left_out.joint_covariance(precision, torch.float64)
    with pytest.raises(UnsupportedError, match="coherent"):
        left_out.functions(precision, 3, None, torch.float64)


# -- priors by their own modes ----------------------------------------------------------------------------------------

GRID = (0.05, 1.0, 30.0)


def head_data(likelihood, datum=None):
    noise, rows = generator(4), 24
    phi = torch.randn(rows, D, generator=noise)
    y = torch.randint(C, (rows,), generator=noise) if likelihood == "classification" else phi[:, :C] ** 2
    return HeadData(phi, y, shapes_of(C, D), datum)


def priors(deltas=GRID):
    return [GaussianPrior(torch.zeros(()), torch.tensor([delta]), (C * D, C)) for delta in deltas]


def refitted(data, name, structure="full", sigma=SIGMA, **arguments):
    likelihood = resolve(name, **({"sigma_noise": sigma} if name == "regression" else {}))
    return refitted_leave_one_out_scores(
        data, nll(likelihood), priors(), likelihood, STRUCTURES[structure], Options, **arguments
    )


def cross_validated(data, name, structure="full", sigma=SIGMA):
    """With a fold for each datum."""
    likelihood = resolve(name, **({"sigma_noise": sigma} if name == "regression" else {}))
    n_folds = len(data.phi) if data.datum is None else len(data.datum.unique())
    return cross_validation_scores(
        data, nll(likelihood), priors(), likelihood, STRUCTURES[structure], Options, n_folds=n_folds
    )


@pytest.mark.parametrize("datum", [None, torch.arange(24) % 7], ids=["rows", "positions of data"])
@pytest.mark.parametrize("sigma", [SIGMA, [0.3, 0.6, 1.5]], ids=["one noise", "by output"])
def test_refitted_scores_of_a_regression_are_those_of_cross_validation_with_a_fold_for_each_datum(datum, sigma):
    data, sigma = head_data("regression", datum), torch.tensor(sigma)
    assert_close(refitted(data, "regression", sigma=sigma), cross_validated(data, "regression", sigma=sigma))


def test_refitted_scores_of_a_classifier_are_near_those_of_cross_validation_with_a_fold_for_each_datum():
    data = head_data("classification")
    exact, found = cross_validated(data, "classification"), refitted(data, "classification")
    # First order: the error is a fraction of what leaving a datum out changes, here with 24 data for 15 weights.
    training = torch.stack([training_loss(data, prior) for prior in priors()])
    assert bool(((found - exact).abs() < 0.2 * (exact - training)).all())


def training_loss(data, prior):
    """The score at the same mode when no datum is left out."""
    ((_, head, theta, precision),) = posteriors(data, [prior], resolve("classification"), STRUCTURES["full"])
    likelihood = resolve("classification")
    arguments = nll(likelihood), [precision], [likelihood], Options, torch.float64
    return data.at(head.outputs(theta)).scores(*arguments)[0]


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_strong_prior_is_not_rewarded_once_its_own_mode_is_scored(structure):
    data, likelihood = head_data("regression"), resolve("regression", sigma_noise=SIGMA)
    grid = priors((1.0, 1e9))
    weak, strong = refitted_leave_one_out_scores(
        data, nll(likelihood), grid, likelihood, STRUCTURES[structure], Options
    )
    assert float(strong) > float(weak)
    # With the weights of the weak prior held, the same strong prior looks better than it.
    ((_, head, theta, _),) = posteriors(data, grid[:1], likelihood, STRUCTURES[structure])
    held = CachedData.collect([(head.outputs(theta), data.y)], lambda f: of_head(f, data.phi), likelihood)
    curvature = STRUCTURES[structure].from_batch(HeadBackend(head, theta), data.phi, data.y)[1] * likelihood.scale
    fixed = [left_out_score(held, curvature.posterior(prior), likelihood) for prior in grid]
    assert fixed[1] < fixed[0]


def test_each_prior_of_refitted_scores_meets_the_same_random_numbers():
    data, state = head_data("classification"), torch.get_rng_state()
    sampled = fresh(link=LinkApprox.MC, n_samples=5)
    likelihood, twice = resolve("classification"), priors((1.0, 1.0))
    arguments = data, nll(likelihood), twice, likelihood, STRUCTURES["full"], sampled
    first, second = refitted_leave_one_out_scores(*arguments)
    assert float(first) == pytest.approx(float(second), rel=1e-10)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_start_of_refits_does_not_matter():
    data = head_data("classification")
    start = 3 * torch.randn(C * (D + 1), generator=generator(2))
    assert_close(refitted(data, "classification", initial=start), refitted(data, "classification"))
