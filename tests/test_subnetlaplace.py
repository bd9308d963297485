"""Subnetworks: posterior, predictions, evidence and tuning are the dense ones, restricted to the chosen weights."""

import pytest
import torch
from torch.func import functional_call

from laplace import FullLLLaplace, Laplace, SubnetLaplace
from laplace.curvature import AutogradEF, AutogradGGN, AutogradHessian
from laplace.errors import ShapeError
from tests import reference
from tests.cases import named as case_named
from tests.contracts import generator
from tests.networks import Network, named
from tests.subnetworks import (
    DELTA,
    SIGMA,
    all_that_is_seen,
    as_matrix,
    basic,
    choices,
    chosen,
    evidence,
    fitted,
    networks,
    precision,
    restricted,
    structures,
    subnet,
)
from tests.tools import assert_close, assert_covariance_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
# -- posterior --------------------------------------------------------------------------------------------------------


@pytest.mark.every(4)
@structures
@choices
@networks
@pytest.mark.parametrize(("backend", "matrix"), [(AutogradGGN, "GGN"), (AutogradEF, "EF")])
def test_the_curvature_is_the_dense_one_restricted(name, choice, structure, backend, matrix):
    network, index = named(name), chosen(named(name), choice)
    la = fitted(network, structure, index, backend=backend)
    assert_close(as_matrix(la.H), restricted(name, structure, index, matrix))
    assert_close(la.loss, network.problem().nll())
    assert (la.n_data, la.n_outputs) == (network.n_rows, network.n_outputs)


@structures
@choices
@basic
def test_the_hessian_is_the_dense_one_restricted(name, choice, structure):
    index = chosen(named(name), choice)
    la = fitted(named(name), structure, index, backend=AutogradHessian, prior_precision=100.0)
    assert_close(as_matrix(la.H), restricted(name, structure, index, "Hessian"))


@structures
@choices
@networks
def test_sizes_are_those_of_the_network_or_of_its_subnetwork(name, choice, structure):
    network, index = named(name), chosen(named(name), choice)
    la, theta = fitted(network, structure, index), network.problem().theta()
    assert isinstance(la, SubnetLaplace)
    assert (la.n_params, la.n_params_subnet) == (len(theta), len(index))
    assert torch.equal(la.subnetwork_indices, index)
    assert_close(la.mean, theta)
    assert_close(la.mean_subnet, theta[index])
    assert la.prior_precision_diag.shape == (len(index),)
    P = precision(name, structure, index)
    assert_close(as_matrix(la.posterior_precision), P)
    if structure == "full":
        assert_close(la.posterior_covariance, P.inverse())
        assert_close(la.posterior_scale @ la.posterior_scale.T, P.inverse())
    else:
        assert_close(la.posterior_variance, P.inverse().diagonal())


@structures
@choices
@basic
def test_densities_are_those_of_the_gaussian_over_the_subnetwork(name, choice, structure):
    index = chosen(named(name), choice)
    la, P = fitted(named(name), structure, index), precision(name, structure, index)
    gaussian = torch.distributions.MultivariateNormal(la.mean_subnet, precision_matrix=P)
    value = la.mean_subnet + 0.1 * torch.randn(3, len(index))
    assert_close(la.log_prob(value), gaussian.log_prob(value))
    whole = la.mean.expand(3, -1).index_copy(1, index, value)
    assert_close(la.log_prob(whole), gaussian.log_prob(value))
    assert_close(
        la.log_prob(whole[0], normalized=False), gaussian.log_prob(value)[0] - gaussian.log_prob(la.mean_subnet)
    )
    assert_close(la.square_norm(whole), torch.einsum("sp,pq,sq->s", value - la.mean_subnet, P, value - la.mean_subnet))
    with pytest.raises(ShapeError, match=rf"\[\.\.\., {la.n_params}\], or of the subnetwork, \[\.\.\., {len(index)}\]"):
        la.log_prob(value[:, 1:])


@structures
@choices
@basic
def test_samples_move_the_subnetwork_only(name, choice, structure):
    network, index = named(name), chosen(named(name), choice)
    la, theta = fitted(network, structure, index), network.problem().theta()
    samples = la.sample(20_000, generator=generator(0))
    others = torch.ones(len(theta), dtype=torch.bool)
    others[index] = False
    assert samples.shape == (20_000, len(theta))
    assert torch.equal(samples[:, others], theta[others].expand(20_000, -1))
    assert_covariance_of(samples[:, index], theta[index], precision(name, structure, index).inverse())
    assert_close(la.assemble_full_samples(samples[:2, index]), samples[:2])
    for wrong in (samples[:2], samples[0, index]):
        with pytest.raises(ShapeError, match=rf"\[n_samples, {len(index)}\]"):
            la.assemble_full_samples(wrong)


