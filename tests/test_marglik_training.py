"""Weights, prior and noise trained together: the exact optimum where there is one, real data, and what is left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, marglik_training
from laplace.curvature import AutogradGGN
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import reference
from tests.cases import CASES, Case, named
from tests.contracts import generator
from tests.estimators import every_structure
from tests.tools import assert_close

CLASSIFICATION, REGRESSION = CASES[:2]
LBFGS = {"optimizer_cls": torch.optim.LBFGS, "optimizer_kwargs": {"line_search_fn": "strong_wolfe", "max_iter": 50}}
SHORT = {"n_epochs": 3, "n_hypersteps": 2, "optimizer_kwargs": {"lr": 0.05}}


def short(case: Case, model: nn.Module | None = None, loader: Any = None, **options: Any) -> Any:
    """A few epochs on the data of a case."""
    keys = {name: value for name, value in case.options.items() if name.startswith("dict_key")}
    loader = case.batches(2, 4) if loader is None else loader
    return marglik_training(
        model or case.model(), loader, **{"likelihood": case.likelihood, **SHORT, **keys, **options}
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def everything(result: Any) -> list[Tensor]:
    la, model, margliks, losses = result
    found = [la.prior_precision, la.sigma_noise, la.mean, torch.tensor(margliks), torch.tensor(losses)]
    return [*found, *(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- exact ------------------------------------------------------------------------------------------------------------


def bayesian_linear_regression(Phi: Tensor, y: Tensor, groups: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Precisions of the groups of weights, noise and mean at the maximum of the evidence: MacKay's fixed point."""
    n, sizes = len(y), torch.tensor(groups)
    delta, sigma = torch.ones(len(groups)), torch.ones(())
    for _ in range(5000):
        Sigma = (Phi.T @ Phi / sigma**2 + delta.repeat_interleave(sizes).diag()).inverse()
        mean = Sigma @ Phi.T @ y / sigma**2
        known = torch.stack([d * part.sum() for d, part in zip(delta, Sigma.diagonal().split(groups), strict=True)])
        delta = (sizes - known) / torch.stack([part @ part for part in mean.split(groups)])
        sigma = ((y - Phi @ mean).square().sum() / (n - sizes.sum() + known.sum())).sqrt()
    return delta, sigma, mean


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_a_linear_model_ends_at_the_maximum_of_its_exact_evidence(structure, device):
    x = torch.randn(40, 3)
    y = x @ torch.tensor([0.7, 0.0, 1.2]) + 0.5 + 0.3 * torch.randn(40)
    loader = [(x.to(device), y.unsqueeze(1).to(device))]
    options = {"hessian_structure": "full", "prior_structure": structure, "n_epochs": 60, **LBFGS}
    la, model, margliks, _ = marglik_training(nn.Linear(3, 1).to(device), loader, "regression", **options)

    Phi = torch.cat([x, torch.ones(40, 1)], 1)
    groups = [4] if structure == "scalar" else [3, 1]
    delta, sigma, mean = bayesian_linear_regression(Phi, y, groups)
    torch.testing.assert_close(la.prior_precision.cpu(), delta, rtol=2e-4, atol=0)
    torch.testing.assert_close(la.sigma_noise.cpu(), sigma, rtol=2e-5, atol=0)
    torch.testing.assert_close(weights(model).cpu(), mean, rtol=2e-4, atol=1e-5)
    # The second source: the density of the targets under the model with its weights integrated out.
    covariance = sigma**2 * torch.eye(40) + Phi @ (1 / delta.repeat_interleave(torch.tensor(groups))).diag() @ Phi.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(40), covariance).log_prob(y)
    # First-order conditions hold at the maximum, so that small errors there change it by their squares.
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(evidence), abs=1e-6)
    assert -min(margliks) <= float(evidence) + 1e-6, "nothing seen on the way is above the maximum"


