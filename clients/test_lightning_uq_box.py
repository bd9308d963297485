"""lightning-uq-box: Lightning modules that fit a Laplace approximation when a trainer tests them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning_uq_box.uq_methods import LaplaceClassification, LaplaceRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from laplace import Laplace

subsets = pytest.mark.parametrize("subset", ["last_layer", "all"])
structures = pytest.mark.parametrize("structure", ["full", "kron", "diag"])


class Rows(Dataset[dict[str, Tensor]]):
    """Batches are dictionaries in this package."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.inputs[index], "target": self.targets[index]}


class Data(LightningDataModule):
    """Twenty rows of three inputs."""

    def __init__(self, likelihood: str) -> None:
        super().__init__()
        inputs = torch.randn(20, 3)
        targets = inputs.sum(1, keepdim=True) if likelihood == "regression" else torch.arange(20) % 3
        self.rows = Rows(inputs, targets)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=8)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=10)


def network(likelihood: str) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1 if likelihood == "regression" else 3))


def after_testing(module: Any, data: Data, folder: Path) -> Any:
    """The module after a run of `Trainer.test`, as users call it."""
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.test(module, datamodule=data)
    return module


def plain(model: nn.Module, likelihood: str, data: Data, **options: Any) -> Any:
    """The same approximation without the package."""
    fitted = Laplace(copy.deepcopy(model), likelihood, **options)
    fitted.fit(DataLoader(torch.utils.data.TensorDataset(data.rows.inputs, data.rows.targets), batch_size=8))
    return fitted


@subsets
@structures
def test_a_regressor_says_what_the_plain_approximation_says(subset: str, structure: str, tmp_path: Path):
    data, model = Data("regression"), network("regression")
    options = {"subset_of_weights": subset, "hessian_structure": structure, "sigma_noise": 0.3, "prior_precision": 2.0}
    module = LaplaceRegression(Laplace(model, "regression", **options), tune_prior_precision=False)
    said = after_testing(module, data, tmp_path).predict_step(data.rows.inputs)
    mean, variance = plain(model, "regression", data, **options)(data.rows.inputs)
    torch.testing.assert_close(said["pred"], mean.squeeze())
    torch.testing.assert_close(said["epistemic_uct"], variance.squeeze().sqrt())
    torch.testing.assert_close(said["pred_uct"], (variance.squeeze() + 0.3**2).sqrt())
    assert len((tmp_path / "preds.csv").read_text().splitlines()) == 21


@subsets
@structures
def test_a_classifier_says_what_the_plain_approximation_says(subset: str, structure: str, tmp_path: Path):
    data, model = Data("classification"), network("classification")
    options = {"subset_of_weights": subset, "hessian_structure": structure, "prior_precision": 2.0}
    module = LaplaceClassification(Laplace(model, "classification", **options))
    said = after_testing(module, data, tmp_path).predict_step(data.rows.inputs)
    torch.testing.assert_close(said["pred"], plain(model, "classification", data, **options)(data.rows.inputs))
    assert said["pred_uct"].shape == (20,)
    assert len((tmp_path / "preds.csv").read_text().splitlines()) == 21


@subsets
@structures
def test_tuning_by_gradients_of_the_evidence_raises_it(subset: str, structure: str, tmp_path: Path):
    data, model = Data("regression"), network("regression")
    options = {"subset_of_weights": subset, "hessian_structure": structure}
    module = LaplaceRegression(
        Laplace(model, "regression", **options), tune_sigma_noise=True, tuning_lr=0.1, n_epochs_tuning=20
    )
    tuned = after_testing(module, data, tmp_path).laplace_model
    start = plain(model, "regression", data, **options, prior_precision=math.e, sigma_noise=math.e)
    assert tuned.log_marginal_likelihood() > start.log_marginal_likelihood()


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@subsets
def test_samples_have_one_row_per_datum(likelihood: str, pred_type: str, subset: str, tmp_path: Path):
    data = Data(likelihood)
    kind = LaplaceRegression if likelihood == "regression" else LaplaceClassification
    laplace = Laplace(network(likelihood), likelihood, subset_of_weights=subset)
    module = kind(laplace, pred_type=pred_type, link_approx="mc", num_samples=7)
    said = after_testing(module, data, tmp_path).predict_step(data.rows.inputs)
    assert said["samples"].shape == ((20, 1, 7) if likelihood == "regression" else (7, 20, 3))
    assert len(said["pred"]) == 20
