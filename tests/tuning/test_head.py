"""What is collected of the training data for a last layer, and its posterior at a mode of its own."""

import pytest
import torch

from laplace.errors import ShapeError, UnsupportedError
from laplace.likelihoods import resolve
from laplace.prior import GaussianPrior
from laplace.structures import STRUCTURES
from laplace.tuning import HeadData
from laplace.tuning.grouped import numbered
from laplace.tuning.head import check_priors, posteriors
from tests import reference
from tests.cases import STRUCTURES as NAMES
from tests.cases import named
from tests.contracts import generator, shapes_of
from tests.estimators import fitted, structure_type
from tests.tools import assert_close
from tests.tuning.collected import collected

N, C, D = 11, 3, 4
SIZES = (C * D, C)


def head_data():
    noise = generator(0)
    return HeadData(torch.randn(N, D, generator=noise), torch.randint(C, (N,), generator=noise), shapes_of(C, D))


def prior(delta, sizes=SIZES):
    return GaussianPrior(torch.zeros(()), torch.tensor([delta]), sizes)


@pytest.mark.parametrize("name", ["classification", "masked_positions", "positions_regression", "soft_positions"])
def test_batches_are_collected_to_unmasked_rows_and_their_data(name):
    case = named(name)
    la, problem = fitted(case, "diag"), case.problem()
    data = HeadData.collect(collected(la, case.batches(1, 2)), torch.float64)
    D = problem.model.head.in_features
    kept = [(n, t) for n, datum in enumerate(problem.data) for t in datum.kept]
    expected = torch.tensor([n for n, _ in kept])
    assert torch.equal(numbered(data.datum)[0], numbered(expected)[0])
    assert_close(data.phi, torch.stack([problem.data[n].J[t * case.n_outputs, :D] for n, t in kept]))
    targets = [case.data()[1][n].reshape(len(problem.data[n].f), *data.y.shape[1:])[t] for n, t in kept]
    assert torch.equal(data.y, torch.stack(targets))


@pytest.mark.parametrize("structure", NAMES)
def test_a_posterior_is_the_curvature_at_the_mode_and_the_prior(structure):
    data, deltas = head_data(), (0.1, 10.0, 1.0)
    found = list(
        posteriors(data, [prior(delta) for delta in deltas], resolve("classification"), structure_type(structure))
    )
    assert [index for index, *_ in found] == [1, 2, 0], "from strong to weak"
    for index, _, theta, precision in found:
        layer = torch.nn.Linear(D, C)
        torch.nn.utils.vector_to_parameters(theta, layer.parameters())
        dense = reference.Problem(layer, lambda m, x: m(x), ("weight", "bias"), data.phi, data.y, "classification", C)
        assert_close(dense.gradients().sum(0), -deltas[index] * theta, "stationary")
        if structure == "kron":
            G, A = sum(datum.output_hessian for datum in dense.data), data.phi.T @ data.phi / N
            H = torch.block_diag(torch.kron(G, A), G)
        else:
            H = dense.curvature(structure)
        assert_close(precision.to_dense(), H + deltas[index] * torch.eye(len(theta)))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_noise_for_each_output_is_that_of_each_output_alone(structure):
    noise, sigma = generator(0), torch.tensor([0.3, 1.0, 2.5])
    data = HeadData(head_data().phi, torch.randn(N, C, generator=noise), shapes_of(C, D))
    likelihood = resolve("regression", sigma_noise=sigma)
    ((_, _, theta, precision),) = posteriors(data, [prior(0.7)], likelihood, STRUCTURES[structure])
    W, b = theta[: C * D].view(C, D), theta[C * D :]
    for c in range(C):
        weights, cov, _ = reference.linear_regression(data.phi, data.y[:, [c]], float(sigma[c]), 0.7)
        assert_close(torch.cat([W[c], b[[c]]]), weights[0])
        index = [*range(c * D, c * D + D), C * D + c]
        dense = precision.to_dense()[index][:, index]
        exact = cov.inverse()
        assert_close(dense, exact if structure == "full" else exact.diagonal().diag())


def test_whole_networks_and_pairs_are_refused():
    case = named("preferences")
    with pytest.raises(UnsupportedError, match="reward modeling"):
        HeadData.collect(collected(fitted(case, "full"), case.batches(4)), torch.float64)
    with pytest.raises(UnsupportedError, match="compare two inputs"):
        check_priors(head_data(), [prior(1.0)], resolve("reward_modeling"))


@pytest.mark.parametrize("sizes", [[(C * D + 1, C)], [SIZES, (2 * D, 2)], []])
def test_priors_over_other_weights_are_refused(sizes):
    with pytest.raises(ShapeError, match="over the weights of one head"):
        check_priors(head_data(), [prior(1.0, size) for size in sizes], resolve("classification"))
