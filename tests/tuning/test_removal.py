"""The posterior without one datum, against explicit removal of its dense term."""

import pytest
import torch

from laplace import Laplace
from laplace.curvature import AutogradEF
from laplace.enums import CurvatureKind
from laplace.errors import NotPositiveDefiniteError, UnsupportedError
from laplace.likelihoods import Positions, resolve
from laplace.predictive import NetworkLinearization
from laplace.structures import DiagPrecision, FullPrecision
from laplace.tuning import removal
from laplace.tuning.loo import leave_one_out
from laplace.tuning.removal import Terms
from tests import networks
from tests.cases import CASES, named
from tests.contracts import generator, of_head
from tests.estimators import fitted, posterior
from tests.tools import LargestTensor, assert_close
from tests.tuning.collected import against_zero, collected, own_blocks, without_each

additive = pytest.mark.parametrize("structure", ["full", "diag"])


def check(data, problem, precision, likelihood, expected, kind=CurvatureKind.GGN):
    """Means and covariances of all outputs of all data are the expected ones."""
    left_out = leave_one_out(data, precision, likelihood, torch.float64, kind=kind)
    means, covariances = expected
    if problem.pairs:
        means, covariances = zip(*map(against_zero, means, covariances), strict=True)
    C = 2 if problem.pairs else problem.n_outputs
    # Unmasked positions, datum by datum; those of a pair are one.
    kept = [[0] if problem.pairs else list(datum.kept) for datum in problem.data]
    expected_mean = torch.cat([mean.view(-1, C)[t] for mean, t in zip(means, kept, strict=True)])
    expected_cov = torch.cat([own_blocks(cov, C)[t] for cov, t in zip(covariances, kept, strict=True)])
    rows = [(get(), slice(None) if p.kept is None else p.kept) for get, p in left_out.batches]
    mean = torch.cat([inputs.mean(torch.float64)[t] for inputs, t in rows])
    cov = torch.cat([inputs.covariance(precision, torch.float64)[t] for inputs, t in rows])
    var = torch.cat([inputs.variance(precision, torch.float64)[t] for inputs, t in rows])
    assert_close(cov, expected_cov, "covariance")
    assert_close(var, cov.diagonal(dim1=1, dim2=2), "variance")
    assert_close(mean, expected_mean, "mean")


@additive
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_head_without_a_datum_is_that_with_its_term_subtracted(case, structure):
    la = fitted(case, structure, prior_precision=0.7, temperature=1.3)
    dense = posterior(case, structure, delta=0.7, temperature=1.3)
    expected = without_each(case.problem(), dense, case.scale / 1.3, structure)
    check(collected(la, case.batches(4)), case.problem(), la._frozen_posterior, la._frozen_likelihood, expected)


@additive
@pytest.mark.parametrize("name", ["classification", "regression", "masked_positions", "positions_regression"])
def test_the_term_of_the_empirical_fisher_is_the_square_of_the_gradient_of_the_datum(name, structure):
    case = named(name)
    la = fitted(case, structure, backend=AutogradEF)
    dense = posterior(case, structure, fisher=True)
    expected = without_each(case.problem(), dense, case.scale, structure, fisher=case.sigma**-4)
    data = collected(la, case.batches(4))
    check(data, case.problem(), la._frozen_posterior, la._frozen_likelihood, expected, CurvatureKind.EF)


@additive
@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "squeezed", "positions", "masked_rows", "conv1d_depthwise"])
def test_a_network_without_a_datum_is_that_with_its_term_subtracted(name, structure):
    network = networks.named(name)
    problem, (x, y) = network.problem(), network.data()
    la = Laplace(network.model(), network.likelihood, subset_of_weights="all", hessian_structure=structure)
    la.fit([(x, y)])
    dense = problem.curvature(structure) + torch.eye(len(problem.theta()))
    data = collected(la, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert all(isinstance(get(), NetworkLinearization) for get, _ in data.batches)
    check(data, problem, la._frozen_posterior, la._frozen_likelihood, without_each(problem, dense, 1.0, structure))


@additive
def test_pairs_of_a_whole_network_lose_the_term_of_the_pair(structure):
    case = named("preferences")
    problem = case.problem()
    la = Laplace(case.model(), case.likelihood, subset_of_weights="all", hessian_structure=structure)
    la.fit(case.batches(4))
    whole = type(problem)(
        problem.model, problem.forward, tuple(dict(problem.model.named_parameters())), problem.x, problem.y,
        problem.likelihood, problem.n_outputs,
    )  # fmt: skip
    dense = whole.curvature(structure) + torch.eye(len(whole.theta()))
    data = collected(la, case.batches(4))
    check(data, whole, la._frozen_posterior, la._frozen_likelihood, without_each(whole, dense, 1.0, structure))


@additive
@pytest.mark.parametrize("name", ["classification", "masked_positions"])
def test_chunks_of_data_change_nothing(monkeypatch, name, structure):
    case = named(name)
    la = fitted(case, structure)
    data, arguments = collected(la, case.batches(4)), (la._frozen_posterior, la._frozen_likelihood, torch.float64)
    (at_once, _), *_ = leave_one_out(data, *arguments).batches
    expected = at_once()
    monkeypatch.setattr(removal, "chunk_elements", lambda device: 1)
    (in_chunks, _), *_ = leave_one_out(data, *arguments).batches
    assert_close(in_chunks().f, expected.f)
    assert_close(in_chunks().moment, expected.moment)


def test_a_last_layer_on_the_diagonal_needs_no_jacobian(device):
    n, C, D = 64, 20, 30
    noise = generator(0)
    f, phi = torch.randn(n, C, generator=noise).to(device), torch.randn(n, D, generator=noise).to(device)
    inputs, likelihood = of_head(f, phi), resolve("classification")
    positions = Positions(f, torch.zeros(n, dtype=torch.long, device=device))
    precision = DiagPrecision(torch.full((C * (D + 1),), 100.0, device=device))
    terms = Terms.of(inputs, positions, likelihood, CurvatureKind.GGN)
    with LargestTensor() as largest:
        removal.from_diagonal(inputs, terms, precision, torch.float64)
    assert largest.numel <= n * C * (D + 1), largest.operation


@additive
def test_data_that_the_posterior_was_not_fitted_to_are_noticed(structure):
    inputs = of_head(torch.zeros(2, 2), torch.tensor([[0.1, 0.1], [3.0, 1.0]]), False)
    precision = DiagPrecision(torch.ones(4)) if structure == "diag" else FullPrecision(torch.eye(4))
    remove = removal.from_diagonal if structure == "diag" else removal.from_dense
    terms = Terms.of(inputs, Positions(inputs.f, torch.zeros(2, 2)), resolve("regression"), CurvatureKind.GGN)
    with pytest.raises(NotPositiveDefiniteError, match=r"for 1 of the 2 data.*curvature_dtype=torch\.float64"):
        remove(inputs, terms, precision, torch.float64)


@additive
def test_outputs_without_derivatives_are_refused(structure):
    inputs = NetworkLinearization(torch.zeros(2, 3, 2), None, lambda theta: theta, torch.zeros(4))
    precision = DiagPrecision(torch.ones(4)) if structure == "diag" else FullPrecision(torch.eye(4))
    remove = removal.from_diagonal if structure == "diag" else removal.from_dense
    terms = Terms.of(inputs, Positions(torch.zeros(6, 2), torch.zeros(6, 2)), resolve("regression"), CurvatureKind.GGN)
    with pytest.raises(UnsupportedError, match="derivatives of a whole network"):
        remove(inputs, terms, precision, torch.float64)
