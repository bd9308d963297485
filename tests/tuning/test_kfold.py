"""Cross-validation of priors with fixed features, against explicit loops over folds and refits by L-BFGS."""

import math

import pytest
import torch

from laplace.enums import LinkApprox
from laplace.errors import InputError
from laplace.likelihoods import resolve
from laplace.predictive import Options
from laplace.prior import GaussianPrior
from laplace.structures import STRUCTURES
from laplace.tuning import HeadData, cross_validation_scores
from laplace.tuning.kfold import folds
from tests import reference
from tests.cases import STRUCTURES as NAMES
from tests.cases import named
from tests.contracts import generator, shapes_of
from tests.estimators import fitted, structure_type
from tests.tools import assert_close
from tests.tuning.collected import collected, nll

N, C, D, SIGMA = 11, 3, 4, 0.6
SIZES = (C * D, C)
GRID = (0.05, 1.0, 30.0)
likelihoods = pytest.mark.parametrize("likelihood", ["classification", "regression"])


def named_likelihood(name):
    return resolve(name, **({"sigma_noise": SIGMA} if name == "regression" else {}))


def prior(delta, device="cpu"):
    return GaussianPrior(torch.zeros((), device=device), torch.tensor([delta], device=device), SIZES)


def problem(likelihood, device="cpu"):
    noise = generator(5)
    phi = torch.randn(N, D, generator=noise)
    y = (
        torch.randint(C, (N,), generator=noise)
        if likelihood == "classification"
        else torch.randn(N, C, generator=noise)
    )
    return HeadData(phi.to(device), y.to(device), shapes_of(C, D))


def scores(data, likelihood, structure="full", deltas=GRID, options=Options, loss=None, **arguments):
    return cross_validation_scores(
        data,
        nll(named_likelihood(likelihood), loss),
        [prior(delta, data.phi.device) for delta in deltas],
        named_likelihood(likelihood),
        structure_type(structure),
        options,
        **arguments,
    )


def refit(likelihood, phi, y, delta):
    """The mode of a linear model's weights, by L-BFGS."""
    layer = torch.nn.Linear(D, C)
    scale = SIGMA**-2 if likelihood == "regression" else 1.0
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        nll = sum(
            reference.datum_nll(likelihood, layer(row).unsqueeze(0), target) for row, target in zip(phi, y, strict=True)
        )
        value = scale * nll + 0.5 * delta * sum(p.square().sum() for p in layer.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return layer


def brute_force(data, likelihood, structure, delta, split):
    """Mean negative log predictive density over folds, each from a refit and a dense posterior."""
    total, scale = 0.0, SIGMA**-2 if likelihood == "regression" else 1.0
    for train, held in split:
        layer = refit(likelihood, data.phi[train], data.y[train], delta)
        names = ("weight", "bias")
        fold = reference.Problem(layer, lambda m, x: m(x), names, data.phi[train], data.y[train], likelihood, C)
        precision = scale * fold_curvature(fold, structure) + delta * torch.eye(sum(SIZES))
        mean = layer(data.phi[held]).detach()
        cov = reference.output_covariance(fold.jacobian(data.phi[held]).flatten(0, 1), precision)
        if likelihood == "classification":
            total -= float(reference.probit(mean, cov).log()[range(len(held)), data.y[held]].sum())
        else:
            density = torch.distributions.MultivariateNormal(mean, cov + SIGMA**2 * torch.eye(C))
            total -= float(density.log_prob(data.y[held]).sum())
    return total / N


def fold_curvature(fold, structure):
    if structure != "kron":
        return fold.curvature(structure)
    G = sum(datum.output_hessian for datum in fold.data)
    A = fold.x.T @ fold.x / len(fold.x)
    return torch.block_diag(torch.kron(G, A), G)


@pytest.mark.every(4)
@likelihoods
@pytest.mark.parametrize("structure", NAMES)
def test_scores_are_those_of_explicit_refits_fold_by_fold(likelihood, structure):
    data = problem(likelihood)
    split = list(folds(data, 3, generator(7)))
    found = scores(data, likelihood, structure, n_folds=3, generator=generator(7))
    expected = [brute_force(data, likelihood, structure, delta, split) for delta in GRID]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=0)  # what L-BFGS reaches


def test_with_one_datum_a_fold_the_score_is_the_exact_leave_one_out_density():
    data = problem("regression")
    design, expected = torch.cat([data.phi, torch.ones(N, 1)], 1), 0.0
    marginal = design @ design.T / GRID[1] + SIGMA**2 * torch.eye(N)
    for n in range(N):
        others = torch.arange(N) != n
        gain = torch.linalg.solve(marginal[others][:, others], marginal[others, n])
        variance = marginal[n, n] - gain @ marginal[others, n]
        density = torch.distributions.Normal(gain @ data.y[others], variance.sqrt())
        expected -= float(density.log_prob(data.y[n]).sum()) / N
    assert float(scores(data, "regression", n_folds=N)[1]) == pytest.approx(expected, rel=1e-9)


