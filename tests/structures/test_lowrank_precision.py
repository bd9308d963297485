"""A diagonal plus low rank, factorized."""

import pytest
import torch

from laplace.structures.jacobian import DenseBlock
from laplace.structures.lowrank_precision import LowRankPrecision
from laplace.structures.product import ProductBlock
from tests.contracts import check_precision, generator
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, SIZES, C, D, P, prior, uniform
from tests.tools import assert_close

RANK = 5


def sample(precision, *, n_params=P, sizes=SIZES, scale=1.7):
    """A precision and its dense meaning; orthonormal directions, so that a scalar prior takes the short way."""
    U = torch.linalg.qr(torch.randn(n_params, RANK, dtype=torch.float64, generator=generator(1))).Q
    values, delta = 3 * uniform(RANK), prior(precision, sizes).diagonal()
    found = LowRankPrecision(U, values, scale, delta, isotropic=precision.numel() == 1)
    return found, scale * (U * values) @ U.T + delta.diag()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER, PER_WEIGHT], ids=["scalar", "per layer", "per weight"])
def test_lowrank_precisions_satisfy_the_contract(precision, bias):
    sizes = SIZES[: 1 + bias]
    n_params = sum(sizes)
    part = precision[:n_params] if precision.numel() > 2 else precision[: len(sizes)]
    found, dense = sample(part, n_params=n_params, sizes=sizes)
    check_precision(found, dense, n_outputs=C, bias=bias)
    T = found.correction
    assert_close((1 / found.delta).diag() - T @ T.T, dense.inverse(), "the identity of Woodbury")


@pytest.mark.parametrize("precision", [SCALAR, PER_WEIGHT], ids=["scalar", "per weight"])
def test_derivatives_in_factors_give_what_those_written_out_give(precision):
    found, _ = sample(precision)
    left, right = torch.randn(3, 6, 1, 1, C).double(), torch.randn(6, 1, 1, D).double()
    blocks = [ProductBlock(left, right), DenseBlock(left.flatten(2))]
    J = torch.cat([block.dense() for block in blocks], -1).transpose(0, 1)
    V = found.functional_variance(J)
    assert_close(found.block_covariance(blocks), V)
    assert_close(found.block_variance(blocks), V.diagonal(dim1=1, dim2=2).T)
    assert_close(found.block_kernel(blocks), found.functional_covariance(J))


def test_variances_of_strong_directions_are_not_lost_in_float32():
    """Curvature 1e9 over a prior of 1: subtracting from the prior variance in float32 would leave rounding alone."""
    n_params = C * D
    U = torch.linalg.qr(torch.randn(n_params, RANK, dtype=torch.float64, generator=generator(2))).Q
    values, delta = torch.full((RANK,), 1e9).double(), torch.ones(n_params).double()
    exact = 1 / (1 + values[0])
    narrow = LowRankPrecision(U.float(), values.float(), 1.0, delta.float(), isotropic=True)
    J = U[:, 0].reshape(1, 1, -1).float()
    # What is left of float32 is that J and U are the same only up to rounding: its square.
    rounding = n_params * torch.finfo(torch.float32).eps ** 2
    assert abs(float(narrow.functional_variance(J)) - float(exact)) <= 1e-5 * float(exact) + rounding
    assert abs(float(narrow.block_variance([DenseBlock(J)])) - float(exact)) <= 1e-5 * float(exact) + rounding
    assert bool((narrow.diagonal_of_inverse() > 0).all())
