"""torch-uncertainty: `LaplaceApprox`, one of its methods of post-processing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.post_processing import LaplaceApprox

from laplace import Laplace

TASKS = ["classification", "regression"]
tasks = pytest.mark.parametrize("task", TASKS)
subsets = pytest.mark.parametrize("subset", ["last_layer", "all"])
structures = pytest.mark.parametrize("structure", ["full", "kron", "diag"])


def network_and_data(task: str) -> tuple[nn.Module, DataLoader[Any]]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(20, 3)
    return model, DataLoader(TensorDataset(inputs, torch.arange(20) % 3 if task == "classification" else 2 * inputs), 8)


@tasks
@subsets
@structures
@pytest.mark.parametrize("optimize", [True, False], ids=["tuned", "untuned"])
def test_it_says_what_the_plain_approximation_says(task: str, subset: str, structure: str, optimize: bool):
    model, loader = network_and_data(task)
    options = {"subset_of_weights": subset, "hessian_structure": structure}
    ours = Laplace(copy.deepcopy(model), task, **options)
    theirs = LaplaceApprox(task, model, subset, structure, optimize_prior_precision=optimize)
    theirs.fit(loader)
    ours.fit(loader)
    if optimize:
        ours.optimize_prior_precision(method="marglik")
        assert theirs.la.prior_precision.item() != 1
    inputs = torch.randn(6, 3)
    said, expected = theirs(inputs), ours(inputs)
    torch.testing.assert_close(said, expected if task == "classification" else expected[0])


@pytest.mark.parametrize(
    ("pred_type", "link"), [("glm", "mc"), ("glm", "bridge"), ("glm", "bridge_norm"), ("nn", "mc")]
)
@subsets
def test_every_link_gives_probabilities(pred_type: str, link: str, subset: str):
    model, loader = network_and_data("classification")
    method = LaplaceApprox("classification", model, subset, pred_type=pred_type, link_approx=link)
    method.fit(loader)
    probabilities = method(torch.randn(6, 3))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
    assert (probabilities > 0).all()


def test_a_model_can_be_set_later():
    model, loader = network_and_data("regression")
    method = LaplaceApprox("regression")
    method.set_model(model)
    method.fit(loader)
    inputs = torch.randn(6, 3)
    torch.testing.assert_close(method(inputs), model(inputs))
