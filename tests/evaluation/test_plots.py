"""Pictures show the numbers of the metrics, on figures of pyplot or on given axes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from laplace.errors import BackendUnavailableError, InputError, ShapeError
from laplace.evaluation import calibration_curve, coverage, metrics, plots


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def predictions() -> dict[str, tuple[Tensor, Tensor]]:
    y = torch.randint(3, (80,))
    logits = torch.randn(80, 3) + 2 * torch.nn.functional.one_hot(y, 3)
    return {"sharp": ((4 * logits).softmax(-1), y), "soft": (logits.softmax(-1), y)}


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_reliability_diagram_shows_the_occupied_bins(predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    figure = plots.reliability_diagram(predictions, n_bins=8, title="On test data")
    (axes,) = figure.axes
    assert axes.get_title() == "On test data"
    assert len(axes.collections) == 2
    for points, (probs, y) in zip(axes.collections, predictions.values(), strict=True):
        bins = metrics.reliability(probs, y, n_bins=8)
        held = bins.count > 0
        expected = torch.stack([bins.confidence, bins.accuracy], -1)[held]
        np.testing.assert_allclose(points.get_offsets(), expected, atol=1e-12)
        areas = torch.as_tensor(points.get_sizes())
        assert areas[bins.count[held].argmax()] == areas.max()


def test_reliability_diagram_names_methods_with_their_error(predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    expected = [f"{name} (ECE {metrics.calibration_error(*pair):.3f})" for name, pair in predictions.items()]
    assert labels(plots.reliability_diagram(predictions)) == ["calibrated", *expected]


def test_risk_coverage_curve_shows_the_metric(predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    figure = plots.risk_coverage_curve(predictions)
    for line, (probs, y) in zip(figure.axes[0].lines, predictions.values(), strict=True):
        curve = metrics.risk_coverage(probs, y)
        np.testing.assert_allclose(line.get_xdata(), curve.coverage)
        np.testing.assert_allclose(line.get_ydata(), curve.risk)
    expected = [f"{name} (area {metrics.risk_coverage(*pair).area:.3f})" for name, pair in predictions.items()]
    assert labels(figure) == expected


def test_regression_band_sorts_its_inputs_and_is_as_wide_as_asked() -> None:
    x, mean, std = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([5.0, 3.0, 4.0]), torch.tensor([0.5, 0.1, 0.2])
    figure = plots.regression_band(x, mean, std, n_std=3.0, data=(x, mean))
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 3], [1, 4], [2, 5]])
    corners = axes.collections[0].get_paths()[0].vertices
    for at, low, high in ((0, 2.7, 3.3), (1, 3.4, 4.6), (2, 3.5, 6.5)):
        heights = corners[corners[:, 0] == at][:, 1]
        assert heights.min() == pytest.approx(low)
        assert heights.max() == pytest.approx(high)
    assert labels(figure) == ["± 3 standard deviations", "mean", "data"]


def test_a_picture_is_drawn_on_the_axes_it_is_given(predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    figure = Figure()
    left, middle, right = figure.subplots(1, 3)
    assert plots.reliability_diagram(predictions, ax=left) is figure
    assert plots.risk_coverage_curve(predictions, ax=middle) is figure
    grid = torch.linspace(0, 1, 5)
    assert plots.regression_band(grid, grid, grid, ax=right) is figure
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in figure.axes)


def test_a_picture_can_be_saved(predictions: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    target = tmp_path / "reliability.png"
    plots.reliability_diagram(predictions).savefig(target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_one_of_pyplot(predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    figure = plots.risk_coverage_curve(predictions)
    assert pyplot.gcf() is figure
    pyplot.close(figure)


def test_the_calibration_of_error_bars_is_drawn() -> None:
    mean, y = torch.zeros(200), torch.randn(200, generator=torch.Generator().manual_seed(0))
    parts = {"narrow": (mean, torch.full_like(mean, 0.3), y), "right": (mean, torch.ones_like(mean), y)}
    figure = plots.regression_calibration(parts, n_levels=9)
    for name, line in zip(parts, figure.axes[0].lines[1:], strict=True):
        levels, shares = calibration_curve(*parts[name], n_levels=9)
        np.testing.assert_array_equal(line.get_xydata(), np.stack([levels, shares], 1))
    assert [text.split("(")[0] for text in labels(figure)] == ["calibrated", "narrow ", "right "]
    assert f"hold {100 * coverage(*parts['narrow']):.0f} %" in labels(figure)[1]
    with pytest.raises(InputError, match="nothing to draw"):
        plots.regression_calibration({})


def test_what_is_refused_leaves_no_figure_open() -> None:
    before, ones = pyplot.get_fignums(), torch.ones(3)
    with pytest.raises(InputError):
        plots.regression_calibration({"a": (ones, 0 * ones, ones)})
    for draw in (plots.reliability_diagram, plots.risk_coverage_curve):
        with pytest.raises(InputError):
            draw({"a": (torch.full((3, 2), 0.7), torch.zeros(3).long())})
    assert pyplot.get_fignums() == before


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        plots.reliability_diagram({})
    with pytest.raises(InputError, match="nothing to draw"):
        plots.risk_coverage_curve({})


def test_a_band_needs_vectors_of_one_length_and_no_negative_width() -> None:
    with pytest.raises(ShapeError, match="three vectors of one length"):
        plots.regression_band(torch.ones(3), torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="negative"):
        plots.regression_band(torch.ones(2), torch.ones(2), torch.tensor([0.1, -0.1]))


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match=r"'matplotlib'.*laplace-posthoc\[evaluation\]"):
        plots.regression_band(torch.ones(2), torch.ones(2), torch.ones(2))
