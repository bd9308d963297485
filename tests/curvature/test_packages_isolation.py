"""Back ends of packages call their package, leave nothing behind, and can be mixed."""

import ast
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import laplace
from laplace import Laplace, curvature
from laplace.curvature import BACKENDS, AutogradGGN
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure
from laplace.errors import BackendUnavailableError, UnsupportedError
from tests.cases import BASIC
from tests.contracts import model_untouched
from tests.networks import Applied, named
from tests.tools import assert_close

PACKAGES = tuple(cls for cls in BACKENDS if issubclass(cls, PackageInterface))
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
POSITIVE = [cls for cls in PACKAGES if cls.matrix != "Hessian"]  # that of all weights is indefinite
STRUCTURES = tuple((cls, structure) for cls in PACKAGES for structure in sorted(cls.structures))
every_structure = pytest.mark.parametrize(("cls", "structure"), STRUCTURES, ids=lambda v: getattr(v, "__name__", v))
PUBLIC = Path(laplace.__file__).parent / "curvature"

ENTRIES = {
    "backpack": [("backpack", "backpack")],
    "asdl": [("asdl", "get_fisher_maker"), ("asdl", "batch_gradient"), ("asdl", "HessianMaker")],
    "curvlinops": [
        ("curvlinops.TransposedJacobianLinearOperator", "__matmul__"),
        ("curvlinops.HessianLinearOperator", "__matmul__"),
        ("curvlinops.KFACLinearOperator", "compute_kronecker_factors"),
    ],
}
"""What of a package an adapter calls: (where, name)."""


def compute(engine, x, y, structure):
    if structure in ("jacobians", "gradients"):
        return engine.jacobians(x)[0] if structure == "jacobians" else engine.gradients(x, y)[0]
    structure = HessianStructure(structure)
    H = getattr(engine, structure.value)(x, y, **({"N": 1} if structure is HessianStructure.KRON else {}))[1]
    return H.to_matrix() if structure is HessianStructure.KRON else H


def spy(monkeypatch, cls, after=None) -> list[str]:
    """Count calls of the package's entry points; with `after`, raise it once the entry point has done its work."""
    calls: list[str] = []
    for where, name in ENTRIES[cls.package]:
        module, _, owner = where.partition(".")
        target = importlib.import_module(module)
        target = getattr(target, owner) if owner else target
        original = getattr(target, name)

        def watched(*args, _original=original, _name=name, **kwargs):
            calls.append(_name)
            result = _original(*args, **kwargs)
            if after is not None:
                raise after
            return result

        monkeypatch.setattr(target, name, watched)
    return calls


@pytest.mark.parametrize("last_layer", [False, True], ids=["all", "last_layer"])
@every_structure
def test_what_an_adapter_claims_its_package_computes(cls, structure, last_layer, monkeypatch):
    """The entry point of the package is called, and our engines are not."""
    for engine in ("all_weights.AllWeightsEngine", "last_layer.LastLayerEngine"):
        module, _, name = engine.partition(".")
        ours = getattr(importlib.import_module(f"laplace.curvature.{module}"), name)
        monkeypatch.setattr(ours, "__init__", lambda *_args: pytest.fail("this is our engine"))
    calls, case = spy(monkeypatch, cls), BASIC[0]
    model = case.extractor() if last_layer else case.model()
    compute(cls(model, case.likelihood, last_layer=last_layer), *case.data(), structure)
    assert calls


@pytest.mark.parametrize("quantity", ["jacobians", "gradients"])
@every_package
def test_gradients_and_jacobians_are_computed_by_the_package(cls, quantity, monkeypatch):
    calls, network = spy(monkeypatch, cls), named("mlp")
    compute(cls(network.model(), network.likelihood), *network.data(), quantity)
    assert calls


QUANTITIES = {cls: [*sorted(s.value for s in cls.structures), "jacobians", "gradients"] for cls in PACKAGES}


