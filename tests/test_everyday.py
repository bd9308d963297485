"""What people reach for first: the card of an estimator, its names, ``predict_std``, and ``laplace.load``."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace
from laplace import FullLLLaplace, Laplace
from laplace.baselaplace.card import EVERYDAY, size
from laplace.curvature import AutogradEF
from laplace.errors import StateError, StateNotFoundError, UnknownOptionError, UnsupportedError
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from laplace.likelihoods import GaussianLikelihood, PoissonLikelihood

Made = Callable[..., Any]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def numbers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), X[:, :2].sin()


OPTIONS: dict[str, dict[str, Any]] = {
    "FullSubnetLaplace": {"subnetwork_indices": torch.tensor([3, 0, 7])},
    "DiagSubnetLaplace": {"subnetwork_indices": torch.tensor([3, 0, 7])},
    "FunctionalLaplace": {"n_subset": 8, "seed": 3},
    "FunctionalLLLaplace": {"n_subset": 8, "diagonal_hessian": True},
    "ELLA": {"n_eigenvalues": 3, "subsample_size": 12},
    "LLELLA": {"n_eigenvalues": 3, "subsample_size": 12},
    "VaLLA": {"inducing_locations": X[:3], "alpha": 1.0},
    "LLVaLLA": {"inducing_locations": X[:3], "alpha": 1.0},
    "LowRankLaplace": {"rank": 3},
    "LowRankLLLaplace": {"captured_trace": 0.5},
}
CLASSES = {cls.__name__: cls for cls in (*ESTIMATORS.values(), *FUNCTIONAL.values())}


KEPT = {
    "asdl_fisher_kwargs", "functional_variance_fast", "log_det_posterior_precision", "log_det_prior_precision",
    "log_det_ratio", "n_layers", "params", "predictive", "prior_precision_diag", "scatter",
}  # fmt: skip
"""What nobody needs who does not have it in his code already."""


@pytest.mark.parametrize("name", sorted(KEPT))
def test_names_that_are_kept_for_other_code_say_so(name: str) -> None:
    for cls in (*CLASSES.values(), laplace.BaseLaplace):
        found = getattr(cls, name, None)
        assert found is None or "Kept for code written for laplace-torch" in str(found.__doc__), cls
    assert name not in EVERYDAY


def saved(la: Any) -> io.BytesIO:
    file = io.BytesIO()
    la.save(file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", CLASSES)
def test_load_makes_the_estimator_that_was_saved(name: str) -> None:
    model = network()
    la: Any = CLASSES[name](model, "classification", **OPTIONS.get(name, {}))
    la.fit([(X, Y)], **({"iterations": 2} if name.endswith("VaLLA") else {}))
    if not name.endswith("VaLLA"):
        la.prior_precision = 0.3
    again: Any = laplace.load(saved(la), model)
    assert type(again) is type(la)
    torch.testing.assert_close(again(X), la(X))
    torch.testing.assert_close(again.prior_precision, la.prior_precision)
    assert repr(again).replace("cpu", "") == repr(la).replace("cpu", "") or "tuned" in repr(la)


def test_load_takes_kind_likelihood_and_options_from_where_they_are() -> None:
    model, y = numbers()
    la = Laplace(model, "regression", "last_layer", "full", backend=AutogradEF, sigma_noise=0.2)
    la.fit([(X, y)])
    again: Any = laplace.load(saved(la), model)
    assert (again.likelihood, again.backend.kind, float(again.sigma_noise)) == ("regression", la.backend.kind, 0.2)
    assert laplace.load(saved(la), model, dict_key_y="target").dict_key_y == "target"
    with pytest.raises(UnknownOptionError, match="rank"):
        laplace.load(saved(la), model, rank=3)


def test_load_asks_for_a_likelihood_that_a_name_does_not_make() -> None:
    model, y = numbers()
    noise = GaussianLikelihood(noise_covariance=torch.eye(2, dtype=torch.float64) * 0.1)
    la = Laplace(model, noise, "last_layer", "full")
    la.fit([(X, y)])
    with pytest.raises(UnsupportedError, match="likelihood=…"):
        laplace.load(saved(la), model)
    again: Any = laplace.load(saved(la), model, likelihood=noise)
    torch.testing.assert_close(again(X), la(X))


def test_load_refuses_what_is_no_estimator(tmp_path: Any) -> None:
    model = network()
    with pytest.raises(StateNotFoundError):
        laplace.load(tmp_path / "nothing.pt", model)
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, file)
    file.seek(0)
    with pytest.raises(StateError, match="of which class"):
        laplace.load(file, model)

    class Mine(FullLLLaplace):
        pass

    mine = Mine(model, "classification")
    mine.fit([(X, Y)])
    with pytest.raises(UnsupportedError, match="Mine"):
        laplace.load(saved(mine), model)
    la = Laplace(model, "classification")
    la.fit([(X, Y)])
    file = saved(la)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(StateError, match="weights of the model differ"):
        laplace.load(file, model)


def test_load_leaves_several_heads_to_their_own_load() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    model = Two().double()
    la = Laplace(model, {"a": "classification", "b": "regression"})
    la.fit([(X, {"a": Y, "b": X[:, :1]})])
    with pytest.raises(UnsupportedError, match="several heads"):
        laplace.load(saved(la), model)


@pytest.mark.parametrize("name", CLASSES)
def test_the_card_says_what_an_estimator_is(name: str) -> None:
    la: Any = CLASSES[name](network(), "classification", **OPTIONS.get(name, {}))
    before = repr(la)
    assert before.startswith(name)
    assert "no: call fit(train_loader)" in before
    la.fit([(X, Y)], **({"iterations": 2} if name.endswith("VaLLA") else {}))
    after = repr(la)
    assert "24 rows" in after
    assert "classification" in after
    assert f"<code>{name}</code>" in la._repr_html_()
    assert repr(copy.deepcopy(la)) == after


def test_the_card_says_what_was_tuned_and_by_what() -> None:
    la = Laplace(network(), "classification")
    la.fit([(X, Y)])
    assert "no: call tune(val_loader)" in repr(la)
    la.tune([(X, Y)])
    assert f"validation: nll {la.tuning_.value:.4f}" in repr(la)
    model, _ = numbers()
    of_numbers = Laplace(model, "regression", sigma_noise=0.25, prior_mean=1.0, backend_kwargs={"stochastic": True})
    assert "sigma noise:             0.25" in repr(of_numbers)
    assert "prior mean:              1" in repr(of_numbers)
    assert "stochastic=True" in repr(of_numbers)
    assert "output temperature" not in repr(of_numbers)


def test_an_object_that_is_not_made_yet_has_a_card() -> None:
    assert "not constructed" in repr(FullLLLaplace.__new__(FullLLLaplace))


def test_the_card_counts_memory_once() -> None:
    shared = torch.zeros(1000, dtype=torch.float32)
    assert size([shared, {"again": shared}, (torch.zeros(250, dtype=torch.float64),)]) == "6.0 kB"
    assert size([]) == "0 bytes"


def test_what_tuning_found_is_json() -> None:
    la = Laplace(network(), "classification")
    la.fit([(X, Y)])
    told = la.tune([(X, Y)])
    read = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert read["method"] == "validation"
    assert read["value"] == told.value
    assert read["hyperparameters"]["prior_precision"] == told.hyperparameters["prior_precision"].tolist()


def test_dir_lists_the_everyday_names_and_those_of_a_users_class() -> None:
    class Mine(FullLLLaplace):
        extra_name: int = 3

        def again(self) -> None:
            """Something of one's own."""

    la = Mine(network(), "classification")
    la.fit([(X, Y)])
    listed = dir(la)
    assert {"fit", "tune", "predict", "predict_std", "save", "load", "extra_name", "again"} <= set(listed)
    assert len([name for name in listed if name in EVERYDAY]) <= 18
    assert "posterior_precision" not in listed
    assert la.posterior_precision is not None  # there all the same


