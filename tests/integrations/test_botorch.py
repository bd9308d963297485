"""``LaplaceModel``: the numbers of the library through the interface of BoTorch, for all t-batches at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    PosteriorMean,
    qKnowledgeGradient,
    qMaxValueEntropy,
    qUpperConfidenceBound,
)
from botorch.acquisition.logei import qLogExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models.transforms import ChainedInputTransform, Log, Normalize
from botorch.models.transforms.input import InputStandardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from linear_operator.operators import LowRankRootLinearOperator
from torch import Tensor, nn

from laplace import Laplace
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.integrations import botorch as integration
from laplace.integrations.botorch import LaplaceModel
from laplace.likelihoods.gaussian import GaussianLikelihood
from tests import reference
from tests.integrations.regressions import (
    BATCHES,
    HIDDEN,
    SIGMA,
    UNIT,
    X,
    fitted,
    jacobians,
    network,
    precision,
    scaled,
    targets,
)
from tests.tools import assert_close

# -- posteriors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_dense", [2048, 1])
@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_posteriors_of_all_t_batches_are_the_dense_formula(
    subset: str, n_outputs: int, most_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "MOST_DENSE", most_dense)
    la, of_head = fitted(n_outputs, subset), subset == "last_layer"
    model = LaplaceModel(la)
    for X_ in (BATCHES, BATCHES[..., :1, :], BATCHES[0, :1]):
        posterior: Any = model.posterior(X_)
        assert posterior.mean.shape == (*X_.shape[:-1], n_outputs)
        K = posterior.distribution.covariance_matrix
        A = precision(la, last_layer=of_head)
        plain = la.model.model if of_head else la.model
        for mean, cov, x in zip(posterior.mean.flatten(0, -3), K.flatten(0, -3), X_.flatten(0, -3), strict=True):
            J = jacobians(plain, x, last_layer=of_head)
            torch.testing.assert_close(cov, reference.joint_covariance(J.unflatten(0, (-1, n_outputs)), A))
            torch.testing.assert_close(mean, plain(x))


@pytest.mark.parametrize("structure", ["kron", "diag", "blockdiag", "ekfac", "lowrank"])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_posteriors_are_those_of_the_object(subset: str, structure: str) -> None:
    la = fitted(2, subset, structure)
    with torch.no_grad():
        posterior: Any = LaplaceModel(la).posterior(BATCHES)
        mean, K = la(BATCHES[1, 1], joint=True)
    torch.testing.assert_close(posterior.mean[1, 1].flatten(), mean)
    torch.testing.assert_close(posterior.distribution.covariance_matrix[1, 1], K)


def test_chosen_weights_of_a_network_have_a_posterior() -> None:
    options = {"subnetwork_indices": torch.tensor([0, 4, 7, 18, 20, 25])}
    la = Laplace(network(), "regression", "subnetwork", "full", **options).fit([(X, targets(X))])
    posterior: Any = LaplaceModel(la).posterior(BATCHES)
    with torch.no_grad():
        torch.testing.assert_close(posterior.distribution.covariance_matrix[2, 0], la(BATCHES[2, 0], joint=True)[1])


def test_more_points_than_weights_share_a_root_of_low_rank() -> None:
    model = LaplaceModel(fitted())
    many = torch.rand(2, 3 * HIDDEN, 3)
    posterior: Any = model.posterior(many)
    covariance = posterior.distribution.lazy_covariance_matrix
    assert isinstance(covariance, LowRankRootLinearOperator)
    assert covariance.root.shape[-1] == HIDDEN + 1
    samples = SobolQMCNormalSampler(torch.Size([2**12]), seed=0)(posterior)
    found = torch.cov(samples[:, 0, :, 0].T)
    torch.testing.assert_close(found, covariance.to_dense()[0], rtol=0.02, atol=2e-4)
    few: Any = model.posterior(many[:, :HIDDEN])
    assert not isinstance(few.distribution.lazy_covariance_matrix, LowRankRootLinearOperator)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_observation_noise_is_that_of_the_fit_or_what_is_given(n_outputs: int) -> None:
    sigma = torch.tensor([0.3, 0.7])[:n_outputs]
    model = LaplaceModel(fitted(n_outputs, sigma_noise=sigma))
    plain: Any = model.posterior(BATCHES)
    noisy: Any = model.posterior(BATCHES, observation_noise=True)
    torch.testing.assert_close(noisy.variance - plain.variance, (sigma**2).expand(4, 2, 6, n_outputs))
    given = torch.rand(4, 2, 1, n_outputs)
    noisy = model.posterior(BATCHES, observation_noise=given)
    torch.testing.assert_close(noisy.variance - plain.variance, given.expand(4, 2, 6, n_outputs))


def test_noise_that_outputs_share_is_added_within_points() -> None:
    S = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    la = Laplace(network(2), GaussianLikelihood(noise_covariance=S), "last_layer", "full", sigma_noise=SIGMA)
    model = LaplaceModel(la.fit([(X, targets(X, 2))]))
    plain: Any = model.posterior(BATCHES)
    noisy: Any = model.posterior(BATCHES, observation_noise=True)
    added = noisy.distribution.covariance_matrix - plain.distribution.covariance_matrix
    torch.testing.assert_close(added[0, 0], SIGMA**2 * torch.kron(torch.eye(6), S))


def test_outputs_are_chosen_and_scalarized() -> None:
    model = LaplaceModel(fitted(2))
    both: Any = model.posterior(BATCHES)
    second: Any = model.posterior(BATCHES, output_indices=[1])
    torch.testing.assert_close(second.mean, both.mean[..., 1:])
    torch.testing.assert_close(second.variance, both.variance[..., 1:])
    torch.testing.assert_close(
        model.subset_output([-1]).posterior(BATCHES).distribution.covariance_matrix,
        second.distribution.covariance_matrix,
    )
    swapped: Any = model.subset_output([1, 0])
    assert swapped.num_outputs == 2
    torch.testing.assert_close(swapped.posterior(BATCHES).variance, both.variance.flip(-1))
    weights = torch.tensor([2.0, -1.0])
    one: Any = model.posterior(BATCHES, posterior_transform=ScalarizedPosteriorTransform(weights))
    torch.testing.assert_close(one.mean[..., 0], both.mean @ weights)
    K = both.distribution.covariance_matrix.unflatten(-1, (6, 2)).unflatten(-3, (6, 2))
    torch.testing.assert_close(
        one.distribution.covariance_matrix, torch.einsum("...iajb,a,b->...ij", K, weights, weights)
    )


def test_width_at_foreign_inputs_is_part_of_the_posterior() -> None:
    la = fitted()
    x = torch.rand(60, 3)
    la.tune([(x, targets(x) + 0.1 * torch.randn(60, 1))])
    la.distance_scale = 3.0
    far = torch.cat([BATCHES, BATCHES + 3.0], -2)
    posterior: Any = LaplaceModel(la).posterior(far)
    with torch.no_grad():
        mean, K = la(far[0, 0], joint=True)
    torch.testing.assert_close(posterior.mean[0, 0].flatten(), mean)
    torch.testing.assert_close(posterior.distribution.covariance_matrix[0, 0], K)
    assert (K.diagonal()[6:] > 3 * K.diagonal()[:6].max()).all()


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_posteriors_are_differentiable_and_flags_stay(subset: str) -> None:
    la = fitted(2, subset)
    model = LaplaceModel(la)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = model.posterior(x)
        return found.mean, found.distribution.covariance_matrix

    assert torch.autograd.gradcheck(moments, (torch.rand(2, 3, 3, requires_grad=True),))
    assert not la.enable_backprop
    assert not la(X.clone().requires_grad_())[0].requires_grad
    with torch.no_grad():
        assert not model.posterior(X).mean.requires_grad


def test_acquisition_functions_have_the_gradients_of_finite_differences() -> None:
    model = LaplaceModel(fitted(), num_inputs=3)
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    for acquisition in (
        qLogExpectedImprovement(model, best_f=0.1, sampler=sampler),
        qLogNoisyExpectedImprovement(model, X[:5], sampler=sampler, cache_root=False, prune_baseline=False),
        qUpperConfidenceBound(model, beta=2.0, sampler=sampler),
    ):
        assert torch.autograd.gradcheck(acquisition, (torch.rand(2, 2, 3, requires_grad=True),))


def test_a_network_in_float32_serves_inputs_in_float64() -> None:
    model = LaplaceModel(
        Laplace(network().float(), "regression", "last_layer", "full").fit([(X.float(), targets(X).float())])
    )
    posterior: Any = model.posterior(torch.rand(2, 40, 3, requires_grad=True))
    assert posterior.mean.dtype == posterior.variance.dtype == torch.float64
    assert posterior.rsample(torch.Size([3])).isfinite().all()


# -- transforms -------------------------------------------------------------------------------------------------------


def test_transforms_round_trip() -> None:
    low, high = torch.tensor([-2.0, 0.0, 5.0]), torch.tensor([2.0, 10.0, 6.0])
    Y = 100 + 40 * targets(X)
    standardize = scaled(Y)
    la = Laplace(network(), "regression", "last_layer", "full", sigma_noise=SIGMA).fit([(X, standardize(Y)[0])])
    model = LaplaceModel(la, Normalize(3, bounds=torch.stack([low, high])), standardize)
    plain = LaplaceModel(la)
    outside = low + (high - low) * BATCHES
    found: Any = model.posterior(outside, observation_noise=True)
    inside: Any = plain.posterior(BATCHES, observation_noise=True)
    torch.testing.assert_close(found.mean, Y.mean() + Y.std() * inside.mean)
    torch.testing.assert_close(found.variance, Y.var() * inside.variance)
    x, y = torch.rand(4, 3), 100 + 40 * torch.randn(4, 1)
    for extra in ((), (1,)):
        found = model.condition_on_observations((low + (high - low) * x).expand(*extra, 4, 3), y.expand(*extra, 4, 1))
        inside = plain.condition_on_observations(x, standardize(y)[0])
        torch.testing.assert_close(
            found.posterior(outside[0]).mean, Y.mean() + Y.std() * inside.posterior(BATCHES[0]).mean
        )
    values = model.sample([3], torch.Generator().manual_seed(0))(outside)
    torch.testing.assert_close(
        values, Y.mean() + Y.std() * plain.sample([3], torch.Generator().manual_seed(0))(BATCHES)
    )


def test_a_transform_that_is_not_linear_transforms_samples() -> None:
    transform = Log()
    la = Laplace(network(), "regression", "last_layer", "full").fit([(X, transform(targets(X) + 2)[0])])
    model, plain = LaplaceModel(la, outcome_transform=transform), LaplaceModel(la)
    sampler = SobolQMCNormalSampler(torch.Size([8]), seed=0)
    torch.testing.assert_close(sampler(model.posterior(BATCHES)), sampler(plain.posterior(BATCHES)).exp())


# -- with BoTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_acquisition_functions_find_the_maximum() -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 3)
    y = -(x - torch.tensor([0.3, 0.6, 0.5])).square().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        squares = sum(weight.square().sum() for weight in model.parameters())
        total = (model(x) - y).square().sum() + 1e-4 * squares
        total.backward()
        return total

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    la = Laplace(model, "regression", "last_layer", "full", sigma_noise=0.01, prior_precision=10.0).fit([(x, y)])
    bridge = LaplaceModel(la)
    few: dict[str, Any] = {"num_restarts": 2, "raw_samples": 32, "options": {"maxiter": 30}}
    acquisitions: list[tuple[Any, int]] = [
        (LogExpectedImprovement(bridge, best_f=-0.05), 1),
        (qLogExpectedImprovement(bridge, best_f=-0.05), 2),
        (qLogNoisyExpectedImprovement(bridge, x, cache_root=False), 2),
        (qUpperConfidenceBound(bridge, beta=0.1), 2),
        (qKnowledgeGradient(bridge, num_fantasies=2), 1),
        (qMaxValueEntropy(bridge, torch.rand(50, 3)), 1),
    ]
    for acquisition, q in acquisitions:
        chosen, value = optimize_acqf(acquisition, UNIT, q=q, **few)
        assert chosen.shape == (q, 3)
        assert value.isfinite()
    chosen, _ = optimize_acqf(PosteriorMean(bridge), UNIT, q=1, **few)
    torch.testing.assert_close(chosen[0], torch.tensor([0.3, 0.6, 0.5]), atol=0.08, rtol=0)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_has_no_gaussian_targets_is_refused_by_name() -> None:
    classifier = Laplace(network(2), "classification").fit([(X, torch.randint(0, 2, (20,)))])
    with pytest.raises(UnsupportedError, match="likelihood='regression', got 'classification'"):
        LaplaceModel(classifier)
    counts = Laplace(network(), "poisson").fit([(X, torch.randint(0, 5, (20, 1)))])
    with pytest.raises(UnsupportedError, match="got 'poisson'"):
        LaplaceModel(counts)
    spread = Laplace(network(2), "heteroscedastic_regression").fit([(X, targets(X))])
    with pytest.raises(UnsupportedError, match="got 'heteroscedastic_regression'"):
        LaplaceModel(spread)
    process = Laplace(network(), "regression", hessian_structure="gp", n_subset=10)
    with pytest.raises(UnsupportedError, match="FunctionalLLLaplace"):
        LaplaceModel(process)
    with pytest.raises(UnsupportedError, match="got a Sequential"):
        LaplaceModel(network())
    with pytest.raises(NotFittedError, match="fit"):
        LaplaceModel(Laplace(network(), "regression"))
    la = fitted()
    la.weight_uncertainty = False
    with pytest.raises(UnsupportedError, match="weight_uncertainty=False"):
        LaplaceModel(la)


def test_inputs_and_observations_of_other_shapes_are_refused() -> None:
    model = LaplaceModel(fitted(2))
    with pytest.raises(ShapeError, match=r"\[\*batch, q, d\]; got torch.float64 \[3\]"):
        model.posterior(X[0])
    with pytest.raises(ShapeError, match="int64"):
        model.posterior(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="X must be a tensor"):
        model.posterior(X.numpy())  # pyright: ignore[reportArgumentType]
    model.posterior(X)
    with pytest.raises(ShapeError, match=r"q, 3\]; got torch.float64 \[20, 2\]"):
        model.posterior(X[:, :2])
    with pytest.raises(ShapeError, match=r"\[\*batch, 20, 2\]; got \[20, 1\]"):
        model.condition_on_observations(X, targets(X))
    with pytest.raises(ShapeError, match=r"\[\*batch, 20, 2\]; got \[20\]"):
        model.condition_on_observations(X, targets(X)[:, 0])
    for wrong in ([], [2], [-3]):
        with pytest.raises(InputError, match=r"There are 2 outputs: indices are from 0 to 1"):
            model.posterior(X, output_indices=wrong)
    with pytest.raises(InputError, match="num_inputs"):
        LaplaceModel(fitted(), num_inputs=0)
    for noise in (torch.ones(7, 1), torch.ones(2, 1, *X.shape[:-1], 1)):
        with pytest.raises(ShapeError, match=r"observation_noise must be variances .*got"):
            model.posterior(X, observation_noise=noise)
    with pytest.raises(ShapeError, match=r"noise must be variances of Y, \[20, 2\]; got \[7, 1\]"):
        model.condition_on_observations(X, model.posterior(X).mean, noise=torch.ones(7, 1))
    with pytest.raises(ShapeError, match=r"batch of X must be broadcast with that of Y, \[3\]; got \[2\]"):
        model.condition_on_observations(X.expand(2, 20, 3), torch.zeros(3, 20, 2))
    fantasies: Any = model.condition_on_observations(BATCHES, model.posterior(BATCHES).mean)
    with pytest.raises(ShapeError, match=r"batch of X .*model's"):
        fantasies.posterior(X.expand(len(BATCHES) + 1, *X.shape))
    with pytest.raises(InputError, match="observation_noise"):
        model.posterior(X, observation_noise="yes")  # pyright: ignore[reportArgumentType]


def test_a_transform_of_inputs_that_has_learned_nothing_is_refused() -> None:
    la = fitted()
    for transform in (Normalize(3), ChainedInputTransform(first=Normalize(3, bounds=UNIT), second=Normalize(3))):
        with pytest.raises(InputError, match=r"Normalize learns from data.*bounds.*input_transform\(X\)"):
            LaplaceModel(la, transform)
    with pytest.raises(InputError, match="InputStandardize learns"):
        LaplaceModel(la, InputStandardize(3))
    learned = Normalize(3)
    learned(2 * X)
    at = torch.stack([2 * X.amin(0), 2 * X.amax(0)])
    expected = LaplaceModel(la, Normalize(3, bounds=at)).posterior(X).mean
    assert_close(LaplaceModel(la, learned).posterior(X).mean, expected)


@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_observations_that_are_not_finite_are_refused(subset: str, wrong: float) -> None:
    model, y = LaplaceModel(fitted(subset=subset)), targets(X)
    y[3] = wrong
    for given in ((X, y), (X[None], y[None]), (X.where(X.min() < X, wrong), targets(X))):
        with pytest.raises(InputError, match="Observations must be finite"):
            model.condition_on_observations(*given)
    with pytest.raises(InputError, match=r"not negative; the smallest is -0\.01"):
        model.condition_on_observations(X, targets(X), noise=torch.full((20, 1), -0.01))


def test_what_cannot_be_conditioned_or_drawn_is_refused() -> None:
    model = LaplaceModel(fitted(2))
    with pytest.raises(UnsupportedError, match="some of the outputs only"):
        model.subset_output([0]).condition_on_observations(X, targets(X))
    with pytest.raises(UnsupportedError, match=r"batch \[1\] of fantasies"):
        model.condition_on_observations(X[None], targets(X, 2)[None]).sample()
    with pytest.raises(UnsupportedError, match="ekfac"):
        LaplaceModel(fitted(structure="ekfac")).condition_on_observations(X, targets(X))


def test_a_network_with_positions_is_refused() -> None:
    model = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    la = Laplace(model, "regression").fit([(X, torch.rand(20, 3, 1))])
    with pytest.raises(ShapeError, match=r"\[20, 3, 1\]"):
        LaplaceModel(la).posterior(X)
