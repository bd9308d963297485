"""`la.export_module`: what leaves is what the estimator predicts, through every exporter, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import NotFittedError, ShapeError, UnsupportedError
from laplace.likelihoods import CategoricalLikelihood
from tests.compiled_predictions import TARGETS, X, fitted, network
from tests.exported_predictions import CASES, SLOW
from tests.tools import assert_close

ROOT = Path(__file__).parents[1]


def failed(names: Iterable[str]) -> dict[str, str]:
    """What went wrong in some of the cases, which run in a process of their own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.exported_predictions", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.keys() == set(names)
    return {name: outcome for name, outcome in outcomes.items() if outcome}


@pytest.mark.slow
def test_what_leaves_is_what_the_estimator_predicts() -> None:
    assert not failed(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("group", SLOW)
def test_predictions_of_every_kind_leave(group: str) -> None:
    assert not failed(SLOW[group])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subset", "structure", "options", "said"),
    [
        ("all", "kron", {}, 'KronLaplace takes derivatives.*subset_of_weights="last_layer"'),
        ("all", "gp", {"n_subset": 8}, "FunctionalLaplace predicts by.*Take the last layer"),
        ("last_layer", "gp", {"n_subset": 8}, "FunctionalLLLaplace predicts by.*Take the last layer"),
    ],
)
def test_what_needs_derivatives_is_refused_by_name(
    subset: str, structure: str, options: dict[str, Any], said: str
) -> None:
    la: Any = Laplace(network(), "classification", subset, structure, **options)
    la.fit([(X, TARGETS["classification"])])
    with pytest.raises(UnsupportedError, match=said):
        la.export_module()


def test_samples_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r'"mc" draws samples.*probit.*bridge_norm'):
        fitted(network()).export_module("mc")


def test_before_fit_there_is_nothing_to_export() -> None:
    with pytest.raises(NotFittedError):
        Laplace(network(), "classification", "last_layer").export_module()


class Locked(nn.Linear):
    """A layer with an attribute that cannot be copied."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.stream = sys.stdout

    def __deepcopy__(self, memo: Any) -> Any:
        msg = "cannot copy a stream"
        raise TypeError(msg)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(Locked(), nn.Linear(5, 3)).double()
    la = fitted(model)
    with pytest.raises(UnsupportedError, match=r"Sequential cannot be copied \(cannot copy a stream\).*torch.compile"):
        la.export_module()


class Looking(CategoricalLikelihood):
    """One whose link depends on values."""

    name = "looking"

    def predict(self, mean: Any, cov: Any, link: Any) -> Any:
        found = super().predict(mean, cov, link)
        return found if bool(found.max() > 0.5) else found.flip(-1)


def test_a_likelihood_that_looks_at_values_is_refused_with_the_reason() -> None:
    la: Any = Laplace(network(), Looking(), "last_layer", "kron")
    la.fit([(X, TARGETS["classification"])])
    la.accept_untuned()
    with pytest.raises(UnsupportedError, match=r"cannot be written as a graph.*PyTorch says.*torch.compile\(la\)"):
        la.export_module()


@pytest.mark.parametrize(("likelihood", "n_outputs"), [("regression", 1), ("binary", 1), ("classification", 3)])
def test_one_row_whose_axis_is_squeezed_away_is_refused(likelihood: str, n_outputs: int) -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, n_outputs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).tanh()).squeeze()

    y = TARGETS[likelihood][:, 0] if likelihood == "regression" else TARGETS[likelihood]
    la: Any = Laplace(Squeezing().double(), likelihood, "last_layer", "kron").fit([(X, y)])
    la.accept_untuned()
    module = la.export_module()
    for ours, theirs in zip(*((v if isinstance(v, tuple) else (v,)) for v in (module(X), la(X))), strict=True):
        assert_close(ours, theirs)
    with pytest.raises(ShapeError, match=r"without an axis for the batch.*squeeze\(-1\)"):
        module(X[:1])


def test_several_heads_leave_one_by_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = network(), network("poisson")

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"kind": self.one(x), "count": self.two(x)}

    la: Any = Laplace(Two().double(), {"kind": "classification", "count": "poisson"}, "last_layer", "kron")
    la.fit([(X, {"kind": TARGETS["classification"], "count": TARGETS["poisson"]})])
    for key, expected in la(X).items():
        found = la[key].export_module()(X)
        for ours, theirs in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
            assert_close(ours, theirs)
