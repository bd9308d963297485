"""The Gaussian likelihood."""

import math

import pytest
import torch

from laplace.enums import CurvatureKind
from laplace.errors import InputError, ShapeError
from laplace.likelihoods import GaussianLikelihood
from laplace.likelihoods import softmax as links
from tests.contracts import check_likelihood
from tests.tools import assert_close


def outputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gaussian_satisfies_the_contract():
    check_likelihood(GaussianLikelihood(), outputs(5, 3), outputs(5, 3, seed=1))


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_scaled_nll_and_normalizer_are_the_normal_density(sigma):
    f, y = outputs(5, 3), outputs(5, 3, seed=1)
    likelihood = GaussianLikelihood(torch.tensor(sigma))
    log_density = -likelihood.scale * likelihood.nll(f, y) - likelihood.log_normalizer(5, 3)
    assert_close(log_density, torch.distributions.Normal(f, sigma).log_prob(y).sum())


def test_scales_follow_noise_and_temperature():
    likelihood = GaussianLikelihood(torch.tensor(0.5), temperature=2.0)
    assert_close(likelihood.scale, torch.tensor(1 / (0.25 * 2)))
    assert_close(likelihood.curvature_scale(CurvatureKind.GGN), torch.tensor(1 / (0.25 * 2)))
    assert_close(likelihood.curvature_scale(CurvatureKind.EF), torch.tensor(1 / (0.0625 * 2)))


def test_the_normalizer_is_not_tempered():
    hot, cold = (GaussianLikelihood(torch.tensor(0.5), temperature=T).log_normalizer(4, 2) for T in (10.0, 0.1))
    assert_close(hot, torch.tensor(8 * math.log(0.5 * math.sqrt(2 * math.pi))))
    assert_close(hot, cold)


def test_scales_and_normalizer_are_differentiable_in_the_noise():
    sigma = torch.tensor(0.7, requires_grad=True)
    for quantity in (
        lambda s: GaussianLikelihood(s).scale,
        lambda s: GaussianLikelihood(s).curvature_scale(CurvatureKind.EF),
        lambda s: GaussianLikelihood(s).log_normalizer(3, 2),
    ):
        assert torch.autograd.gradcheck(quantity, (sigma,))


def test_predictive_nll_adds_the_noise_to_the_covariance():
    mean, y, root = outputs(4, 3), outputs(4, 3, seed=1), outputs(4, 3, 3, seed=2)
    cov = root @ root.mT
    likelihood = GaussianLikelihood(torch.tensor(0.6))
    density = torch.distributions.MultivariateNormal(mean, cov + 0.36 * torch.eye(3))
    assert_close(likelihood.predictive_nll(mean, cov, y, links.probit), -density.log_prob(y).sum())
    variances = cov.diagonal(dim1=1, dim2=2)
    independent = torch.distributions.Normal(mean, (variances + 0.36).sqrt())
    assert_close(likelihood.predictive_nll(mean, variances, y, links.probit), -independent.log_prob(y).sum())


def test_positions_are_flattened_and_counted():
    likelihood = GaussianLikelihood()
    f, y = outputs(2, 3, 4), outputs(2, 3, 4, seed=1)
    positions = likelihood.flatten(f, y)
    assert_close(positions.f, f.reshape(6, 4))
    assert_close(positions.y, y.reshape(6, 4))
    assert positions.datum.tolist() == [0, 0, 0, 1, 1, 1]
    assert likelihood.count(y, 4) == 6


def test_targets_without_an_output_axis_fit_one_output():
    positions = GaussianLikelihood().flatten(outputs(5, 1), outputs(5))
    assert positions.y.shape == (5, 1)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (4, 2), (5, 3), (5, 2, 1), (2, 5)])
def test_targets_of_another_shape_are_refused_instead_of_broadcast(shape):
    with pytest.raises(ShapeError, match="Regression targets"):
        GaussianLikelihood().flatten(outputs(5, 2), outputs(*shape))


def test_integer_targets_are_refused():
    with pytest.raises(InputError, match="floating-point"):
        GaussianLikelihood().flatten(outputs(5, 2), torch.ones(5, 2, dtype=torch.long))
