"""log |A| − log |A₀| where nearly all of both determinants is the prior's."""

import pytest
import torch

from laplace.prior import GaussianPrior
from laplace.structures import BlockDiagCurvature, DiagCurvature, EKFACCurvature, FullCurvature, LowRankCurvature
from tests.contracts import generator
from tests.structures.samples import psd

SIDE = 300
"""Of one weight: 90,000 numbers of which a few are known by data."""


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(0), dtype=torch.float64)


def curvature(structure: str, dtype: torch.dtype):
    """A curvature of trace about 1 or 10."""
    if structure == "diag":
        return DiagCurvature((uniform(SIDE**2) / SIDE**2).to(dtype))
    if structure == "ekfac":
        return EKFACCurvature([[None, None]], [(uniform(SIDE, SIDE) / SIDE**2).to(dtype)])
    if structure == "lowrank":
        Q = torch.linalg.qr(torch.randn(SIDE**2, 3, generator=generator(1), dtype=torch.float64)).Q
        return LowRankCurvature(Q.to(dtype), torch.tensor([5.0, 2.0, 1.0]).to(dtype))
    matrix = psd(SIDE, 1, rank=3)
    matrix = (matrix / matrix.trace()).to(dtype)
    return FullCurvature(matrix) if structure == "full" else BlockDiagCurvature([FullCurvature(matrix)] * 300)


@pytest.mark.parametrize("precisions", [1, 2], ids=["scalar", "layerwise"])
@pytest.mark.parametrize("structure", ["diag", "ekfac", "lowrank", "full", "blockdiag"])
def test_in_single_precision_it_is_that_of_double(structure, precisions):
    sizes = {"full": (SIDE,), "blockdiag": (SIDE,) * 300}.get(structure, (SIDE**2,))
    found = []
    for dtype in (torch.float64, torch.float32):
        delta = torch.full((1 if precisions == 1 else len(sizes),), 1e4, dtype=dtype)
        prior = GaussianPrior(torch.zeros((), dtype=dtype), delta, sizes)
        found.append(float(curvature(structure, dtype).log_det_ratio(prior)))
    assert 0 < found[0] < 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-3)
