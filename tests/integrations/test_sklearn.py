"""``LaplaceClassifier`` and ``LaplaceRegressor``: what scikit-learn expects, and the library's own numbers."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any, cast

import numpy as np
import pytest
import skorch  # pyright: ignore[reportMissingTypeStubs]
import torch
from sklearn.calibration import CalibrationDisplay
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, UnsupportedError
from laplace.integrations import sklearn as integration
from laplace.integrations.sklearn import LaplaceClassifier, LaplaceRegressor

X, Y = cast("tuple[np.ndarray, np.ndarray]", load_iris(return_X_y=True))
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
EXPECTED_FAILURES = {
    "check_methods_subset_invariance": "Networks compute in float32: one row alone differs by 2e-7, 1e-7 is allowed."
}


def trained(n_outputs: int = 3) -> nn.Sequential:
    """A network that was trained on the labels, in another library's loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, n_outputs)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    labels = torch.from_numpy(Y)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(X))
        loss = (
            nn.functional.cross_entropy(logits, labels)
            if n_outputs == 3
            else nn.functional.binary_cross_entropy_with_logits(logits[:, 0], (labels == 2).double())
        )
        loss.backward()
        optimizer.step()
    return model


def small(n_features: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_features, 5), nn.Tanh(), nn.Linear(5, n_outputs))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few epochs."""
    monkeypatch.setattr(integration, "EPOCHS", 8)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [LaplaceClassifier(random_state=0), LaplaceRegressor(random_state=0)])
def test_estimators_pass_the_checks_of_scikit_learn(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "EPOCHS", 40)
    torch.set_default_dtype(torch.float32)  # as users have it
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data that are few or degenerate
        told = check_estimator(estimator, expected_failed_checks=EXPECTED_FAILURES, on_fail=None, on_skip=None)
    status = {check["check_name"]: check["status"] for check in told}
    # Whether a difference of 2e-7 shows is a matter of the machine's sums.
    assert {name for name, said in status.items() if said == "xfail"} <= set(EXPECTED_FAILURES)
    assert [check for check in told if check["status"] == "failed"] == []
    # Those of arrays of other libraries run only where those are installed.
    assert {name for name, said in status.items() if said == "skipped"} <= {"check_array_api_input"}
    assert len(told) > 45


def test_a_row_alone_has_the_probabilities_of_the_same_row_in_a_batch(short: None) -> None:
    """To the rounding of float32; scikit-learn asks for 1e-7, which one machine keeps and another does not."""
    torch.set_default_dtype(torch.float32)
    classifier = LaplaceClassifier(small, random_state=0).fit(X, Y)
    alone = np.concatenate([classifier.predict_proba(row[None]) for row in X[:40]])
    np.testing.assert_allclose(alone, classifier.predict_proba(X)[:40], rtol=0, atol=1e-6)


def test_a_trained_network_gives_the_numbers_of_laplace_itself() -> None:
    model, rows, labels = trained(), torch.from_numpy(X), torch.from_numpy(Y)
    before = copy.deepcopy(model.state_dict())
    classifier = LaplaceClassifier(model, batch_size=64).fit(X[::2], NAMES[::2], X_val=X[1::2], y_val=NAMES[1::2])
    la = Laplace(model, "classification", "last_layer", "kron")
    la.fit(list(zip(rows[::2].split(64), labels[::2].split(64), strict=True)))
    la.tune(list(zip(rows[1::2].split(64), labels[1::2].split(64), strict=True)))
    np.testing.assert_allclose(classifier.predict_proba(X), la(rows).double().numpy(), rtol=1e-5, atol=1e-7)
    assert (classifier.predict(X) == classifier.classes_[la(rows).argmax(1).numpy()]).all()
    assert list(classifier.classes_) == ["setosa", "versicolor", "virginica"]
    np.testing.assert_allclose(classifier.ood_score(X), la.ood_score(rows).double().numpy(), rtol=1e-4)
    assert classifier.module_ is model
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_logit_is_two_classes() -> None:
    model = trained(1)
    classifier = LaplaceClassifier(model, likelihood="binary", random_state=0).fit(X, Y == 2)
    probabilities = classifier.predict_proba(X)
    assert classifier.laplace_.likelihood == "binary"
    assert probabilities.shape == (150, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert classifier.score(X, Y == 2) > 0.9


@pytest.mark.usefixtures("short")
def test_pipelines_searches_and_plots_take_it() -> None:
    pipeline = make_pipeline(StandardScaler(), LaplaceClassifier(small, random_state=0))
    grid = {"laplaceclassifier__hessian_structure": ["diag", "full"], "laplaceclassifier__tuning": ["marglik"]}
    search = GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss").fit(X, NAMES)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    pipeline.fit(X, Y == 1)
    display = CalibrationDisplay.from_estimator(pipeline, X, Y == 1)
    assert display.y_prob.shape == (150,)
    assert (pickle.loads(pickle.dumps(pipeline)).predict_proba(X) == pipeline.predict_proba(X)).all()


def test_a_network_of_skorch_is_trained_anew_with_its_parameters() -> None:
    options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0, "lr": 0.1}
    net = skorch.NeuralNetClassifier(small(4, 3), max_epochs=3, **options)
    classifier = LaplaceClassifier(net, random_state=0).set_params(module__max_epochs=5)
    classifier.fit(X, Y)
    assert not net.initialized_
    assert classifier.get_params()["module__max_epochs"] == 5
    assert classifier.predict_proba(X).shape == (150, 3)


@pytest.mark.usefixtures("short")
def test_the_same_seed_gives_the_same_numbers_and_leaves_torchs_alone() -> None:
    state = torch.get_rng_state()
    first, second = (LaplaceClassifier(small, random_state=3).fit(X, Y).predict_proba(X) for _ in range(2))
    assert (first == second).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("short")
def test_images_are_rows_too() -> None:
    class Convolutional(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))

    images = np.random.default_rng(0).normal(size=(40, 1, 4, 4))
    labels = images.mean((1, 2, 3)) > 0
    classifier = LaplaceClassifier(lambda _features, _outputs: Convolutional(), random_state=0).fit(images, labels)
    assert classifier.predict(images).shape == (40,)


@pytest.mark.slow
def test_error_bars_are_in_the_units_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "EPOCHS", 40)
    rows, y = cast("tuple[np.ndarray, np.ndarray]", load_diabetes(return_X_y=True))
    regressor = make_pipeline(StandardScaler(), LaplaceRegressor(small, random_state=0))
    mean, std = regressor.fit(rows[::2], y[::2]).predict(rows[1::2], return_std=True)
    assert mean.shape == std.shape == (221,)
    error = y[1::2] - mean
    assert np.sqrt((error**2).mean()) < 0.9 * y.std()
    assert 0.85 < (np.abs(error) < 1.645 * std).mean() < 0.97
    both = LaplaceRegressor(small, random_state=0).fit(rows, np.stack([y, 2 * y], 1))
    mean, std = both.predict(rows, return_std=True)
    assert mean.shape == std.shape == (442, 2)
    assert both.score(rows, np.stack([y, 2 * y], 1)) > 0


def test_a_trained_regressor_keeps_its_units() -> None:
    rows, y = cast("tuple[np.ndarray, np.ndarray]", load_diabetes(return_X_y=True))
    model = nn.Linear(10, 1).double()
    with torch.no_grad():
        solution = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], y, rcond=None)[0]
        model.weight.copy_(torch.from_numpy(solution[:-1])[None])
        model.bias.fill_(float(solution[-1]))
    regressor = LaplaceRegressor(model, subset_of_weights="all", hessian_structure="full", tuning="marglik")
    mean, std = regressor.fit(rows, y).predict(rows, return_std=True)
    np.testing.assert_allclose(mean, model(torch.from_numpy(rows)).detach().numpy()[:, 0], rtol=1e-4)
    assert 45 < float(regressor.laplace_.sigma_noise) < 65
    assert (std > float(regressor.laplace_.sigma_noise)).all()


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="3 outputs, and y has 2 classes"):
        LaplaceClassifier(trained()).fit(X, Y == 1)
    with pytest.raises(InputError, match="1 outputs, and y has 2 targets"):
        LaplaceRegressor(nn.Linear(4, 1)).fit(X, X[:, :2])
    with pytest.raises(UnsupportedError, match=r"binary"):
        LaplaceClassifier(trained(1)).fit(X, Y == 1)
    with pytest.raises(UnsupportedError, match="tuning is"):
        LaplaceClassifier(trained(), tuning="best").fit(X, Y)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="belong together"):
        LaplaceClassifier(trained()).fit(X, Y, X_val=X)
    with pytest.raises(InputError, match="labels that y does not have"):
        LaplaceClassifier(trained()).fit(X, Y, X_val=X, y_val=Y + 1)
    with pytest.raises(UnsupportedError, match="module is a trained"):
        LaplaceClassifier("a network").fit(X, Y)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_cross_validation_takes_a_regressor() -> None:
    rows, y = cast("tuple[np.ndarray, np.ndarray]", load_diabetes(return_X_y=True))
    assert np.isfinite(cross_val_score(LaplaceRegressor(small, random_state=0), rows[:120], y[:120], cv=2)).all()