@pytest.mark.every(2)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_package
def test_the_model_is_untouched(cls, training):
    """Parameters, gradients, buffers, modes, hooks, attributes: before and after each call, of both choices of weights."""
    for network in (named("mlp"), named("two_convolutions")):
        model, (x, y) = network.model().train(training), network.data()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for quantity in QUANTITIES[cls]:
            with model_untouched(model):
                try:
                    compute(cls(model, network.likelihood), x, y, quantity)
                except UnsupportedError:
                    assert network.name == "two_convolutions"
    case = BASIC[0]
    extractor = case.extractor()
    for structure in cls.structures:
        with model_untouched(extractor):
            compute(cls(extractor, case.likelihood, last_layer=True), *case.data(), structure)


@every_structure
def test_the_model_is_untouched_when_the_package_fails(cls, structure, monkeypatch):
    network, model = named("mlp"), named("mlp").model()
    calls = spy(monkeypatch, cls, after=KeyboardInterrupt())
    with model_untouched(model), pytest.raises(KeyboardInterrupt):
        compute(cls(model, network.likelihood), *network.data(), structure)
    assert calls
    monkeypatch.undo()
    expected = compute(cls(network.model(), network.likelihood), *network.data(), structure)
    assert_close(compute(cls(model, network.likelihood), *network.data(), structure), expected, "the same object later")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "two_convolutions"])
