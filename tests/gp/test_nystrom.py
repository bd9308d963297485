"""Nyström features and the posterior of ELLA, against dense algebra."""

import pytest
import torch

from laplace.errors import NotPositiveDefiniteError, NumericalWarning
from laplace.gp import nystrom
from laplace.gp.derivatives import jacobian
from laplace.gp.posterior import FeaturePrecision, FunctionLinearization
from laplace.likelihoods import resolve
from tests.cases import named as case_named
from tests.gp.samples import F64, head_points, situation
from tests.networks import named
from tests.tools import assert_close

THINGS = [named("mlp"), named("conv2d"), case_named("classification")]
everything = pytest.mark.parametrize("thing", THINGS, ids=str)


@everything
def test_directions_are_the_leading_ones_of_the_points(thing):
    here = situation(thing)
    values, vectors = torch.linalg.eigh(here.Z @ here.Z.T)
    expected = (here.Z.T @ vectors[:, -3:] / values[-3:].sqrt()).T  # [3, P]
    V = nystrom.leading_directions(here.points, 3)
    assert_close(V @ V.T, torch.eye(3), "orthonormal")
    assert_close(V.T @ V, expected.T @ expected, "the same subspace")


@everything
def test_the_posterior_is_that_of_weights_that_move_along_the_directions(thing):
    here, delta = situation(thing), torch.tensor(0.7)
    V = nystrom.leading_directions(here.points, 4)
    phi = here.J @ V.T
    f, likelihood = torch.randn(phi.shape[:2]), resolve("classification")
    Lambda = likelihood.hessian(f).dense()
    features = nystrom.NystromMap(V)
    gram = nystrom.feature_gram(features.features(jacobian(here.inputs, F64)), f, likelihood)
    assert_close(gram, torch.einsum("nck,ncd,ndl->kl", phi, Lambda, phi), "Σ φᵀ Λ φ")
    precision, inputs = FeaturePrecision.of(gram, delta), FunctionLinearization.of(here.inputs, features, F64)
    S = V.T @ (gram + delta * torch.eye(4)).inverse() @ V  # of the weights
    cov = here.J @ S @ here.J.mT
    assert_close(inputs.covariance(precision, F64), cov, "covariance")
    assert_close(inputs.variance(precision, F64), cov.diagonal(dim1=1, dim2=2), "variance")
    flat = here.J.flatten(0, 1)
    assert_close(inputs.joint_covariance(precision, F64), flat @ S @ flat.T, "across rows")
    ratio = (gram + delta * torch.eye(4)).logdet() - 4 * delta.log()
    assert_close(nystrom.log_det_ratio(precision), ratio, "log-determinant")


def test_fewer_features_than_asked_for_are_announced():
    phi = torch.randn(3, 2)
    points = head_points(torch.cat([phi, phi]))
    with pytest.warns(NumericalWarning, match="has rank 2 to working precision"):
        V = nystrom.leading_directions(points, 5)
    assert V.shape == (2, 2)


def test_a_kernel_of_zeros_is_refused():
    points = head_points(torch.zeros(3, 2))
    with pytest.raises(NotPositiveDefiniteError, match="do not depend on the random weights"):
        nystrom.leading_directions(points, 2)
