"""−(1/α) log E[p(y|f)^α] against quadrature, its bounds and its limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from laplace.likelihoods import resolve, softmax
from tests import reference
from tests.structures.samples import psd
from tests.tools import assert_close, assert_within

C = 3
ALPHAS = (0.0, 0.3, 1.0)
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)
ONE = torch.ones(())


def rows(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    cov = torch.stack([psd(C, seed) + 0.1 * torch.eye(C).double() for seed in range(n)])
    return torch.randn(n, C, generator=noise), cov, torch.randint(C, (n,), generator=noise)


def quadrature(mean: Tensor, cov: Tensor, nll, alpha: float, order: int = 30) -> Tensor:
    """By a tensor grid of Gauss-Hermite nodes."""
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * C)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * C).prod(-1)
    result = []
    for row, (m, V) in enumerate(zip(mean, cov, strict=True)):
        values = nll(m + grid @ torch.linalg.cholesky(V).T, row)
        result.append(mass @ values if alpha == 0 else -(mass @ (-alpha * values).exp()).log() / alpha)
    return torch.stack(result)


def softmax_nll(y: Tensor):
    return lambda f, row: f.logsumexp(-1) - f[:, y[row]]


@every_alpha
def test_a_gaussian_likelihood_is_exact(alpha):
    mean, cov, _ = rows()
    y, s = torch.randn(mean.shape), torch.tensor(1.7)
    cov = 0.3 * cov  # where the quadrature has converged
    expected = quadrature(mean, cov, lambda f, row: 0.5 * s * (f - y[row]).square().sum(-1), alpha, 60)
    found = resolve("regression", s**-0.5).energy(mean, cov, y, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # of the quadrature


def test_alpha_one_of_a_gaussian_is_the_predictive_density():
    mean, cov, _ = rows()
    y, sigma = torch.randn(mean.shape), torch.tensor(0.8)
    likelihood = resolve("regression", sigma, torch.ones(()))
    found = likelihood.energy(mean, cov, y, 1.0).sum() + likelihood.log_normalizer(len(y), C)
    assert_close(found, likelihood.predictive_nll(mean, cov, y, lambda m, _: m))


def test_the_tilted_bound_is_one_and_its_gap_is_of_second_order():
    mean, cov, y = rows()

    def gap(size: float) -> Tensor:
        return softmax.expected_cross_entropy(mean, size * cov, y) - quadrature(mean, size * cov, softmax_nll(y), 0)

    for size in (0.1, 1.0, 4.0):
        assert bool((gap(size) >= 0).all())
    assert bool((gap(0.01) <= 0.3 * gap(0.02)).all())  # a quarter, and what higher orders add


def test_for_small_variances_the_tilted_bound_is_the_expansion_of_laplace():
    mean, cov, y = rows()
    likelihood, step = resolve("classification"), 1e-6
    plain = softmax.expected_cross_entropy(mean, 0 * cov, y)
    assert_close(plain.sum(), likelihood.nll(mean, y))
    slope = (softmax.expected_cross_entropy(mean, step * cov, y) - plain) / step
    expected = 0.5 * torch.einsum("nck,nkc->n", likelihood.hessian(mean).dense(), cov)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)  # of the finite difference


def test_a_change_common_to_all_logits_costs_nothing():
    mean, cov, y = rows()
    shifted = cov + 5.0  # the covariance of adding one random number to all logits
    assert_close(softmax.expected_cross_entropy(mean, shifted, y), softmax.expected_cross_entropy(mean, cov, y))


def test_closed_forms_of_a_softmax_fall_with_alpha_between_bound_and_probit():
    mean, cov, y = rows()
    found = torch.stack([softmax.energy(mean, 0.1 * cov, y, ONE, alpha) for alpha in ALPHAS])
    assert_close(found[0], softmax.expected_cross_entropy(mean, 0.1 * cov, y))
    assert_close(found[2], -reference.probit(mean, 0.1 * cov).log().gather(1, y.unsqueeze(1)).squeeze(1))
    assert_close(found[1], 0.7 * found[0] + 0.3 * found[2])
    exact = torch.stack([quadrature(mean, 0.1 * cov, softmax_nll(y), alpha) for alpha in ALPHAS])
    assert float((found[1] - exact[1]).abs().max()) < 0.05


def test_a_temperature_tempers():
    mean, cov, y = rows()
    T = torch.tensor(2.0)
    found = softmax.energy(mean, cov, y, 1 / T, 0.0)
    assert_close(found, softmax.expected_cross_entropy(mean, cov, y) / T)
    cold = softmax.energy(mean, cov, y, 2 * ONE, 1.0)  # p^(α/T) with α/T above 1: that of 1
    assert_close(cold, 2 * softmax.energy(mean, cov, y, ONE, 1.0))


def test_one_hot_labels_are_classes():
    mean, cov, y = rows()
    soft = torch.nn.functional.one_hot(y, C).to(mean)
    for alpha in ALPHAS:
        assert_close(softmax.energy(mean, cov, soft, ONE, alpha), softmax.energy(mean, cov, y, ONE, alpha))


@every_alpha
def test_samples_converge_to_the_truth(alpha):
    mean, cov, y = rows()
    n, batches = 2000, 50
    noise = torch.Generator().manual_seed(1)
    factor = torch.linalg.cholesky(cov)
    draws = mean + torch.einsum("nck,bsnk->bsnc", factor, torch.randn(batches, n, len(mean), C, generator=noise))
    found = torch.stack([softmax.sampled_energy(samples, y, ONE, alpha) for samples in draws])
    truth = quadrature(mean, cov, softmax_nll(y), alpha)
    # The bias of a logarithm of a mean of n terms is of order 1/n, far below the standard error.
    assert_within(found.mean(0), truth, found.std(0) / math.sqrt(batches) + 2 / n)