@pytest.mark.parametrize("name", ["regression", "classification", "preferences"])
def test_with_fixed_hyperparameters_training_ends_at_the_mode_of_the_posterior(name):
    case = named(name)
    noise = {"sigma_noise_init": 0.7, "fix_sigma_noise": True} if name == "regression" else {}
    options = {
        "temperature": 1.6,
        "prior_mean": 0.2,
        "prior_prec_init": 0.3,
        "lr_hyp": 0.0,
        "n_epochs": 8,
        **LBFGS,
        **noise,
    }
    la, model, _, _ = short(case, loader=case.batches(), **options)
    x, y = case.data()
    f = case.forward(model, x).reshape(len(y), -1, case.n_outputs)
    scale = 1 / (1.6 * 0.49) if name == "regression" else 1 / 1.6
    nll = sum(reference.datum_nll(case.likelihood, row, target) for row, target in zip(f, y, strict=True))
    log_joint = -scale * nll - sum(0.15 * (p - 0.2).square().sum() for p in model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(log_joint, list(model.parameters()))])
    assert float(gradient.abs().max()) < 1e-4 * max(1.0, float(weights(model).abs().max()))
    assert_close(la.prior_precision, torch.full_like(la.prior_precision, 0.3))


# -- every kind of data, structure and prior --------------------------------------------------------------------------


def refitted(case: Case, la: Any, structure: str, model: nn.Module, **options: Any) -> Any:
    keys = {name: value for name, value in case.options.items() if name.startswith("dict_key")}
    chosen = {"sigma_noise": la.sigma_noise, "prior_precision": la.prior_precision}
    again = Laplace(model, case.likelihood, "all", structure, **chosen, **keys, **options)
    again.fit(case.batches(2, 4))
    return again


@pytest.mark.every(3, each_value=False)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_returned_approximation_belongs_to_the_returned_weights(case):
    la, model, margliks, losses = short(case)
    assert la.model is model
    assert_close(la.mean, weights(model))
    again = refitted(case, la, "kron", model)
    assert_close(la.log_marginal_likelihood(), again.log_marginal_likelihood())
    assert (len(margliks), len(losses)) == (6, 3)
    assert -float(la.log_marginal_likelihood()) <= min(margliks) + 1e-9


@every_structure
@pytest.mark.parametrize("prior", ["scalar", "layerwise", "diag"])
def test_structures_and_priors_combine(structure, prior):
    if structure in ("kron", "ekfac") and prior == "diag":
        with pytest.raises(UnsupportedError, match="one for each weight"):
            short(REGRESSION, hessian_structure=structure, prior_structure=prior)
        return
    la, model, _, _ = short(REGRESSION, hessian_structure=structure, prior_structure=prior)
    size = {"scalar": 1, "layerwise": 4, "diag": la.n_params}[prior]
    assert la.prior_precision.shape == (size,)
    assert len(set(la.prior_precision.tolist())) == size, "each has moved in its own way"
    assert not la.prior_precision.requires_grad
    assert not la.sigma_noise.requires_grad
    again = refitted(REGRESSION, la, structure, model)
    assert_close(la.log_marginal_likelihood(), again.log_marginal_likelihood())


def test_noise_is_learned_in_regression_alone_and_only_if_it_may():
    assert float(short(REGRESSION, sigma_noise_init=0.8)[0].sigma_noise) != pytest.approx(0.8, rel=1e-3)
    assert float(short(REGRESSION, sigma_noise_init=0.8, fix_sigma_noise=True)[0].sigma_noise) == pytest.approx(0.8)
    assert float(short(CLASSIFICATION)[0].sigma_noise) == 1
    with pytest.raises(UnsupportedError, match="observation noise of regression"):
        short(CLASSIFICATION, sigma_noise_init=0.8)


def test_the_hyperparameters_climb_the_evidence_of_each_fit():
    _, _, margliks, _ = short(REGRESSION, n_hypersteps=5, lr_hyp=0.01)
    for fit in range(3):
        steps = margliks[5 * fit : 5 * fit + 5]
        assert steps == sorted(steps, reverse=True)


