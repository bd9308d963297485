"""Random weights as one vector."""

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace.network.parameters import ParameterSubset, expand_groups, split_sizes
from tests.tools import assert_close


def test_the_last_layer_is_its_weight_row_by_row_then_its_bias():
    layer = nn.Linear(3, 2).double()
    subset = ParameterSubset.last_layer(layer)
    assert (subset.n_params, subset.n_layers, subset.sizes) == (8, 2, (6, 2))
    assert_close(subset.vector(), parameters_to_vector(layer.parameters()))
    assert not subset.vector().requires_grad


def test_a_head_without_bias_is_one_group():
    subset = ParameterSubset.last_layer(nn.Linear(3, 2, bias=False))
    assert (subset.n_params, subset.n_layers, subset.sizes) == (6, 1, (6,))


def test_the_vector_is_a_copy():
    layer = nn.Linear(3, 2)
    vector = ParameterSubset.last_layer(layer).vector()
    before = layer.weight.detach().clone()
    vector.zero_()
    assert torch.equal(layer.weight, before)


def test_groups_split_and_expand():
    vector = torch.arange(8.0)
    first, second = split_sizes(vector.expand(4, 8), (6, 2))
    assert (first.shape, second.shape) == ((4, 6), (4, 2))
    assert expand_groups(torch.tensor([1.0, 2.0]), (3, 2)).tolist() == [1, 1, 1, 2, 2]
