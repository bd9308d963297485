"""The sparse Gaussian process of VaLLA, against its definition by kernel matrices."""

import pytest
import torch

from laplace.errors import NotPositiveDefiniteError, NumericalWarning
from laplace.gp import variational
from laplace.gp.derivatives import InducingPoints, jacobian
from laplace.gp.nystrom import feature_gram
from laplace.gp.posterior import FeaturePrecision, FunctionLinearization, PriorResidual
from laplace.gp.variational import InducingMap, Objective, Statistics
from laplace.likelihoods import resolve
from tests.cases import named as case_named
from tests.gp.samples import F64, head_points, situation
from tests.networks import named
from tests.tools import assert_close, assert_covariance_of

THINGS = [named("mlp"), named("conv2d"), case_named("classification")]
everything = pytest.mark.parametrize("thing", THINGS, ids=str)
DELTA = torch.tensor(0.7)


def triangle(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).tril()


@everything
def test_the_posterior_is_the_one_of_the_paper(thing):
    """K_xx − K_xZ (A'⁻¹ + K_ZZ)⁻¹ K_Zx with A' = R⁻ᵀ A R⁻¹."""
    here, L = situation(thing), triangle(5)
    R = variational.kernel_factor(here.points)
    inputs = FunctionLinearization.of(here.inputs, InducingMap(here.points, R), F64)
    precision = FeaturePrecision.of(L @ L.T, DELTA)
    A = R.inverse().T @ (L @ L.T) @ R.inverse()
    flat = here.J.flatten(0, 1)
    K, Kz, Kzz = (a @ b.T / DELTA for a, b in ((flat, flat), (flat, here.Z), (here.Z, here.Z)))
    joint = K - Kz @ (A.inverse() + Kzz).inverse() @ Kz.T
    assert_close(inputs.joint_covariance(precision, F64), joint, "across rows")
    n, C = here.J.shape[:2]
    cov = torch.stack([joint[C * i : C * (i + 1), C * i : C * (i + 1)] for i in range(n)])
    assert_close(inputs.covariance(precision, F64), cov, "covariance")
    assert_close(inputs.variance(precision, F64), cov.diagonal(dim1=1, dim2=2), "variance")


def test_the_divergence_is_that_of_two_gaussians_over_weights():
    """KL(N(θ*, S) ‖ N(μ₀, I/δ)), S the covariance of the weights that gives the posterior over functions."""
    here, L = situation(named("mlp")), triangle(5)
    R = variational.kernel_factor(here.points)
    V = R.inverse() @ here.Z  # orthonormal rows
    P = V.shape[1]
    S = (torch.eye(P) * DELTA + V.T @ L @ L.T @ V).inverse()
    theta = torch.randn(P)
    q = torch.distributions.MultivariateNormal(theta, S)
    p = torch.distributions.MultivariateNormal(torch.zeros(P), torch.eye(P) / DELTA)
    found = variational.kl_divergence(L, DELTA, theta @ theta)
    assert_close(found, torch.distributions.kl_divergence(q, p))


def statistics(thing, likelihood) -> Statistics:
    here = situation(thing)
    inputs = jacobian(here.inputs, F64)
    phi = InducingMap(here.points, variational.kernel_factor(here.points)).features(inputs)
    f = torch.randn(here.J.shape[:2])
    y = torch.randint(3, (len(f),)) if likelihood.name == "classification" else torch.randn(f.shape)
    return Statistics(f, y, phi, PriorResidual(inputs, phi).covariance)


def objective(alpha: float, n_rows: int, n_samples: int = 0) -> Objective:
    return Objective(alpha, n_rows, torch.tensor(2.0), n_samples, torch.Generator().manual_seed(0))


def test_the_best_root_of_a_gaussian_is_known():
    """At α = 0 the gradient vanishes at A = Σ φᵀ Λ φ / σ², whatever the prior; elsewhere the objective is larger."""
    likelihood = resolve("regression", torch.tensor(0.6), torch.ones(()))
    batch = statistics(named("mlp"), likelihood)
    best = variational.triangular_root(likelihood.scale * feature_gram(batch.phi, batch.f, likelihood))
    score = objective(0.0, len(batch.f))
    for delta in (0.2, 3.0):
        root = best.clone().requires_grad_()
        value = score(batch, root, torch.tensor(delta), likelihood)
        (gradient,) = torch.autograd.grad(value, root)
        assert float(gradient.abs().max()) < 1e-8 * float(root.detach().abs().max())
        for seed in range(5):
            other = best + 0.1 * triangle(len(best), seed)
            assert float(score(batch, other, torch.tensor(delta), likelihood)) > float(value.detach())


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_objective_is_differentiable_in_all_that_is_trained(alpha):
    likelihood = resolve("classification")
    batch, score = statistics(named("mlp"), likelihood), objective(alpha, 7)

    def value(root: torch.Tensor, log_delta: torch.Tensor) -> torch.Tensor:
        return score(batch, root, log_delta.exp(), likelihood)

    assert torch.autograd.gradcheck(value, (triangle(5).requires_grad_(), torch.tensor(0.3, requires_grad=True)))


def test_samples_have_the_covariance_of_the_posterior():
    batch, L = statistics(named("mlp"), resolve("classification")), triangle(5)
    precision = FeaturePrecision.of(L @ L.T, DELTA)
    cov = batch.covariance(precision)
    samples = batch.samples(precision, 20000, torch.Generator().manual_seed(0))
    for row in range(len(batch.f)):
        assert_covariance_of(samples[:, row], batch.f[row], cov[row])


def test_a_triangular_root_of_a_singular_matrix_is_one():
    half = torch.randn(2, 4)
    L = variational.triangular_root(half.T @ half)
    assert_close(L @ L.T, half.T @ half)
    assert torch.equal(L, L.tril())


def test_repeated_points_get_a_jitter_that_is_announced():
    phi = torch.randn(3, 2)
    with pytest.warns(NumericalWarning, match=r"jitter of about .*e-1\d was added.*Likely causes"):
        R = variational.kernel_factor(head_points(torch.cat([phi, phi])))
    assert_close(R @ R.T, torch.cat([phi, phi]) @ torch.cat([phi, phi]).T)


def test_points_without_a_kernel_are_refused():
    phi = torch.randn(3, 2)
    phi[1] = 0
    with pytest.raises(NotPositiveDefiniteError, match=r"inducing points \[1\]"):
        variational.kernel_factor(head_points(phi))


def test_a_kernel_that_no_jitter_helps_is_refused():
    class Wrong(InducingPoints):
        """Products that are no kernel."""

        def gram(self) -> torch.Tensor:
            return torch.tensor([[1.0, 2.0], [2.0, 1.0]])

    wrong = Wrong((), (2,))
    with pytest.raises(NotPositiveDefiniteError, match=r"smallest eigenvalue -1.000e\+00.*Likely causes"):
        variational.kernel_factor(wrong)
