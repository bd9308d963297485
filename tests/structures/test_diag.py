"""The diagonal structure."""

import pytest
import torch

from laplace.structures.diag import DiagCurvature, DiagPrecision
from laplace.structures.head_block import head_blocks
from tests.contracts import check_curvature, check_precision, shapes_of
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, C, D, P, prior, uniform
from tests.tools import LargestTensor


@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER, PER_WEIGHT], ids=["scalar", "per layer", "per weight"])
def test_diag_satisfies_the_contract(precision):
    first, second = uniform(P, 1), uniform(P, 2)
    first[0] = 0.0  # a weight the data say nothing about
    dense = (first.diag(), second.diag())
    check_curvature(DiagCurvature(first), DiagCurvature(second), dense[0] + dense[1], dense, prior(precision))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_diag_knows_the_closed_forms_of_a_linear_layer(bias):
    vector = uniform(C * (D + bias), 3)
    check_precision(DiagPrecision(vector), vector.diag(), n_outputs=C, bias=bias)


def test_variances_take_no_more_memory_than_the_weights_or_the_outputs():
    n_outputs, n_features, rows = 40, 30, 20
    precision = DiagPrecision(uniform(n_outputs * (n_features + 1)))
    blocks_of_head = head_blocks(torch.randn(rows, n_features).double(), shapes_of(n_outputs, n_features))
    with LargestTensor() as largest:
        precision.block_variance(blocks_of_head)
    assert largest.numel <= n_outputs * (n_features + 1), largest.operation
