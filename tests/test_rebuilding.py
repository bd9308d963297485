"""Every argument of a constructor can be read off the object, and another one be made of what is read."""

import copy
import inspect

import pytest
import torch

from laplace import Laplace
from laplace.baselaplace import VaLLA
from laplace.curvature import AsdlGGN, AutogradEF, AutogradGGN, BackPackGGN, CurvlinopsGGN, GGNInterface
from laplace.errors import UnsupportedError
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from laplace.marglik_training import marglik_training
from tests.contracts import generator
from tests.networks import named
from tests.tools import assert_close

CLASSES = sorted({*ESTIMATORS.values(), *FUNCTIONAL.values()}, key=lambda cls: cls.__name__)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
NETWORK = named("mlp_regression")

COMMON = {
    "sigma_noise": 0.4,
    "prior_precision": 2.5,
    "prior_mean": 0.1,
    "temperature": 1.7,
    "enable_backprop": True,
    "dict_key_x": "pixels",
    "dict_key_y": "truth",
    "curvature_dtype": torch.float64,
    "output_dim": 1,
    "shift_labels": False,
    "backend": CurvlinopsGGN,
    "backend_kwargs": {"stochastic": True, "num_samples": 3},
}
"""None of them the default."""
OTHERS = {
    "likelihood": "regression",
    "subnetwork_indices": torch.tensor([5, 1, 9]),
    "damping": True,
    "rank": 4,
    "n_subset": 5,
    "independent_outputs": True,
    "seed": 7,
    "diagonal_hessian": True,
    "subsample_size": 4,
    "n_eigenvalues": 3,
    "inducing_locations": NETWORK.data(shift=3, n_rows=3)[0],
    "num_inducing": 3,
    "inducing_classes": torch.tensor([0, 1, 1]),
    "alpha": 0.5,
    "asdl_fisher_kwargs": {"data_size": 2},
}
"""Those that not every class has."""
TWO_ITEM = {
    "captured_trace",
    "output_fn",
    "output_key",
    "feature_reduction",
    "mc_softmax_samples",
    "last_layer_name",
    "model",
}
"""What another option excludes, or regression does; see the tests below."""


def options_of(cls, **changes) -> dict[str, object]:
    names = inspect.signature(cls).parameters
    options = {name: value for name, value in {**COMMON, **OTHERS}.items() if name in names}
    if "asdl_fisher_kwargs" in options:
        options |= {"backend": AsdlGGN}
    if issubclass(cls, (ESTIMATORS["all", "ekfac"], ESTIMATORS["all", "lowrank"], ESTIMATORS["all", "blockdiag"])):
        options |= {"backend": AutogradGGN, "asdl_fisher_kwargs": None}
    if cls in FUNCTIONAL.values():
        options["backend_kwargs"] = {"curvature_dtype": torch.float64}
    if "last_layer_name" in names:
        options["last_layer_name"] = [key for key, _ in NETWORK.model().named_parameters()][-1].rpartition(".")[0]
    return {**options, **changes}


def rebuilt(la, model=None):
    """As lightning-uq-box does it: from the names in the code of the constructor, locals among them."""
    names = la.__init__.__code__.co_varnames
    arguments = {name: getattr(la, name) for name in names if hasattr(la, name)}
    arguments["model"] = copy.deepcopy(la.model) if model is None else model
    return type(la)(**arguments)


def numbers(la) -> list[torch.Tensor]:
    batch = NETWORK.data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the sampled curvature
        la.fit([batch])
        found = la(NETWORK.data(shift=2, n_rows=2)[0])
    values = [*(found if isinstance(found, tuple) else (found,)), la.log_likelihood, la.prior_precision]
    return [value.detach() for value in values]


@every_class
def test_an_object_made_of_what_is_read_off_another_gives_the_same_numbers(cls):
    la = cls(NETWORK.model(), **options_of(cls))
    before = rebuilt(la)
    assert before.backend is not la.backend
    assert before.model is not la.model
    expected = numbers(la)
    for mine, theirs in zip(numbers(before), expected, strict=True):
        assert_close(mine, theirs, "made before fit")
    if issubclass(cls, (VaLLA, ESTIMATORS["all", "lowrank"])):
        return  # what fit found has taken the place of what was asked for
    for mine, theirs in zip(numbers(rebuilt(la)), expected, strict=True):
        assert_close(mine, theirs, "made after fit")


@every_class
def test_options_can_be_read_as_they_were_given(cls):
    options = options_of(cls)
    la = cls(NETWORK.model(), **options)
    signature = inspect.signature(cls)
    assert set(signature.parameters) - set(options) <= TWO_ITEM, "the table has every argument"
    for name, given in options.items():
        read = getattr(la, name)
        if name == "backend":
            assert type(read) is given
            assert read.made_with == {**options["backend_kwargs"], "curvature_dtype": torch.float64}
        elif name == "asdl_fisher_kwargs":
            assert read == (given or {})
        elif isinstance(read, torch.Tensor):
            assert_close(read.double().flatten(), torch.as_tensor(given).double().flatten(), name)
        else:
            assert read == given, name
    for name in set(signature.parameters) - set(options):
        getattr(la, name)


