"""Curvature of all weights against brute force: every kind of layer, every structure."""

import warnings

import pytest
import torch

from laplace.curvature import AutogradEF, AutogradGGN, AutogradHessian
from laplace.curvature.by_autograd import hessian_products, hessian_rows
from laplace.errors import PerformanceWarning
from laplace.network.parameters import ParameterSubset
from tests.contracts import model_untouched
from tests.networks import NETWORKS, Network, named
from tests.tools import assert_close, assert_within, slow_but

# What the reference meets: attention under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)


def backend(cls, network: Network, model=None, **options):
    return cls(network.model() if model is None else model, network.likelihood, **options)


@every_network
def test_jacobians_and_gradients_are_exact(network):
    engine, problem, (x, y) = backend(AutogradGGN, network), network.problem(), network.data()
    J, f = engine.jacobians(x)
    assert_close(J, problem.jacobian(x).flatten(0, 1), "Jacobians")
    assert_close(f, problem.outputs(problem.theta(), x).flatten(0, 1), "outputs")
    gradients, loss = engine.gradients(x, y)
    assert_close(gradients, problem.gradients(), "gradients")
    assert_close(loss, problem.nll(), "loss")


@every_network
def test_the_ggn_is_exact(network):
    engine, problem, (x, y) = backend(AutogradGGN, network), network.problem(), network.data()
    ggn = problem.ggn()
    for structure, expected in (("full", ggn), ("diag", ggn.diagonal())):
        loss, H = getattr(engine, structure)(x, y)
        assert_close(loss, problem.nll(), "loss")
        assert_close(H, expected, structure)


@every_network
def test_the_empirical_fisher_is_exact(network):
    engine, problem, (x, y) = backend(AutogradEF, network), network.problem(), network.data()
    fisher = problem.empirical_fisher()
    assert_close(engine.full(x, y)[1], fisher)
    assert_close(engine.diag(x, y)[1], fisher.diagonal())


@every_network
def test_formulas_are_used_wherever_they_exist(network):
    """Row by row only where the table of networks says so: the slow way would hide a reader that is broken."""
    engine = backend(AutogradGGN, network)
    recording = engine.derivatives(network.data()[0])
    assert tuple(engine.network.names[group] for group in sorted(recording.verdict.slow)) == network.slow


@every_network
def test_batches_add_up(network):
    engine, (x, y) = backend(AutogradGGN, network), network.data()
    parts = [engine.diag(x[rows], y[rows])[1] for rows in (slice(0, 1), slice(1, 3), slice(3, None))]
    assert_close(sum(parts), engine.diag(x, y)[1])


@every_network
def test_the_model_is_untouched(network):
    model, (x, y) = network.model(), network.data()
    engine = backend(AutogradGGN, network, model)
    with model_untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        engine.full(x, y), engine.diag(x, y), engine.jacobians(x)
        if network.kron:
            engine.kron(x, y, 1)


@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp_regression", "conv2d", "positions"))],
)
def test_the_sampled_fisher_has_the_ggn_as_its_expectation(name):
    network = named(name)
    (x, y), problem, n = network.data(), network.problem(), 400
    engine = backend(AutogradGGN, network, stochastic=True, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([engine.full(x, y)[1] for _ in range(n)])
    assert_within(draws.mean(0), problem.ggn(), draws.std(0) / n**0.5)
    many = backend(AutogradGGN, network, stochastic=True, num_samples=n, generator=torch.Generator().manual_seed(1))
    assert_within(many.diag(x, y)[1], problem.ggn().diagonal(), draws.std(0).diagonal() / n**0.5)


@pytest.mark.every(4, each_value=False)
@pytest.mark.parametrize(
    "network",
    slow_but(
        {str(network) for network in NETWORKS} - {"gru_two_layers", "encoder_norm_first", "encoder", "few_positions"},
        NETWORKS,
    ),
)
def test_the_hessian_is_the_second_derivative(network):
    engine, problem, (x, y) = backend(AutogradHessian, network), network.problem(), network.data()
    hessian = problem.true_hessian()
    loss, H = engine.full(x, y)
    assert_close(loss, problem.nll())
    assert_close(H, hessian)
    assert_close(engine.diag(x, y)[1], hessian.diagonal())


@pytest.mark.parametrize("network", [named("conv2d"), named("layer_norm")], ids=str)
def test_a_hessian_row_by_row_is_the_same(network, monkeypatch):
    """Where several backward passes at once are not what one by one gives, they are taken one by one."""
    (x, y), batched = network.data(), backend(AutogradHessian, network).full(*network.data())[1]
    monkeypatch.setattr("laplace.curvature.by_autograd.can_batch", lambda *_: False)
    assert_close(backend(AutogradHessian, network).full(x, y)[1], batched)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("index", [None, [7, 1, 20, 12]], ids=["all", "chosen"])
def test_products_with_the_hessian_are_those_with_the_matrix_of_the_random_weights(index, together, monkeypatch):
    network, model = named("mlp"), named("mlp").model()
    problem, (x, y) = network.problem(model), network.data()
    monkeypatch.setattr("laplace.curvature.by_autograd.can_batch", lambda *_: together)
    subset = ParameterSubset(tuple(model.parameters()))
    H = problem.true_hessian()
    if index is not None:
        subset, H = ParameterSubset.indices(model, torch.tensor(index)), H[index][:, index]
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    V = torch.randn(3, len(H))
    assert_close(hessian_products(loss, subset)(V), V @ H)
    assert_close(torch.stack(list(hessian_rows(loss, subset))), H)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "encoder", "vision", "lstm"])
def test_small_chunks_change_nothing(name, monkeypatch):
    network = named(name)
    engine, (x, y) = backend(AutogradGGN, network), network.data()
    expected = engine.full(x, y)[1]
    for module in ("structures.jacobian", "curvature.recording"):
        monkeypatch.setattr(f"laplace.{module}.piece_elements", lambda _device: 7)
    for module in ("structures.dense_jacobian", "curvature.recording"):
        monkeypatch.setattr(f"laplace.{module}.CHUNK_ELEMENTS", 7)
    monkeypatch.setattr("laplace.structures.gather.chunk_elements", lambda _device: 7)
    assert_close(engine.full(x, y)[1], expected)
    assert_close(engine.diag(x, y)[1], expected.diagonal())


def test_jacobians_by_functorch_and_of_selected_outputs():
    network = named("conv2d")
    engine, (x, _) = backend(AutogradGGN, network), network.data()
    J, f = engine.jacobians(x)
    for ours, theirs in zip(engine.functorch_jacobians(x), (J, f), strict=True):
        assert_close(ours, theirs)
    chosen = torch.tensor([0, 2, 1, 1, 0])
    selected, outputs = engine.selected_output_jacobians(x, chosen)
    assert_close(selected, J[torch.arange(5), chosen].unsqueeze(1))
    assert_close(outputs, f)
    pairs = torch.stack([chosen, chosen.flip(0)], 1)
    assert_close(engine.selected_output_jacobians(x, pairs)[0], J[torch.arange(5).unsqueeze(1), pairs])


@pytest.mark.parametrize("name", slow_but(["mlp", "layer_norm"], ["mlp", "layer_norm", "conv2d"]))
def test_jacobians_are_differentiable_also_in_the_first_pass_of_a_back_end(name):
    """What the check against autograd computes on the way has no graph, and must not be used again."""
    network = named(name)
    x = network.data()[0].requires_grad_()
    model = network.model()

    def jacobian(x):
        return backend(AutogradGGN, network, model).jacobians(x, enable_backprop=True)[0]

    assert torch.autograd.gradcheck(jacobian, (x,))