def test_back_ends_follow_each_other_on_one_model(name):
    """In both orders, twice each, and PyTorch's own transformations after them."""
    network, model, (x, y) = named(name), named(name).model(), named(name).data()
    expected = {
        cls: compute(cls(network.model(), network.likelihood), x, y, "full") for cls in (*PACKAGES, AutogradGGN)
    }
    for cls in [*PACKAGES, AutogradGGN, *reversed(PACKAGES), *PACKAGES]:
        assert_close(compute(cls(model, network.likelihood), x, y, "full"), expected[cls], cls.__name__)
    parameters = dict(model.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    flat = torch.cat([part.detach().flatten(2) for part in J.values()], -1)
    assert_close(flat, AutogradGGN(model, network.likelihood).jacobians(x)[0])


@pytest.mark.parametrize("cls", POSITIVE, ids=lambda cls: cls.__name__)
def test_two_approximations_side_by_side(cls):
    """Of one model, by different packages: each predicts as if it were alone."""
    network, model, data = named("mlp"), named("mlp").model(), [named("mlp").data()]
    x = named("mlp").data(shift=2)[0]
    alone = Laplace(network.model(), network.likelihood, "all", "diag", backend=cls)
    alone.fit(data)
    first, second = (Laplace(model, network.likelihood, "all", "diag", backend=b) for b in (cls, curvature.AsdlGGN))
    first.fit(data), second.fit(data)
    second(x)
    assert_close(first(x), alone(x))
    first.fit(data, override=False)
    assert first.n_data == 2 * alone.n_data
    second.optimize_prior_precision(n_steps=3)
    second(x)


@pytest.mark.parametrize("cls", [cls for cls in PACKAGES if cls.matrix == "GGN"], ids=lambda cls: cls.__name__)
def test_random_numbers_of_the_user_are_left_alone(cls):
    network, noise = named("mlp"), torch.Generator().manual_seed(0)
    engine = cls(network.model(), network.likelihood, stochastic=True, generator=noise)
    before = torch.get_rng_state()
    compute(engine, *network.data(), "diag")
    assert torch.equal(torch.get_rng_state(), before)


def test_options_reach_asdl_and_are_refused_elsewhere():
    network, data = named("mlp"), [named("mlp").data()]
    options = {"subset_of_weights": "all", "hessian_structure": "diag"}
    plain = Laplace(network.model(), network.likelihood, backend=curvature.AsdlGGN, **options)
    scaled = Laplace(
        network.model(), network.likelihood, backend=curvature.AsdlGGN, asdl_fisher_kwargs={"data_size": 2}, **options
    )
    plain.fit(data), scaled.fit(data)
    assert_close(2 * scaled.H, plain.H)
    with pytest.raises(UnsupportedError, match="asdl_fisher_kwargs"):
        Laplace(network.model(), network.likelihood, backend=curvature.BackPackGGN, asdl_fisher_kwargs={"seed": 1})
    with pytest.raises(UnsupportedError, match="'seed'"):
        curvature.BackPackGGN(network.model(), network.likelihood).diag(*network.data(), seed=1)
    for name in ("fisher_type", "n_mc_samples", "seed"):
        with pytest.raises(UnsupportedError, match=f"cannot set '{name}'"):
            curvature.AsdlGGN(network.model(), network.likelihood).diag(*network.data(), **{name: 1})
    two = named("two_convolutions")
    with pytest.raises(UnsupportedError, match="'scale'"):
        curvature.AsdlGGN(two.model(), two.likelihood).diag(*two.data(), scale=2.0)


def test_the_loss_has_the_name_that_asdl_knows():
    asdl, model = importlib.import_module("asdl"), named("mlp").model()
    assert curvature.AsdlGGN(model, "classification").loss_type == asdl.LOSS_CROSS_ENTROPY
    assert curvature.AsdlEF(model, "regression").loss_type == asdl.LOSS_MSE


@every_package
def test_a_missing_package_is_named_with_its_extra(cls, monkeypatch):
    """The class can be imported without it; making one says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == cls.package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, cls.package, None)
    with pytest.raises(BackendUnavailableError, match=rf"'{cls.package}'.*laplace-posthoc\[{cls.extra}\]"):
        cls(named("mlp").model(), "classification")


@pytest.mark.parametrize("module", ["backpack", "asdl", "curvlinops"])
def test_adapters_use_public_names_of_packages_only(module):
    tree = ast.parse((PUBLIC / f"{module}.py").read_text(encoding="utf-8"))
    private = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
        if not (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super")
    ]
    assert private == []


def test_a_model_that_cannot_be_copied_is_refused_with_what_takes_it():
    class Handle:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a handle")

    model = nn.Sequential(nn.Linear(3, 3))
    model.handle = Handle()
    with pytest.raises(UnsupportedError, match=r"cannot pickle a handle.*AutogradGGN"):
        curvature.CurvlinopsGGN(model, "classification").diag(torch.randn(2, 3), torch.tensor([0, 1]))


def test_a_copy_shares_storage_and_nothing_else():
    from laplace.network.structural_copy import structural_copy

    model = named("two_convolutions").model()
    twin = structural_copy(model, torch.float64)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours is not theirs
        assert ours.data_ptr() == theirs.data_ptr()
    twin[0].register_forward_hook(lambda *_: None)
    twin.extra = 1
    assert not model[0]._forward_hooks
    assert not hasattr(model, "extra")
    assert model[1].inplace
    assert not twin[1].inplace
    assert next(structural_copy(model, torch.float32).parameters()).dtype is torch.float32


def test_models_of_several_inputs_are_taken_where_the_package_can():
    """Nested inputs enter ASDL, curvlinops and BackPACK's gradients; the other quantities of BackPACK need one tensor."""
    model = Applied(lambda m, pair: m.head(torch.cat(pair, 1)), head=nn.Linear(5, 3)).double()
    x, y = [torch.randn(4, 2), torch.randn(4, 3)], torch.tensor([0, 1, 2, 0])
    for cls in PACKAGES:
        for quantity in QUANTITIES[cls]:
            engine = cls(copy.deepcopy(model), "classification")
            if cls is curvature.BackPackGGN and quantity in ("full", "diag", "kron"):
                with pytest.raises(UnsupportedError, match="one tensor"):
                    compute(engine, x, y, quantity)
            elif quantity in ("jacobians", "gradients"):
                expected = compute(AutogradGGN(copy.deepcopy(model), "classification"), x, y, quantity)
                assert_close(compute(engine, x, y, quantity), expected, f"{cls.__name__} {quantity}")
            else:
                compute(engine, x, y, quantity)
