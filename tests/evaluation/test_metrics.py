"""Metrics against numbers worked out by hand, and against the identities that define them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from laplace.errors import BackendUnavailableError, InputError, ShapeError
from laplace.evaluation import metrics

# Four rows, three classes: right with 0.7, wrong with 0.6, right with 0.9, wrong with 0.5.
PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.3, 0.5, 0.2]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 0])


def random_predictions(seed: int, rows: int = 60, outputs: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(outputs, (rows,), generator=generator)


def test_accuracy_by_hand() -> None:
    assert metrics.accuracy(PROBS, TARGETS) == 0.5


def test_nll_by_hand() -> None:
    expected = -(math.log(0.7) + math.log(0.3) + math.log(0.9) + math.log(0.3)) / 4
    assert metrics.mean_nll(PROBS, TARGETS) == pytest.approx(expected, abs=1e-15)


def test_nll_equals_the_cross_entropy_of_the_logits() -> None:
    logits = torch.randn(20, 5)
    y = torch.randint(5, (20,))
    expected = torch.nn.functional.cross_entropy(logits, y)
    assert metrics.mean_nll(logits.softmax(-1), y) == pytest.approx(float(expected), abs=1e-14)


@pytest.mark.parametrize("metric", [metrics.mean_nll, metrics.accuracy, metrics.brier_score, metrics.calibration_error])
def test_probabilities_may_be_on_a_graph(metric) -> None:
    """As they come from ``model(x).softmax(-1)``; warnings are errors here."""
    on_graph = PROBS.clone().requires_grad_()
    assert metric(on_graph, TARGETS) == metric(PROBS, TARGETS)


def test_nll_is_infinite_where_the_right_class_has_no_probability() -> None:
    assert metrics.mean_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_brier_score_by_hand() -> None:
    rows = [0.3**2 + 0.2**2 + 0.1**2, 0.6**2 + 0.7**2 + 0.1**2, 2 * 0.05**2 + 0.1**2, 0.7**2 + 0.5**2 + 0.2**2]
    assert metrics.brier_score(PROBS, TARGETS) == pytest.approx(sum(rows) / 4, abs=1e-15)


def test_brier_score_runs_from_zero_to_two() -> None:
    certain = torch.eye(3)
    assert metrics.brier_score(certain, torch.tensor([0, 1, 2])) == 0
    assert metrics.brier_score(certain, torch.tensor([1, 2, 0])) == 2


def test_brier_score_of_two_classes_is_twice_the_squared_error_of_one() -> None:
    probs, y = random_predictions(0, outputs=2)
    expected = 2 * (probs[:, 1] - y).square().mean()
    assert metrics.brier_score(probs, y) == pytest.approx(float(expected), abs=1e-15)


def test_calibration_error_by_hand() -> None:
    # Five bins: [0.4, 0.6) holds 0.5 (wrong); [0.6, 0.8) holds 0.7 (right) and 0.6 (wrong); [0.8, 1] holds 0.9 (right).
    expected = (1 * abs(0 - 0.5) + 2 * abs(0.5 - 0.65) + 1 * abs(1 - 0.9)) / 4
    assert metrics.calibration_error(PROBS, TARGETS, n_bins=5) == pytest.approx(expected, abs=1e-15)


def test_calibration_error_in_one_bin_is_confidence_minus_accuracy() -> None:
    probs, y = random_predictions(1)
    expected = abs(float(probs.amax(-1).mean()) - metrics.accuracy(probs, y))
    assert metrics.calibration_error(probs, y, n_bins=1) == pytest.approx(expected, abs=1e-14)


@given(seed=st.integers(0, 10_000), n_bins=st.integers(1, 30))
def test_calibration_error_is_that_of_torchmetrics(seed: int, n_bins: int) -> None:
    probs, y = random_predictions(seed)
    expected = multiclass_calibration_error(probs, y, num_classes=4, n_bins=n_bins)
    # torchmetrics rounds confidences to float32.
    assert metrics.calibration_error(probs, y, n_bins=n_bins) == pytest.approx(float(expected), abs=1e-6)


def test_calibration_error_counts_certain_rows_in_the_last_bin() -> None:
    probs = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    y = torch.tensor([1, 0])
    # Together they are right half of the time at a confidence of 0.95.
    assert metrics.calibration_error(probs, y, n_bins=5) == pytest.approx(0.45, abs=1e-15)


def test_calibration_error_of_the_class_shares_is_zero() -> None:
    y = torch.arange(40) % 4
    assert metrics.calibration_error(torch.full((40, 4), 0.25), y) == pytest.approx(0, abs=1e-15)


def test_reliability_bins_by_hand() -> None:
    bins = metrics.reliability(PROBS, TARGETS, n_bins=5)
    torch.testing.assert_close(bins.edges, torch.linspace(0, 1, 6))
    assert bins.count.tolist() == [0, 0, 1, 2, 1]
    nan = math.nan
    torch.testing.assert_close(bins.confidence, torch.tensor([nan, nan, 0.5, 0.65, 0.9]), equal_nan=True)
    torch.testing.assert_close(bins.accuracy, torch.tensor([nan, nan, 0.0, 0.5, 1.0]), equal_nan=True)


def test_reliability_bins_hold_every_row() -> None:
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]])
    assert metrics.reliability(probs, torch.tensor([0, 0, 1]), n_bins=4).count.tolist() == [0, 0, 1, 2]


def test_uncertainty_is_the_probability_of_the_other_classes() -> None:
    torch.testing.assert_close(metrics.uncertainty(PROBS), torch.tensor([0.3, 0.4, 0.1, 0.5]))


def test_uncertainty_keeps_the_order_of_float32_probabilities_near_one() -> None:
    probs = torch.tensor([[30.0, 0.0, 0.0], [40.0, 0.0, 0.0], [35.0, 0.0, 0.0]], dtype=torch.float32).softmax(-1)
    assert (probs.amax(-1) == 1).all(), "one minus the largest probability cannot tell these rows apart"
    assert metrics.uncertainty(probs).argsort().tolist() == [1, 2, 0]


def test_auroc_counts_ordered_pairs_and_half_of_the_ties() -> None:
    inside = torch.tensor([0.1, 0.4, 0.4, 0.9])
    outside = torch.tensor([0.4, 0.8, 0.9])
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert metrics.ood_auroc(inside, outside) == pytest.approx(float(wins.mean()), abs=1e-12)


@given(seed=st.integers(0, 10_000))
def test_auroc_depends_on_the_order_of_the_scores_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(30, generator=generator, dtype=torch.float64)
    outside = 0.5 + torch.randn(20, generator=generator, dtype=torch.float64)
    expected = float((outside[:, None] > inside).double().mean())
    for transform in (lambda s: s, lambda s: 1e6 + 100 * s, torch.exp, torch.sigmoid):
        assert metrics.ood_auroc(transform(inside), transform(outside)) == pytest.approx(expected, abs=1e-6)
    assert metrics.ood_auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-6)


def test_auroc_of_separated_scores_is_one() -> None:
    assert metrics.ood_auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 7.0])) == 1


def test_risk_coverage_by_hand() -> None:
    # Most to least confident: right (0.9), right (0.7), wrong (0.6), wrong (0.5).
    curve = metrics.risk_coverage(PROBS, TARGETS)
    torch.testing.assert_close(curve.coverage, torch.tensor([0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(curve.risk, torch.tensor([0, 0, 1 / 3, 1 / 2]))
    assert curve.area == pytest.approx((1 / 3 + 1 / 2) / 4, abs=1e-15)


def test_risk_at_full_coverage_is_one_minus_accuracy() -> None:
    probs, y = random_predictions(2)
    assert float(metrics.risk_coverage(probs, y).risk[-1]) == pytest.approx(1 - metrics.accuracy(probs, y), abs=1e-14)


def test_risk_does_not_depend_on_the_order_of_tied_rows() -> None:
    probs = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 4])
    for y in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]):
        torch.testing.assert_close(metrics.risk_coverage(probs, torch.tensor(y)).risk, expected)


SCORES = [
    metrics.accuracy,
    metrics.mean_nll,
    metrics.brier_score,
    metrics.calibration_error,
    lambda probs, y: metrics.risk_coverage(probs, y).area,
]
NAMES = ["accuracy", "mean_nll", "brier_score", "calibration_error", "risk_coverage"]


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_positions_are_rows_and_masked_ones_are_left_out(score) -> None:
    probs, y = random_predictions(3, rows=12)
    masked = y.clone()
    masked[[2, 5, 11]] = -100
    kept = masked != -100
    assert score(probs.reshape(3, 4, 4), masked.reshape(3, 4)) == score(probs[kept], y[kept])


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_rows_may_come_in_any_order(score) -> None:
    probs, y = random_predictions(4)
    order = torch.randperm(len(y))
    assert score(probs[order], y[order]) == pytest.approx(score(probs, y), abs=1e-12)


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_probabilities_are_accepted(score, dtype: torch.dtype) -> None:
    probs, y = random_predictions(5)
    rounded = probs.to(dtype)
    assert score(rounded, y) == pytest.approx(score(probs, y), abs=60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_logits_are_refused(score) -> None:
    with pytest.raises(InputError, match=r"apply softmax"):
        score(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("probs", "y", "error", "message"),
    [
        (PROBS, TARGETS[:3], ShapeError, "same leading axes"),
        (PROBS, TARGETS.double(), InputError, "integer dtype"),
        (PROBS, TARGETS + 1, InputError, "class indices from 0 to 2"),
        (PROBS, TARGETS - 1, InputError, "class indices from 0 to 2"),
        (PROBS, torch.full((4,), -100), InputError, "nothing to evaluate"),
        (PROBS[:0], TARGETS[:0], InputError, "nothing to evaluate"),
        (PROBS * math.nan, TARGETS, InputError, "finite"),
        (PROBS * 0.99, TARGETS, InputError, "sums from 0.99"),
        (PROBS - torch.tensor([0.2, 0.0, -0.2]), TARGETS, InputError, "not negative"),
    ],
)
def test_wrong_input_is_explained(probs: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metrics.accuracy(probs, y)


def test_a_bin_is_needed() -> None:
    with pytest.raises(InputError, match="n_bins"):
        metrics.calibration_error(PROBS, TARGETS, n_bins=0)
    with pytest.raises(InputError, match="n_bins"):
        metrics.reliability(PROBS, TARGETS, n_bins=0)


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([math.nan])])
def test_auroc_needs_finite_scores_on_both_sides(bad: Tensor) -> None:
    with pytest.raises(InputError, match="in_distribution"):
        metrics.ood_auroc(bad, torch.tensor([1.0]))
    with pytest.raises(InputError, match="out_of_distribution"):
        metrics.ood_auroc(torch.tensor([1.0]), bad)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(BackendUnavailableError, match=r"'torchmetrics'.*laplace-posthoc\[evaluation\]"):
        metrics.ood_auroc(torch.zeros(1), torch.ones(1))
    assert metrics.brier_score(PROBS, TARGETS) > 0, "what needs no package works without it"


def test_importing_the_room_loads_no_optional_package() -> None:
    code = "import sys, laplace.evaluation; print(sorted({'torchmetrics', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
