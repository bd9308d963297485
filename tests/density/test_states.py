"""States of sums, excess and references: they come back as they were, and wrong ones are refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.testing import assert_close

from laplace.density import ClassSums, Excess, FeatureDensity, Reference
from laplace.density import sums as sums_module
from laplace.errors import StateError
from laplace.schema import check_entries, check_tree
from tests.density.brute_force import rows_of
from tests.density.test_sums import C, D, accumulated, equal


def saved(state):
    """Through a file, which holds tensors and plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def read(kind, state, **known):
    """As the estimators read them: the tables first."""
    check_tree(state)
    check_entries(state, kind.entries, {"dtype": torch.float32, **known})
    return kind.from_state(state)


def sums(**options):
    return accumulated(*rows_of(C, D, 60), **options)


def reference(n=50):
    return Reference.of((-torch.rand(n)).round(decimals=1), torch.randn(n), "training")


@pytest.mark.parametrize("form", ["class form", "tied form"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_come_back(form, normalize, monkeypatch):
    if form == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    before = sums(normalize_features=normalize)
    after = read(ClassSums, saved(before.state()), classes=C, features=D)
    equal(after, before)
    x = torch.randn(3, D)
    assert_close(FeatureDensity(after).g(x), FeatureDensity(before).g(x), rtol=0, atol=0)


def test_sums_with_an_empty_class_come_back():
    phi, y = rows_of(C, D, 60)
    before = accumulated(phi, y.clamp(min=1))
    equal(read(ClassSums, saved(before.state())), before)


def test_moments_may_be_larger_than_the_precision_of_the_model_holds():
    phi, y = rows_of(C, D, 60)
    before = accumulated(1e25 * phi, y)
    equal(read(ClassSums, saved(before.state())), before)


def test_excess_and_references_come_back():
    excess = Excess.of(torch.randn(30))
    assert read(Excess, saved(excess.state())) == excess
    before = reference()
    after = read(Reference, saved(before.state()))
    assert len(before.max_prob.values) != len(before.density.values)
    new = torch.linspace(-3, 3, 9), torch.linspace(-5, 50, 9)
    assert_close(after.fisher(*new), before.fisher(*new), rtol=0, atol=0)
    assert (after.source, after.n_rows) == ("training", 50)


def test_values_move_to_other_dtypes():
    narrow = sums().to(dtype=torch.float32)
    assert {part.dtype for part in (narrow.counts, narrow.sums, narrow.moments)} == {torch.float32}
    assert narrow.nbytes * 2 == sums().nbytes
    before = sums()
    assert before.to("cpu").moments is before.moments
    assert reference().to("cpu", torch.float32).density.values.dtype == torch.float32


def damaged(state, path, value):
    """A copy with another value at a path of names."""
    state = copy.deepcopy(state)
    place = state
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value(place[path[-1]])
    return state


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("counts",), lambda v: -v),
        (("counts",), lambda v: v[:-1]),
        (("counts",), lambda v: v.long()),
        (("counts",), lambda v: v / 1000),
        (("sums",), lambda v: v * torch.nan),
        (("sums",), lambda v: v * 1000),
        (("sums",), lambda v: v.mT),
        (("moments",), lambda v: v.sum(0, keepdim=True)),
        (("moments",), lambda v: v.triu()),
        (("moments",), lambda v: -v),
        (("moments",), lambda v: v * torch.inf),
        (("normalized",), lambda v: "no"),
    ],
)
def test_wrong_states_of_sums_are_refused(path, value):
    with pytest.raises(StateError, match="damaged"):
        read(ClassSums, damaged(sums().state(), path, value))


def test_sums_of_another_model_are_refused():
    for known in ({"classes": C + 1}, {"features": D - 1}):
        with pytest.raises(StateError):
            read(ClassSums, sums().state(), **known)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_prob", "values"), lambda v: v.flip(0)),
        (("max_prob", "values"), lambda v: v[:-1]),
        (("density", "values"), lambda v: torch.zeros_like(v)),
        (("density", "log_shares"), lambda v: -v),
        (("density", "log_shares"), lambda v: v.flip(0)),
        (("density", "scale"), lambda v: 0.0),
        (("density", "scale"), lambda v: torch.tensor(1.0)),
        (("source",), lambda v: "test"),
        (("n_rows",), lambda v: 0),
        (("density",), lambda v: None),
    ],
)
def test_wrong_states_of_references_are_refused(path, value):
    with pytest.raises(StateError):
        read(Reference, damaged(reference().state(), path, value))


def test_tails_of_too_many_or_no_quantiles_are_refused():
    empty = {"values": torch.zeros(0), "log_shares": torch.zeros(0), "scale": 1.0}
    many = {"values": torch.arange(1001.0), "log_shares": -1 - torch.arange(1001.0), "scale": 1.0}
    for tail in (empty, many):
        with pytest.raises(StateError, match="1 to 1000 numbers"):
            read(Reference, {**reference().state(), "density": tail})


@pytest.mark.parametrize(
    "state", [{"q50": 1.0, "q95": 0.5}, {"q50": 1.0, "q95": float("inf")}, {"q50": 1.0}, {"q50": 1, "q95": 2.0}]
)
def test_wrong_states_of_the_excess_are_refused(state):
    with pytest.raises(StateError):
        read(Excess, state)
