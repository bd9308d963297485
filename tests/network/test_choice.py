"""Single weights of a model: where they are, and which indices are refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace.errors import InputError, UnsupportedError
from laplace.network.choice import Interleaved
from laplace.network.parameters import ParameterSubset, expand_groups
from laplace.network.whole_network import WholeNetwork
from tests.contracts import model_untouched
from tests.tools import assert_close

INDICES = {
    "ascending": [1, 4, 12, 15, 19],
    "whole tensors": [*range(12, 16), 16, 17],
    "one weight": [25],
    "tensor by tensor": [16, 18, 3, 2],
    "shuffled": [25, 3, 17, 0, 16, 5],
}
every_choice = pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)


def network() -> nn.Module:
    """26 weights in tensors of 12, 4, 8 and 2."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@every_choice
def test_the_vector_holds_the_chosen_weights_in_the_order_of_the_indices(index):
    model = network()
    subset = ParameterSubset.indices(model, torch.tensor(index))
    whole = parameters_to_vector(model.parameters()).detach()
    assert_close(subset.vector(), whole[index])
    assert subset.n_params == len(index) == sum(subset.sizes)
    assert not subset.vector().requires_grad
    touched = [
        p
        for p, start in zip(model.parameters(), (0, 12, 16, 24), strict=True)
        if any(start <= i < start + p.numel() for i in index)
    ]
    assert [id(p) for p in subset.parameters] == [id(p) for p in touched]
    together = torch.cat([p.detach().flatten() for p in touched])
    assert_close(subset.restrict(together.expand(2, -1)), whole[index].expand(2, -1))


@every_choice
def test_embedding_is_the_transpose_of_restricting(index):
    subset = ParameterSubset.indices(network(), torch.tensor(index))
    v, w = torch.randn(3, len(index)), torch.randn(sum(p.numel() for p in subset.parameters))
    assert_close(subset.embed(v) @ w, v @ subset.restrict(w))
    assert_close(subset.restrict(subset.embed(v)), v)


@every_choice
def test_other_weights_are_put_where_the_indices_say_and_nothing_is_written_to(index):
    model = network()
    subset, theta = ParameterSubset.indices(model, torch.tensor(index)), torch.arange(1.0, 1 + len(index))
    expected = parameters_to_vector(model.parameters()).detach().clone()
    expected[index] = theta
    with model_untouched(model):
        new = dict(zip(map(id, subset.parameters), subset.at(theta), strict=True))
    found = torch.cat([new.get(id(p), p).detach().flatten() for p in model.parameters()])
    assert_close(found, expected)
    assert not subset.equals(theta)
    assert subset.equals(subset.vector())
    x = torch.randn(3, 3)
    other = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(expected, other.parameters())
    assert_close(WholeNetwork(model, indices=torch.tensor(index)).at(theta, x), other(x))


def test_values_of_groups_go_to_their_weights_and_groups_are_in_the_order_of_their_first_index():
    subset = ParameterSubset.indices(network(), torch.tensor(INDICES["shuffled"]))
    assert subset.sizes == (1, 3, 2)  # of the last bias, the first weight, the second weight
    assert expand_groups(torch.tensor([1.0, 2.0, 3.0]), subset.sizes).tolist() == [1, 2, 3, 2, 3, 2]
    ascending = ParameterSubset.indices(network(), torch.tensor(INDICES["ascending"]))
    assert expand_groups(torch.tensor([1.0, 2.0, 3.0]), ascending.sizes).tolist() == [1, 1, 2, 2, 3]


def test_sizes_survive_copies_and_pickles():
    sizes = Interleaved((2, 1), torch.tensor([0, 1, 0]))
    for twin in (copy.deepcopy(sizes), pickle.loads(pickle.dumps(sizes))):
        assert twin == (2, 1)
        assert twin.groups.tolist() == [0, 1, 0]


def test_a_tied_weight_counts_once():
    model = network()
    model.append(nn.Linear(4, 2))
    model[3].weight = model[2].weight
    assert ParameterSubset.indices(model, torch.tensor([27])).n_params == 1
    with pytest.raises(InputError, match="28 weights"):
        ParameterSubset.indices(model, torch.tensor([28]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1, 2], r"one-dimensional torch\.LongTensor.*got list.*mask\.select\(\)"),
        (torch.tensor([1.0, 2.0]), r"got torch\.float32.*\.long\(\)"),
        (torch.tensor([1, 2], dtype=torch.int32), r"got torch\.int32.*\.long\(\)"),
        (torch.ones(26, dtype=torch.bool), r"boolean mask.*nonzero\(\)\.flatten\(\)"),
        (torch.tensor([[1, 2]]), r"one-dimensional.*\[1, 2\]"),
        (torch.tensor(3), r"one-dimensional.*\[\]"),
        (torch.tensor([], dtype=torch.long), "empty"),
        (torch.tensor([1, 26]), r"between 0 and 25.*26 weights; got \[26\]\. Were they selected for another model"),
        (torch.tensor([-1, 2]), r"between 0 and 25.*got \[-1\]"),
        (torch.tensor([4, 2, 4]), r"must differ; \[4\] occur more than once"),
    ],
)
def test_indices_that_are_none_are_refused(index, message):
    with pytest.raises(InputError, match=message):
        ParameterSubset.indices(network(), index)


def test_frozen_weights_are_counted_and_refused():
    model = network()
    model[0].requires_grad_(False)
    subset = ParameterSubset.indices(model, torch.tensor([16, 25]))
    assert_close(subset.vector(), torch.stack([model[2].weight[0, 0], model[2].bias[1]]))
    with pytest.raises(UnsupportedError, match=r"weights of '0\.weight'.*requires_grad_\(True\).*frozen ones included"):
        ParameterSubset.indices(model, torch.tensor([0, 25]))


def test_other_tensors_may_be_frozen_later_but_not_those_with_chosen_weights():
    model = network()
    whole = WholeNetwork(model, indices=torch.tensor([16]))
    model[0].requires_grad_(False)
    whole.check_still_random()
    model[2].weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"requires_grad of '2\.weight' has changed"):
        whole.check_still_random()