def test_predict_std_is_that_of_a_target() -> None:
    model, y = numbers()
    la = Laplace(model, "regression", "last_layer", "full", sigma_noise=0.3)
    la.fit([(X, y)])
    _, covariance = la(X)
    expected = (covariance.diagonal(dim1=1, dim2=2) + 0.3**2).sqrt()
    torch.testing.assert_close(la.predict_std(X), expected)
    torch.testing.assert_close(la.predict_std([(X[:10], y[:10]), (X[10:], y[10:])].__iter__()), expected)
    counts = Laplace(model, PoissonLikelihood(), "last_layer", "full")
    counts.fit([(X, torch.ones(24, 2, dtype=torch.float64))])
    torch.testing.assert_close(counts.predict_std(X), counts.predict(X).total_variance.sqrt())


def test_predict_std_of_probabilities_is_refused() -> None:
    la = Laplace(network(), "classification")
    la.fit([(X, Y)])
    with pytest.raises(UnsupportedError, match=r"entropies instead\. la\.predict"):
        la.predict_std(X)


@pytest.mark.parametrize("name", CLASSES)
def test_fit_returns_the_estimator(name: str) -> None:
    la: Any = CLASSES[name](network(), "classification", **OPTIONS.get(name, {}))
    assert la.fit([(X, Y)], **({"iterations": 2} if name.endswith("VaLLA") else {})) is la
