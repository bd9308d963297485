"""Metrics of error bars against their definitions, and the table that compares regressors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from laplace import Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import (
    calibration_curve,
    compare_regressors,
    coverage,
    crps,
    gaussian_nll,
    ood_auroc,
    ood_average_precision,
    ood_false_positives,
    regression_band,
    rmse,
)

G = torch.Generator().manual_seed(0)
MEAN, STD = torch.randn(40, 2, generator=G, dtype=torch.float64), 0.3 + torch.rand(40, 2, generator=G).double()
Y = MEAN + STD * torch.randn(40, 2, generator=G, dtype=torch.float64)


def test_metrics_are_their_definitions() -> None:
    mean, std, y = (value.numpy() for value in (MEAN, STD, Y))
    assert gaussian_nll(MEAN, STD, Y) == pytest.approx(-stats.norm.logpdf(y, mean, std).mean())
    assert rmse(MEAN, Y) == pytest.approx(math.sqrt(((mean - y) ** 2).mean()))
    each = []
    for m, s, t in zip(mean.ravel()[:6], std.ravel()[:6], y.ravel()[:6], strict=True):
        below = integrate.quad(lambda z, m=m, s=s: stats.norm.cdf(z, m, s) ** 2, m - 12 * s, t)[0]
        above = integrate.quad(lambda z, m=m, s=s: stats.norm.sf(z, m, s) ** 2, t, m + 12 * s)[0]
        each.append(below + above)
    first = [value.reshape(-1)[:6] for value in (MEAN, STD, Y)]
    assert crps(*first) == pytest.approx(sum(each) / 6, rel=1e-6)


def test_coverage_and_calibration_are_those_of_the_predicted_distribution() -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(20_000, generator=g, dtype=torch.float64)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    assert coverage(zero, one, z, 0.9) == pytest.approx(0.9, abs=0.01)
    assert coverage(zero, one / 2, z, 0.9) == pytest.approx(2 * stats.norm.cdf(1.6449 / 2) - 1, abs=0.01)
    levels, shares = calibration_curve(zero, one, z, n_levels=9)
    assert levels.tolist() == pytest.approx([0.1 * k for k in range(1, 10)])
    assert float((levels - shares).abs().max()) < 0.01
    assert float(calibration_curve(zero + 1, one, z)[1][9]) == pytest.approx(stats.norm.cdf(1), abs=0.01)  # level ½


def test_what_is_no_prediction_is_refused() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        gaussian_nll(MEAN, STD, Y[:3])
    with pytest.raises(ShapeError):
        rmse(MEAN[:, :1], Y)
    for bad in (STD * 0, STD * float("nan"), -STD):
        with pytest.raises(InputError, match="positive"):
            crps(MEAN, bad, Y)
    for level in (0.0, 1.0, 2.0):
        with pytest.raises(InputError, match="level"):
            coverage(MEAN, STD, Y, level)
    with pytest.raises(InputError, match="n_levels"):
        calibration_curve(MEAN, STD, Y, n_levels=0)


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 60, dtype=torch.float64).unsqueeze(1)
    y = x.sin() + 0.1 * torch.randn(60, 1, generator=G, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.mse_loss(model(x[::2]), y[::2]) + 1e-4 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(loss)
    return model, [(x[::2], y[::2])], [(x[1::4], y[1::4]), (x[3::4], y[3::4])]


def test_a_table_of_regressors_holds_the_metrics_of_their_predictions() -> None:
    model, train, test = problem()
    la = Laplace(model, "regression", "all", "full", sigma_noise=0.1)
    la.fit(train)
    x, y = (torch.cat(part) for part in zip(*test, strict=True))
    rows = {"Laplace": la, "wide": lambda x: (model(x), torch.ones(len(x), 1, dtype=torch.float64))}
    report = compare_regressors(model, rows, test, val_loader=test, level=0.8)
    told = la.predict(x)
    assert told.total_variance is not None
    std = told.total_variance.sqrt()
    row = report.rows["Laplace"]
    assert row["NLL"] == pytest.approx(gaussian_nll(told.mean, std, y))
    assert row["CRPS"] == pytest.approx(crps(told.mean, std, y))
    assert row["coverage 80 %"] == pytest.approx(coverage(told.mean, std, y, 0.8))
    assert row["width 80 %"] == pytest.approx(2 * stats.norm.ppf(0.9) * float(std.mean()), rel=1e-6)
    residual = (model(x).detach() - y).square().mean().sqrt()
    assert report.rows["MAP"]["NLL"] == pytest.approx(gaussian_nll(model(x), residual.expand_as(y), y))
    assert report.rows["wide"]["NLL"] > row["NLL"]
    assert str(report).startswith("|")
    assert "<td>" in report._repr_html_()  # pyright: ignore[reportPrivateUsage]
    frame = report.to_frame()
    assert list(frame.index) == ["MAP", "Laplace", "wide"]
    assert frame.loc["Laplace", "RMSE"] == row["RMSE"]


def test_a_table_of_regressors_refuses_classifiers_and_taken_names() -> None:
    model, train, test = problem()
    classifier = Laplace(nn.Linear(1, 3).double(), "classification")
    classifier.fit([(train[0][0], torch.arange(30) % 3)])
    with pytest.raises(UnsupportedError, match="side_by_side"):
        compare_regressors(model, {"classes": classifier}, test, val_loader=test)
    with pytest.raises(InputError, match="taken"):
        compare_regressors(model, {"MAP": classifier}, test, val_loader=test)
    with pytest.raises(InputError, match="empty"):
        compare_regressors(model, {}, test, val_loader=[])


def test_scores_of_foreign_inputs_are_told_apart() -> None:
    inside, outside = torch.arange(100.0), torch.arange(50.0, 150.0)
    assert ood_false_positives(inside, outside) == pytest.approx(0.45)  # 95 of 100 are from 55 on
    assert ood_false_positives(inside, outside, found=1.0) == pytest.approx(0.5)
    assert ood_false_positives(inside, outside + 100) == 0
    assert ood_average_precision(inside, outside + 100) == pytest.approx(1)
    assert ood_average_precision(inside, inside) == pytest.approx(0.5, abs=0.02)
    assert ood_auroc(inside, outside + 100) == pytest.approx(1)
    with pytest.raises(InputError, match="share"):
        ood_false_positives(inside, outside, found=0)
    with pytest.raises(InputError, match="out_of_distribution"):
        ood_average_precision(inside, outside[:0])


def test_a_band_takes_what_a_call_returns() -> None:
    model, train, _ = problem()
    la = Laplace(model, "regression", "all", "full", sigma_noise=0.1)
    la.fit(train)
    x = torch.linspace(-4, 4, 50, dtype=torch.float64).unsqueeze(1)
    axes = regression_band(x, *la(x), data=train[0]).axes[0]
    mean, variance = la(x)
    low = np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 1].min()
    assert low == pytest.approx(float((mean[:, 0] - 2 * variance[:, 0, 0].sqrt()).min()))
    assert len(regression_band(x[:, 0], la.predict(x).mean, la.predict_std(x)).axes) == 1
    with pytest.raises(ShapeError):
        regression_band(x, mean.expand(-1, 2), variance)
