"""BackPACK, ASDL and curvlinops behind one contract: what they give is exact, and what they cannot give is refused.

``TAKES`` says for every back end, quantity and kind of network which it is; nothing is left open.
"""

import contextlib
import functools

import pytest
import torch

from laplace import Laplace, curvature
from laplace.curvature import BACKENDS, AutogradEF, AutogradGGN
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure, Likelihood
from laplace.errors import UnsupportedError
from laplace.network import FeatureExtractor
from tests import reference
from tests.cases import CASES, Case
from tests.networks import NETWORKS, Network, named
from tests.tools import assert_close, assert_within

# What the reference meets: attention under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
PACKAGES = tuple(cls for cls in BACKENDS if issubclass(cls, PackageInterface))
FISHERS = tuple(cls for cls in PACKAGES if cls.matrix == "empirical Fisher")
SAMPLERS = tuple(cls for cls in PACKAGES if cls.matrix == "GGN")
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)

ALL = {network.name for network in NETWORKS} - {"positions", "unused"}
DENSE = {"mlp", "mlp_regression", "soft_labels", "no_bias", "masked_rows", "frozen_backbone"}
CONVOLUTIONS = {"two_convolutions", "few_positions"}
NORMS = {"batch_norm", "batch_norm_1d"}
FACTORS = DENSE | CONVOLUTIONS | {"squeezed", "functional"}

GRAPHS = DENSE | CONVOLUTIONS | NORMS | {"conv1d_depthwise", "conv2d", "conv3d", "positions_then_flat"}
HOOKED = GRAPHS | {"functional", "squeezed", "flattened_head", "residual"}
ASDL = FACTORS | NORMS | {"layer_norm", "residual"}
SHARED = {"conv2d", "conv2d_same_in_place", "flattened_head", "positions_then_flat", "residual"}
FORWARD_MODE = {"embedding", "encoder", "encoder_norm_first", "group_norm", "layer_norm", "vision", "weight_norm"}
"""Networks that forward-mode differentiation gets wrong, or not at all, in some releases of PyTorch (2.13, not 2.14)."""

GRADIENTS = {"jacobians", "gradients"}
TAKES = {
    "BackPackGGN": {"full": GRAPHS, "diag": GRAPHS, "kron": DENSE, **dict.fromkeys(GRADIENTS, HOOKED)},
    "BackPackEF": dict.fromkeys({"full", "diag", *GRADIENTS}, HOOKED),
    "AsdlGGN": {"kron": FACTORS | {"residual"}, **dict.fromkeys({"full", "diag", *GRADIENTS}, ASDL)},
    "AsdlEF": {"kron": FACTORS | {"residual"}, **dict.fromkeys({"full", "diag", *GRADIENTS}, ASDL)},
    "AsdlHessian": dict.fromkeys({"full", *GRADIENTS}, ASDL),
    "CurvlinopsGGN": {"kron": FACTORS | SHARED, **dict.fromkeys({"full", "diag", *GRADIENTS}, ALL)},
    "CurvlinopsEF": {
        "kron": (FACTORS | SHARED) - {"soft_labels"},
        **dict.fromkeys({"full", "diag", *GRADIENTS}, ALL),
    },
    "CurvlinopsHessian": {
        **dict.fromkeys({"full", "diag"}, ALL - FORWARD_MODE),
        **dict.fromkeys(GRADIENTS, ALL),
    },
}
"""Back end → quantity → networks that it takes."""
QUANTITIES = ("full", "diag", "kron", "jacobians", "gradients")


@functools.cache
def truth(network: Network, matrix: str) -> torch.Tensor:
    problem = network.problem()
    if matrix == "Hessian":
        return problem.true_hessian()
    return problem.ggn() if matrix == "GGN" else problem.empirical_fisher()


@functools.cache
def factors(network: Network, matrix: str) -> torch.Tensor:
    """Kronecker factors as a matrix, by our engine, whose tests have them from the definition (expand setting)."""
    ours = (AutogradGGN if matrix == "GGN" else AutogradEF)(network.model(), network.likelihood)
    sums = ours.kron(*network.data(), N=1)[1]
    return sums.divide_inputs(sums.counts).to_matrix()


@functools.cache
def problem_of(network: Network) -> reference.Problem:
    return network.problem()


def check(cls, network: Network, quantity: str) -> None:
    """One quantity against the truth."""
    engine, (x, y), problem = cls(network.model(), network.likelihood), network.data(), problem_of(network)
    if quantity == "jacobians":
        J, f = engine.jacobians(x)
        assert_close(J, problem.jacobian(x).flatten(0, 1), "Jacobians")
        assert_close(f, problem.outputs(problem.theta(), x).flatten(0, 1), "outputs")
        return
    if quantity == "gradients":
        gradients, loss = engine.gradients(x, y)
        assert_close(gradients, problem.gradients(), "gradients")
    elif quantity == "kron":
        loss, sums = engine.kron(x, y, N=1)
        assert_close(sums.divide_inputs(sums.counts).to_matrix(), factors(network, cls.matrix), "factors")
    else:
        loss, H = getattr(engine, quantity)(x, y)
        expected = truth(network, cls.matrix)
        assert_close(H, expected if quantity == "full" else expected.diagonal(), quantity)
    assert_close(loss, problem.nll(), "loss")


