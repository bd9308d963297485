"""Models with several heads: each last layer by itself, and all weights together, compared with dense derivatives."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, Dataset

from laplace import Laplace
from laplace.errors import InputError, MissingKeyError, NotFittedError, ShapeError, StateError, UnsupportedError
from laplace.likelihoods import GaussianLikelihood, PoissonLikelihood

SIGMA = 0.5


class Network(nn.Module):
    """Two heads, returned as a mapping or a tuple."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.kind, self.size = nn.Linear(5, 3), nn.Linear(5, 2)
        self.as_tuple = as_tuple
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        found = {"kind": self.kind(h), "size": self.size(h)}
        return tuple(found.values()) if self.as_tuple else found


class One(nn.Module):
    """One head of the network."""

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[self.key]


GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(30, 4, dtype=torch.float64, generator=GENERATOR)
Y = {"kind": torch.arange(30) % 3, "size": torch.randn(30, 2, dtype=torch.float64, generator=GENERATOR)}
BATCHES = [(X[:17], {key: y[:17] for key, y in Y.items()}), (X[17:], {key: y[17:] for key, y in Y.items()})]
SIZE = GaussianLikelihood(sigma_noise=torch.tensor(SIGMA))
HEADS: dict[str | int, Any] = {"kind": "classification", "size": SIZE}


class Rows(Dataset[Any]):
    """Single data, which a loader collates."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index], {key: y[index] for key, y in Y.items()}


def fitted(*options: str, model: nn.Module | None = None, **keywords: Any) -> Any:
    la = Laplace(Network() if model is None else model, HEADS, *options, **keywords)
    la.fit(BATCHES)
    return la


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_last_layer_is_that_of_its_head(structure: str) -> None:
    model = Network()
    la, found = fitted("last_layer", structure, model=model), {}
    for key in HEADS:
        alone = Laplace(One(model, str(key)), HEADS[key], "last_layer", structure)
        alone.fit([(x, y[str(key)]) for x, y in BATCHES])
        found[key] = alone
        for got, expected in zip(parts(la(X)[key]), parts(alone(X)), strict=True):
            torch.testing.assert_close(got, expected)
        for got, expected in zip(la.predict(X)[key].as_tuple(), alone.predict(X).as_tuple(), strict=True):
            assert got.shape == expected.shape
        assert la[key].mean.shape == alone.mean.shape
    expected = sum(float(one.log_marginal_likelihood()) for one in found.values())
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected)


def parts(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def dense(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of both heads side by side and their Jacobians, by reverse mode."""
    weights: dict[str, Tensor] = dict(model.named_parameters())

    def outputs(given: dict[str, Tensor]) -> Tensor:
        found = functional_call(model, given, (x,))
        return torch.cat([found["kind"], found["size"]], 1)

    jacobian = jacrev(outputs)(weights)
    return outputs(weights), torch.cat([part.flatten(2) for part in jacobian.values()], 2)


