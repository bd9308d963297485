"""Subnetworks: what they cost, other back ends, and the model that is left alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace import FullLLLaplace, Laplace
from laplace.curvature import GGNInterface
from laplace.enums import SubsetOfWeights
from tests.cases import Net
from tests.contracts import generator, model_untouched
from tests.networks import named
from tests.subnetworks import (
    all_that_is_seen,
    as_matrix,
    basic,
    choices,
    chosen,
    fitted,
    restricted,
    structures,
)
from tests.tools import LargestTensor, assert_close, assert_within

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


# -- cost -------------------------------------------------------------------------------------------------------------


class CountedBackward(torch.autograd.Function):
    """The identity; counts how often it is differentiated."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountedBackward.count += 1
        return gradient


class Counted(nn.Module):
    def forward(self, x):
        return CountedBackward.apply(x)


@structures
def test_backward_passes_end_at_the_first_layer_with_a_chosen_weight(structure):
    model = nn.Sequential(nn.Linear(3, 6), Counted(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    for index, some in ((torch.tensor([30, 60, 70]), False), (torch.tensor([3, 60, 70]), True)):
        CountedBackward.count = 0
        la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=index)
        la.fit([(x, y)])
        la(x)
        assert (CountedBackward.count > 0) == some


@structures
@pytest.mark.parametrize("n_chosen", [40, 2000])
def test_no_tensor_is_as_large_as_the_jacobian_of_a_touched_layer(structure, n_chosen):
    """100 000 weights in the touched layer, of which few or none of the others are differentiated."""
    rows, width, n_outputs = 16, 300, 8
    model = nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, n_outputs)
    )
    first = 5 * width
    index = first + torch.randperm(width * width, generator=generator(0))[:n_chosen]
    x, y = torch.randn(rows, 4), torch.randint(n_outputs, (rows,))
    la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=index)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        la(x)
        la(x, link_approx="mc", n_samples=10)
    n_params = sum(p.numel() for p in model.parameters())
    allowed = max(n_params, rows * n_outputs * n_chosen, n_chosen**2 if structure == "full" else 0)
    assert largest.numel <= allowed, largest.operation
    assert allowed < rows * n_outputs * width * width


# -- back ends, the model ---------------------------------------------------------------------------------------------


class ByJacobians(GGNInterface):
    """A back end of a user: whatever follows from Jacobians by torch.func."""

    subsets = frozenset({SubsetOfWeights.SUBNETWORK})


@structures
@choices
@basic
def test_a_back_end_of_a_user_provides_subnetworks_by_its_jacobians(name, choice, structure):
    network, index = named(name), chosen(named(name), choice)
    la, ours = fitted(network, structure, index, backend=ByJacobians), fitted(network, structure, index)
    for theirs, expected in zip(all_that_is_seen(la, network), all_that_is_seen(ours, network), strict=True):
        assert_close(theirs, expected)
    x, y = network.data()
    gradients, loss = la.backend.gradients(x, y)
    assert_close(gradients, network.problem().gradients()[:, index])
    assert_close(loss, network.problem().nll())


@structures
def test_the_sampled_fisher_has_the_restricted_curvature_for_mean(structure):
    network, index = named("mlp"), chosen(named("mlp"), "few")
    options = {"stochastic": True, "num_samples": 3000, "generator": generator(0)}
    la = fitted(network, structure, index, backend_kwargs=options)
    mean, variance = network.problem().sampled_fisher()
    spread = (variance[index][:, index] / 3000).sqrt()
    if structure == "diag":
        mean, spread = mean.diagonal().diag(), spread.diagonal().diag()
    assert_within(as_matrix(la.H), mean[index][:, index], spread)


@structures
@choices
def test_the_model_is_untouched(choice, structure):
    network = named("conv2d")
    model = network.model().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = network.data(shift=2)[0]
    with model_untouched(model):
        la = fitted(network, structure, chosen(network, choice), model)
        la(x)
        la(x, pred_type="nn", n_samples=3)
        la.sample(2)
        la.optimize_prior_precision(n_steps=2)


def test_frozen_weights_are_counted_and_stay():
    model = Net(3, 4, 2)
    model.body.requires_grad_(False)
    la = FullLLLaplace(model, "classification")
    ours = Laplace(model, "classification", "subnetwork", "full", subnetwork_indices=torch.arange(16, 26))
    batch = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    for estimator in (la, ours):
        estimator.fit([batch])
    assert_close(ours.H, la.H)
    assert ours.n_params == 26
    assert_close(ours.mean, parameters_to_vector(model.parameters()))
    samples = ours.sample(3)
    nn.utils.vector_to_parameters(samples[0], Net(3, 4, 2).parameters())
    assert torch.equal(samples[:, :16], ours.mean[:16].expand(3, -1))


def test_masked_positions_do_not_count():
    network, index = named("masked_rows"), chosen(named("masked_rows"), "shuffled")
    la = fitted(network, "full", index)
    assert_close(la.H, restricted("masked_rows", "full", index))


def test_weights_that_move_after_the_fit_are_noticed():
    network, index = named("mlp"), torch.tensor([1, 20])
    model = network.model()
    la, x = fitted(network, "full", index, model), network.data(shift=2)[0]
    with torch.no_grad():
        model[2].bias += 1  # not random: predictions are those of the network as it is
    la(x)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.warns(UserWarning, match="random weights have changed since fit"):
        la(x)
