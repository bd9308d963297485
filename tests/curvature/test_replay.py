"""Data that are read more than once."""

import pytest
import torch

from laplace.curvature import replay
from laplace.curvature.replay import Features, Replay
from laplace.enums import HessianStructure
from laplace.errors import InputError
from laplace.network import Batch, Passes

BATCHES = [(torch.full((2, 3), float(n)), torch.zeros(2)) for n in range(3)]


def count(calls):
    def features(x):
        calls.append(1)
        return Features(x.sum(1, keepdim=True), x)

    return features


def test_features_are_made_once_and_are_the_same_in_each_pass():
    calls = []
    data = Replay(iter(BATCHES), count(calls))
    first, second = list(data), list(data)
    assert len(calls) == 3
    assert [x.phi.tolist() for x, _ in first] == [x.tolist() for x, _ in BATCHES] == [x.phi.tolist() for x, _ in second]


def test_features_that_do_not_fit_are_made_again(monkeypatch):
    monkeypatch.setattr(replay, "KEPT_ELEMENTS", 12)
    calls = []
    data = Replay(BATCHES, count(calls))
    for n in (1, 2):
        assert [float(x.f[0]) for x, _ in data] == [0, 3, 6]
        assert len(calls) == 3 * n


def test_a_pass_that_was_broken_off_is_made_again():
    calls = []
    data = Replay(BATCHES, count(calls))
    for _ in data:
        break
    assert len(list(data)) == 3
    assert len(calls) == 4


def test_iterators_are_refused_where_data_are_read_again():
    once = Passes(iter(BATCHES), lambda: iter([]))
    for batches in (iter(BATCHES), once):
        with pytest.raises(InputError, match=r"hessian_structure='lowrank'.*read\s+once"):
            replay.check_repeatable(batches, HessianStructure.LOWRANK)
    for batches in (BATCHES, Passes(BATCHES, lambda: iter([]))):
        replay.check_repeatable(batches, HessianStructure.LOWRANK)


def test_passes_yield_the_same_number_of_rows_or_raise():
    left = [[Batch(*batch) for batch in BATCHES], [Batch(*batch) for batch in BATCHES[1:]]]
    passes = Passes(BATCHES, lambda: iter(left.pop(0)))
    assert len(list(passes)) == 3
    with pytest.raises(InputError, match="6 rows in its first pass and 4 in a later one"):
        list(passes)