@pytest.mark.parametrize("structure", ["full", "diag", "blockdiag"])
def test_all_weights_are_those_of_both_heads(structure: str) -> None:
    """H = Σ_n J_nᵀ Λ_n J_n with Λ = diag(p) − p pᵀ for one head and I/σ² for the other; predictions by hand."""
    model = Network()
    la = fitted("all", structure, model=model, prior_precision=0.7)
    f, J = (part.detach() for part in dense(model, X))
    p = f[:, :3].softmax(1)
    curvature = torch.zeros(30, 5, 5, dtype=torch.float64)
    curvature[:, :3, :3] = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    curvature[:, 3:, 3:] = torch.eye(2) / SIGMA**2
    whole = torch.einsum("nap,nab,nbq->pq", J, curvature, J)
    sizes = [weight.numel() for weight in model.parameters()]
    kept = {
        "full": torch.ones_like(whole),
        "diag": torch.eye(len(whole)),
        "blockdiag": torch.block_diag(*(torch.ones(n, n) for n in sizes)),
    }
    precision = whole * kept[structure] + 0.7 * torch.eye(len(whole))
    covariance = J @ torch.linalg.inv(precision) @ J.mT
    mean, cov = la(X)["size"]
    torch.testing.assert_close(mean, f[:, 3:])
    torch.testing.assert_close(cov, covariance[:, 3:, 3:])
    variance = covariance.diagonal(dim1=1, dim2=2)[:, :3]
    torch.testing.assert_close(la(X)["kind"], (f[:, :3] / (1 + torch.pi / 8 * variance).sqrt()).softmax(1))
    nll = -p.gather(1, Y["kind"][:, None]).log().sum()
    nll = nll - torch.distributions.Normal(f[:, 3:], SIGMA).log_prob(Y["size"]).sum()
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    logs = torch.linalg.slogdet(precision)[1] - len(whole) * torch.log(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(la.log_marginal_likelihood(), -nll - 0.5 * (logs + 0.7 * theta.square().sum()))


def test_kron_of_all_weights_has_the_factors_of_the_heads() -> None:
    """The blocks of a head's own layer are those of that head alone."""
    model = Network()
    la = fitted("all", "kron", model=model)
    for key, at in (("kind", 25), ("size", 43)):
        alone = Laplace(One(model, key), HEADS[key], "last_layer", "kron")
        alone.fit([(x, y[key]) for x, y in BATCHES])
        n, scale = len(alone.mean), 1 / SIGMA**2 if key == "size" else 1.0
        block = la.joint.H.to_matrix()[at : at + n, at : at + n]
        torch.testing.assert_close(block, scale * alone.H.to_matrix())


def test_parts_of_a_prediction_with_all_weights() -> None:
    la = fitted("all", "full")
    told, found = la.predict(X, n_samples=50), la(X)
    torch.testing.assert_close(told["kind"].mean, found["kind"])
    torch.testing.assert_close(told["size"].epistemic_variance, found["size"][1].diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(told["size"].aleatoric_variance, torch.full((30, 2), SIGMA**2, dtype=torch.float64))
    torch.testing.assert_close(told["kind"].expected_entropy + told["kind"].mutual_information, told["kind"].entropy)
    whole = la.predict(DataLoader(Rows(), 8), n_samples=50)
    torch.testing.assert_close(whole["size"].mean, told["size"].mean)


@pytest.mark.parametrize("options", [{"pred_type": "nn"}, {"link_approx": "mc"}, {"n_samples": 7}], ids=str)
def test_options_hold_for_all_heads(options: dict[str, Any]) -> None:
    la = fitted("all", "full")
    found = la(X, generator=torch.Generator().manual_seed(0), **options)
    assert found["kind"].shape == (30, 3)
    torch.testing.assert_close(found["kind"].sum(1), torch.ones(30, dtype=torch.float64))
    assert bool((found["size"][1] != 0).any())


def test_joint_covariances_are_those_of_one_head() -> None:
    la = Laplace(Network(), {"size": SIZE, "kind": SIZE}, "all", "full")
    la.fit([(X, {"size": Y["size"], "kind": torch.zeros(30, 3, dtype=torch.float64)})])
    _, cov = la(X[:4], joint=True)["kind"]
    assert cov.shape == (12, 12)
    for row in range(4):
        block = la(X[row : row + 1])["kind"][1][0]
        torch.testing.assert_close(cov[3 * row : 3 * row + 3, 3 * row : 3 * row + 3], block)


@pytest.mark.parametrize("weights", ["last_layer", "all"])
def test_tuples_have_numbers_for_keys(weights: str) -> None:
    la = Laplace(Network(as_tuple=True), {0: "classification", 1: SIZE}, weights, "diag")
    la.fit([(x, (y["kind"], y["size"])) for x, y in BATCHES])
    expected = fitted(weights, "diag")(X)
    torch.testing.assert_close(la(X)[0], expected["kind"])
    torch.testing.assert_close(la(X)[1][1], expected["size"][1])


def test_heads_of_last_layers_may_miss_labels() -> None:
    model = Network()
    y = {**Y, "kind": Y["kind"].where(torch.arange(30) > 9, -100)}
    la = Laplace(model, HEADS, "last_layer", "full")
    la.fit([(X, y)])
    alone = Laplace(One(model, "kind"), "classification", "last_layer", "full")
    alone.fit([(X[10:], Y["kind"][10:])])
    torch.testing.assert_close(la["kind"].H, alone.H)
    with pytest.raises(UnsupportedError, match="masked targets"):
        Laplace(model, HEADS, "all", "full").fit([(X, y)])


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("weights", ["last_layer", "all"])
def test_tuning_chooses_a_prior(weights: str) -> None:
    la = fitted(weights, "diag")
    before = [float(one.prior_precision) for one in la._estimators]
    la.optimize_prior_precision()
    after = [float(one.prior_precision) for one in la._estimators]
    assert all(a != b for a, b in zip(before, after, strict=True))
    la.optimize_prior_precision("gridsearch", val_loader=BATCHES, grid_size=5)
    found = la.tune(BATCHES)
    assert set(found) == {"kind", "size"} if weights == "last_layer" else found.hyperparameters


@pytest.mark.parametrize("weights", ["last_layer", "all"])
def test_states_come_back(weights: str, tmp_path: Path) -> None:
    model = Network()
    la = fitted(weights, "kron", model=model)
    la.save(tmp_path / "state.pt")
    other = Laplace(model, HEADS, weights, "kron")
    other.load(tmp_path / "state.pt")
    torch.testing.assert_close(other(X)["size"][1], la(X)["size"][1])
    swapped = Laplace(model, {"size": SIZE, "kind": "classification"}, weights, "kron")
    with pytest.raises(StateError, match="heads"):
        swapped.load(tmp_path / "state.pt")
    other.fit(BATCHES, override=False)
    assert sum(one.n_data for one in other._estimators) == 2 * sum(one.n_data for one in la._estimators)


def test_an_iterator_serves_all_weights_alone() -> None:
    la = Laplace(Network(), HEADS, "all", "diag")
    la.fit(iter(BATCHES))
    torch.testing.assert_close(la(X)["kind"], fitted("all", "diag")(X)["kind"])
    with pytest.raises(InputError, match="iterator"):
        Laplace(Network(), HEADS, "last_layer", "diag").fit(iter(BATCHES))


@pytest.mark.parametrize("weights", ["last_layer", "all"])
def test_bad_targets_change_nothing(weights: str) -> None:
    la = fitted(weights, "diag")
    before = la(X)["size"][1]
    for wrong in (
        {"kind": Y["kind"]},
        {**Y, "size": Y["size"][:, :1]},
        {**Y, "size": Y["size"].long()},
        {**Y, "kind": Y["kind"] + 5},
        {**Y, "kind": 3},
        Y["kind"],
    ):
        with pytest.raises((InputError, ShapeError, UnsupportedError, MissingKeyError)):
            la.fit([(X, wrong)])
        torch.testing.assert_close(la(X)["size"][1], before)
    with pytest.raises((InputError, ShapeError, UnsupportedError, MissingKeyError)):
        la.fit([])


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UnsupportedError, match="empty mapping"):
        Laplace(Network(), {})
    with pytest.raises(UnsupportedError, match="compares inputs"):
        Laplace(Network(), {"kind": "reward_modeling"})
    with pytest.raises(UnsupportedError, match="likelihood"):
        Laplace(Network(), {"kind": "clasification"})
    with pytest.raises(UnsupportedError, match="output_key"):
        Laplace(Network(), HEADS, output_key="kind")
    with pytest.raises(TypeError, match="prior_precisoin"):
        Laplace(Network(), HEADS, "all", prior_precisoin=2.0)
    la = Laplace(Network(), HEADS, "all", "diag")
    with pytest.raises(NotFittedError):
        la(X)
    with pytest.raises(UnsupportedError, match=r"la\.joint"):
        la["kind"]
    with pytest.raises(MissingKeyError, match="'kind', 'size'"):
        la["color"]
    with pytest.raises(UnsupportedError, match=r"la\[key\]"):
        _ = fitted("last_layer", "diag").joint
    missing = Laplace(Network(), {"kind": "classification", "color": "regression"}, "all", "diag")
    with pytest.raises(MissingKeyError, match="color"):
        missing.fit([(X, {"kind": Y["kind"], "color": Y["size"]})])


def counts(*shape: int) -> Tensor:
    return torch.arange(30 * shape[0]).reshape(30, *shape) % 4 if shape else torch.arange(30) % 2


OTHERS: dict[str, tuple[Any, int, Tensor]] = {
    "classification": ("classification", 3, Y["kind"]),
    "binary": ("binary", 1, counts()),
    "multilabel": ("multilabel", 2, (counts(2) % 2).double().where(torch.rand(30, 2, generator=GENERATOR) > 0.2, torch.nan).index_fill(1, torch.tensor([0]), 1.0)),
    "poisson": ("poisson", 2, counts(2)),
    "exposures": (PoissonLikelihood(exposure=True), 1, torch.stack([counts(1), 1 + counts(1)], -1).double()),
    "negative_binomial": ("negative_binomial", 1, counts(1)),
    "heteroscedastic_regression": ("heteroscedastic_regression", 2, Y["size"][:, :1]),
    "noise_covariance": (GaussianLikelihood(noise_covariance=torch.tensor([[1.0, 0.3], [0.3, 0.5]])), 2, Y["size"]),
}  # fmt: skip


class Pair(nn.Module):
    """A regression head, and one with so many outputs."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.size, self.other = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, n_outputs)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"size": self.size(h), "other": self.other(h)}


@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:A predicted rate is too large")
@pytest.mark.parametrize("name", OTHERS)
def test_every_likelihood_may_be_that_of_a_head(name: str) -> None:
    """All weights: the curvature is the sum of that of networks with one head each; so is the loss."""
    likelihood, n_outputs, y = OTHERS[name]
    model, targets = Pair(n_outputs), {"size": Y["size"], "other": y}
    la = Laplace(model, {"size": SIZE, "other": likelihood}, "all", "full")
    la.fit([(X, targets)])
    alone = {key: Laplace(model, one, "all", "full", output_key=key) for key, one in la.likelihoods.items()}
    for key, one in alone.items():
        one.fit([(X, targets[key])])
    scaled = {"size": 1 / SIGMA**2, "other": 1.0}
    torch.testing.assert_close(la.joint.H, sum(scaled[key] * one.H for key, one in alone.items()))
    expected = sum(float(one.log_likelihood) for one in alone.values())
    assert float(la.joint.log_likelihood) == pytest.approx(expected)
    la.optimize_prior_precision()
    la.optimize_prior_precision("gridsearch", val_loader=[(X, targets)], grid_size=5)
    for precision in (0.5, float(la.joint.prior_precision)):
        la.joint.prior_precision = precision
        assert all(bool(part.isfinite().all()) for part in la.predict(X)["other"].as_tuple())


@pytest.mark.parametrize("weights", ["last_layer", "all"])
def test_copies_have_a_model_of_their_own(weights: str) -> None:
    la = fitted(weights, "diag")
    expected = la(X)["size"][1]
    for copied in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        with torch.no_grad():
            for parameter in la.model.parameters():
                parameter.zero_()
        torch.testing.assert_close(copied(X)["size"][1], expected)
        copied.fit(BATCHES)
        torch.testing.assert_close(copied(X)["size"][1], expected)
        la = copied


def test_a_refit_keeps_hyperparameters() -> None:
    la = fitted("all", "diag", prior_precision=3.0)
    la.joint.prior_precision = 7.0
    la.fit(BATCHES)
    assert float(la.joint.prior_precision) == 7.0
    la.joint.weight_uncertainty = False
    torch.testing.assert_close(la(X)["size"][1], torch.zeros(30, 2, 2, dtype=torch.float64))


def test_the_noise_of_a_head_is_part_of_a_state() -> None:
    model = Network()
    la = Laplace(model, {"size": GaussianLikelihood(sigma_noise=0.5)}, "all", "diag")
    la.fit([(X, {"size": Y["size"]})])
    state = la.state_dict()
    other = Laplace(model, {"size": GaussianLikelihood(sigma_noise=0.1)}, "all", "diag")
    with pytest.raises(StateError, match="likelihood"):
        other.load_state_dict(state)
    with pytest.raises(StateError, match="1 states"):
        other.load_state_dict({**state, "states": []})


def test_hyperparameters_belong_to_estimators() -> None:
    la = fitted("all", "diag")
    with pytest.raises(UnsupportedError, match=r"'prior_precision' cannot be assigned.*la\.joint"):
        la.prior_precision = 2.0
    with pytest.raises(UnsupportedError, match=r"GaussianLikelihood\(sigma_noise=0.3\)"):
        Laplace(Network(), HEADS, sigma_noise=0.5)
