"""Bars say what is being done, over how much; without being asked for there is none."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.evaluation import fit_temperature, predict, side_by_side

X = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(X.split(4), (torch.arange(12) % 3).split(4), strict=True))


def approximation(subset: str = "all"):
    torch.manual_seed(0)
    return Laplace(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), "classification", subset)


def fit(la, **shown):
    la.fit(BATCHES, **shown)


def tune(la, **shown):
    la.tune(BATCHES, n_steps=3, refit=False, **shown)


def marglik(la, **shown):
    la.optimize_prior_precision(n_steps=3, **shown)


def gridsearch(la, **shown):
    grid = {"log_prior_prec_min": -9, "log_prior_prec_max": 9, "grid_size": 5}
    la.optimize_prior_precision(method="gridsearch", val_loader=BATCHES, **grid, **shown)


CALLS = {
    fit: ["[Fitting]"],
    tune: ["[Linearizing at validation data]", "[Scoring the network alone]", "hyperparameters]", "[Refining"],
    marglik: ["[Optimizing the marginal likelihood]"],
    gridsearch: ["[Linearizing at validation data]", "[Grid search]"],
    lambda la, **shown: predict(la, BATCHES, **shown): ["[Predicting]"],
    lambda la, **shown: la.predict(DataLoader(TensorDataset(X, torch.arange(12) % 3), 4), **shown): ["[Predicting]"],
    lambda la, **shown: fit_temperature(la.model, BATCHES, **shown): ["[Fitting the temperature]"],
    lambda la, **shown: side_by_side(la.model, {"Laplace": la}, BATCHES, ood_loader=BATCHES, **shown): [
        "[Predicting test data: MAP]",
        "[Predicting foreign data: Laplace]",
    ],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize(("call", "texts"), CALLS.items())
def test_bars_say_what_is_done(call, texts, subset, capsys):
    la = approximation(subset)
    la.fit(BATCHES)
    call(la)
    assert not capsys.readouterr().err
    call(la, progress_bar=True)
    shown = capsys.readouterr().err
    assert [text for text in texts if text not in shown] == []
    if "[Optimizing the marginal likelihood]" not in texts:
        assert "marginal" not in shown
        assert "3/3" in shown or "1/1" in shown, "how many batches there are is known"
