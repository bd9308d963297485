"""Which data and outputs become points."""

import itertools

import numpy as np
import pytest
import torch

from laplace.errors import InputError
from laplace.gp.subsample import Reservoir, choose_columns, k_means
from tests import reference
from tests.tools import assert_close

X, Y = torch.arange(24.0).reshape(12, 2), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2])


def drawn(*cuts: int, size: int = 6, seed: int = 0, balanced: bool = False, x=X) -> list:
    reservoir = Reservoir(size, seed, balanced=balanced)
    edges = [0, *cuts, len(Y)]
    for start, stop in itertools.pairwise(edges):
        reservoir.add(reference.rows_of(x, slice(start, stop)), Y[start:stop])
    return reservoir.batches()


def joined(pieces: list) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    return torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces]), np.concatenate([p.noise for p in pieces])


@pytest.mark.parametrize("balanced", [False, True])
def test_the_subset_does_not_depend_on_the_batches(balanced):
    x, y, noise = joined(drawn(balanced=balanced))
    for cuts in ((1,), (5, 6), (3, 4, 9), tuple(range(1, 12))):
        other = joined(drawn(*cuts, balanced=balanced))
        assert torch.equal(x, other[0])
        assert torch.equal(y, other[1])
        assert np.array_equal(noise, other[2])


def test_data_are_drawn_without_replacement_and_all_when_all_are_asked_for():
    x = joined(drawn(4))[0]
    assert len(x.unique(dim=0)) == 6
    assert not torch.equal(x, joined(drawn(4, seed=1))[0])
    assert torch.equal(joined(drawn(4, size=12))[0], X)


def test_every_datum_is_as_likely():
    counts = sum((joined(drawn(4, seed=seed))[0][:, :1] == X[:, 0]).sum(0) for seed in range(400))
    spread = (400 * 0.5 * 0.5) ** 0.5
    assert bool(((counts - 200).abs() < 5 * spread).all())


@pytest.mark.parametrize(("size", "expected"), [(3, [1, 1, 1]), (6, [3, 2, 1]), (9, [4, 4, 1]), (12, [7, 4, 1])])
def test_a_balanced_subset_has_as_equal_classes_as_there_are_data_for(size, expected):
    y = joined(drawn(5, size=size, balanced=True))[1]
    counts = torch.bincount(y, minlength=3)
    assert len(y) == size
    assert counts[2] == 1
    assert int((counts[:2] - torch.tensor(expected[:2])).abs().max()) <= 1


def test_masked_rows_are_no_class():
    masked = torch.where(torch.arange(12) % 2 == 0, reference.IGNORED, Y)
    for cuts in ((12,), (1, 4, 7)):
        reservoir = Reservoir(5, 0, balanced=True)
        for x, y in zip(X.tensor_split(cuts), masked.tensor_split(cuts), strict=True):
            reservoir.add(x, y)
        x, y, _ = joined(reservoir.batches())
        assert sorted(y.tolist()) == [0, 0, 1, 1, 2]
        assert torch.equal(y, Y[(x[:, 0] / 2).long()])
    reservoir = Reservoir(7, 0, balanced=True)
    reservoir.add(X, masked)
    with pytest.raises(InputError, match="subsample of 7 of 6 unmasked training data"):
        reservoir.batches()


def test_nested_inputs_stay_nested():

    pieces = drawn(3, 8, x={"a": X, "b": [X[:, :1]]})
    assert sum(len(p.y) for p in pieces) == 6
    for piece in pieces:
        assert torch.equal(piece.x["a"][:, :1], piece.x["b"][0])


def test_inputs_of_different_lengths_stay_apart():
    reservoir = Reservoir(4, 0)
    reservoir.add(torch.zeros(2, 3), Y[:2])
    reservoir.add(torch.zeros(2, 5), Y[:2])
    assert sorted(p.x.shape for p in reservoir.batches()) == [(2, 3), (2, 5)]


def test_more_than_there_are_is_refused():
    with pytest.raises(InputError, match="subsample of 13 of 12 training data"):
        drawn(4, size=13)


def test_a_balanced_subset_needs_classes():
    with pytest.raises(InputError, match="one class index a datum"):
        Reservoir(2, 0, balanced=True).add(X, X)


def test_columns_are_unmasked_positions_and_any_output():
    noise = np.random.default_rng(0).random((300, 2))
    columns = choose_columns(noise, [(1, 3)] * 300, 4)
    assert set((columns // 4).tolist()) == {1, 3}
    assert set((columns % 4).tolist()) == {0, 1, 2, 3}
    turns = choose_columns(noise[:6], [(0,)] * 6, 4, turns=range(6))
    assert turns.tolist() == [0, 1, 2, 3, 0, 1]


def test_k_means_finds_clusters():
    noise = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centers.unsqueeze(1) + 0.1 * torch.randn(3, 50, 2, generator=noise)).flatten(0, 1)
    found = k_means(x, 3, seed=0)
    order = [int(torch.cdist(c.unsqueeze(0), found).argmin()) for c in centers]
    assert_close(found[order], x.reshape(3, 50, 2).mean(1))


def test_k_means_of_repeated_data_is_finite():
    assert torch.equal(k_means(torch.ones(5, 2), 3, seed=0), torch.ones(3, 2))