@every_class
def test_no_local_of_a_constructor_is_called_like_an_attribute(cls):
    """Whoever goes by ``co_varnames`` would pass it on."""
    la = cls(NETWORK.model(), **options_of(cls))
    locals_ = set(cls.__init__.__code__.co_varnames) - set(inspect.signature(cls).parameters) - {"self"}
    assert [name for name in locals_ if hasattr(la, name)] == []


@pytest.mark.parametrize(
    ("subset", "structure", "options"),
    [
        ("all", "lowrank", {"captured_trace": 0.5}),
        ("last_layer", "lowrank", {"captured_trace": 0.5}),
        ("last_layer", "full", {"feature_reduction": "average"}),
    ],
)
def test_what_excludes_each_other_can_be_read_and_made_again(subset, structure, options):
    la = Laplace(NETWORK.model(), "regression", subset, structure, **options)
    again = rebuilt(la)
    for name, value in options.items():
        assert getattr(again, name) == getattr(la, name) == value


def test_samples_of_a_softmax_can_be_read_and_asked_again():
    network = named("mlp")
    la = VaLLA(network.model(), "classification", network.data()[0], mc_softmax_samples=4)
    assert rebuilt(la).mc_softmax_samples == la.mc_softmax_samples == 4


# -- back ends as objects ------------------------------------------------------------------------------------------------


class Own(GGNInterface):
    """A user's, which fixes an option of its base and has one that it keeps under another name."""

    def __init__(self, model, likelihood, last_layer=False, *, factor_of_mine=1.0, **kwargs):
        super().__init__(model, likelihood, last_layer, stochastic=False, **kwargs)
        self.kept = factor_of_mine

    def jacobians(self, x, enable_backprop=False):
        J, f = super().jacobians(x, enable_backprop)
        return self.kept * J, f


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AutogradGGN, {}),
        (AutogradGGN, {"stochastic": True, "num_samples": 4, "curvature_dtype": torch.float64}),
        (AutogradGGN, {"kfac_approx": "reduce"}),
        (AutogradEF, {}),
        (BackPackGGN, {}),
        (Own, {"factor_of_mine": 2.0}),
    ],
)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_an_object_stands_for_its_class_and_options(cls, options, subset):
    network = named("mlp_regression")
    structure = "kron" if "kfac_approx" in options else "full"
    made = cls(network.model(), "regression", **options)
    expected = numbers(Laplace(network.model(), "regression", subset, structure, backend=cls, backend_kwargs=options))
    model = network.model()
    la = Laplace(model, "regression", subset, structure, backend=made)
    for mine, theirs in zip(numbers(la), expected, strict=True):
        assert_close(mine, theirs)
    assert la.backend is not made
    assert la.backend.params[0] is next(iter(model.parameters())) or subset == "last_layer"
    assert la.backend_kwargs == la.backend.made_with == options


def test_positional_options_are_read_by_their_names():
    made = AutogradGGN(NETWORK.model(), "regression", False, None, "x", "y", True, 5, kfac_approx="reduce")
    assert made.made_with == {"stochastic": True, "num_samples": 5, "kfac_approx": "reduce"}


def test_an_object_keeps_its_generator_and_its_options_when_copied():
    noise = generator(0)
    made = CurvlinopsGGN(NETWORK.model(), "regression", stochastic=True, generator=noise)
    la = Laplace(NETWORK.model(), "regression", "all", "diag", backend=made)
    assert la.backend.generator is noise
    assert AutogradGGN(NETWORK.model(), "regression", stochastic=True).made_with == {"stochastic": True}
    assert copy.copy(made).made_with == made.made_with


def test_an_object_beside_other_options_is_refused():
    made = AutogradGGN(NETWORK.model(), "regression", stochastic=True, num_samples=2)
    keywords = {"subset_of_weights": "all", "hessian_structure": "diag", "backend": made}
    same = Laplace(NETWORK.model(), "regression", **keywords, backend_kwargs={"num_samples": 2})
    assert same.backend_kwargs == {"stochastic": True, "num_samples": 2}
    for options in ({"num_samples": 3}, {"kfac_approx": "reduce"}):
        with pytest.raises(UnsupportedError, match=r"made with .*'num_samples': 2.*Pass the class"):
            Laplace(NETWORK.model(), "regression", **keywords, backend_kwargs=options)
    with pytest.raises(UnsupportedError, match=r"likelihood='regression'.*'classification'.*backend=AutogradGGN"):
        Laplace(NETWORK.model(), "classification", **keywords)
    with pytest.raises(UnsupportedError, match=r"subclass of CurvatureInterface, or an object"):
        Laplace(NETWORK.model(), "regression", backend="curvlinops")


def test_the_evidence_trains_with_an_object():
    made = CurvlinopsGGN(NETWORK.model(), "regression")
    la = marglik_training(NETWORK.model(), [NETWORK.data()], "regression", "diag", made, n_epochs=1)[0]
    assert type(la.backend) is CurvlinopsGGN
    assert la.backend is not made
