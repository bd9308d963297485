"""Names that objects do not have are refused when they are assigned; those of somebody else's classes are theirs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from laplace import FullLaplace, KronLLLaplace
from laplace.curvature import AutogradGGN
from laplace.errors import InputError, UnknownAttributeError, UnsupportedError
from laplace.utils import FeatureExtractor, Kron, KronDecomposed
from tests.kinds import KINDS, data, every_kind, fitted, make, observed

FUNCTIONS: list[dict[str, Any]] = [
    {"n_subset": 8},
    {"functional_approximation": "nystrom", "subsample_size": 8, "n_eigenvalues": 3},
    {"functional_approximation": "variational", "num_inducing": 4, "inducing_locations": "random"},
]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def all_estimators() -> list[Any]:
    found = [make(*kind) for kind in KINDS]
    return found + [make(subset, "gp", **options) for subset in ("all", "last_layer") for options in FUNCTIONS]


@pytest.mark.parametrize("index", range(len(KINDS) + 2 * len(FUNCTIONS)))
def test_a_name_that_no_estimator_has_is_refused_with_the_nearest(index):
    la = all_estimators()[index]
    for name, nearest in {
        "prior_precison": "'prior_precision'",
        "sigma_nois": "'sigma_noise'",
        "_posterior_scales": "What can be assigned: .*prior_precision",
        "temprature": "'temperature'",
        "something": "What can be assigned: .*prior_precision",
    }.items():
        before = dict(vars(la))
        with pytest.raises(UnknownAttributeError, match=f"{type(la).__name__} has no attribute {name!r}.*{nearest}"):
            setattr(la, name, 1.0)
        assert vars(la) == before
    assert issubclass(UnknownAttributeError, AttributeError)


@every_kind
def test_what_is_computed_cannot_be_assigned_and_what_can_is_listed(subset, structure):
    la = fitted(subset, structure)
    for name in ("posterior_precision", "log_likelihood", "n_params", "scatter", "prior_precision_diag"):
        with pytest.raises(UnknownAttributeError, match=rf"{name} is computed.*H, .*mean.*prior_precision"):
            setattr(la, name, torch.ones(1))


@every_kind
def test_options_are_assigned_as_ever_and_copies_are_whole(subset, structure):
    la = fitted(subset, structure)
    la.prior_precision, la.sigma_noise, la.temperature, la.enable_backprop = 2.0, 0.5, 1.5, False
    before = observed(la)
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert_equal(observed(other), before)


class Extended(FullLaplace):
    """Somebody's class, with an attribute whose name is near one of ours."""

    prior_precisions: list[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.sigma_noises = [1.0]


def test_a_class_from_elsewhere_may_add_attributes_but_no_near_misses():
    la = Extended(nn.Sequential(nn.Linear(3, 2)), "regression")
    la.prior_precisions, la.history, la.prior_precision_init, la.models = [1.0], [], 2.0, []
    assert (la.calls, la.sigma_noises, la.prior_precision_init) == (0, [1.0], 2.0)
    for name, ours in {
        "prior_precison": "prior_precision",
        "sigma_nois": "sigma_noise",
        "likelyhood": "likelihood",
    }.items():
        with pytest.raises(UnknownAttributeError, match=f"did you mean {ours!r}.*declared in the class"):
            setattr(la, name, 1.0)
        assert not hasattr(la, name)


class Backend(AutogradGGN):
    """Somebody's back end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_calls = 0
        self.lossfunc = nn.MSELoss()


def test_a_back_end_takes_no_loss_and_no_unknown_names_unless_it_is_somebody_elses():
    la = make("all", "full")
    with pytest.raises(UnknownAttributeError, match=r"lossfunc .* is not called.*shape of the outputs.*backend="):
        la.backend.lossfunc = nn.MSELoss()
    with pytest.raises(UnknownAttributeError, match="AutogradGGN has no attribute 'n_calls'"):
        la.backend.n_calls = 1
    la = make("all", "full", backend=Backend)
    la.fit([data()])
    la.backend.anything = 1
    assert la.backend.n_calls == 0
    with pytest.raises(UnknownAttributeError, match="did you mean 'curvature_dtype'"):
        la.backend.curvature_dtyp = torch.float64


def test_kronecker_matrices_take_their_own_names():
    la = fitted("all", "kron")
    for holder, name, nearest in ((la.H, "eigenvalue", "eigenvalues"), (la.H_facs, "kfac", "kfacs")):
        assert isinstance(holder, (Kron, KronDecomposed))
        with pytest.raises(UnknownAttributeError, match=f"Did you mean {nearest!r}"):
            setattr(holder, name, [])


def test_a_feature_extractor_takes_names_of_frameworks_but_no_near_misses_and_finds_the_layer_it_is_given():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    extractor = FeatureExtractor(model)
    extractor._framework_hook = 1
    with pytest.raises(UnknownAttributeError, match="did you mean 'last_layer_name'"):
        extractor.last_layer_nam = "1"
    extractor.last_layer = model[1]
    assert (extractor.last_layer_name, extractor._last_layer_name) == ("1", "1")
    extractor.last_layer = None
    assert extractor.last_layer_name is None
    extractor.find_last_layer(torch.ones(2, 3))
    assert extractor.last_layer is model[1]
    with pytest.raises(ValueError, match=r"a layer of the model\. Linear layers of the model: '0'"):
        extractor.last_layer = nn.Linear(4, 2)
    la = KronLLLaplace(model, "regression")
    la.model.find_last_layer(torch.ones(2, 3))
    la.model.last_layer = None
    la.fit([(torch.randn(5, 3), torch.randn(5, 2))])
    assert la.model.last_layer is model[1]


@every_kind
def test_a_replaced_model_is_the_one_that_is_evaluated(subset, structure):
    la, (x, _) = fitted(subset, structure), data()
    network = la._network
    expected = observed(la)
    la.model = copy.deepcopy(network)
    assert_equal(observed(la), expected)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    la.model = other
    with pytest.warns(UserWarning, match="have changed since fit"):
        mean, _ = la(x)
    assert torch.allclose(mean, other(x).detach())
    before = dict(vars(la))
    with pytest.raises(UnsupportedError, match="same shapes"):
        la.model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 7))
    assert vars(la) == before


@every_kind
def test_options_are_checked_when_they_are_assigned_as_in_the_constructor(subset, structure):
    la = fitted(subset, structure)
    expected = observed(la)
    for name, value in {
        "enable_backprop": "no",
        "dict_key_x": 3,
        "dict_key_y": None,
        "likelihood": "regressions",
        "model": "net",
    }.items():
        with pytest.raises((InputError, UnsupportedError), match=name):
            setattr(la, name, value)
    with pytest.raises(UnsupportedError, match="cannot be replaced"):
        la.likelihood = "reward_modeling"
    la.likelihood = la.likelihood.value
    la.dict_key_x = "x"
    assert la.backend.dict_key_x == "x"
    assert_equal(observed(la), expected)


@every_kind
def test_what_earlier_releases_pickled_is_read(subset, structure):
    la = fitted(subset, structure)
    old = type(la).__new__(type(la))
    old.__setstate__({**la.__getstate__(), "_posterior_cache": None})
    assert_equal(observed(old), observed(la))