def test_with_a_strong_prior_every_class_is_equally_likely():
    assert float(scores(problem("classification"), "classification", deltas=[1e10])) == pytest.approx(math.log(C))


# -- folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_folds", [2, 3, N])
def test_every_row_is_held_out_once_and_folds_differ_by_one_datum_at_most(n_folds):
    split = list(folds(problem("regression"), n_folds, generator(0)))
    assert len(split) == n_folds
    assert torch.equal(torch.cat([held for _, held in split]).sort().values, torch.arange(N))
    for train, held in split:
        assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(N))
    assert {len(held) for _, held in split} <= {N // n_folds, N // n_folds + 1}


def test_all_positions_of_a_datum_are_in_one_fold():
    datum = torch.tensor([9, 2, 2, 2, 5, 5, 7, 9])
    data = HeadData(torch.zeros(8, D), torch.zeros(8, C), shapes_of(C, D), datum)
    split = list(folds(data, 4, generator(0)))
    assert sorted(len(held) for _, held in split) == [1, 2, 2, 3]
    for train, held in split:
        assert not set(datum[train].tolist()) & set(datum[held].tolist())


@pytest.mark.parametrize("n_folds", [-1, 0, 1, N + 1])
def test_too_few_folds_and_too_few_data_are_refused(n_folds):
    with pytest.raises(InputError, match=f"n_folds={n_folds} for {N} data"):
        scores(problem("regression"), "regression", n_folds=n_folds)


def test_positions_do_not_count_as_data():
    data = HeadData(torch.zeros(8, D), torch.zeros(8, C), shapes_of(C, D), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    with pytest.raises(InputError, match="n_folds=3 for 2 data"):
        scores(data, "regression", n_folds=3)


# -- randomness, order, start -----------------------------------------------------------------------------------------


def test_the_generator_decides_the_folds_and_the_global_one_is_left_alone():
    data, state = problem("classification"), torch.get_rng_state()

    def found(source=None):
        return scores(data, "classification", "diag", deltas=[1.0], generator=source)

    assert torch.equal(found(generator(1)), found(generator(1)))
    assert not torch.equal(found(generator(1)), found(generator(2)))
    assert torch.equal(found(), found())
    assert torch.equal(torch.get_rng_state(), state)


def test_each_prior_meets_the_same_random_numbers():
    data, state = problem("classification"), torch.get_rng_state()

    def options():
        return Options(link=LinkApprox.MC, n_samples=7, generator=generator(3))

    found = scores(data, "classification", deltas=[1.0, 1.0], options=options)
    assert found[0] == pytest.approx(float(found[1]), rel=1e-12)
    assert abs(float(scores(data, "classification", deltas=[1.0])) - float(found[0])) > 1e-6  # the link matters
    assert torch.equal(torch.get_rng_state(), state)


@likelihoods
def test_the_order_of_priors_and_the_start_do_not_matter(likelihood):
    data = problem(likelihood)
    found = scores(data, likelihood)
    assert_close(scores(data, likelihood, deltas=GRID[::-1]).flip(0), found)
    start = 3 * torch.randn(sum(SIZES), generator=generator(1))
    assert_close(scores(data, likelihood, initial=start), found)


def test_options_of_the_structure_reach_it():
    data = problem("classification")
    plain, damped = scores(data, "classification", "kron"), scores(data, "classification", "kron", damping=True)
    assert float((plain - damped).abs().min()) > 1e-6


def test_a_loss_of_the_users_own_is_averaged_over_rows():
    def brier(probabilities, targets):
        return (probabilities - torch.nn.functional.one_hot(targets, C)).square().sum(-1).mean()

    seen = []
    data = problem("classification")
    found = scores(
        data, "classification", deltas=[1.0], loss=lambda p, y: seen.append((p, y)) or brier(p, y), n_folds=3
    )
    assert sorted(len(y) for _, y in seen) == [3, 4, 4]
    everything = [torch.cat(column) for column in zip(*seen, strict=True)]
    assert float(found) == pytest.approx(float(brier(*everything)))


def test_batches_change_nothing():
    case = named("masked_positions")
    la = fitted(case, "full")
    found = []
    for sizes in ((1, 3), (5,)):
        data = HeadData.collect(collected(la, case.batches(*sizes)), torch.float64)
        found.append(
            cross_validation_scores(
                data,
                nll(la._frozen_likelihood),
                [la._prior],
                la._frozen_likelihood,
                STRUCTURES["full"],
                Options,
                n_folds=2,
            )
        )
    assert_close(*found)


@likelihoods
def test_scores_are_computed_where_the_features_are(likelihood, device):
    found = scores(problem(likelihood, device), likelihood, n_folds=2)
    assert_close(found, scores(problem(likelihood), likelihood, n_folds=2))
