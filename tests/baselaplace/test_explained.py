"""`predict`: the parts of a prediction, compared with moments and entropies that are computed by themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, Prediction
from laplace.errors import InputError, NotFittedError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, GaussianLikelihood

CLASSES = ("entropy", "expected_entropy", "mutual_information")
NUMBERS = ("epistemic_variance", "aleatoric_variance", "total_variance")


def network(n_outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, n_outputs)).double()


X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS: dict[str, Tensor] = {
    "classification": torch.arange(40) % 3,
    "binary": torch.arange(40) % 2,
    "regression": torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "poisson": torch.arange(80).reshape(40, 2) % 5,
    "multilabel": torch.arange(80).reshape(40, 2) // 3 % 2,
    "negative_binomial": torch.arange(80).reshape(40, 2) % 7,
    "heteroscedastic_regression": torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
}
N_OUTPUTS = {"classification": 3, "binary": 1} | dict.fromkeys([*TARGETS][2:], 2)


def fitted(likelihood: str, *options: str, **keywords: Any) -> Any:
    la = Laplace(network(N_OUTPUTS[likelihood]), likelihood, *options, **keywords)
    la.fit([(X, TARGETS[likelihood])])
    la.accept_untuned()
    return la


WEIGHTS = [("last_layer", "full"), ("last_layer", "kron"), ("all", "diag"), ("all", "gp")]


def of_weights(likelihood: str, weights: tuple[str, str], **keywords: Any) -> Any:
    return fitted(likelihood, *weights, **({"n_subset": 40} if weights[1] == "gp" else {}), **keywords)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("likelihood", TARGETS)
def test_the_mean_is_what_a_call_returns(likelihood: str, weights: tuple[str, str]) -> None:
    la = of_weights(likelihood, weights)
    told, found = la.predict(X[:5]), la(X[:5])
    mean = found if isinstance(found, Tensor) else found[0]
    torch.testing.assert_close(told.mean, mean)
    there, absent = (CLASSES, NUMBERS) if isinstance(found, Tensor) else (NUMBERS, CLASSES)
    assert all(getattr(told, name) is None for name in absent)
    expected = [told.mean, *(getattr(told, name) for name in there)]
    assert [id(part) for part in told.as_tuple()] == [id(part) for part in expected]
    if not isinstance(found, Tensor):
        torch.testing.assert_close(told.epistemic_variance, found[1].diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("sigma", [0.5, [0.5, 2.0]], ids=str)
def test_noise_of_a_regression_is_its_own(sigma: Any) -> None:
    la = fitted("regression", "last_layer", "full", sigma_noise=torch.tensor(sigma, dtype=torch.float64))
    told, variance = la.predict(X[:7]), la(X[:7])[1].diagonal(dim1=1, dim2=2)
    noise = torch.tensor(sigma, dtype=torch.float64).square().expand(7, 2)
    torch.testing.assert_close(told.aleatoric_variance, noise)
    torch.testing.assert_close(told.total_variance, variance + noise)


def test_variances_of_counts_are_those_of_the_integral() -> None:
    """Var y = E[Var(y|f)] + Var(E[y|f]), by Gauss–Hermite quadrature over f."""
    la = fitted("poisson", "last_layer", "full")
    told, (mean, cov) = la.predict(X[:4]), la._glm_predictive_distribution(X[:4])
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / math.sqrt(2 * math.pi)
    rate = (mean.unsqueeze(-1) + cov.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(-1) * nodes).exp()
    expected = (rate * weights).sum(-1)
    spread = (rate.square() * weights).sum(-1) - expected.square()
    torch.testing.assert_close(told.aleatoric_variance, expected)
    torch.testing.assert_close(told.epistemic_variance, spread)
    torch.testing.assert_close(told.total_variance, expected + spread)


@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_entropies_are_those_of_the_posterior(likelihood: str) -> None:
    """Compared with weights that are drawn here from the dense posterior, and their softmax."""
    la = fitted(likelihood, "last_layer", "full", prior_precision=0.3)
    told = la.predict(X[:6], link_approx="mc", n_samples=20000)
    features = torch.tanh(la.model.model[0](X[:6])).detach()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(20000, len(la.mean), dtype=torch.float64, generator=generator)
    draws = la.mean + noise @ torch.linalg.cholesky(torch.linalg.inv(la.posterior_precision)).T
    n = N_OUTPUTS[likelihood]
    logits = draws[:, : 6 * n].view(-1, n, 6) @ features.T + draws[:, 6 * n :].unsqueeze(-1)
    logits = logits.mT if n > 1 else torch.cat([torch.zeros_like(logits), logits], 1).mT
    p = logits.softmax(-1)
    entropies = -(p * p.log()).sum(-1)
    total = -(p.mean(0) * p.mean(0).log()).sum(-1)
    torch.testing.assert_close(told.entropy, total, atol=0.01, rtol=0)
    torch.testing.assert_close(told.expected_entropy, entropies.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(told.mutual_information, total - entropies.mean(0), atol=0.01, rtol=0)
    assert bool((told.mutual_information > 0.005).all())


def test_each_label_has_entropies_of_its_own() -> None:
    """Those of the likelihood of one logit, with the same mean and variance."""
    la = fitted("multilabel", "last_layer", "diag", prior_precision=0.3)
    told = la.predict(X[:6], n_samples=20000)
    assert told.entropy.shape == told.mutual_information.shape == (6, 2)
    p = la(X[:6])
    torch.testing.assert_close(told.entropy, -(p * p.log() + (1 - p) * (1 - p).log()))
    head = la.model.last_layer
    for c in range(2):
        one = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        one[0].load_state_dict(la.model.model[0].state_dict())
        with torch.no_grad():
            one[2].weight.copy_(head.weight[c : c + 1])
            one[2].bias.copy_(head.bias[c : c + 1])
        single = Laplace(one, "binary", "last_layer", "diag", prior_precision=0.3)
        single.fit([(X, TARGETS["multilabel"][:, c])])
        single.accept_untuned()
        torch.testing.assert_close(told.entropy[:, c], single.predict(X[:6]).entropy)
        alone = single.predict(X[:6], n_samples=20000).mutual_information
        torch.testing.assert_close(told.mutual_information[:, c], alone, atol=0.01, rtol=0)


@pytest.mark.parametrize("link", ["probit", "mc", "mf2", "bridge"])
def test_parts_add_up(link: str) -> None:
    told = fitted("classification", "last_layer", "kron", prior_precision=0.01).predict(X, link, n_samples=7)
    torch.testing.assert_close(told.expected_entropy + told.mutual_information, told.entropy)
    assert bool((told.expected_entropy >= 0).all())
    assert bool((told.mutual_information >= 0).all())


def test_without_the_weights_nothing_is_epistemic() -> None:
    for likelihood in ("classification", "regression"):
        la = fitted(likelihood, "last_layer", "kron")
        la.weight_uncertainty = False
        told = la.predict(X)
        epistemic = told.mutual_information if likelihood == "classification" else told.epistemic_variance
        torch.testing.assert_close(epistemic, torch.zeros_like(epistemic))
        whole = told.entropy if likelihood == "classification" else told.aleatoric_variance
        assert bool((whole > 0).all())


def test_width_at_foreign_inputs_is_epistemic() -> None:
    la = fitted("classification", "last_layer", "kron")
    la.tune([(X + 0.1, TARGETS["classification"])], refit=False)
    la.weight_uncertainty, la.distance_scale = False, 10.0
    far = la.predict(100 * X)
    assert float(far.mutual_information.max()) > 0.05
    la.distance_scale = 0.0
    torch.testing.assert_close(la.predict(100 * X).mutual_information, torch.zeros(40, dtype=torch.float64))


def test_pairs_have_scores_or_probabilities() -> None:
    la = Laplace(network(1), "reward_modeling", "last_layer", "kron")
    pairs = X.reshape(20, 2, 4)
    la.fit([(pairs, torch.arange(20) % 2)])
    scores = la.predict(X)
    assert [tuple(part.shape) for part in scores.as_tuple()] == [(40, 1), (40, 1)]
    assert scores.aleatoric_variance is None
    told = la.predict(pairs, fitting=True)
    torch.testing.assert_close(told.mean, la(pairs, fitting=True))
    assert told.mutual_information is not None
    torch.testing.assert_close(told.expected_entropy + told.mutual_information, told.entropy)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_loader_is_one_batch_after_the_other(likelihood: str) -> None:
    la = fitted(likelihood, "last_layer", "kron")
    y = TARGETS[likelihood]
    whole = la.predict(X, link_approx="probit", n_samples=4)
    for loader in (
        DataLoader(TensorDataset(X, y), 16),
        DataLoader(TensorDataset(X), 16),
        (batch for batch in X.split(16)),
    ):
        found = la.predict(loader, n_samples=4)
        torch.testing.assert_close(found.mean, whole.mean)
        torch.testing.assert_close(found.as_tuple()[1], whole.as_tuple()[1])


def test_the_same_generator_gives_the_same_numbers() -> None:
    la = fitted("classification", "last_layer", "kron")
    first, second = (la.predict(X, n_samples=5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.mutual_information, second.mutual_information)


def test_one_pass_of_the_network() -> None:
    la = fitted("classification", "last_layer", "kron")
    calls: list[int] = []
    hook = la.model.model.register_forward_hook(lambda *_: calls.append(1))
    la.predict(X)
    hook.remove()
    assert len(calls) == 1


def test_a_prediction_cannot_be_changed() -> None:
    told = fitted("regression", "last_layer", "diag").predict(X)
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.mean = told.mean + 1
    assert isinstance(told, Prediction)


def test_what_cannot_be_predicted_is_said() -> None:
    with pytest.raises(NotFittedError):
        Laplace(network(3), "classification").predict(X)
    la = fitted("classification", "last_layer", "kron")
    with pytest.raises(InputError, match="yields no batch"):
        la.predict(iter([]))
    with pytest.raises(UnsupportedError, match="link_approx"):
        la.predict(X, "logit")
    with pytest.raises(UnsupportedError, match="n_sample"):
        la.predict(X, n_sampels=3)  # spelling: meant


@dataclasses.dataclass(frozen=True)
class Unsaid(GaussianLikelihood):
    """A likelihood that does not say the variance of its targets."""

    name = "unsaid"

    def noise_variance(self, mean: Tensor, variance: Tensor) -> Any:
        return AbstractLikelihood.noise_variance(self, mean, variance)


def test_a_likelihood_that_says_no_variance_is_refused() -> None:
    la = Laplace(network(2), Unsaid(), "last_layer", "diag")
    la.fit([(X, TARGETS["regression"])])
    with pytest.raises(UnsupportedError, match="noise_variance"):
        la.predict(X)


class View(nn.Module):
    """Outputs that are a view of a much larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, -1]


def test_of_a_loader_neither_graphs_nor_larger_tensors_are_kept() -> None:
    inputs = torch.randn(6, 50, 4)
    la = Laplace(View(), "regression", "all", "diag", enable_backprop=True)
    la.fit([(inputs, torch.randn(6, 2))])
    prediction = la.predict(DataLoader(TensorDataset(inputs.requires_grad_(), torch.randn(6, 2)), batch_size=6))
    for part in prediction.as_tuple():
        assert not part.requires_grad
        assert part.untyped_storage().nbytes() == part.nbytes
    assert la.predict(inputs).mean.requires_grad