def test_hyperparameters_that_do_not_move_see_one_evidence_a_fit():
    la, _, margliks, _ = short(REGRESSION, n_hypersteps=4, lr_hyp=0.0, prior_prec_init=[0.5, 1.0, 2.0, 3.0])
    assert all(len(set(margliks[4 * fit : 4 * fit + 4])) == 1 for fit in range(3))
    assert_close(la.prior_precision, torch.tensor([0.5, 1.0, 2.0, 3.0]))
    with pytest.raises(ShapeError, match="for each of the 4 parameter groups"):
        short(REGRESSION, prior_prec_init=[0.5, 1.0, 2.0])
    with pytest.raises(InputError, match="'scalar' takes one value or 1 of them; got 4"):
        short(REGRESSION, prior_prec_init=[0.5, 1.0, 2.0, 3.0], prior_structure="scalar")


def test_the_result_of_the_last_step_counts():
    la, _, margliks, _ = short(REGRESSION, n_epochs=1, n_hypersteps=1, lr_hyp=0.05)
    assert -float(la.log_marginal_likelihood()) < margliks[0]
    assert (la.prior_precision != 1).all()


# -- which weights are returned ---------------------------------------------------------------------------------------


class Spoiled(torch.optim.SGD):
    """Learns until some step, and then walks away."""

    def __init__(self, parameters, lr, good_steps):
        super().__init__(parameters, lr=lr)
        self.good_steps = good_steps

    def step(self, closure):
        loss = super().step(closure)
        self.good_steps -= 1
        if self.good_steps < 0:
            for p in self.param_groups[0]["params"]:
                p.data += 1.0
        return loss


@pytest.mark.parametrize("good", [0, 1, 3])
def test_the_best_weights_are_returned_wherever_training_ends(good):
    """The weights of each fit are recorded, and so is the best evidence of each."""
    case, model, visited = named("conv_regression"), named("conv_regression").model(), []

    class Watched(AutogradGGN):
        def kron(self, x, y, *args, **options):
            visited.append([tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())])
            return super().kron(x, y, *args, **options)

    options = {"optimizer_cls": Spoiled, "optimizer_kwargs": {"lr": 0.05, "good_steps": good}}
    la, _, margliks, _ = short(
        case, model, case.batches(), n_epochs=6, n_hypersteps=1, lr_hyp=0.0, backend=Watched, **options
    )
    best = margliks.index(min(margliks))
    assert best < 5, "training that gets worse does not end with its best"
    assert same([*model.parameters(), *model.buffers()], visited[best])
    assert float(la.log_marginal_likelihood()) == pytest.approx(-margliks[best])


@pytest.mark.parametrize(
    ("n_epochs", "burnin", "frequency", "fits"),
    [(6, 0, 1, [1, 2, 3, 4, 5, 6]), (6, 3, 2, [4, 6]), (6, 3, 1, [3, 4, 5, 6]), (5, 0, 2, [2, 4]), (3, 3, 3, [3])],
)
def test_burn_in_and_frequency_say_after_which_epochs_is_fitted(n_epochs, burnin, frequency, fits):
    """The passes over the data are counted; the model is in evaluation mode in those of a fit."""
    model, modes = REGRESSION.model(), []

    class Passes:
        def __iter__(self) -> Iterator[Any]:
            modes.append("train" if model.training else "fit")
            return iter(REGRESSION.batches(4))

    result = short(REGRESSION, model, Passes(), n_epochs=n_epochs, n_epochs_burnin=burnin, marglik_frequency=frequency)
    expected = [
        "train" if what == "epoch" else "fit"
        for e in range(1, n_epochs + 1)
        for what in ("epoch", "fit")[: 1 + (e in fits)]
    ]
    assert modes[1:] == expected, "the first pass counts rows"
    assert (len(result[2]), len(result[3])) == (2 * len(fits), n_epochs)


