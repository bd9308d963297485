"""The categorical likelihood."""

import pytest
import torch

from laplace import linalg
from laplace.enums import CurvatureKind
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import CategoricalLikelihood
from tests.contracts import check_likelihood
from tests.tools import assert_close


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_categorical_satisfies_the_contract(n_classes):
    check_likelihood(CategoricalLikelihood(), logits(5, n_classes), torch.tensor([0, 1, 1, 0, n_classes - 1]))


def test_categorical_satisfies_the_contract_with_soft_labels():
    check_likelihood(CategoricalLikelihood(), logits(5, 3), (2 * logits(5, 3)).softmax(-1))


def test_one_hot_soft_labels_equal_class_indices():
    likelihood, y = CategoricalLikelihood(), torch.tensor([2, 0, 1, 1])
    soft = torch.nn.functional.one_hot(y, 3).double()
    assert_close(likelihood.nll(logits(4, 3), soft), likelihood.nll(logits(4, 3), y))
    assert_close(likelihood.gradient(logits(4, 3), soft), likelihood.gradient(logits(4, 3), y))


def test_hessians_are_blind_to_a_shift_of_all_logits():
    """Probabilities sum to one, so the Hessian maps the vector of ones to zero."""
    dense = CategoricalLikelihood().hessian(logits(5, 4)).dense()
    assert_close(dense.sum(-1), torch.zeros(5, 4))


def test_extreme_logits_stay_finite():
    f, y = 1e4 * logits(4, 3), torch.tensor([0, 1, 2, 0])
    likelihood = CategoricalLikelihood()
    for quantity in (likelihood.nll(f, y), likelihood.gradient(f, y), likelihood.hessian(f).dense()):
        assert bool(torch.isfinite(quantity).all())


@pytest.mark.parametrize("margin", [8.0, 12.0, 16.0, 20.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_confident_float32_logits_keep_their_curvature(margin, n_classes):
    """p - p^2 cancels when p is near one; a network that fits its training data is that confident."""
    n = 2000
    y = torch.arange(n) % n_classes
    noise = torch.randn(n, n_classes, generator=torch.Generator().manual_seed(0))
    f = noise + margin * torch.nn.functional.one_hot(y, n_classes)
    narrow, wide = (CategoricalLikelihood().hessian(f.to(dtype)) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(narrow.diag().double(), wide.diag(), rtol=1e-4, atol=0.0)
    G, truth = narrow.sum().double(), wide.sum()
    assert (G - truth).abs().max() < 1e-4 * truth.max()
    assert torch.linalg.eigvalsh(G).min() > -1e-4 * truth.max()


def test_only_the_temperature_scales():
    likelihood = CategoricalLikelihood(temperature=4.0)
    for scale in (likelihood.scale, *map(likelihood.curvature_scale, CurvatureKind)):
        assert_close(torch.as_tensor(scale), torch.tensor(0.25))
    assert float(likelihood.log_normalizer(10, 3)) == 0.0


def test_masked_positions_are_dropped_and_the_rest_keeps_its_datum():
    likelihood, f = CategoricalLikelihood(), logits(3, 2, 4)
    y = torch.tensor([[1, -100], [-100, -100], [0, 3]])
    positions = likelihood.flatten(f, y)
    assert_close(positions.f, f.reshape(6, 4)[[0, 4, 5]])
    assert positions.y.tolist() == [1, 0, 3]
    assert positions.datum.tolist() == [0, 2, 2]
    assert_close(positions.select(f), positions.f)
    assert likelihood.count(y, 4) == 3


def test_soft_labels_of_positions_are_flattened_and_counted():
    likelihood, f = CategoricalLikelihood(), logits(2, 3, 4)
    y = (2 * f).softmax(-1)
    assert_close(likelihood.flatten(f, y).y, y.reshape(6, 4))
    assert likelihood.count(y, 4) == 6


@pytest.mark.parametrize(
    ("y", "error", "says"),
    [
        (torch.tensor([0, 1, 2, 4]), InputError, "0..3"),
        (torch.tensor([0, 1, 2, -1]), InputError, "0..3"),
        (torch.zeros(3, dtype=torch.long), ShapeError, "shape"),
        (torch.zeros(4, 1, dtype=torch.long), ShapeError, "shape"),
        (torch.zeros(4, dtype=torch.bool), InputError, "bool"),
        (torch.zeros(4), ShapeError, "Soft labels"),
        (torch.ones(4, 4), InputError, "sum to one"),
        (torch.tensor([1.5, -0.5, 0.0, 0.0]).expand(4, 4), InputError, "non-negative"),
    ],
    ids=["class too large", "class negative", "too few", "extra axis", "bool", "float classes", "not normalized", "negative"],
)  # fmt: skip
def test_targets_that_mean_nothing_are_refused(y, error, says):
    with pytest.raises(error, match=says):
        CategoricalLikelihood().flatten(logits(4, 4), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_indices_of_any_integer_dtype_are_read(dtype):
    y = torch.tensor([0, 1, 2, 3])
    assert CategoricalLikelihood().flatten(logits(4, 4), y.to(dtype)).y.tolist() == y.tolist()


def test_bytes_that_would_wrap_to_the_mask_count():
    """156 as a byte is -100 modulo 256."""
    y = torch.tensor([156, 3], dtype=torch.uint8)
    assert CategoricalLikelihood().count(y, 200) == len(CategoricalLikelihood().flatten(logits(2, 200), y).y) == 2


def test_predictive_nll_is_the_cross_entropy_of_the_link():
    likelihood, f, y = CategoricalLikelihood(), logits(4, 3), torch.tensor([0, 2, 1, 1])
    cov = torch.ones(4, 3)
    link = lambda mean, cov: mean.log_softmax(-1)  # noqa: E731
    assert_close(likelihood.predictive_nll(f, cov, y, link), likelihood.nll(f, y))
    one_hot = torch.nn.functional.one_hot(y, 3).double()
    assert_close(likelihood.predictive_nll(f, cov, one_hot, link), likelihood.nll(f, y))
    assert_close(likelihood.predict(f, cov, link), f.softmax(-1))


def test_columns_that_have_no_room_are_refused_before_they_are_made(monkeypatch):
    f = torch.randn(4, 50, dtype=torch.float64)
    monkeypatch.setattr(linalg, "memory_of", lambda device: 3 * 4 * 50 * 49 * 8)
    root = CategoricalLikelihood().hessian_root(f)
    assert root.shape == (4, 50, 49)
    monkeypatch.setattr(linalg, "memory_of", lambda device: 3 * 4 * 50 * 49 * 8 - 1)
    with pytest.raises(
        UnsupportedError, match=r"4 rows with 50 classes takes 49 columns .*\"columns\".*\"stochastic\""
    ):
        CategoricalLikelihood().hessian_root(f)
