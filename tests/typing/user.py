"""What a user writes, with the types that pyright and mypy find in strict mode. `test_types.py` runs both on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import laplace
from laplace import (
    ELLA,
    DiagSubnetLaplace,
    FullLaplace,
    FunctionalLaplace,
    HessianStructure,
    KronLLLaplace,
    Laplace,
    Likelihood,
    Plan,
    Prediction,
    SubsetOfWeights,
    marglik_training,
)
from laplace.baselaplace.fitted import FittedLaplace
from laplace.evaluation import conformal
from laplace.likelihoods import CategoricalLikelihood, GaussianLikelihood
from laplace.several import SeveralHeads
from laplace.tuning import Tuning


def loader(y: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(len(y), 4), y), batch_size=5)


def network(n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, n_outputs))


def classify(x: Tensor, path: Path) -> None:
    model, data = network(3), loader(torch.arange(10) % 3)
    la = Laplace(model, "classification", prior_precision=2.0, backend_kwargs={"kfac_approx": "expand"})
    assert_type(la, KronLLLaplace[Literal["classification"]])
    assert_type(la.fit(data), KronLLLaplace[Literal["classification"]])
    assert_type(la.plan(data, tune=False), Plan)
    assert_type(la.tune(data, refit=True, limits={"output_temperature": (0.1, 10.0)}), Tuning)
    assert_type(la(x), Tensor)
    assert_type(la(x, link_approx="mc", n_samples=20, generator=torch.Generator()), Tensor)
    assert_type(la.predict(data), Prediction)
    assert_type(la.predict(x, link_approx="mf1").mean, Tensor)
    assert_type(la.ood_score(x, kind="density"), Tensor)
    assert_type(la.sample(n_samples=3), Tensor)
    assert_type(la.predictive_samples(x, n_samples=3), Tensor)
    assert_type(la.log_marginal_likelihood(prior_precision=torch.ones(1)), Tensor)
    la.optimize_prior_precision(method="gridsearch", val_loader=data, loss="brier", grid_size=3)
    la.prior_precision, la.output_temperature, la.damping = 3.0, 1.5, False
    assert_type(la.prior_precision, Tensor)
    assert_type(la.n_data, int)
    la.save(path)
    la.load(path)
    assert_type(laplace.load(path, model), FittedLaplace)
    read = laplace.load(path, model, "classification", backend_kwargs={"kfac_approx": "expand"})
    assert_type(read(x), Tensor)
    assert_type(read.predict(x), Prediction)
    print(la, la.tuning_, conformal(la, data, method="lac", link_approx="probit")(x))


def regress(x: Tensor) -> None:
    model, data = network(1), loader(torch.randn(10, 1))
    la = Laplace(model, "regression", "all", "full", sigma_noise=0.3)
    assert_type(la, FullLaplace[Literal["regression"]])
    mean, variance = la.fit(data, override=True, progress_bar=False)(x, joint=True)
    assert_type(mean, Tensor)
    assert_type(variance, Tensor)
    assert_type(la.predict_std(x), Tensor)
    la.tune(data, noise="scalar", score="crps", n_steps=5)
    assert_type(la.functional_samples(x, n_samples=3), Tensor)
    mean, variance = FullLaplace(model, GaussianLikelihood(sigma_noise=0.3)).fit(data)(x)
    counts = Laplace(model, Likelihood.POISSON, hessian_structure=HessianStructure.DIAG)
    mean, variance = counts.fit(loader(torch.ones(10, 1)))(x)


def other_weights(x: Tensor) -> None:
    model, data = network(3), loader(torch.arange(10) % 3)
    subnetwork = Laplace(model, CategoricalLikelihood(), "subnetwork", "diag", subnetwork_indices=torch.arange(5))
    assert_type(subnetwork, DiagSubnetLaplace[CategoricalLikelihood])
    assert_type(subnetwork.fit(data)(x), Tensor)
    process = Laplace(model, "classification", "all", "gp", n_subset=8)
    assert_type(process, FunctionalLaplace[Literal["classification"]])
    assert_type(process.fit(data)(x), Tensor)
    features = Laplace(
        model, "classification", "all", "gp", functional_approximation="nystrom", subsample_size=8, n_eigenvalues=4
    )
    assert_type(features, ELLA[Literal["classification"]])
    assert_type(features.fit(data, balanced=True)(x), Tensor)


def chosen_at_run_time(x: Tensor, text: str, likelihood: Likelihood) -> None:
    model, data = network(3), loader(torch.arange(10) % 3)
    la = Laplace(model, "classification", SubsetOfWeights("all"), HessianStructure(text))
    assert_type(la, FittedLaplace[Literal["classification"]])
    assert_type(la.fit(data)(x), Tensor)
    for structure in ("kron", "diag"):
        assert_type(Laplace(model, "classification", "all", structure).fit(data).predict(x), Prediction)
    for subset in SubsetOfWeights.ALL, SubsetOfWeights.LAST_LAYER:
        found = Laplace(model, likelihood, subset).fit(data)(x)
        print(found.shape if isinstance(found, Tensor) else found[0].shape)


def preferences(x: Tensor) -> None:
    la = Laplace(network(1), "reward_modeling").fit(loader(torch.arange(10) % 2))
    mean, _ = la(x)
    assert_type(mean, Tensor)
    assert_type(la(torch.stack([x, x], 1), fitting=True), Tensor)


def heads(x: Tensor) -> None:
    la = Laplace(network(2), {"kind": "classification", "price": "regression"})
    assert_type(la, SeveralHeads)
    print(la(x, link_approx="probit"), la["kind"].n_data, la.predict(x)["price"].mean)


def sees_a_mask(x: Tensor, la: KronLLLaplace) -> None:
    print(la(x, attention_mask=torch.ones(2, 3)), la.predict(x, attention_mask=torch.ones(2, 3)).mean)


def by_evidence() -> None:
    la, _, margliks, _ = marglik_training(
        network(3), loader(torch.arange(10) % 3), "classification", "diag", n_epochs=2, prior_structure="scalar"
    )
    print(la.prior_precision, margliks)


if __name__ == "__main__":
    inputs = torch.randn(2, 4)
    with tempfile.TemporaryDirectory() as folder:
        classify(inputs, Path(folder) / "la.pt")
    regress(inputs)
    other_weights(inputs)
    chosen_at_run_time(inputs, "diag", Likelihood.CLASSIFICATION)
    by_evidence()
