"""The dense structure."""

import pytest
import torch

from laplace.structures.full import FullCurvature, FullPrecision
from laplace.structures.head_block import head_blocks
from tests.contracts import check_curvature, check_precision, shapes_of
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, C, D, P, prior, psd
from tests.tools import LargestTensor, assert_close


@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER, PER_WEIGHT], ids=["scalar", "per layer", "per weight"])
def test_full_satisfies_the_contract(precision):
    first, second = psd(P, 1), psd(P, 2)
    check_curvature(FullCurvature(first), FullCurvature(second), first + second, (first, second), prior(precision))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_full_knows_the_closed_forms_of_a_linear_layer(bias):
    size = C * (D + bias)
    dense = psd(size, 3, rank=size) + torch.eye(size).double()
    check_precision(FullPrecision(dense), dense, n_outputs=C, bias=bias)


def test_the_root_is_a_lower_triangular_root_of_the_covariance():
    dense = psd(P, 4, rank=P) + torch.eye(P).double()
    precision = FullPrecision(dense)
    assert_close(precision.root, precision.root.tril())
    assert_close(precision.root @ precision.root.T, dense.inverse())
    assert_close(precision.covariance, dense.inverse())


def test_variances_of_many_outputs_never_build_their_covariance():
    n_outputs, n_features, rows = 24, 3, 50
    size = n_outputs * (n_features + 1)
    precision = FullPrecision(psd(size, 5, rank=size) + torch.eye(size).double())
    blocks_of_head = head_blocks(torch.randn(rows, n_features).double(), shapes_of(n_outputs, n_features))
    with LargestTensor() as largest:
        precision.block_variance(blocks_of_head)
    assert largest.numel < rows * n_outputs**2, largest.operation
