"""The Gaussian prior."""

import pytest
import torch

from laplace.errors import ShapeError, UnsupportedError
from laplace.prior import GaussianPrior
from tests.tools import assert_close

SIZES = (4, 2)
THETA = torch.arange(1.0, 7.0, dtype=torch.float64)
PRECISIONS = {
    "scalar": ([2.0], [2.0] * 6),
    "per layer": ([2.0, 3.0], [2.0] * 4 + [3.0] * 2),
    "per weight": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("given", "expanded"), PRECISIONS.values(), ids=PRECISIONS)
def test_a_prior_of_any_shape_means_one_precision_a_weight(given, expanded):
    prior = GaussianPrior(tensor(0.5), tensor(given), SIZES)
    assert_close(prior.diagonal(), tensor(expanded))
    assert_close(prior.logdet(), tensor(expanded).log().sum())
    assert_close(prior.scatter(THETA), (tensor(expanded) * (THETA - 0.5) ** 2).sum())


@pytest.mark.parametrize("given", [row[0] for row in PRECISIONS.values()], ids=PRECISIONS)
def test_log_determinant_and_scatter_are_differentiable_in_the_precision(given):
    precision = tensor(given).requires_grad_()
    for quantity in (lambda prior: prior.logdet(), lambda prior: prior.scatter(THETA)):
        assert torch.autograd.gradcheck(lambda p, q=quantity: q(GaussianPrior(tensor(0.5), p, SIZES)), (precision,))


def test_the_mean_may_be_one_value_a_weight():
    prior = GaussianPrior(THETA.flip(0), tensor([2.0]), SIZES)
    assert_close(prior.scatter(THETA), 2 * ((THETA - THETA.flip(0)) ** 2).sum())


def test_a_precision_per_layer_exists_unless_there_is_one_per_weight():
    assert_close(GaussianPrior(tensor(0.0), tensor([2.0]), SIZES).per_layer(), tensor([2.0, 2.0]))
    assert_close(GaussianPrior(tensor(0.0), tensor([2.0, 3.0]), SIZES).per_layer(), tensor([2.0, 3.0]))
    with pytest.raises(UnsupportedError, match="diag"):
        GaussianPrior(tensor(0.0), tensor([1.0] * 6), SIZES).per_layer()


@pytest.mark.parametrize("shape", [(), (3,), (5,), (1, 1), (6, 1)])
def test_precisions_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match="2 parameter groups"):
        GaussianPrior(tensor(0.0), torch.ones(shape, dtype=torch.float64), SIZES)


@pytest.mark.parametrize("shape", [(2,), (5,), (6, 1)])
def test_means_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match="6 weights"):
        GaussianPrior(torch.zeros(shape, dtype=torch.float64), tensor([1.0]), SIZES)
