"""Every keyword of the methods that are not predictions changes a result, or what is shown, or raises."""

import inspect

import pytest
import torch

from laplace import ParametricLaplace
from laplace.errors import StateError
from tests.cases import BASIC
from tests.contracts import generator
from tests.estimators import estimator, fitted
from tests.tools import assert_close

CASE = BASIC[0]
GRID = {"method": "gridsearch", "val_loader": "held out", "grid_size": 5}
SAMPLED = {**GRID, "pred_type": "nn", "n_samples": 5, "generator": 0}
TUNING = {
    "pred_type": ({**GRID, "generator": 0, "n_samples": 3}, {**SAMPLED, "n_samples": 3}),
    "method": ({}, GRID),
    "n_steps": ({}, {"n_steps": 3}),
    "lr": ({"n_steps": 5}, {"n_steps": 5, "lr": 0.01}),
    "init_prior_prec": ({"n_steps": 5}, {"n_steps": 5, "init_prior_prec": 9.0}),
    "prior_structure": ({}, {"prior_structure": "layerwise"}),
    "val_loader": (GRID, {**GRID, "val_loader": "training"}),
    "loss": (GRID, {**GRID, "loss": lambda p, y: p.max()}),
    "log_prior_prec_min": (GRID, {**GRID, "log_prior_prec_min": 1}),
    "log_prior_prec_max": (GRID, {**GRID, "log_prior_prec_max": -1}),
    "grid_size": (GRID, {**GRID, "grid_size": 1}),
    "log_prior_prec_base": (GRID, {**GRID, "log_prior_prec_base": 2.0}),
    "link_approx": (GRID, {**GRID, "link_approx": "bridge"}),
    "n_samples": (SAMPLED, {**SAMPLED, "n_samples": 4}),
    "generator": (SAMPLED, {**SAMPLED, "generator": 1}),
    "bounds": ({}, {"bounds": (1e-3, 0.1)}),
    "verbose": ({}, {"verbose": True}),
    "progress_bar": ({}, {"progress_bar": True}),
}
"""Two sets of keywords that differ in one."""


def tuned(options, capsys, scores):
    """Everything that tuning shows: the chosen precision, the scores of the grid, what it prints."""
    la = fitted(CASE, "full")
    options = dict(options)
    if "val_loader" in options:
        batches = list(CASE.batches(4, 4))
        options["val_loader"] = batches if options["val_loader"] == "training" else batches[:1]
    if "generator" in options:
        options["generator"] = generator(options["generator"])
    if options.get("method") == "gridsearch":
        given = options.get("loss", lambda p, y: -p.gather(1, y[:, None]).log().mean())
        options["loss"] = lambda p, y: scores.append(float(given(p, y))) or scores[-1]
    la.optimize_prior_precision(**options)
    return la.prior_precision.tolist(), scores, capsys.readouterr()


def test_the_table_covers_every_keyword_of_tuning():
    # Noise is of regression, tempering is refused: tests/baselaplace/test_tuned_by_evidence.py; others: test_refitted.py.
    others = {"self", "noise", "temperature", "train_loader", "n_folds", "refit"}
    assert set(inspect.signature(ParametricLaplace.optimize_prior_precision).parameters) == {*others, *TUNING}


@pytest.mark.parametrize("keyword", TUNING)
@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:The validation loss is the same")
def test_every_keyword_of_tuning_has_an_effect(keyword, capsys):
    first, second = (tuned(options, capsys, []) for options in TUNING[keyword])
    assert first != second


def test_every_keyword_of_fit_has_an_effect(capsys):
    assert set(inspect.signature(ParametricLaplace.fit).parameters) == {
        "self",
        "train_loader",
        "override",
        "progress_bar",
    }
    la = fitted(CASE, "full")
    once = la.n_data
    la.fit(CASE.batches(1, 3), override=False)
    assert la.n_data == 2 * once
    assert capsys.readouterr().err == ""
    la.fit(CASE.batches(1, 3), progress_bar=True)
    assert "Fitting" in capsys.readouterr().err
    assert la.n_data == once


def test_every_keyword_of_samples_densities_and_evidence_has_an_effect(tmp_path):
    la = fitted(CASE, "full")
    assert len(la.sample(3)) == 3
    assert torch.equal(la.sample(2, generator=generator(0)), la.sample(2, generator=generator(0)))
    assert not torch.equal(la.sample(2, generator=generator(0)), la.sample(2, generator=generator(1)))
    assert la.log_prob(la.mean) != la.log_prob(la.mean, normalized=False)
    before = la.log_marginal_likelihood()
    assert la.log_marginal_likelihood(prior_precision=3.0) != before
    la.save(tmp_path / "state")
    other = estimator(CASE, "full")
    other.load(tmp_path / "state", map_location="cpu")
    assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    with pytest.raises(StateError, match="elsewhere"):
        other.load(tmp_path / "state", map_location="elsewhere")