@pytest.mark.every(6, each_value=False)
@every_package
@every_network
def test_all_weights_are_exact_or_refused(cls, network):
    for quantity in QUANTITIES:
        if cls is curvature.CurvlinopsHessian and network.name in FORWARD_MODE and quantity in ("full", "diag"):
            with contextlib.suppress(UnsupportedError):  # exact or refused, as the release has it; never wrong
                check(cls, network, quantity)
        elif network.name in TAKES[cls.__name__].get(quantity, ()):
            check(cls, network, quantity)
        else:
            with pytest.raises(UnsupportedError, match=r"Autograd|No back end") as raised:
                check(cls, network, quantity)
            instead = [other for other in BACKENDS if other.__name__ in str(raised.value)]
            assert all(other.matrix == cls.matrix for other in instead), "what takes its place is of the same matrix"


def last_layer(cls, case: Case, **options):
    return cls(case.extractor(), case.likelihood, last_layer=True, **options)


@pytest.mark.every(5)
@every_package
@pytest.mark.parametrize("case", [c for c in CASES if c.likelihood != "reward_modeling"], ids=str)
def test_the_last_layer_is_exact_for_every_case(cls, case):
    """Positions, masks, soft labels, nested inputs: the package sees features, so that nothing of it matters."""
    (x, y), problem, fisher = case.data(), case.problem(), cls.matrix == "empirical Fisher"
    for structure in sorted(cls.structures):
        if structure is HessianStructure.KRON:
            if cls is curvature.CurvlinopsEF and y.is_floating_point() and case.likelihood == "classification":
                with pytest.raises(UnsupportedError, match="AutogradEF"):
                    last_layer(cls, case).kron(x, y, N=1)
                continue
            loss, factors = last_layer(cls, case).kron(x, y, N=problem.n_positions())
            assert_close(factors.to_matrix(), problem.kron(fisher=fisher), "kron")
        else:
            loss, H = getattr(last_layer(cls, case), structure.value)(x, y)
            expected = problem.curvature(structure.value, fisher=fisher)
            assert_close(H, expected if structure is HessianStructure.FULL else expected.diagonal(), structure.value)
        assert_close(loss, problem.nll(), "loss")
    gradients, _ = last_layer(cls, case).gradients(x, y)
    assert_close(gradients, problem.gradients(), "gradients")
    assert_close(last_layer(cls, case).jacobians(x)[0], problem.jacobian(x).flatten(0, 1), "Jacobians")