# -- predictions ------------------------------------------------------------------------------------------------------


@structures
@choices
@networks
def test_predictions_are_those_of_the_network_linearized_in_the_subnetwork(name, choice, structure):
    network, model, index = named(name), named(name).model(), chosen(named(name), choice)
    la, P = fitted(network, structure, index, model), precision(name, structure, index)
    problem, x = network.problem(model), network.data(shift=2, n_rows=3)[0]
    J, f = problem.jacobian(x).flatten(0, 1)[..., index], problem.outputs(problem.theta(), x).flatten(0, 1)
    cov = reference.output_covariance(J, P)
    if network.likelihood == "regression":
        mean, found = la(x)
        assert_close(mean, f)
        assert_close(found, cov)
        assert_close(la(x, diagonal_output=True)[1], cov.diagonal(dim1=1, dim2=2))
        assert_close(la(x, joint=True)[1], reference.joint_covariance(J, P))
    else:
        assert_close(la(x).flatten(0, -2), reference.probit(f, cov))
        if bool((cov.diagonal(dim1=1, dim2=2) > 0).all()):  # the bridge divides by variances
            assert_close(la(x, link_approx="bridge").flatten(0, -2), reference.bridge(f, cov))
    assert_close(la.functional_variance(J), cov)
    assert_close(la.backend.jacobians(x)[0].reshape(J.shape), J)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
def test_function_samples_have_the_joint_covariance_with_and_without_weight_samples(name, structure):
    network, model, index = named(name), named(name).model(), chosen(named(name), "shuffled")
    la, x = fitted(network, structure, index, model), network.data(shift=2, n_rows=3)[0]
    problem = network.problem(model)
    f = problem.outputs(problem.theta(), x).flatten()
    cov = reference.joint_covariance(problem.jacobian(x).flatten(0, 1)[..., index], precision(name, structure, index))
    many = la.functional_samples(x, n_samples=20_000, generator=generator(0))  # more than outputs: in function space
    assert_covariance_of(many.flatten(1), f, cov)
    noise = generator(1)
    few = torch.cat([la.functional_samples(x, n_samples=5, generator=noise) for _ in range(600)])
    assert_covariance_of(few.flatten(1), f, cov)


@structures
@choices
@basic
def test_nn_predictions_run_the_network_at_assembled_weights(name, choice, structure):
    network, model, index = named(name), named(name).model(), chosen(named(name), choice)
    la, x = fitted(network, structure, index, model), network.data(shift=2, n_rows=3)[0]
    sizes = [p.numel() for p in model.parameters()]

    def run(theta):
        parts = zip(model.named_parameters(), theta.split(sizes), strict=True)
        return functional_call(model, {key: part.view_as(p) for (key, p), part in parts}, (x,))

    outputs = torch.stack([run(theta) for theta in la.sample(6, generator=generator(3))]).detach()
    assert_close(la.functional_samples(x, "nn", n_samples=6, generator=generator(3)), outputs)
    if network.likelihood == "regression":
        assert_close(la(x, pred_type="nn", n_samples=6, generator=generator(3))[1], outputs.var(0))
    else:
        assert_close(la(x, "nn", n_samples=6, generator=generator(3)), outputs.softmax(-1).mean(0))


@choices
def test_predictions_are_differentiable_in_the_inputs(choice):
    network = named("mlp_regression")
    la = fitted(network, "full", chosen(network, choice), enable_backprop=True)
    x = network.data(shift=2, n_rows=2)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x), (x,))


# -- limits -----------------------------------------------------------------------------------------------------------


@structures
@networks
def test_the_subnetwork_of_all_weights_is_the_network(name, structure):
    network = named(name)
    n_params = sum(p.numel() for p in network.model().parameters())
    noise = {"sigma_noise": SIGMA} if network.likelihood == "regression" else {}
    whole = Laplace(network.model(), network.likelihood, "all", structure, prior_precision=DELTA, **noise)
    x, y = network.data()
    whole.fit([(x, y)])
    la = fitted(network, structure, torch.arange(n_params))
    for ours, theirs in zip(all_that_is_seen(la, network), all_that_is_seen(whole, network), strict=True):
        assert_close(ours, theirs)


