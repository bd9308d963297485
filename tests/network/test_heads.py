"""Each kind of last layer against its own forward pass."""

import pytest
import torch
from torch import nn

from laplace.network.heads import HEADS, KINDS, head_of, n_outputs
from laplace.network.parameters import ParameterSubset
from tests.tools import assert_close

EXAMPLES = {
    "linear": nn.Linear(3, 2).double(),
    "linear without bias": nn.Linear(3, 2, bias=False).double(),
    "linear with a parametrized weight": nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double(),
}
every_layer = pytest.mark.parametrize("layer", EXAMPLES.values(), ids=EXAMPLES)


@every_layer
def test_outputs_are_those_of_the_layer_and_linear_in_its_weights(layer):
    head, phi = head_of(layer), torch.randn(4, 3).double()
    assert_close(head.outputs(layer, phi), layer(phi))
    weight, *bias = head.parameters(layer)
    assert [tuple(p.shape) for p in (weight, *bias)] == head.groups(layer) == ParameterSubset.last_layer(layer).shapes
    assert_close(phi @ weight.T + (bias[0] if bias else 0), layer(phi))
    assert n_outputs(layer) == layer(phi).shape[-1]


def test_every_kind_has_an_example():
    assert {kind for kind in KINDS for layer in EXAMPLES.values() if isinstance(layer, kind)} == set(HEADS)