@pytest.mark.parametrize("cls", FISHERS, ids=lambda cls: cls.__name__)
def test_the_empirical_fisher_of_regression_is_that_of_the_likelihood(cls):
    """Outer products of gradients of ½‖f − y‖², not of ‖f − y‖²: by hand for a model with one weight."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    w, x, y = 0.7, torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.2], [1.5]])
    torch.nn.init.constant_(model[0].weight, w)
    expected = ((w * x - y) * x).square().sum()
    for structure in ("full", "diag"):
        assert_close(getattr(cls(model, "regression"), structure)(x, y)[1].sum(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "structure"), [("mlp", "full"), ("mlp", "diag"), ("mlp", "kron"), ("mlp_regression", "diag")]
)
@pytest.mark.parametrize("cls", SAMPLERS, ids=lambda cls: cls.__name__)
def test_the_sampled_fisher_converges_to_the_ggn_at_the_monte_carlo_rate(cls, name, structure):
    network, (x, y) = named(name), named(name).data()

    def draw(num_samples: int, seed: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        engine = cls(network.model(), network.likelihood, stochastic=True, num_samples=num_samples, generator=noise)
        H = getattr(engine, structure)(x, y, **({"N": len(y)} if structure == "kron" else {}))[1]
        return H.to_matrix() if structure == "kron" else H

    ggn = factors(network, "GGN") if structure == "kron" else truth(network, "GGN")
    expected = ggn.diagonal() if structure == "diag" else ggn
    single = torch.stack([draw(1, seed) for seed in range(100)])
    assert_within(single.mean(0), expected, single.std(0) / 100**0.5, "mean of single samples")
    many = torch.stack([draw(8, seed) for seed in range(30)])
    assert_within(many.mean(0), expected, many.std(0) / 30**0.5, "mean of 8 samples each")
    ratio = float(single.var(0).sum() / many.var(0).sum())
    assert 8 / 1.8 < ratio < 8 * 1.8, "the variance falls as 1/num_samples"
    assert torch.equal(draw(2, 3), draw(2, 3)), "the generator decides"
    assert not torch.equal(draw(2, 3), draw(2, 4))


@pytest.mark.every(4)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@every_package
def test_batches_of_any_sizes_give_the_same_posterior(cls, subset):
    network, (x, y) = named("mlp"), named("mlp").data()
    for structure in sorted(cls.structures):
        if cls.matrix == "Hessian" and subset == "all":
            # It is indefinite there: no posterior, but sums.
            engine = cls(network.model(), network.likelihood)
            parts = [getattr(engine, structure.value)(x[rows], y[rows])[1] for rows in (slice(0, 2), slice(2, None))]
            assert_close(parts[0] + parts[1], getattr(engine, structure.value)(x, y)[1])
            continue
        fits = []
        for sizes in ([5], [1, 3, 1]):
            la = Laplace(network.model(), network.likelihood, subset, structure, backend=cls)
            la.fit(list(zip(x.split(sizes), y.split(sizes), strict=True)))
            fits.append(la)
        first, second = fits
        assert_close(second.log_marginal_likelihood(), first.log_marginal_likelihood())
        assert_close(second(x), first(x))
        ours = {"GGN": AutogradGGN, "empirical Fisher": AutogradEF, "Hessian": AutogradGGN}[cls.matrix]
        la = Laplace(network.model(), network.likelihood, subset, structure, backend=ours)
        la.fit([(x, y)])
        assert_close(first(x), la(x), "predictions with our engine")


@every_package
def test_low_precision_is_computed_in_single_or_in_what_is_asked(cls):
    network, (x, y) = named("mlp"), named("mlp").data()
    for options, dtype in (({}, torch.float32), ({"curvature_dtype": torch.float64}, torch.float64)):
        engine = cls(network.model().to(torch.bfloat16), network.likelihood, **options)
        loss, H = engine.full(x.to(torch.bfloat16), y)
        assert (loss.dtype, H.dtype) == (dtype, dtype)
        wide = cls(network.model().to(torch.bfloat16).double(), network.likelihood)
        assert_close(H, wide.full(x.to(torch.bfloat16).double(), y)[1])


@every_package
def test_likelihoods_and_positions_that_a_package_lacks_are_refused(cls):
    if Likelihood.REWARD_MODELING not in cls.likelihoods:
        with pytest.raises(UnsupportedError, match=r"reward_modeling.*'classification', 'regression'.*Autograd"):
            cls(named("mlp").model(), "reward_modeling")
    network = named("positions")
    with pytest.raises(UnsupportedError, match=r"\[batch, C\]|rows of its input|is expected"):
        cls(network.model(), network.likelihood).full(*network.data())


@every_package
def test_data_that_are_all_masked_say_nothing(cls):
    network, (x, y) = named("masked_rows"), named("masked_rows").data()
    engine = cls(network.model(), network.likelihood)
    masked = torch.full_like(y, reference.IGNORED)
    for structure in sorted(cls.structures):
        H = getattr(engine, structure.value)(x, masked, **({"N": 1} if structure is HessianStructure.KRON else {}))[1]
        assert float((H.to_matrix() if structure is HessianStructure.KRON else H).abs().max()) == 0
    assert float(engine.gradients(x, masked)[0].abs().max()) == 0


@pytest.mark.parametrize("cls", BACKENDS, ids=lambda cls: cls.__name__)
def test_what_client_code_reads_off_a_back_end_is_there(cls):
    """The attributes of laplace-torch: a functional call by the names of random weights and buffers is the model."""
    network, x = named("batch_norm_1d"), named("batch_norm_1d").data()[0]
    model = network.model()
    index = torch.tensor([1, 3])
    whole, part = cls(model, network.likelihood), cls(model, network.likelihood, subnetwork_indices=index)
    assert torch.equal(
        torch.func.functional_call(whole.model, {**whole.params_dict, **whole.buffers_dict}, x), model(x)
    )
    assert list(map(id, whole.params)) == list(map(id, whole.params_dict.values())) == list(map(id, model.parameters()))
    assert (whole.likelihood, whole.last_layer, whole.subnetwork_indices) == (network.likelihood, False, None)
    assert (whole.dict_key_x, whole.dict_key_y, whole.factor) == ("input_ids", "labels", 1.0)
    f, y = model(x), network.data()[1]
    assert_close(whole.factor * whole.lossfunc(f, y), named("batch_norm_1d").problem().nll())
    assert part.subnetwork_indices is index
    assert list(part.params_dict) == [next(iter(whole.params_dict))]
    head = cls(FeatureExtractor(model), network.likelihood, last_layer=True)
    head.model.find_last_layer(x)
    assert [value is own for value, own in zip(head.params, head.params_dict.values(), strict=True)] == [True, True]
    assert list(head.params_dict) == ["weight", "bias"]
    assert head.last_layer