@basic
def test_the_subnetwork_of_the_last_layer_is_the_last_layer(name):
    network, model = named(name), named(name).model()
    n_params, last = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model[2].parameters())
    options = {"prior_precision": DELTA} | ({"sigma_noise": SIGMA} if network.likelihood == "regression" else {})
    theirs = FullLLLaplace(model, network.likelihood, **options)
    theirs.fit([network.data()])
    la, x = fitted(network, "full", torch.arange(n_params - last, n_params), model), network.data(shift=2)[0]
    assert_close(la.H, theirs.H)
    assert_close(la.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for ours, other in zip(la(x), theirs(x), strict=True):
        assert_close(ours, other)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_pairs_are_one_datum_of_two_scores(structure):
    case = case_named("preferences")
    model, x = case.model(), torch.randn(4, 3)
    n_params = sum(p.numel() for p in model.parameters())
    order = torch.randperm(n_params, generator=generator(0))
    la = Laplace(model, "reward_modeling", "subnetwork", structure, subnetwork_indices=order)
    whole = Laplace(model, "reward_modeling", "all", structure)
    for estimator in (la, whole):
        estimator.fit(case.batches(3, 3))
    for options in ({}, {"joint": True}):
        for ours, theirs in zip(la(x, **options), whole(x, **options), strict=True):
            assert_close(ours, theirs)
    pairs = torch.randn(4, 2, 3)
    assert_close(la(pairs, fitting=True), whole(pairs, fitting=True))
    assert_close(la.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_data_are_added_exactly():
    network, index = named("mlp"), chosen(named("mlp"), "shuffled")
    x, y = network.data()
    la = subnet(network, "full", index)
    la.fit([(x[:2], y[:2])])
    la.fit([(x[2:], y[2:])], override=False)
    assert_close(la.H, restricted("mlp", "full", index))


# -- the prior --------------------------------------------------------------------------------------------------------


def group_of_each_weight(network: Network, index: torch.Tensor) -> list[int]:
    """The parameter tensor of each chosen weight, numbered in the order of their first index."""
    sizes = torch.tensor([p.numel() for p in network.model().parameters()])
    tensors = [int((sizes.cumsum(0) <= i).sum()) for i in index.tolist()]
    return [list(dict.fromkeys(tensors)).index(tensor) for tensor in tensors]


@structures
@choices
@basic
def test_a_prior_is_that_of_the_chosen_weights(name, choice, structure):
    network, index = named(name), chosen(named(name), choice)
    groups = group_of_each_weight(network, index)
    n_params = sum(p.numel() for p in network.model().parameters())
    layerwise, each = 0.5 + torch.rand(max(groups) + 1), 0.5 + torch.rand(n_params)
    for given, delta in ((layerwise, layerwise[groups]), (each, each[index]), (each[index], each[index])):
        la = fitted(network, structure, index, prior_precision=given)
        assert_close(la.prior_precision_diag, delta)
        P = precision(name, structure, index, delta)
        assert_close(as_matrix(la.posterior_precision), P)
        assert_close(la.log_marginal_likelihood(), evidence(name, P, index, delta))
    mean = torch.randn(n_params)
    for given in (mean, mean[index]):
        la = fitted(network, structure, index, prior_mean=given)
        assert_close(la.prior_mean, mean[index])
        P = precision(name, structure, index)
        assert_close(la.log_marginal_likelihood(), evidence(name, P, index, DELTA, mean[index]))
    with pytest.raises(ShapeError, match=f"each of the {len(index)} weights"):
        fitted(network, structure, index, prior_precision=torch.ones(n_params + 1))


@structures
@choices
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise", "diag"])
def test_the_tuned_prior_has_the_highest_evidence_near_by(choice, structure, prior_structure):
    network, index = named("mlp_regression"), chosen(named("mlp_regression"), choice)
    la = fitted(network, structure, index)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure=prior_structure, n_steps=200)
    n_values = {"scalar": 1, "layerwise": la.n_layers, "diag": len(index)}[prior_structure]
    best, tuned = la.log_marginal_likelihood(), la.prior_precision
    assert tuned.shape == (n_values,)
    assert best > before
    P = precision("mlp_regression", structure, index, la.prior_precision_diag)
    assert_close(best, evidence("mlp_regression", P, index, la.prior_precision_diag))


@structures
def test_the_gradient_of_the_evidence_is_right_in_prior_and_noise(structure):
    network = named("mlp_regression")
    la = fitted(network, structure, chosen(network, "shuffled"))
    delta, sigma = torch.full((la.n_layers,), 0.8, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (delta, sigma))


@structures
@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_grid_search_takes_the_point_with_the_lowest_loss(structure):
    network, index = named("mlp"), chosen(named("mlp"), "few")
    la = fitted(network, structure, index)
    x, y = network.data(shift=3)
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=5)
    losses = []
    grid = torch.logspace(-4, 4, 5)
    for delta in grid:
        P = restricted("mlp", structure, index) + delta * torch.eye(len(index))
        J = network.problem().jacobian(x).flatten(0, 1)[..., index]
        f = network.problem().outputs(network.problem().theta(), x).flatten(0, 1)
        p = reference.probit(f, reference.output_covariance(J, P))
        losses.append(float(-p.gather(1, y[:, None]).log().mean()))
    assert_close(la.prior_precision, grid[torch.tensor(losses).argmin()].reshape(1))
