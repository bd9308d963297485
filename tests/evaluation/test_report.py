"""A report holds the numbers of the metrics, and prints them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import (
    Report,
    SoftmaxPredictor,
    compare_regressors,
    fit_temperature,
    metrics,
    predict,
    side_by_side,
)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


def labeled(model: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """Inputs, and targets that follow the model most of the time."""
    x = 2 * torch.randn(n, 2)
    with torch.no_grad():
        y = torch.where(torch.rand(n) < 0.8, model(x).argmax(-1), torch.randint(3, (n,)))
    return x, y


@pytest.fixture
def data(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: labeled(model, n) for name, n in (("val", 60), ("test", 70), ("shifted", 50), ("ood", 40))}


def loader(pair: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*pair), batch_size=16)


def uniform(x: Tensor) -> Tensor:
    return torch.full((len(x), 3), 1 / 3)


def test_predict_gathers_all_batches(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    x, y = data["test"]
    result = predict(SoftmaxPredictor(model), loader(data["test"]))
    torch.testing.assert_close(result.probs, model(x).softmax(-1))
    assert result.y.equal(y)
    assert result.seconds > 0


def test_predict_takes_positions_for_rows() -> None:
    y = torch.tensor([[0, 1], [2, -100]])
    result = predict(lambda x: x.softmax(-1), [(torch.randn(2, 2, 3), y), (torch.randn(1, 4, 3), y[:1].repeat(1, 2))])
    assert result.probs.shape == (8, 3)
    assert result.y.tolist() == [0, 1, 2, -100, 0, 1, 0, 1]


def test_predict_needs_a_batch() -> None:
    with pytest.raises(InputError, match="empty"):
        predict(uniform, [])


def test_side_by_side_holds_the_metrics(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    report = side_by_side(
        model,
        {"uniform": uniform},
        loader(data["test"]),
        val_loader=loader(data["val"]),
        shifted={"later": loader(data["shifted"])},
        ood_loader=loader(data["ood"]),
        n_bins=7,
    )
    assert list(report.rows) == ["MAP", "MAP, temperature T", "uniform"]
    assert report.columns == [
        "accuracy", "NLL", "ECE", "Brier", "AURC", "NLL later", "ECE later",
        "OOD AUROC", "OOD AUPR", "OOD FPR95", "predict ms",
    ]  # fmt: skip
    scaled = fit_temperature(model, loader(data["val"]))
    for name, predictor in (("MAP", SoftmaxPredictor(model)), ("MAP, temperature T", scaled), ("uniform", uniform)):
        row = dict(report.rows[name])
        probs, y = predictor(data["test"][0]), data["test"][1]
        later, later_y = predictor(data["shifted"][0]), data["shifted"][1]
        doubts = metrics.uncertainty(probs), metrics.uncertainty(predictor(data["ood"][0]))
        assert row.pop("predict ms") > 0
        assert row == pytest.approx(
            {
                "accuracy": metrics.accuracy(probs, y),
                "NLL": metrics.mean_nll(probs, y),
                "ECE": metrics.calibration_error(probs, y, n_bins=7),
                "Brier": metrics.brier_score(probs, y),
                "AURC": metrics.risk_coverage(probs, y).area,
                "NLL later": metrics.mean_nll(later, later_y),
                "ECE later": metrics.calibration_error(later, later_y, n_bins=7),
                "OOD AUROC": metrics.ood_auroc(*doubts),
                "OOD AUPR": metrics.ood_average_precision(*doubts),
                "OOD FPR95": metrics.ood_false_positives(*doubts),
            },
            abs=1e-12,
        )
    assert report.rows["uniform"]["NLL"] == pytest.approx(math.log(3))
    assert report.rows["uniform"]["OOD AUROC"] == 0.5


def test_a_temperature_keeps_the_accuracy_and_lowers_the_nll_it_was_fitted_on(
    model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]
) -> None:
    report = side_by_side(model, {}, loader(data["val"]), val_loader=loader(data["val"]))
    plain, scaled = report.rows.values()
    assert scaled["accuracy"] == plain["accuracy"]
    assert scaled["NLL"] < plain["NLL"]


def test_what_is_not_given_is_not_reported(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    report = side_by_side(model, {}, loader(data["test"]))
    assert list(report.rows) == ["MAP"]
    assert report.columns == ["accuracy", "NLL", "ECE", "Brier", "AURC", "predict ms"]


def test_targets_of_foreign_inputs_are_ignored(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    x, _ = data["ood"]
    reports = [
        side_by_side(model, {}, loader(data["test"]), ood_loader=[(x, torch.full((len(x),), label))])
        for label in (0, -1, -100)
    ]
    assert len({report.rows["MAP"]["OOD AUROC"] for report in reports}) == 1


def test_names_of_the_network_are_taken(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(InputError, match="MAP"):
        side_by_side(model, {"MAP": uniform}, loader(data["test"]))


REPORT = Report({"first": {"NLL": 0.25, "ECE": 0.1}, "second one": {"NLL": 10.5, "ECE": 0.03}})


def test_times_are_left_out_where_that_is_said(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
    given: Any = model, {}, loader(data["test"])
    assert "predict ms" not in side_by_side(*given, timed=False).columns
    for compare, more in ((side_by_side, {}), (compare_regressors, {"val_loader": given[2]})):
        with pytest.raises(InputError, match="timed must be True or False; got 'no'"):
            compare(*given, **more, timed="no")


def test_a_table_is_aligned_markdown() -> None:
    assert REPORT.table(digits=2).splitlines() == [
        "|            |   NLL |  ECE |",
        "|:-----------|------:|-----:|",
        "| first      |  0.25 | 0.10 |",
        "| second one | 10.50 | 0.03 |",
    ]


def test_columns_are_chosen_and_ordered() -> None:
    assert REPORT.table(["ECE"]).splitlines()[0].split() == ["|", "|", "ECE", "|"]
    assert REPORT.table(["ECE", "NLL"]).splitlines()[2].split() == ["|", "first", "|", "0.100", "|", "0.250", "|"]
    with pytest.raises(InputError, match=r"no columns \['Brier'\]"):
        REPORT.table(["Brier"])


def test_a_column_is_added_and_may_have_gaps() -> None:
    report = REPORT.with_column("fit s", {"second one": 1.5})
    assert report.columns == ["NLL", "ECE", "fit s"]
    assert report.table(["fit s"], digits=1).splitlines()[2:] == ["| first      |       |", "| second one |   1.5 |"]
    assert "fit s" not in REPORT.columns
    with pytest.raises(InputError, match="no rows"):
        REPORT.with_column("fit s", {"third": 1.0})


def test_an_average_has_mean_and_standard_error() -> None:
    values = [1.0, 2.0, 6.0]
    report = Report.average([Report({"a": {"NLL": value}}) for value in values])
    spread = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    assert report.rows == {"a": {"NLL": pytest.approx(3)}}
    assert report.errors == {"a": {"NLL": pytest.approx(spread / math.sqrt(3))}}
    assert report.table(digits=2).splitlines()[-1] == "| a | 3.00 ± 1.53 |"


def test_only_alike_reports_are_averaged() -> None:
    with pytest.raises(InputError, match="at least two"):
        Report.average([REPORT])
    with pytest.raises(InputError, match="same rows"):
        Report.average([REPORT, Report({"first": {"NLL": 1.0}})])


def binary_data() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 2, generator=generator, dtype=torch.float64)
    y = torch.bernoulli((2 * x[:, 0]).sigmoid(), generator=generator).long()
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0, 1.0]]))
    return model, x, y


@pytest.mark.parametrize("dtype", [torch.long, torch.float64])
def test_one_logit_is_evaluated_as_two_classes(dtype: torch.dtype) -> None:
    model, x, y = binary_data()
    la = Laplace(model, "binary", "all", "full")
    la.fit([(x, y)])
    batches = [(x[:50], y[:50].to(dtype)), (x[50:], y[50:].to(dtype))]
    rows = side_by_side(model, {"Laplace": la}, batches, val_loader=batches, ood_loader=batches).rows
    scaled = model(x).squeeze(-1).detach() / fit_temperature(model, batches).temperature
    expected = {
        "MAP": model(x).squeeze(-1).detach().sigmoid(),
        "MAP, temperature T": scaled.sigmoid(),
        "Laplace": la(x).squeeze(-1).detach(),
    }
    for name, p in expected.items():
        of_target = torch.where(y == 1, p, 1 - p)
        assert rows[name]["NLL"] == pytest.approx(float(-of_target.log().mean()))
        assert rows[name]["accuracy"] == pytest.approx(float((of_target > 0.5).double().mean()))
        assert rows[name]["OOD AUROC"] == 0.5
    zeros = predict(la, [(x, torch.zeros(len(x)))])  # of which the only column would be P(0)
    assert metrics.mean_nll(zeros.probs, zeros.y) == pytest.approx(float(-(1 - expected["Laplace"]).log().mean()))


def test_a_single_column_of_a_function_is_refused_by_name() -> None:
    x, y = torch.randn(6, 2), torch.zeros(6).long()
    for predictor in (lambda x: x[:, :1].sigmoid(), lambda x: x[:, 0].sigmoid(), lambda x: torch.ones(len(x), 1)):
        with pytest.raises(ShapeError, match=r"\[1 - p, p\]"):
            predict(predictor, [(x, y)])
    with pytest.raises(ShapeError, match=r"\[1 - p, p\]"):
        metrics.mean_nll(torch.ones(6, 1), y)


def test_independent_labels_and_regression_are_refused_by_name() -> None:
    x, y = torch.randn(20, 2), torch.randint(2, (20, 3))
    model = nn.Linear(2, 3)
    labels = Laplace(model, "multilabel", "all", "diag")
    labels.fit([(x, y)])
    numbers = Laplace(model, "regression", "all", "diag")
    numbers.fit([(x, torch.randn(20, 3))])
    with pytest.raises(UnsupportedError, match="one label c at a time"):
        predict(labels, [(x, y)])
    with pytest.raises(UnsupportedError, match="one label c at a time"):
        side_by_side(model, {"Laplace": labels}, [(x, y)])
    with pytest.raises(UnsupportedError, match="likelihood='regression' predicts no class probabilities"):
        predict(numbers, [(x, y[:, 0])])
    with pytest.raises(ShapeError, match="multilabel"):
        predict(SoftmaxPredictor(model), [(x, y)])


@pytest.mark.parametrize("bad", [0.5, torch.nan, torch.inf, -1.25])
def test_targets_that_are_no_class_indices_are_not_cut_off(bad: float) -> None:
    x, y = torch.randn(4, 2), torch.tensor([0.0, 1.0, 2.0, bad])
    with pytest.raises(InputError, match="whole numbers"):
        predict(uniform, [(x, y)])
    report = side_by_side(nn.Linear(2, 3), {}, [(x, torch.tensor([0, 1, 2, 0]))], ood_loader=[(x, y)])
    assert report.rows["MAP"]["OOD AUROC"] == 0.5


def test_the_rows_of_the_network_read_outputs_as_estimators_do() -> None:
    """Classes after the batch where sizes agree, and labels that are not to be shifted."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1)
    last = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        conv.weight.mul_(5)
        last[0].weight.copy_(conv.weight[:, :, 0, 0])
        last[0].bias.copy_(conv.bias)
    x = torch.randn(6, 2, 5, 3)
    y = torch.distributions.Categorical(logits=last(x.movedim(1, -1)) / 3).sample()
    loader, moved = [(x, y)], [(x.movedim(1, -1), y)]
    assert fit_temperature(conv, loader).temperature == pytest.approx(fit_temperature(last, moved).temperature)
    la = Laplace(conv, "classification", "last_layer", "diag")
    la.fit(loader)
    la.accept_untuned()
    table = side_by_side(conv, {"la": la}, loader, val_loader=loader)
    expected = side_by_side(last, {}, moved, val_loader=moved)
    for row in ("MAP", "MAP, temperature T"):
        assert table.rows[row]["NLL"] == pytest.approx(expected.rows[row]["NLL"])
    tokens = torch.randint(7, (4, 6))
    copies = nn.Sequential(nn.Embedding(7, 7), nn.Linear(7, 7))
    with torch.no_grad():
        copies[0].weight.copy_(9 * torch.eye(7))
        copies[1].weight.copy_(torch.eye(7))
    la = Laplace(copies, "classification", "last_layer", "diag", shift_labels=False)
    la.fit([(tokens, tokens)])
    la.accept_untuned()
    table = side_by_side(copies, {"la": la}, [(tokens, tokens)])
    assert table.rows["MAP"]["accuracy"] == 1.0
