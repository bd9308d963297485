"""The block-diagonal estimators."""

import torch

from laplace import BlockDiagLaplace, BlockDiagLLLaplace, FullLaplace
from tests.cases import BASIC
from tests.networks import named
from tests.tools import assert_close


def test_blocks_are_those_of_the_dense_curvature_in_the_order_of_the_parameters():
    network, model = named("conv2d"), named("conv2d").model()
    full, la = (cls(model, network.likelihood) for cls in (FullLaplace, BlockDiagLaplace))
    for each in (full, la):
        each.fit([network.data()])
    assert [len(block) for block in la.H] == [p.numel() for p in model.parameters()]
    assert_close(torch.block_diag(*la.H), torch.block_diag(*network.problem().groups(full.H)))
    assert_close(torch.block_diag(*la.posterior_precision), torch.block_diag(*la.H) + torch.eye(la.n_params))


def test_without_a_bias_the_last_layer_is_one_block_and_the_dense_curvature():
    case = BASIC[0]
    la = BlockDiagLLLaplace(case.model(), case.likelihood)
    la.fit(case.batches(4))
    weight = case.model().head.weight.numel()
    assert_close(la.H[0], case.problem().ggn()[:weight, :weight])
