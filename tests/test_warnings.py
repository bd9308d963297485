"""Warnings point at the line of the user's that led to them, whatever lies between."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import laplace
from laplace import Laplace
from laplace.errors import NumericalWarning, PerformanceWarning
from laplace.network import FeatureExtractor
from laplace.tuning import marglik

LIBRARY = Path(laplace.__file__).parent
X, Y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Recurrent(nn.Module):
    """A recurrent layer that has no formula, and a head."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(1, 3, batch_first=True, proj_size=2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.cell(x.unsqueeze(-1))[0][:, -1])


class Tied(nn.Module):
    """An embedding with the weight of the head."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table(x).mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))


def fitted(model=None, subset="last_layer"):
    la = Laplace(network() if model is None else model, "classification", subset)
    la.fit([(X, Y)])
    return la


def predict_after_training(subset):
    model = network()
    la = fitted(model, subset)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    la(X)


def tune_where_everything_is_right():
    fitted().tune([(X, fitted().model(X).argmax(-1))], refit=False, distance_aware=False)


def search_at_an_end():
    options = {"log_prior_prec_min": 3, "log_prior_prec_max": 4, "grid_size": 3}
    fitted().optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], **options)


def ascend_where_nothing_is_finite():
    def bounded(p):
        return p.sum() + (torch.nan if float(p.detach().sum()) > 2 else 0.0)

    marglik.optimize(bounded, torch.ones(1), n_steps=50, lr=0.1)


@pytest.mark.parametrize(
    ("call", "category"),
    [
        (lambda: predict_after_training("last_layer"), UserWarning),
        (lambda: predict_after_training("all"), UserWarning),
        (tune_where_everything_is_right, UserWarning),
        (search_at_an_end, UserWarning),
        (ascend_where_nothing_is_finite, NumericalWarning),
        (lambda: fitted(Recurrent(), "all"), PerformanceWarning),
        (lambda: FeatureExtractor(Tied(), "head"), UserWarning),
        (lambda: FeatureExtractor(Tied()).find_last_layer(torch.zeros(2, 3, dtype=torch.long)), UserWarning),
    ],
)
def test_a_warning_points_at_the_call_of_the_user(call, category):
    with pytest.warns(category) as caught:
        call()
    assert {Path(found.filename).name for found in caught} == {Path(__file__).name}


def test_the_library_warns_through_one_function():
    """Which finds that line."""
    elsewhere = []
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "warn" and path.name != "errors.py":
                elsewhere.append(f"{path.relative_to(LIBRARY)}:{node.lineno}")
    assert not elsewhere