def test_burn_in_trains_with_the_first_hyperparameters():
    first = short(REGRESSION, n_epochs=4, n_epochs_burnin=4)
    still = short(REGRESSION, n_epochs=4, n_epochs_burnin=4, lr_hyp=0.0)
    moved = short(REGRESSION, n_epochs=4)
    assert_close(first[0].mean, still[0].mean)
    assert not torch.allclose(first[0].mean, moved[0].mean)


# -- real data --------------------------------------------------------------------------------------------------------


def standardized(x: Any) -> Tensor:
    x = torch.tensor(x)
    return (x - x.mean(0)) / x.std(0)


@pytest.mark.slow
def test_on_diabetes_the_evidence_prefers_the_network_that_predicts_better():
    """Of three networks on two halvings of the patients. Depth does not help here; to see age and sex alone does not do."""
    x, y = (standardized(part) for part in load_diabetes(return_X_y=True))
    networks = {
        "linear": lambda: nn.Linear(10, 1),
        "two inputs": lambda: nn.Sequential(FirstTwo(), nn.Linear(2, 1)),
        "deep": lambda: nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1)),
    }
    worse: dict[str, list[Tensor]] = {"two inputs": [], "deep": []}
    for seed in range(2):
        order = torch.randperm(len(y), generator=generator(seed))
        train, test = order[:221], order[221:]
        evidence, score = {}, {}
        for name, build in networks.items():
            torch.manual_seed(seed)
            options = {"optimizer_kwargs": {"lr": 0.01}, "n_epochs": 100, "marglik_frequency": 10, "n_hypersteps": 20}
            la, _, margliks, losses = marglik_training(build(), [(x[train], y[train, None])], "regression", **options)
            evidence[name] = float(la.log_marginal_likelihood())
            assert evidence[name] > -margliks[0] + 20, "nats, from the first fit to the best"
            assert losses[-1] < losses[0]
            mean, variance = la(x[test])
            noisy = variance.squeeze(-1) + la.sigma_noise**2
            score[name] = 0.5 * ((y[test, None] - mean).square() / noisy + noisy.log() + math.log(2 * math.pi))
        for name, differences in worse.items():
            assert evidence["linear"] > evidence[name] + 20
            differences.append(score[name] - score["linear"])
    held_out = {name: torch.cat(differences) for name, differences in worse.items()}
    error = {name: float(difference.std()) / len(difference) ** 0.5 for name, difference in held_out.items()}
    assert float(held_out["two inputs"].mean()) > 5 * error["two inputs"]
    assert float(held_out["deep"].mean()) > -2 * error["deep"]


class FirstTwo(nn.Module):
    """Lets two inputs through."""

    def forward(self, x):
        return x[:, :2]


@pytest.mark.slow
def test_on_digits_the_evidence_prefers_the_network_that_predicts_better():
    """A small convolutional network predicts better than one with 32 hidden units."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=generator(0))
    x, y = x[order] / 8 - 1, y[order]
    train = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=100, shuffle=True)
    networks = {
        "hidden": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        "convolution": nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
        ),
    }
    evidence, score = {}, {}
    for name, model in networks.items():
        options = {"optimizer_kwargs": {"lr": 0.01}, "n_epochs": 60, "marglik_frequency": 5, "n_hypersteps": 20}
        la, _, margliks, _ = marglik_training(model, train, **options)
        evidence[name] = float(la.log_marginal_likelihood())
        assert evidence[name] > -margliks[0] + 200, "nats, from the first fit to the best"
        score[name] = nn.functional.nll_loss(la(x[400:]).log(), y[400:], reduction="none")
    assert evidence["convolution"] > evidence["hidden"] + 20
    difference = score["hidden"] - score["convolution"]
    assert float(difference.mean()) > 5 * float(difference.std()) / len(difference) ** 0.5, "on digits held out"
