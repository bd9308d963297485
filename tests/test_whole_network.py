"""All weights random: posterior, predictions, evidence and tuning against dense algebra, for every structure."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from laplace import Laplace
from laplace.curvature import GGNInterface
from laplace.tuning import cached
from tests import reference
from tests.cases import EVERYTHING, STRUCTURES
from tests.contracts import generator, model_untouched
from tests.estimators import PREDICTIONS, additive_structures, dense, every_structure
from tests.networks import Network, frozen, named
from tests.tools import LargestTensor, assert_close, assert_covariance_of, assert_within, slow_but

NAMES = ("mlp", "mlp_regression", "conv2d", "positions", "embedding", "encoder", "conv1d_depthwise", "tied_layers")
DENSE = {"full", "diag", "blockdiag", "lowrank"}
networks = pytest.mark.parametrize("name", NAMES)
basic = pytest.mark.parametrize("name", ["mlp", "mlp_regression"])


pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
SIGMA, DELTA = 0.7, 1.3


def fitted(network: Network, structure: str, model=None, **options):
    noise = {"sigma_noise": SIGMA} if network.likelihood == "regression" else {}
    model = network.model() if model is None else model
    options = {**EVERYTHING.get(structure, {}), **options}
    la = Laplace(model, network.likelihood, "all", structure, prior_precision=DELTA, **noise, **options)
    x, y = network.data()
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    return la


def precision(network: Network, la) -> torch.Tensor:
    """The posterior precision as a matrix, from the curvature."""
    H = la.H_facs.to_matrix() if hasattr(la, "H_facs") else dense(la.H)
    scale = SIGMA**-2 if network.likelihood == "regression" else 1.0
    return scale * H + DELTA * torch.eye(la.n_params)


def inputs(network: Network):
    return network.data(shift=2, n_rows=3)[0]


@every_structure
@networks
def test_the_posterior_is_that_of_the_curvature(name, structure):
    network = named(name)
    la, problem = fitted(network, structure), network.problem()
    assert_close(la.mean, problem.theta())
    assert_close(la.loss, problem.nll())
    assert la.n_params == len(problem.theta())
    if structure in DENSE:
        assert_close(dense(la.H), problem.curvature(structure))
    P = precision(network, la)
    assert_close(dense(la.posterior_precision), P, "posterior precision")
    assert_close(la.log_det_posterior_precision, P.logdet(), "log-determinant")
    n_values = problem.n_positions() * network.n_outputs
    sigma, scale = (SIGMA, SIGMA**-2) if network.likelihood == "regression" else (None, 1.0)
    P0 = DELTA * torch.eye(la.n_params)
    evidence = reference.log_evidence(problem.nll(), scale, sigma, n_values, P, P0, problem.theta())
    assert_close(la.log_marginal_likelihood(), evidence)
    value = problem.theta() + 0.1
    log_prob = torch.distributions.MultivariateNormal(problem.theta(), precision_matrix=P).log_prob(value)
    assert_close(la.log_prob(value), log_prob)


@every_structure
@networks
def test_predictions_are_those_of_the_linearized_network(name, structure):
    network, model = named(name), named(name).model()
    la, x = fitted(network, structure, model), inputs(network)
    problem, P = network.problem(model), precision(network, la)
    J, f = problem.jacobian(x).flatten(0, 1), problem.outputs(problem.theta(), x).flatten(0, 1)
    cov = reference.output_covariance(J, P)
    if network.likelihood == "regression":
        mean, found = la(x)
        assert_close(mean, f)
        assert_close(found, cov)
        assert_close(la(x, diagonal_output=True)[1], cov.diagonal(dim1=1, dim2=2))
        assert_close(la(x, joint=True)[1], reference.joint_covariance(J, P))
    else:
        assert_close(la(x).flatten(0, -2), reference.probit(f, cov))
        assert_close(la(x, link_approx="bridge").flatten(0, -2), reference.bridge(f, cov))
    assert_close(la.functional_variance(J), cov)
    assert_close(la.functional_covariance(J), reference.joint_covariance(J, P))


@pytest.mark.slow  # thousands of samples take seconds
@every_structure
@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "conv2d", "embedding"])
def test_function_samples_have_the_joint_covariance_with_and_without_weight_samples(name, structure):
    network, model = named(name), named(name).model()
    la, x = fitted(network, structure, model), inputs(network)
    problem, P = network.problem(model), precision(network, la)
    J, f = problem.jacobian(x).flatten(0, 1), problem.outputs(problem.theta(), x)
    cov = reference.joint_covariance(J, P)
    many = la.functional_samples(x, n_samples=20_000, generator=generator(0))  # more than outputs: in function space
    assert_covariance_of(many.flatten(1), f.flatten(), cov)
    noise = generator(1)
    few = torch.cat([la.functional_samples(x, n_samples=5, generator=noise) for _ in range(600)])
    assert_covariance_of(few.flatten(1), f.flatten(), cov)


def test_samples_in_function_space_draw_no_weights(monkeypatch):
    network = named("mlp")
    la, x = fitted(network, "diag"), inputs(network)
    monkeypatch.setattr(type(la._frozen_posterior), "sample", lambda *_: pytest.fail("weights were drawn"))
    la.functional_samples(x, n_samples=50)
    la(x, link_approx="mc")


@every_structure
@basic
def test_nn_predictions_run_the_network_at_sampled_weights(name, structure):
    network, model = named(name), named(name).model()
    la, x = fitted(network, structure, model), inputs(network)
    thetas = la.sample(6, generator=generator(3))
    sizes = [p.numel() for p in model.parameters()]

    def run(theta):
        parts = zip(model.named_parameters(), theta.split(sizes), strict=True)
        return functional_call(model, {key: part.view_as(p) for (key, p), part in parts}, (x,))

    outputs = torch.stack([run(theta) for theta in thetas]).detach()
    assert_close(la.functional_samples(x, "nn", n_samples=6, generator=generator(3)), outputs)
    if network.likelihood == "regression":
        mean, variance = la(x, pred_type="nn", n_samples=6, generator=generator(3))
        assert_close(mean, outputs.mean(0))
        assert_close(variance, outputs.var(0))
    else:
        assert_close(la(x, "nn", n_samples=6, generator=generator(3)), outputs.softmax(-1).mean(0))


@every_structure
def test_the_gradient_of_the_evidence_is_right_in_prior_and_noise(structure):
    la = fitted(named("mlp_regression"), structure, **({"damping": True} if structure == "kron" else {}))

    def evidence(delta, sigma):
        return la.log_marginal_likelihood(delta, sigma)

    start = (torch.tensor([0.8], requires_grad=True), torch.tensor(0.6, requires_grad=True))
    assert torch.autograd.gradcheck(evidence, start)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding"])
def test_damping_survives_to_the_predictions(name):
    """Each product is widened on both sides; blocks of one factor get the prior itself."""
    network, model = named(name), named(name).model()
    la, x = fitted(network, "kron", model, damping=True), inputs(network)
    eye, root = torch.eye, DELTA**0.5
    blocks = []
    for sides in la.H_facs.kfacs:
        sides = [side.diag() if side.dim() == 1 else side for side in sides]
        if len(sides) == 1:
            blocks.append(sides[0] + DELTA * eye(len(sides[0])))
        else:
            blocks.append(torch.kron(*(side + root * eye(len(side)) for side in sides)))
    P = torch.block_diag(*blocks)
    assert_close(dense(la.posterior_precision), P)
    problem = network.problem(model)
    J, f = problem.jacobian(x).flatten(0, 1), problem.outputs(problem.theta(), x).flatten(0, 1)
    assert_close(la(x), reference.probit(f, reference.output_covariance(J, P)))


@pytest.mark.every(2)
@additive_structures
@pytest.mark.parametrize("name", ["mlp", "conv2d", "encoder"])
def test_two_fits_add_up_to_the_fit_of_all_data(name, structure):
    network, model = named(name), named(name).model()
    whole, (x, y) = fitted(network, structure, model), network.data()
    parts = Laplace(model, network.likelihood, "all", structure, prior_precision=DELTA, **EVERYTHING.get(structure, {}))
    parts.fit([(x[:1], y[:1])])
    parts.fit([(x[1:], y[1:])], override=False)
    assert_close(dense(parts.posterior_precision), dense(whole.posterior_precision))
    assert parts.n_data == whole.n_data == len(y)


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@every_structure
@basic
def test_tuning_works_and_keeps_derivatives_only_while_memory_allows(name, structure, monkeypatch):
    network, model, calls = named(name), named(name).model(), []
    la, data = fitted(network, structure, model), network.data(shift=3)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision()
    assert la.log_marginal_likelihood() > before
    found = []
    for kept, passes in ((10**9, 1), (0, 2)):  # all points of the grid are scored in one
        monkeypatch.setattr(cached, "KEPT_ELEMENTS", kept)
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        la.optimize_prior_precision(method="gridsearch", val_loader=[data], grid_size=5, log_prior_prec_max=1)
        handle.remove()
        assert len(calls) == passes
        found.append(la.prior_precision)
    assert_close(found[0], found[1])
    la.optimize_prior_precision(prior_structure="layerwise")
    assert la.prior_precision.shape == (la.n_layers,)


@every_structure
def test_only_weights_that_require_a_gradient_are_random(structure):
    network = named("mlp")
    model = frozen(network.model(), "0")
    la, x = fitted(network, structure, model), inputs(network)
    options = EVERYTHING.get(structure, {})
    head = Laplace(model, "classification", "last_layer", structure, prior_precision=DELTA, **options)
    head.fit([network.data()])
    assert la.n_params == head.n_params == 15
    assert_close(la(x), head(x))
    assert_close(la.log_marginal_likelihood(), head.log_marginal_likelihood())
    assert_close(la(x, "nn", generator=generator(0)), head(x, "nn", generator=generator(0)))


@pytest.mark.parametrize(
    ("name", "structure"),
    slow_but(
        [*(f"mlp_regression-{structure}" for structure in STRUCTURES), "encoder_norm_first-kron"],
        ["mlp_regression", "conv2d", "encoder_norm_first"],
        STRUCTURES,
    ),
)
def test_predictions_are_differentiable_in_the_inputs(name, structure):
    network = named(name)
    la, x = fitted(network, structure, enable_backprop=True), inputs(network)
    if not x.is_floating_point():
        assert la(x).requires_grad  # tokens have no gradient; weights do
        return
    x = x.requires_grad_()

    def predict(x):
        return la(x)[1] if network.likelihood == "regression" else la(x)

    assert torch.autograd.gradcheck(predict, (x,))


@pytest.mark.every(3)
@every_structure
@pytest.mark.parametrize("name", ["mlp", "conv2d_same_in_place", "encoder"])
def test_the_model_is_left_as_it_was(name, structure):
    network, model = named(name), named(name).model().train()
    model.requires_grad_(True)
    x = inputs(network)
    with model_untouched(model):
        la = fitted(network, structure, model)
        for options in PREDICTIONS[network.likelihood]:
            la(x, n_samples=3, **options)
        with pytest.raises(ValueError, match=r"Class indices"):
            la.fit([(x, torch.tensor([0, 1, 9]))])


@every_structure
def test_contexts_of_the_caller_do_not_matter(structure):
    network = named("conv2d")
    model, x = network.model(), inputs(network)
    expected = fitted(network, structure, model)(x)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            la = fitted(network, structure, model)
            assert_close(la(x + 0), expected)
        assert_close(la(x), expected)
    parallel = nn.DataParallel(model)
    assert_close(fitted(network, structure, parallel)(x), expected)


@every_structure
def test_a_state_is_taken_over_and_copies_agree(structure, tmp_path):
    network = named("conv2d")
    model, x = network.model(), inputs(network)
    la = fitted(network, structure, model)
    la.save(tmp_path / "state.pt")
    other = Laplace(model, network.likelihood, "all", structure)
    other.load(tmp_path / "state.pt")
    assert_close(other(x), la(x))
    assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert_close(copy.deepcopy(la)(x), la(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_structure
def test_low_precision_models_work_in_float32_at_least(dtype, structure):
    network = named("conv2d")
    model, x = network.model(), inputs(network)
    expected = fitted(network, structure, model)(x)
    low, (x_low, (data, y)) = network.model().to(dtype), (x.to(dtype), network.data())
    la = Laplace(low, network.likelihood, "all", structure, prior_precision=DELTA, **EVERYTHING.get(structure, {}))
    la.fit([(data.to(dtype), y)])
    assert la.mean.dtype == torch.float32
    found = la(x_low)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02 if dtype == torch.bfloat16 else 1e-4)


def test_float32_sums_do_not_turn_rounding_into_curvature():
    """Kronecker factors of 40 positions a datum and a prior next to nothing: variances are those of float64."""
    network, found = named("conv2d"), []
    for dtype in (torch.float32, torch.float64):
        model, ((inputs_, y), x) = network.model().to(dtype), (network.data(n_rows=40), inputs(network).to(dtype))
        la = Laplace(model, network.likelihood, "all", "kron", prior_precision=1e-4)
        la.fit([(inputs_.to(dtype), y)])
        found.append(la._linearize(x).variance(la._frozen_posterior, dtype).double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


class ByHand(GGNInterface):
    """What a user writes: Jacobians of all weights, nothing else."""

    def jacobians(self, x, enable_backprop=False):
        return self.functorch_jacobians(x, enable_backprop)


@pytest.mark.parametrize("structure", ["full", "diag", "blockdiag", "lowrank"])
@basic
def test_a_back_end_that_gives_jacobians_is_enough(name, structure):
    network, model = named(name), named(name).model()
    ours, theirs = fitted(network, structure, model), fitted(network, structure, model, backend=ByHand)
    x = inputs(network)
    for options in PREDICTIONS[network.likelihood]:
        first, second = (la(x, generator=generator(0), **options) for la in (ours, theirs))
        for a, b in zip(first, second, strict=True):
            assert_close(a, b)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_nothing_of_the_size_of_a_jacobian_is_made(structure, likelihood):
    """P > 50,000: the largest tensor of fit and prediction is far below batch x outputs x weights."""
    rows, C = 16, 10
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, C)
    ).float()
    P = sum(p.numel() for p in model.parameters())
    assert P >= 50_000
    x = torch.randn(rows, 1, 12, 12).float()
    y = torch.randint(C, (rows,)) if likelihood == "classification" else torch.randn(rows, C).float()
    la = Laplace(model, likelihood, "all", structure)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        la(x)
        la.log_marginal_likelihood()
    # The Kronecker factor of 800 inputs is the largest thing that is kept.
    assert largest.numel <= max(800**2, 4 * 2**18), largest.operation
    assert largest.numel < rows * C * P / 7


# -- reward modeling --------------------------------------------------------------------------------------------------


@every_structure
def test_reward_modeling_of_a_whole_network(structure):
    scores = Net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    pairs, y = torch.randn(6, 2, 3), torch.randint(2, (6,))
    la = Laplace(scores, "reward_modeling", "all", structure, prior_precision=DELTA, **EVERYTHING.get(structure, {}))
    la.fit([(pairs[:2], y[:2]), (pairs[2:], y[2:])])
    problem = reference.Problem(
        Net, lambda m, x: m(x), tuple(n for n, _ in Net.named_parameters()), pairs[:, 0], y, "regression", 1
    )
    first, second = (problem.jacobian(pairs[:, item])[:, 0, 0] for item in (0, 1))
    gap = (scores(pairs[:, 0]) - scores(pairs[:, 1])).detach()
    p, d = gap.sigmoid(), first - second
    H = (d * p * (1 - p)).T @ d
    meanings = {"diag": H.diagonal().diag(), "blockdiag": torch.block_diag(*problem.groups(H))}
    if structure in DENSE:
        assert_close(dense(la.H), meanings.get(structure, H))
    P = (la.H_facs.to_matrix() if structure == "kron" else dense(la.H)) + DELTA * torch.eye(la.n_params)
    new = torch.randn(3, 2, 3)
    J = torch.stack([problem.jacobian(new[:, item])[:, 0, 0] for item in (0, 1)], 1)
    mean, cov = la(new[:, 0])
    assert_close(mean, scores(new[:, 0]))
    assert_close(cov, reference.output_covariance(J[:, :1], P))
    gap = (scores(new[:, 0]) - scores(new[:, 1])).detach().squeeze(1)
    variance = reference.output_covariance((J[:, 0] - J[:, 1]).unsqueeze(1), P).flatten()
    expected = (gap / (1 + torch.pi / 8 * variance).sqrt()).sigmoid()
    assert_close(la(new, fitting=True), torch.stack([expected, 1 - expected], 1))
    sampled = la(new, fitting=True, link_approx="mc", n_samples=20_000, generator=generator(0))
    assert_within(sampled[:, 0], expected, torch.full((3,), 0.01))
