"""The Gaussian prior."""

import pytest
import torch
from torch import nn

from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.prior import GaussianPrior
from laplace.utils import expand_prior_precision, fix_prior_prec_structure, parameters_per_layer
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


# -- the recorded helpers ---------------------------------------------------------------------------------------------


def partly_frozen() -> nn.Module:
    """Groups of 6, 2 and 4 weights that require a gradient, and 10 that do not."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(4, 1, bias=False))
    model[1].requires_grad_(False)
    return model


def test_parameters_per_layer_counts_what_requires_a_gradient():
    assert parameters_per_layer(partly_frozen()) == [6, 2, 4]
    assert parameters_per_layer(nn.Identity()) == []


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        (torch.tensor(2.0), torch.full((12,), 2.0)),
        (torch.tensor([2.0]), torch.full((12,), 2.0)),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0] * 6 + [2.0] * 2 + [3.0] * 4)),
        (torch.arange(12.0), torch.arange(12.0)),
    ],
    ids=["scalar", "one value", "groups", "weights"],
)
def test_expand_prior_precision_gives_one_a_weight(given, expanded):
    assert torch.equal(expand_prior_precision(given, partly_frozen()), expanded)
    assert expand_prior_precision(given.float(), partly_frozen()).dtype == torch.float32


def test_expand_prior_precision_is_differentiable_and_refuses_other_shapes():
    delta = torch.ones(3, requires_grad=True)
    expand_prior_precision(delta, partly_frozen()).sum().backward()
    assert torch.equal(delta.grad, torch.tensor([6.0, 2.0, 4.0]))
    with pytest.raises(ShapeError, match="3 parameter groups"):
        expand_prior_precision(torch.ones(5), partly_frozen())


@pytest.mark.parametrize(("structure", "n"), [("scalar", 1), ("layerwise", 3), ("diag", 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fix_prior_prec_structure_gives_a_prior_the_shape_of_its_structure(structure, n, dtype):
    for initial in (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.full((n,), 2.0)):
        values = fix_prior_prec_structure(initial, structure, 3, 12, "cpu", dtype)
        assert values.dtype == dtype
        assert torch.equal(values, torch.full((n,), 2.0, dtype=dtype))
        values[0] = 7.0  # its own memory: entries can be tuned one by one
        assert float(values.sum()) == 7.0 + 2.0 * (n - 1)
        assert float(torch.as_tensor(initial).sum()) in (2.0, 2.0 * n)
    with pytest.raises(InputError, match=rf"'{structure}' takes one value or {n} of them; got 5"):
        fix_prior_prec_structure(torch.ones(5), structure, 3, 12, "cpu", dtype)


def test_fix_prior_prec_structure_lists_the_structures():
    with pytest.raises(UnsupportedError, match=r"'scalar', 'layerwise', 'diag'.*Did you mean 'layerwise'"):
        fix_prior_prec_structure(1.0, "layer", 3, 12, "cpu", torch.float64)
