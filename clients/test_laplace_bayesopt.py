"""laplace-bayesopt: a surrogate for BoTorch that is a network with a Laplace approximation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.optim import optimize_acqf
from laplace_bayesopt.botorch import LaplaceBoTorch
from torch import Tensor, nn

from laplace import Laplace
from laplace.curvature import AsdlGGN, AutogradGGN, BackPackGGN

CONFIGURATIONS: list[dict[str, Any]] = [
    {"hess_factorization": "kron"},
    {"hess_factorization": "full"},
    {"hess_factorization": "diag", "last_layer": True},
    {"hess_factorization": "diag", "marglik_mode": "online"},
    {"hess_factorization": "kron", "marglik_mode": "online", "noise_var": 0.01},
]
configurations = pytest.mark.parametrize(
    "options", CONFIGURATIONS, ids=["kron", "full", "last-layer", "online", "online-noise"]
)
tasks = pytest.mark.parametrize("n_tasks", [1, 2])


def surrogate(n_tasks: int, **options: Any) -> LaplaceBoTorch:
    """A fitted surrogate of sums of squares, in float64."""
    inputs = torch.rand(12, 2, dtype=torch.float64)
    targets = torch.stack([(inputs**2).sum(1) * (task + 1) for task in range(n_tasks)], 1)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, n_tasks)).double()

    steps = {"n_epochs": 20, "posthoc_marglik_iters": 5, "online_marglik_freq": 5}
    return LaplaceBoTorch(network, inputs, targets, **steps, **options)


def plain(model: LaplaceBoTorch) -> Any:
    """The Laplace approximation of the same network, by the built-in back end."""
    fitted = model.bnn
    ours = Laplace(
        fitted.model if model.marglik_mode == "online" else model.net,
        "regression",
        subset_of_weights=model.subset_of_weights,
        hessian_structure=model.hess_factorization,
        prior_precision=fitted.prior_precision.detach(),
        sigma_noise=fitted.sigma_noise.detach() if isinstance(fitted.sigma_noise, Tensor) else fitted.sigma_noise,
    )
    ours.fit(model._get_train_loader())
    return ours


@configurations
@tasks
def test_the_posterior_of_a_batch_of_points_is_that_of_the_plain_approximation(n_tasks: int, options: dict[str, Any]):
    model = surrogate(n_tasks, **options)
    points = torch.rand(4, 3, 2, dtype=torch.float64)
    posterior = model.posterior(points)
    ours = plain(model)
    for point, mean, covariance in zip(
        points, posterior.distribution.mean, posterior.distribution.covariance_matrix, strict=True
    ):
        expected_mean, expected = ours(point, joint=True)
        noise = ours.sigma_noise**2 * torch.eye(3 * n_tasks, dtype=torch.float64)
        torch.testing.assert_close(mean.reshape(-1), expected_mean.reshape(-1))
        torch.testing.assert_close(covariance, expected + noise)
    assert posterior.rsample(torch.Size([8])).shape == (8, 4, 3, n_tasks)


@configurations
def test_the_gradient_of_an_acquisition_is_that_of_differences(options: dict[str, Any]):
    model = surrogate(1, **options)
    acquisition = LogExpectedImprovement(model, best_f=1.0)
    points = torch.rand(3, 1, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda at: acquisition(at).sum(), (points.requires_grad_(),), rtol=1e-4)


@pytest.mark.parametrize("backend", [AutogradGGN, BackPackGGN, AsdlGGN], ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("last_layer", [False, True], ids=["all", "last_layer"])
def test_other_back_ends_run_as_well(backend: type, last_layer: bool):
    model = surrogate(1, backend=backend, last_layer=last_layer, hess_factorization="full")
    points = torch.rand(3, 1, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(LogExpectedImprovement(model, best_f=1.0)(points).sum(), points)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@configurations
def test_a_step_of_bayesian_optimization_adds_the_chosen_points(options: dict[str, Any]):
    model = surrogate(1, **options)
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    acquisition = qLogExpectedImprovement(model, best_f=1.0)
    points, _ = optimize_acqf(acquisition, bounds, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5})
    larger = model.condition_on_observations(points.detach(), (points.detach() ** 2).sum(1, keepdim=True))
    assert len(larger.train_X) == 14
    assert larger.bnn.n_data == 14
    assert torch.isfinite(larger.posterior(points).variance).all()
