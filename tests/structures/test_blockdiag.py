"""The block-diagonal structure."""

import pytest
import torch

from laplace.structures.blockdiag import BlockDiagCurvature, BlockDiagPrecision
from laplace.structures.full import FullCurvature, FullPrecision
from tests.contracts import check_curvature, check_precision
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, SIZES, C, D, prior, psd
from tests.tools import assert_close


def blocks(seed: int) -> list[torch.Tensor]:
    return [psd(size, seed + size) for size in SIZES]


def curvature(parts: list[torch.Tensor]) -> BlockDiagCurvature:
    return BlockDiagCurvature([FullCurvature(part) for part in parts])


@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER, PER_WEIGHT], ids=["scalar", "per layer", "per weight"])
def test_blockdiag_satisfies_the_contract(precision):
    first, second = blocks(1), blocks(2)
    dense = torch.block_diag(*first), torch.block_diag(*second)
    check_curvature(curvature(first), curvature(second), dense[0] + dense[1], dense, prior(precision))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_blockdiag_knows_the_closed_forms_of_a_linear_layer(bias):
    parts = [psd(size, 3, rank=size) + torch.eye(size).double() for size in (C * D, C)[: 1 + bias]]
    precision = BlockDiagPrecision([FullPrecision(part) for part in parts])
    check_precision(precision, torch.block_diag(*parts), n_outputs=C, bias=bias)


def test_the_log_determinant_of_a_group_with_one_precision_factorizes_nothing(monkeypatch):
    parts = blocks(5)
    found, P0 = curvature(parts), prior(PER_LAYER)
    monkeypatch.setattr(FullCurvature, "posterior", lambda *_, **__: pytest.fail("a posterior was made"))
    assert_close(found.posterior_logdet(P0), (torch.block_diag(*parts) + P0.diagonal().diag()).logdet())
