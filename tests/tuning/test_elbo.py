"""Variational inference for a last layer, against quadrature and another optimizer."""

import math

import numpy as np
import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.likelihoods import resolve
from laplace.likelihoods.draws import antithetic_normals
from laplace.prior import GaussianPrior
from laplace.structures import STRUCTURES
from laplace.tuning import HeadData
from laplace.tuning.elbo import Gaussian, VariationalHead, check_family, climb
from tests.contracts import generator
from tests.tools import LargestTensor, assert_close

F64 = torch.float64
N, D, MU = 14, 2, 0.4
MANY = 1024
"""Points per row where the truth is exact."""


def features(likelihood="classification", n_rows=N, width=D):
    """Rows of two overlapping classes."""
    noise = generator(3)
    phi = torch.randn(n_rows, width, generator=noise, dtype=F64)
    label = (phi.sum(1) + torch.randn(n_rows, generator=noise, dtype=F64) > 0).long()
    if likelihood == "binary":
        return HeadData(phi, label.unsqueeze(1).to(F64), [(1, width), (1,)])
    return HeadData(phi, label, [(2, width), (2,)])


def prior_of(data, delta, mean=MU):
    sizes = tuple(math.prod(shape) for shape in data.shapes)
    return GaussianPrior(torch.tensor(mean, dtype=F64), torch.tensor([delta], dtype=F64), sizes)


def variational(data, structure="full", likelihood="classification", n_points=MANY):
    return VariationalHead.of(data, resolve(likelihood), STRUCTURES[structure], {}, 0, n_points)


def fitted(data, structure="full", likelihood="classification", delta=0.7, n_points=MANY):
    head, prior = variational(data, structure, likelihood, n_points), prior_of(data, delta)
    q, value = head.fit(prior, head.start(prior), 100, 1e-9)
    return head, prior, q, value


def margins(data):
    """Derivatives of the log odds of class 1 in the weights, in public order, and labels ±1."""
    ones = torch.ones(len(data.phi), 1, dtype=F64)
    if data.y.dim() == 2:
        return torch.cat([data.phi, ones], 1), 2 * data.y[:, 0] - 1
    return torch.cat([-data.phi, data.phi, -ones, ones], 1), 2 * data.y.to(F64) - 1


NODES, WEIGHTS = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(60))


def bound(data, mean, cov, delta):
    """The ELBO of N(mean, cov): the log odds of a row are one Gaussian number, averaged by Gauss–Hermite quadrature."""
    J, sign = margins(data)
    center, spread = J @ mean, ((J @ cov) * J).sum(1).sqrt()
    odds = sign.unsqueeze(1) * (center.unsqueeze(1) + spread.unsqueeze(1) * NODES)
    energy = (torch.nn.functional.softplus(-odds) * WEIGHTS).sum() / WEIGHTS.sum()
    P = len(mean)
    kl = delta * (cov.trace() + (mean - MU).square().sum()) - P - P * math.log(delta) - torch.logdet(cov)
    return -energy - 0.5 * kl


@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_the_bound_is_that_of_quadrature(likelihood):
    data = features(likelihood)
    head, prior, q, value = fitted(data, likelihood=likelihood)
    cov = head.posterior(q, prior).to_dense().inverse()
    assert value == pytest.approx(float(bound(data, q.mean, cov, 0.7)), abs=2e-3)


