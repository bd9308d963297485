"""``enable_backprop=True`` with BackPACK, ASDL and curvlinops: fitted by the package, differentiable in the inputs."""

import pytest
import torch
from torch.func import jacrev

from laplace import Laplace
from laplace.curvature import BACKENDS, AutogradEF, AutogradGGN, AutogradHessian, CurvlinopsGGN
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure, SubsetOfWeights
from laplace.marglik_training import marglik_training
from laplace.network import FeatureExtractor
from tests import reference
from tests.contracts import model_untouched
from tests.estimators import dense
from tests.networks import Network, named
from tests.subnetworks import chosen
from tests.tools import assert_close

PACKAGES = [cls for cls in BACKENDS if issubclass(cls, PackageInterface)]
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
OURS = {"GGN": AutogradGGN, "empirical Fisher": AutogradEF, "Hessian": AutogradHessian}
OFFERED = [
    (cls, subset, structure)
    for cls in PACKAGES
    for subset in SubsetOfWeights
    for structure in (HessianStructure.FULL, HessianStructure.DIAG, HessianStructure.KRON)
    if cls.can(structure, subset)
]


def index_of(network: Network, subset: str) -> torch.Tensor:
    """The random weights among all."""
    model = network.model()
    n_params = sum(p.numel() for p in model.parameters())
    n_last = sum(p.numel() for p in list(model.modules())[-1].parameters())
    if subset == "subnetwork":
        return chosen(network, "few")
    return torch.arange(n_params if subset == "all" else n_last) + (0 if subset == "all" else n_params - n_last)


def fitted(cls, network: Network, subset: str, structure: str, model=None, **options):
    if subset == "subnetwork":
        options["subnetwork_indices"] = index_of(network, subset)
    model = network.model() if model is None else model
    # A strong prior, under which a Hessian that is indefinite has a posterior, too.
    options = {"prior_precision": 50.0, "enable_backprop": True, **options}
    la = Laplace(model, network.likelihood, subset, structure, backend=cls, **options)
    la.fit([network.data()])
    return la


def with_gradient(variance, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    value = variance(x)
    weights = (1 + torch.arange(value.numel(), dtype=value.dtype)).cos().reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]


@pytest.mark.every(3)
@pytest.mark.parametrize(("cls", "subset", "structure"), OFFERED)
def test_variances_and_their_gradients_are_those_of_the_definition(cls, subset, structure):
    """J(x) P⁻¹ J(x)ᵀ in float64 with the Jacobian of all weights by ``torch.func``, and the built-in back end's."""
    network = named("mlp_regression")
    model = network.model()
    x, index, problem = network.data(shift=2, n_rows=3)[0], index_of(network, subset), network.problem()
    with model_untouched(model):
        la = fitted(cls, network, subset, structure, model)
        value, gradient = with_gradient(lambda x: la(x)[1], x)
    P = dense(la.posterior_precision).detach()

    def brute_force(x: torch.Tensor) -> torch.Tensor:
        J = jacrev(lambda theta: problem.outputs(theta, x).flatten(0, 1))(problem.theta())
        return reference.output_covariance(J[..., index], P)

    expected, slope = with_gradient(brute_force, x)
    assert float(slope.abs().max()) > 0
    assert_close(value, expected, "variance")
    assert_close(gradient, slope, "gradient")
    ours = fitted(OURS[cls.matrix], network, subset, structure)
    for mine, theirs in zip(with_gradient(lambda x: ours(x)[1], x), (value, gradient), strict=True):
        assert_close(theirs, mine, "the built-in back end")


@every_package
@pytest.mark.parametrize("name", ["mlp", "batch_norm_1d"])
def test_probabilities_have_the_slopes_of_finite_differences(cls, name):
    network = named(name)
    la, x = fitted(cls, network, "all", "full"), network.data(shift=2, n_rows=2)[0].requires_grad_()
    assert torch.autograd.gradcheck(la, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: la.functional_samples(x, generator=torch.Generator().manual_seed(0)), (x,), fast_mode=True)  # fmt: skip
    la.enable_backprop = False
    without = la(x)
    assert not without.requires_grad
    la.enable_backprop = True
    assert_close(la(x).detach(), without, "with and without a graph")


@every_package
def test_a_back_end_called_directly_gives_differentiable_jacobians(cls):
    network = named("mlp")
    x, problem = network.data()[0].requires_grad_(), network.problem()
    engine = cls(network.model(), network.likelihood)
    J, f = engine.jacobians(x, enable_backprop=True)
    assert_close(J.detach(), problem.jacobian(x.detach()).flatten(0, 1))
    for value in (J, f):
        assert float(torch.autograd.grad(value.square().sum(), x, retain_graph=True)[0].abs().max()) > 0
    assert torch.autograd.gradcheck(lambda x: engine.jacobians(x, enable_backprop=True), (x,), fast_mode=True)
    index = torch.tensor([[0, 2]]).expand(len(x), -1)
    assert_close(engine.selected_output_jacobians(x, index, enable_backprop=True)[0], J[:, [0, 2]])
    assert not engine.jacobians(x)[0].requires_grad
    head = cls(FeatureExtractor(network.model(), enable_backprop=True), network.likelihood, last_layer=True)
    head.model.find_last_layer(x)
    for ask in (head.jacobians, head.last_layer_jacobians):
        J_head, f = ask(x, enable_backprop=True)
        assert_close(J_head.detach(), J[..., -J_head.shape[-1] :].detach())
        assert float(torch.autograd.grad(J_head.square().sum() + f.sum(), x)[0].abs().max()) > 0


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("cls", [cls for cls in PACKAGES if cls.matrix == "GGN"], ids=lambda cls: cls.__name__)
def test_functions_of_a_process_are_differentiable_with_a_package(cls, subset):
    network = named("mlp_regression")
    x = network.data(shift=2, n_rows=2)[0].requires_grad_()
    la = fitted(cls, network, subset, "gp", n_subset=5, seed=0)
    assert torch.autograd.gradcheck(lambda x: la(x)[1], (x,), fast_mode=True)
    weights = fitted(AutogradGGN, network, subset, "full")
    assert_close(la(x)[1], weights(x)[1], "the same posterior over weights")


def test_training_by_the_evidence_ends_with_differentiable_predictions():
    network = named("mlp_regression")
    x = network.data(shift=2, n_rows=2)[0].requires_grad_()
    options = {"n_epochs": 2, "n_hypersteps": 2, "enable_backprop": True}
    la = marglik_training(network.model(), [network.data()], "regression", "kron", CurvlinopsGGN, **options)[0]
    assert torch.autograd.gradcheck(lambda x: la(x)[1], (x,), fast_mode=True)
