"""What is deterministic, or is given a generator, leaves PyTorch's global random numbers where they are."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.evaluation import fit_temperature, side_by_side

X = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES, TARGETS = [(X, torch.arange(12) % 3)], [(X, X.sum(1, keepdim=True))]


def network(n_outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, n_outputs))


def same_numbers() -> torch.Generator:
    return torch.Generator().manual_seed(0)


ESTIMATORS = [
    ("classification", "last_layer", "kron", {}),
    ("classification", "last_layer", "gp", {"n_subset": 6}),
    (
        "classification",
        "last_layer",
        "kron",
        {"functional_approximation": "nystrom", "subsample_size": 6, "n_eigenvalues": 3},
    ),
    (
        "classification",
        "last_layer",
        "kron",
        {"functional_approximation": "variational", "num_inducing": 3, "inducing_locations": "random"},
    ),
    ("classification", "all", "kron", {}),
    ("classification", "all", "lowrank", {}),
    ("classification", "all", "gp", {"n_subset": 6}),
    ("classification", "all", "kron", {"backend_kwargs": {"stochastic": True, "generator": same_numbers()}}),
    ("regression", "last_layer", "full", {}),
    ("regression", "all", "diag", {}),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the best of few points is at an end
WITH_GENERATOR = ({"link_approx": "mc"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"})


@pytest.mark.every(3, each_value=False)
@pytest.mark.parametrize(("likelihood", "subset", "structure", "options"), ESTIMATORS)
def test_the_global_random_state_stays(likelihood, subset, structure, options, tmp_path):
    data = CLASSES if likelihood == "classification" else TARGETS
    model = network(3 if likelihood == "classification" else 1)
    options = dict(options)
    if "functional_approximation" in options:
        structure = "gp"
    la = Laplace(model, likelihood, subset, structure, **options)
    weights, touched = structure != "gp", []

    def step(name, function, *args, **keywords):
        before = torch.get_rng_state()
        function(*args, **keywords)
        if not torch.equal(before, torch.get_rng_state()):
            touched.append(name)

    step("fit", la.fit, data)
    if options.get("functional_approximation") != "variational":
        step("tune", la.tune, data, n_steps=2)
        step("tune mc", la.tune, data, n_steps=2, link_approx="mc", n_samples=2)
        step("tune mc, generator", la.tune, data, n_steps=2, link_approx="mc", generator=same_numbers())
    approximate = options.get("functional_approximation")
    if approximate is None:
        step("marglik", la.optimize_prior_precision, n_steps=2)
    search = {"method": "gridsearch", "val_loader": data, "grid_size": 3, "log_prior_prec_min": -1}
    for link in ("probit", "mc") if approximate != "variational" else ():
        step(f"gridsearch {link}", la.optimize_prior_precision, link_approx=link, n_samples=2, **search)
    if weights and subset == "last_layer":
        step("cv", la.optimize_prior_precision, method="cv", train_loader=data, grid_size=2, n_folds=2)
    if approximate != "variational":
        step("evidence", la.log_marginal_likelihood)
    for link in ("probit", "bridge", "bridge_norm") if likelihood == "classification" else ("probit",):
        step(link, la, X, link_approx=link)
    for ways in WITH_GENERATOR[: 3 if weights else 1] if likelihood == "classification" else ():
        step(f"{ways}, generator", la, X, n_samples=2, generator=same_numbers(), **ways)
    if weights:
        step("sample", la.sample, 2, generator=same_numbers())
    step("functional_samples", la.functional_samples, X, n_samples=2, generator=same_numbers())
    step("predictive_samples", la.predictive_samples, X, n_samples=2, generator=same_numbers())
    step("save", la.save, tmp_path / "state.pt")
    step("load", la.load, tmp_path / "state.pt")
    if likelihood == "classification":
        step("side_by_side", side_by_side, model, {"Laplace": la}, data)
        step("temperature", fit_temperature, model, data)
    assert not touched


def test_samples_without_a_generator_are_new_each_time():
    la = Laplace(network(), "classification")
    la.fit(CLASSES)
    assert not torch.equal(la(X, pred_type="nn", n_samples=2), la(X, pred_type="nn", n_samples=2))
