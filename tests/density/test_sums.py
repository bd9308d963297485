"""Sums of features for each class: what they are, and that they add and subtract."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from laplace.density import MAX_FEATURES, Accumulator, ClassSums, FeatureDensity, reason_against
from laplace.density import sums as sums_module
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests.density.brute_force import rows_of
from tests.tools import LargestTensor

C, D = 4, 5


def accumulated(phi, y, size=7, n_classes=C, **options):
    accumulator = Accumulator(n_classes, **options)
    for part, labels in zip(phi.split(size), [None] * len(phi) if y is None else y.split(size), strict=False):
        accumulator.add(part, labels)
    return accumulator.finish()


def by_hand(phi, weights):
    """Counts, sums and second moments of rows with a weight in each class, one row at a time."""
    counts, sums = torch.zeros(weights.shape[1]), torch.zeros(weights.shape[1], phi.shape[1])
    moments = torch.zeros(weights.shape[1], phi.shape[1], phi.shape[1])
    for row, weight in zip(phi, weights, strict=True):
        for c, w in enumerate(weight):
            counts[c] += w
            sums[c] += w * row
            moments[c] += w * torch.outer(row, row)
    return counts, sums, moments


def equal(found, expected):
    for name in ("counts", "sums", "moments"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    assert found.normalized == expected.normalized


@pytest.fixture(params=["class form", "tied form"])
def form(request, monkeypatch):
    if request.param == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", C * D**2 - 1)
    return request.param


@pytest.mark.parametrize("waiting", [1, 20, 1024])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_sums_are_those_of_rows(form, labels, waiting, monkeypatch):
    monkeypatch.setattr(sums_module, "BUFFERED_ROWS", waiting)
    monkeypatch.setattr(sums_module, "BLOCK", 2)
    monkeypatch.setattr(Accumulator, "_enough", lambda self, n: waiting)
    phi, y = rows_of(C, D, 53)
    weights = torch.rand(53, C) if labels == "soft" else nn.functional.one_hot(y, C).double()
    counts, sums, moments = by_hand(phi, weights)
    found = accumulated(phi, weights if labels == "soft" else y)
    assert found.tied == (form == "tied form")
    assert_close(found.counts, counts)
    assert_close(found.sums, sums)
    assert_close(found.moments, moments.sum(0, keepdim=True) if found.tied else moments)
    assert found.nbytes == ClassSums.bytes_needed(C, D)


def test_soft_labels_that_are_certain_are_hard_ones(form):
    phi, y = rows_of(C, D, 40)
    equal(accumulated(phi, nn.functional.one_hot(y, C).double()), accumulated(phi, y))


def test_hard_and_soft_batches_may_alternate(form):
    phi, y = rows_of(C, D, 40)
    accumulator = Accumulator(C)
    for i, (part, labels) in enumerate(zip(phi.split(10), y.split(10), strict=True)):
        accumulator.add(part, nn.functional.one_hot(labels, C).float() if i % 2 else labels)
    equal(accumulator.finish(), accumulated(phi, y))


def test_sums_add_in_any_order_and_grouping(form):
    phi, y = rows_of(C, D, 60)
    parts = [accumulated(p, labels) for p, labels in zip(phi.split(20), y.split(20), strict=True)]
    whole = accumulated(phi, y)
    equal(parts[0].merge(parts[1]).merge(parts[2]), whole)
    equal(parts[2].merge(parts[1].merge(parts[0])), whole)
    order = torch.randperm(60)
    equal(accumulated(phi[order], y[order]), whole)


def test_what_was_added_can_be_subtracted(form):
    phi, y = rows_of(C, D, 60)
    gone = (torch.arange(60) < 20) | (y == 1)  # all of one class, and some of the others
    found = accumulated(phi, y).subtract(accumulated(phi[gone], y[gone]))
    equal(found, accumulated(phi[~gone], y[~gone]))
    assert found.counts[1] == 0
    assert not found.sums[1].any()
    weights = torch.rand(60, C)
    equal(
        accumulated(phi, weights).subtract(accumulated(phi[gone], weights[gone])),
        accumulated(phi[~gone], weights[~gone]),
    )
    nothing = accumulated(phi, weights).subtract(accumulated(phi, weights))
    assert not nothing.counts.any()
    assert not nothing.sums.any()
    assert not nothing.moments.any()


def test_rows_that_were_not_there_cannot_be_subtracted():
    phi, y = rows_of(C, D, 40)
    fitted = accumulated(phi, y)
    with pytest.raises(InputError, match=r"There are 10 rows of class 2, and 11 were to be removed"):
        fitted.subtract(accumulated(torch.zeros(11, D), torch.full((11,), 2)))
    with pytest.raises(InputError, match="larger features"):
        fitted.subtract(accumulated(1e3 * phi[:4], y[:4]))


def test_sums_of_other_things_do_not_go_together():
    phi, y = rows_of(C, D, 40)
    fitted = accumulated(phi, y)
    for other in (accumulated(phi[:, 1:], y), accumulated(phi, y, n_classes=5)):
        for combine in (fitted.merge, fitted.subtract):
            with pytest.raises(ShapeError, match="Expected sums of 4 classes of 5 features"):
                combine(other)
    with pytest.raises(InputError, match="normalized"):
        fitted.merge(accumulated(phi, y, normalize_features=True))


def test_rows_can_be_normalized():
    phi, y = rows_of(C, D, 40)
    phi[3] = 0
    lengths = torch.tensor([max(sum(float(v) ** 2 for v in row) ** 0.5, 1e-300) for row in phi])
    found, expected = accumulated(phi, y, normalize_features=True), accumulated(phi / lengths.unsqueeze(1), y)
    assert found.normalized
    assert_close(found.moments, expected.moments)
    assert_close(found.sums, expected.sums)


def test_regression_has_one_class():
    phi, _ = rows_of(C, D, 30)
    equal(accumulated(phi, None, n_classes=1), accumulated(phi, torch.zeros(30).long(), n_classes=1))


def test_narrow_features_are_added_up_in_float64():
    phi, y = rows_of(C, D, 40)
    found = accumulated(phi.float(), y)
    assert found.moments.dtype == found.sums.dtype == found.counts.dtype == torch.float64
    equal(found, accumulated(phi.float().double(), y))


def test_sums_and_scores_are_the_same_on_every_device(device):
    phi, y = rows_of(C, D, 60)
    for labels in (y, torch.rand(60, C)):
        here = accumulated(phi, labels)
        there = accumulated(phi.to(device), labels.to(device))
        assert there.moments.device.type == device.type
        equal(there.to("cpu"), here)
        equal(here.merge(there).subtract(there), here)
        scores = [FeatureDensity(s).g(phi.to(s.sums.device)).cpu() for s in (here, there)]
        assert_close(*scores)


def test_later_changes_of_features_do_not_reach_the_sums():
    phi, y = rows_of(C, D, 10)
    expected, accumulator = accumulated(phi, y), Accumulator(C)
    batch, labels = phi.clone(), y.clone()
    accumulator.add(batch, labels)
    batch.zero_()
    labels.zero_()
    equal(accumulator.finish(), expected)


def test_sums_of_inference_mode_can_be_used_anywhere():
    phi, y = rows_of(C, D, 30)
    with torch.inference_mode():
        found = accumulated(phi, y)
    assert not found.moments.is_inference()
    equal(found, accumulated(phi, y))


def test_no_more_rows_wait_than_are_worth_a_product():
    batches = [rows_of(C, D, 100, seed) for seed in range(50)]
    accumulator = Accumulator(C)
    with LargestTensor() as largest:
        for phi, y in batches:
            accumulator.add(phi, y)
    assert 1024 * D <= largest.numel <= 1124 * D, largest.operation


@pytest.mark.parametrize(
    ("phi", "labels", "error", "message"),
    [
        (torch.ones(3, D), torch.tensor([0, 1]), ShapeError, r"shape \[3\] for 3 rows; got \[2\]"),
        (torch.ones(3, D), torch.ones(3, C + 1), ShapeError, r"shape \[3, 4\] for 3 rows; got \[3, 5\]"),
        (
            torch.ones(3, D + 1),
            torch.tensor([0, 1, 2]),
            ShapeError,
            "Expected 5 features, as in the batches before; got 6",
        ),
        (torch.ones(2, D), torch.tensor([0, C]), InputError, "from 0 to 3; got 4"),
        (torch.ones(2, D), torch.tensor([-100, 1]), InputError, "from 0 to 3; got -100"),
        (torch.ones(2, D), torch.full((2, C), -0.1), InputError, "Soft labels must be finite and not negative"),
        (torch.ones(2, D), torch.full((2, C), torch.nan), InputError, "Soft labels must be finite and not negative"),
    ],
)
def test_wrong_batches_are_refused(phi, labels, error, message):
    accumulator = Accumulator(C)
    accumulator.add(*rows_of(C, D, 8))

    def add():
        accumulator.add(phi, labels)
        accumulator.finish()

    with pytest.raises(error, match=message):
        add()


def test_without_batches_there_is_nothing():
    with pytest.raises(InputError, match="at least one batch"):
        Accumulator(C).finish()


def test_too_many_features_are_refused_before_memory_is_taken():
    assert reason_against(MAX_FEATURES) is None
    with LargestTensor() as largest, pytest.raises(UnsupportedError, match="8193 features"):
        Accumulator(2).add(torch.ones(3, MAX_FEATURES + 1), torch.tensor([0, 1, 0]))
    assert largest.numel <= 3 * (MAX_FEATURES + 1)