@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_the_optimum_is_that_of_another_optimizer_over_mean_and_factor(likelihood):
    data = features(likelihood)
    head, prior, q, value = fitted(data, likelihood=likelihood)
    P = len(q.mean)
    mean, root = torch.zeros(P, dtype=F64, requires_grad=True), torch.eye(P, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, root], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        found = -bound(data, mean, root.tril() @ root.tril().T, 0.7)
        found.backward()
        return found

    optimizer.step(loss)
    cov = (root.tril() @ root.tril().T).detach()
    assert value == pytest.approx(-float(loss().detach()), abs=2e-3)
    assert float((q.mean - mean).detach().abs().max()) < 5e-3
    assert float((head.posterior(q, prior).to_dense().inverse() - cov).abs().max()) < 5e-3 * float(cov.abs().max())


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_at_the_optimum_the_gradient_is_zero_and_the_curvature_is_its_own_average(structure):
    head, prior, q, _ = fitted(features(), structure, n_points=32)
    averages = head.averages(q, prior)
    assert float(averages.gradient.abs().max()) < 1e-3
    phi = torch.cat([head.data.phi, torch.ones(N, 1, dtype=F64)], 1)
    dense = torch.einsum("nck,nd,ne->cdke", averages.hessian.dense(), phi, phi)
    if structure == "diag":  # weights first, then biases
        expected = torch.einsum("cdcd->cd", dense)
        assert_near(q.sums, torch.cat([expected[:, :D].flatten(), expected[:, D]]))
    elif structure == "kron":
        assert_near(q.sums, averages.hessian.dense().sum(0))
    else:
        assert_near(q.sums[: 2 * D, : 2 * D], dense[:, :D, :, :D].reshape(2 * D, 2 * D))


def assert_near(found, expected):
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_averages_of_a_row_are_those_over_its_gaussian():
    data = features("binary")
    head, prior, q, _ = fitted(data, likelihood="binary")
    J, sign = margins(data)
    cov = head.posterior(q, prior).to_dense().inverse()
    odds = (J @ q.mean).unsqueeze(1) + ((J @ cov) * J).sum(1).sqrt().unsqueeze(1) * NODES
    share = WEIGHTS / WEIGHTS.sum()
    strength = (torch.sigmoid(odds) * torch.sigmoid(-odds) * share).sum(1)
    assert float((head.averages(q, prior).hessian.diag()[:, 0] - strength).abs().max()) < 1e-3
    slope = ((torch.sigmoid(odds) - (sign > 0).to(F64).unsqueeze(1)) * share).sum(1)
    expected = slope @ J + 0.7 * (q.mean - MU)
    assert float((head.averages(q, prior).gradient - expected).abs().max()) < 5e-3


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_beyond_a_dense_covariance_no_square_of_the_number_of_weights_is_stored(structure):
    data = features(n_rows=20, width=300)
    head, prior = variational(data, structure, n_points=32), prior_of(data, 3.0)
    with LargestTensor() as largest:
        q, value = head.fit(prior, head.start(prior), 4)
    assert math.isfinite(value)
    assert largest.numel < 602**2, largest.operation
    assert largest.numel <= 301**2


def test_a_dense_covariance_has_a_limit_and_other_structures_have_none_to_fit():
    check_family(STRUCTURES["full"], 1024)
    check_family(STRUCTURES["kron"], 10**6)
    with pytest.raises(UnsupportedError, match=r'1,024 weights.*1,025.*"kron" or "diag"'):
        check_family(STRUCTURES["full"], 1025)
    with pytest.raises(UnsupportedError, match='this one is "blockdiag"'):
        check_family(STRUCTURES["blockdiag"], 10)


@pytest.mark.parametrize("n_points", [1, 2, 9, 10, 100])
@pytest.mark.parametrize("center", [0.0, 0.37, 0.9, 1.0])
def test_the_climb_finds_the_best_point_and_its_neighbors_with_few_fits(n_points, center):
    calls = []

    def solve(index, q):
        calls.append(index)
        return Gaussian(torch.zeros(1), torch.zeros(1)), -abs(index - center * (n_points - 1))

    found = climb(solve, n_points)
    best = max(found, key=lambda index: found[index][1])
    assert found[best][1] == max(-abs(index - center * (n_points - 1)) for index in range(n_points))
    assert {max(best - 1, 0), min(best + 1, n_points - 1)} <= set(found)
    assert len(calls) == len(set(calls)) <= 18


def test_points_come_in_pairs_and_each_row_has_its_own():
    points = antithetic_normals(32, 500, 3, generator(0), torch.zeros((), dtype=F64))
    assert_close(points.sum(0), torch.zeros(500, 3, dtype=F64))
    assert not torch.equal(points[:, 0], points[:, 1])
    assert float(points.square().mean() - 1) == pytest.approx(0, abs=0.01)
