"""Which data are in the subset: those of one draw, in the order of the loader, however the loader cuts and counts them."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace import Laplace, linalg
from laplace.errors import InputError, UnsupportedError
from laplace.gp import subset as room
from laplace.gp.subset import expected_rows
from tests.cases import named, stream, tensor_loader
from tests.tools import assert_close

M, SEED = 5, 3
both = pytest.mark.parametrize("weights", ["last_layer", "all"])


def fitted(loader, name="classification", weights="last_layer", **options):
    case = named(name)
    options = {**case.laplace_options(), "n_subset": M, "seed": SEED, **options}
    la = Laplace(case.model(), case.likelihood, weights, "gp", **options)
    la.fit(loader)
    return la


def chosen(name="classification", n=None):
    """The same data by hand, as one batch."""
    case = named(name)
    x, y = case.data()
    rows = np.sort(np.random.default_rng(SEED).choice(n or len(y), M, replace=False))
    return [(x[rows], y[rows])], len(y)


@both
@pytest.mark.parametrize(
    "name", ["classification", "regression", "masked_positions", "positions_regression", "preferences"]
)
def test_it_is_the_draw_of_numpy_in_the_order_of_the_loader(name, weights):
    case = named(name)
    loaders = [
        case.batches(2, 3),
        tensor_loader(case, 4),
        tensor_loader(case, 3),
        iter(case.batches(1)),
        stream(case.batches(4, 1)),
    ]
    size = min(M, case.n_rows - 1)
    rows = np.sort(np.random.default_rng(SEED).choice(case.n_rows, size, replace=False))
    x, y = case.data()
    by_hand = fitted([(x[rows], y[rows])], name, weights, n_subset=size)
    for loader in loaders:
        la = fitted(loader, name, weights, n_subset=size)
        assert la.n_data == case.n_rows
        assert la.H.ratio == case.n_rows / size
        assert_close(la.H.root, by_hand.H.root)
        assert_close(la.H.gram, by_hand.H.gram)


@both
def test_the_loss_is_that_of_all_data(weights):
    case = named("regression")
    la = fitted(case.batches(3), "regression", weights)
    assert_close(la.loss, case.problem().nll())


def test_expected_rows():
    case = named("classification")
    assert expected_rows(tensor_loader(case, 4), "labels") == case.n_rows
    assert expected_rows(tensor_loader(case, 4, drop_last=True), "labels") == 8
    assert expected_rows(case.batches(2, 3), "labels") == case.n_rows
    assert expected_rows([{"x": torch.zeros(3, 1), "labels": torch.zeros(3)}], "labels") == 3
    assert expected_rows([{"x": torch.zeros(3, 1)}], "labels") is None
    assert expected_rows(iter(case.batches(2)), "labels") is None
    assert expected_rows(stream(case.batches(2)), "labels") is None


def test_dropping_the_last_batch_draws_from_what_is_left():
    case = named("classification")
    la = fitted(tensor_loader(case, 4, drop_last=True))
    assert la.n_data == 8
    assert_close(la.H.gram, fitted(chosen(n=8)[0]).H.gram)


@both
def test_a_subset_larger_than_the_data_is_refused(weights):
    case = named("classification")
    for loader in (case.batches(4), iter(case.batches(4))):
        with pytest.raises(InputError, match="n_subset=50 is more than there are: the training loader yields 11 rows"):
            fitted(loader, weights=weights, n_subset=50)


class Longer(IterableDataset):
    """Says a length that is wrong."""

    def __iter__(self):
        return iter(zip(*named("classification").data(), strict=True))

    def __len__(self):
        return 11


def test_a_loader_that_yields_other_data_than_it_said_is_refused():
    case = named("classification")
    dataset = TensorDataset(*case.data())

    def twice(rows):
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        return torch.cat([x, x]), torch.cat([y, y])

    with pytest.raises(InputError, match="has 11 rows by its length and yielded 22"):
        fitted(DataLoader(dataset, batch_size=4, collate_fn=twice))
    assert fitted(iter(DataLoader(dataset, batch_size=4, collate_fn=twice))).n_data == 22
    assert fitted(DataLoader(Longer(), batch_size=4)).n_data == 11


def test_data_that_are_kept_until_they_are_counted_have_a_bound(monkeypatch):
    monkeypatch.setattr(room, "KEPT_ELEMENTS", 20)
    with pytest.raises(InputError, match="does not say how many rows"):
        fitted(iter(named("classification").batches(2)))


def test_matrices_that_cannot_fit_are_refused_in_the_first_batch(monkeypatch):
    monkeypatch.setattr(linalg, "memory_of", lambda device: 1500)
    with pytest.raises(
        UnsupportedError, match=r"n_subset=5 makes 1 matrices of 15×15 numbers.*independent_outputs=True"
    ):
        fitted(named("classification").batches(4))


def test_a_subset_without_targets_is_refused():
    case = named("masked_rows")
    x, y = case.data()
    y = torch.full_like(y, -100).index_fill(0, torch.tensor([0]), 1)
    seed = next(s for s in range(9) if 0 not in np.random.default_rng(s).choice(len(y), 2, replace=False))
    with pytest.raises(InputError, match="No target of the 2 data of the subset counts"):
        fitted([(x, y)], "masked_rows", n_subset=2, seed=seed)


def test_roots_are_as_small_as_the_likelihood_allows():
    whole, shared = fitted(named("classification").batches(3)), fitted(named("regression").batches(3), "regression")
    assert whole.H.root.shape == (M, 4, 3)
    assert shared.H.root.shape == (M, 1)
    assert fitted(named("classification").batches(3), diagonal_hessian=True).H.root.shape == (M, 4)
    assert fitted(named("classification").batches(3), weights="all", diagonal_hessian=True).H.root.shape == (M, 4, 4)
    assert fitted(named("preferences").batches(3), "preferences").H.root.shape == (M, 1)
    assert whole.H.kernel.shares
    assert not fitted(named("classification").batches(3), weights="all").H.kernel.shares
